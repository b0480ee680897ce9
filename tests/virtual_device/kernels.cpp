// Operators whose results torch's meta kernels do not tell: memory, views, copies, and a few computations.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <functional>
#include <utility>
#include <vector>

#include "copies.h"
#include "device.h"
#include "host.h"
#include "memory.h"
#include "streams.h"

namespace virtual_device {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;
using Tensors = std::vector<Tensor>;

// ---- memory, views, copies -----------------------------------------------------------------------

void check_options(std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  check_ordinal(c10::device_or_default(device));
}

Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool> pin, std::optional<c10::MemoryFormat> format) {
  check_options(device, pin);
  return at::detail::empty_generic(
      size, &allocator(), c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device> device, std::optional<bool> pin) {
  check_options(device, pin);
  return at::detail::empty_strided_generic(
      size, stride, &allocator(), c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef symbolic, std::optional<c10::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
  if (self.sizes() == size) return self;
  size_t needed = (self.storage_offset() + c10::multiply_integers(size)) * self.itemsize();
  if (needed > self.storage().nbytes()) resize_storage(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  return at::cpu::as_strided_symint(self, size, stride, std::move(offset));
}
Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  return at::native::unfold(self, dim, size, step);
}
Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }
Tensor& set_storage(Tensor& self, at::Storage source) { return at::native::set_(self, std::move(source)); }
Tensor& set_part(
    Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::set_(self, std::move(source), offset, size, stride);
}
void record_stream(Tensor& self, c10::Stream stream) {
  allocator().recordStream(self.storage().data_ptr(), stream);
}

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  copy_between(target, self, non_blocking);
  return target;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  target.resize_(self.sizes());
  copy_between(target, self, false);
  return target;
}
at::Scalar item(const Tensor& self) {
  blocks("item", "", int64_t(self.itemsize()));
  drain(current_stream());
  return host_view(self).item();
}

// ---- computations --------------------------------------------------------------------------------

Tensor viewed(const std::optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? host_view(*tensor) : Tensor();
}

Tensor shape_of(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
}

Tensor allocated(const Tensor& shape) {
  if (!shape.defined()) return shape;
  return at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(the_device()));
}

// Computes on the current stream, from host views, into results that are there already.
void enqueue(const Tensors& results, std::function<Tensors()> compute) {
  Tensors targets;
  for (const auto& result : results) targets.push_back(viewed(result));
  current_stream().push([targets, compute = std::move(compute)]() mutable {
    pause(delays().operation);
    Tensors computed = compute();
    for (size_t i = 0; i < targets.size(); ++i) {
      if (targets[i].defined()) targets[i].copy_(computed[i]);
    }
  });
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& x, double p, std::optional<bool> train) {
  auto mask = at::ones_like(x, x.options().dtype(at::kBool));
  if (!train.value_or(true) || p == 0) return {x.clone(), mask};
  mask.bernoulli_(1 - p);
  return {x.mul(mask).mul_(p == 1 ? 0.0 : 1.0 / (1 - p)), mask};
}

// The CPU's kernel has statistics of the input's type where the meta kernel says float32.
std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, SymIntArrayRef shape, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    double eps) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), over(x.sizes().end() - shape.size(), x.sizes().end());
  std::fill(sizes.end() - shape.size(), sizes.end(), 1);
  bool mixed = weight.has_value() && weight->defined() && weight->scalar_type() != x.scalar_type();
  auto out = at::empty_like(x, c10::MemoryFormat::Contiguous);
  auto mean = at::empty(sizes, x.options().dtype(mixed ? at::kFloat : x.scalar_type()));
  auto rstd = at::empty_like(mean);
  enqueue({out, mean, rstd}, [x = host_view(x), over, w = viewed(weight), b = viewed(bias), eps]() -> Tensors {
    auto [y, m, r] = at::native_layer_norm(x, over, w, b, eps);
    return {y, m, r};
  });
  return {out, mean, rstd};
}

// The CPU's kernel has no integers.
Tensor histc(const Tensor& x, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  auto counts = at::empty({bins}, x.options());
  enqueue({counts}, [x = host_view(x), bins, low, high]() -> Tensors {
    return {at::histc(x.to(at::kFloat), bins, low, high)};
  });
  return counts;
}

struct Geometry {
  std::vector<SymInt> stride, padding, dilation, output_padding;
  bool transposed;
  SymInt groups;
};

Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups) {
  Geometry g{stride.vec(), padding.vec(), dilation.vec(), output_padding.vec(), transposed, groups};
  auto compute = [g](const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    return at::convolution_symint(
        x, weight, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups);
  };
  auto out = allocated(compute(shape_of(x), shape_of(weight), std::nullopt));
  enqueue({out}, [compute, x = host_view(x), w = host_view(weight), b = viewed(bias)]() -> Tensors {
    return {compute(x, w, b.defined() ? std::optional<Tensor>(b) : std::nullopt)};
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, SymIntArrayRef stride, SymIntArrayRef padding,
    SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups, std::array<bool, 3> wanted) {
  Geometry g{stride.vec(), padding.vec(), dilation.vec(), output_padding.vec(), transposed, groups};
  auto bias = at::empty({weight.size(transposed ? 1 : 0) * (transposed ? groups.expect_int() : 1)}, x.options());
  Tensor none;
  Tensors results{wanted[0] ? at::empty_like(x) : none, wanted[1] ? at::empty_like(weight) : none,
                  wanted[2] ? bias : none};
  enqueue(results, [=, grad = host_view(grad), x = host_view(x), w = host_view(weight), n = bias.sizes().vec()]() {
    std::vector<SymInt> size{SymInt(n[0])};
    auto for_bias = wanted[2] ? at::OptionalSymIntArrayRef(size) : at::OptionalSymIntArrayRef();
    auto [dx, dw, db] = at::convolution_backward_symint(
        grad, x, w, for_bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups, wanted);
    return Tensors{dx, dw, db};
  });
  return {results[0], results[1], results[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("as_strided", as_strided);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("unfold", unfold);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("record_stream", record_stream);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("native_dropout", native_dropout);
  m.impl("native_layer_norm", layer_norm);
  m.impl("histc", histc);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

}  // namespace virtual_device
