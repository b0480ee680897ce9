// The device as torch meets it: guard, generator, hooks; and what its operators need of those.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>

#include <optional>

namespace virtual_device {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

inline c10::Device the_device() { return {kDevice, 0}; }
void check_ordinal(c10::Device device);  // there is one

void register_device();

const at::Generator& default_generator();
// A CPU generator for one operation. As on a card the state is a seed and a count that the host keeps, so that
// reading or setting it never waits for the device.
at::Generator generator_of_operation(const std::optional<at::Generator>& generator);

void resize_storage(const c10::Storage& storage, size_t nbytes);
// The same memory as a CPU tensor, for the threads of streams alone.
at::Tensor host_view(const at::Tensor& tensor);

}  // namespace virtual_device
