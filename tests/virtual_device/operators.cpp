// Every operator: the host finds the shapes, a stream's thread computes with the CPU's kernel.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "device.h"
#include "host.h"
#include "streams.h"

namespace virtual_device {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

// Their results have shapes that only the values tell: a card's host waits for them, too.
const std::unordered_set<std::string> kShapeFromValues = {
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    "aten::equal", "aten::repeat_interleave", "aten::bincount", "aten::_nested_tensor_from_mask_left_aligned"};

IValue mapped(const IValue& value, const std::function<Tensor(const Tensor&)>& change) {
  auto kept = [&](const Tensor& tensor) { return tensor.defined() ? change(tensor) : tensor; };
  if (value.isTensor()) return kept(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& each : value.toTensorList()) changed.push_back(kept(each));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& each : value.toOptionalTensorList()) {
      changed.push_back(each.has_value() ? std::optional<Tensor>(kept(*each)) : each);
    }
    return changed;
  }
  return value;
}

void for_each(const IValue& value, const std::function<void(const Tensor&)>& look) {
  mapped(value, [&](const Tensor& tensor) {
    look(tensor);
    return tensor;
  });
}

bool there(const Tensor& tensor) { return tensor.device().type() == kDevice; }

Tensor like_on(const Tensor& tensor, c10::Device device) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
}

bool written(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

bool takes_generator(const c10::Argument& argument) {
  return argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()));
}

// One call: its arguments, and how its results come about.
class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), name_(schema_.name()), stack_(stack), num_(schema_.arguments().size()),
        arguments_(stack->end() - num_, stack->end()) {}

  void run() {
    check_devices();
    if (kShapeFromValues.count(name_) || masks_) return on_the_host("values");
    if (!results_from_arguments() || !allocate_results()) return on_the_host("emulation");
    enqueue();
    torch::jit::drop(*stack_, num_);
    for (size_t r = 0; r < from_.size(); ++r) stack_->push_back(from_[r] < 0 ? fresh_[r] : arguments_[from_[r]]);
  }

 private:
  const std::vector<c10::Argument>& parameters() const { return schema_.arguments(); }

  // Tensors of the host may take part as scalars and as indices; as a card has it.
  void check_devices() {
    bool indexing = name_.rfind("aten::index", 0) == 0 || name_.rfind("aten::_index_put", 0) == 0 ||
                    name_.rfind("aten::_unsafe_index", 0) == 0;
    for (size_t i = 0; i < num_; ++i) {
      bool indices = indexing && arguments_[i].isOptionalTensorList(), out = written(parameters()[i]);
      for_each(arguments_[i], [&](const Tensor& tensor) {
        bool allowed = there(tensor) || (tensor.is_cpu() && !out && (tensor.dim() == 0 || indices));
        TORCH_CHECK(
            allowed, "Expected all tensors to be on the same device, but found at least two devices, ", the_device(),
            " and ", tensor.device(), "! (when checking ", name_, ")");
        if (out && tensor.numel() == 0) empty_out_ = true;
        if (indices && there(tensor) && (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte)) {
          masks_ = true;
        }
      });
    }
  }

  // Each result is new, or the argument that was written; else false.
  bool results_from_arguments() {
    for (const auto& result : schema_.returns()) {
      int from = -1;
      if (written(result)) {
        for (size_t i = 0; i < num_; ++i) {
          const auto* alias = parameters()[i].alias_info();
          if (alias && alias->beforeSets() == result.alias_info()->beforeSets()) from = int(i);
        }
        if (from < 0) return false;
      } else if (result.alias_info()) {
        return false;
      } else if (result.type() != c10::TensorType::get() && !result.type()->isSubtypeOf(*c10::ListType::ofTensors())) {
        return false;
      }
      from_.push_back(from);
    }
    return true;
  }

  // Shapes come from torch's meta kernels; false where there is none.
  bool allocate_results() {
    fresh_.resize(from_.size());
    if (!empty_out_ && std::none_of(from_.begin(), from_.end(), [](int from) { return from < 0; })) return true;
    Stack shapes;
    for (const auto& argument : arguments_) {
      IValue value = mapped(argument, [](const Tensor& tensor) {
        return there(tensor) || tensor.dim() > 0 ? like_on(tensor, c10::kMeta) : tensor;
      });
      if (value.isDevice()) value = c10::Device(c10::kMeta);
      if (value.isGenerator()) value = IValue();
      shapes.push_back(std::move(value));
    }
    Stack given = shapes;
    try {
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      op_.callBoxed(&shapes);
    } catch (const c10::NotImplementedError&) {
      return false;
    }
    for (size_t i = 0; i < num_; ++i) {
      if (!written(parameters()[i]) || !arguments_[i].isTensor()) continue;
      auto out = arguments_[i].toTensor(), wanted = given[i].toTensor();
      if (out.defined() && out.sizes() != wanted.sizes()) out.resize_(wanted.sizes());
    }
    for (size_t r = 0; r < from_.size(); ++r) {
      const auto& shape = shapes[shapes.size() - from_.size() + r];
      if (from_[r] < 0) fresh_[r] = mapped(shape, [](const Tensor& tensor) { return like_on(tensor, the_device()); });
    }
    return true;
  }

  void enqueue() {
    auto call = std::make_shared<Stack>();
    auto results = std::make_shared<std::vector<IValue>>();
    for (size_t i = 0; i < num_; ++i) call->push_back(argument_of_kernel(i));
    for (const auto& each : fresh_) results->push_back(each.isNone() ? each : mapped(each, host_view));
    current_stream().push([op = op_, call, results] {
      pause(delays().operation);
      op.callBoxed(call.get());
      for (size_t r = 0; r < results->size(); ++r) store((*results)[r], (*call)[r], op.schema().name());
    });
  }

  IValue argument_of_kernel(size_t i) {
    const auto& argument = arguments_[i];
    if (takes_generator(parameters()[i])) {
      return generator_of_operation(
          argument.isNone() ? std::nullopt : std::optional<at::Generator>(argument.toGenerator()));
    }
    if (argument.isDevice()) return c10::Device(c10::kCPU);
    return mapped(argument, [this](const Tensor& tensor) {
      if (there(tensor)) return host_view(tensor);
      if (tensor.dim() > 0) blocks("copy", "an index on the host, in " + name_, int64_t(tensor.nbytes()));
      return tensor.clone();
    });
  }

  static void store(const IValue& result, const IValue& computed, const std::string& name) {
    if (result.isTensor() && result.toTensor().defined()) {
      auto to = result.toTensor(), from = computed.toTensor();
      TORCH_CHECK(to.sizes() == from.sizes(), "the meta kernel of ", name, " has another shape");
      to.copy_(from);
    } else if (result.isTensorList()) {
      auto to = result.toTensorList(), from = computed.toTensorList();
      for (size_t i = 0; i < to.size(); ++i) to.get(i).copy_(from.get(i));
    }
  }

  void on_the_host(const char* kind) {
    blocks(kind, name_);
    Quiet part_of_it;
    drain(current_stream());
    at::native::cpu_fallback(op_, stack_);
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  Stack* stack_;
  size_t num_;
  std::vector<IValue> arguments_;
  std::vector<int> from_;  // argument that a result is; -1: new
  std::vector<IValue> fresh_;
  bool masks_ = false, empty_out_ = false;
};

void any_operator(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_operator>()); }

}  // namespace virtual_device
