#include "copies.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "host.h"
#include "memory.h"
#include "streams.h"

namespace virtual_device {
namespace {

constexpr int64_t kStagedAtOnce = 64 << 10;  // CUDA takes as much from pageable memory before the call returns

bool there(const at::Tensor& tensor) { return tensor.device().type() == kDevice; }

// The copy is seen to take time: its target holds neither old nor new bytes until it ends.
void slow_copy(char* target, const char* source, int64_t nbytes, const std::atomic<int64_t>& delay) {
  if (delay > 0) {
    memset(target, 0xFF, nbytes);
    pause(delay);
  }
  memcpy(target, source, nbytes);
}

// Bytes over the link: the two have one type and the same dense strides.
void transfer(const at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  bool up = there(target);
  const at::Tensor& of_host = up ? source : target;
  auto* host = static_cast<char*>(const_cast<void*>(of_host.const_data_ptr()));
  char* device = reachable((up ? target : source).const_data_ptr());
  auto nbytes = static_cast<int64_t>(of_host.nbytes());
  bool free_to_go = non_blocking && pinned(host);
  auto& stream = current_stream();
  if (up && non_blocking && !free_to_go && nbytes <= kStagedAtOnce) {
    auto staged = std::make_shared<std::vector<char>>(host, host + nbytes);
    stream.push([=] { slow_copy(device, staged->data(), nbytes, delays().to_device); });
    return;
  }
  InFlight flight(host, nbytes);
  stream.push([=]() mutable {
    if (up) {
      slow_copy(device, host, nbytes, delays().to_device);
    } else {
      slow_copy(host, device, nbytes, delays().to_host);
    }
    flight.landed();
  });
  if (!free_to_go) {
    std::string how = std::string(up ? "to" : "from") + " the device, " + (pinned(host) ? "pinned" : "pageable");
    blocks("copy", how, nbytes);
    drain(stream);
  }
}

bool alike(const at::Tensor& target, const at::Tensor& source) {
  if (target.scalar_type() != source.scalar_type()) return false;
  if (target.is_contiguous() && source.is_contiguous()) return true;
  return target.strides() == source.strides() && target.is_non_overlapping_and_dense();
}

}  // namespace

void copy_between(const at::Tensor& target, const at::Tensor& given, bool non_blocking) {
  if (target.numel() == 0 || target.is_same(given)) return;
  at::Tensor source = given.expand_as(target);
  if (there(target) && there(source)) {
    auto to = host_view(target), from = host_view(source);
    current_stream().push([to, from]() mutable {
      pause(delays().on_device);
      to.copy_(from);
    });
    return;
  }
  if (alike(target, source)) return transfer(target, source, non_blocking);
  // As aten/src/ATen/native/cuda/Copy.cu: where the copy must not block, types are changed on the source's side.
  bool change_at_source = non_blocking ? there(source) : !there(source);
  at::Tensor from, to;
  if (change_at_source) {
    from = source.to(target.scalar_type()).contiguous();
    to = target.is_contiguous() ? target : at::empty_like(target, c10::MemoryFormat::Contiguous);
  } else {
    bool as_it_is = target.is_contiguous() && target.scalar_type() == source.scalar_type();
    from = source.contiguous();
    to = as_it_is ? target : at::empty(target.sizes(), target.options().dtype(source.scalar_type()));
  }
  transfer(to, from, non_blocking);
  if (!to.is_same(target)) const_cast<at::Tensor&>(target).copy_(to, non_blocking);
}

}  // namespace virtual_device
