// Copies between host and device, and inside the device.
#pragma once

#include <ATen/core/Tensor.h>

namespace virtual_device {

void copy_between(const at::Tensor& target, const at::Tensor& source, bool non_blocking);

}  // namespace virtual_device
