#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "host.h"
#include "memory.h"
#include "streams.h"

namespace virtual_device {
namespace {

// ---- events and streams as torch asks for them ---------------------------------------------------

// CUDA's semantics: a wait takes the last record at the time of the call; never recorded is complete.
struct Event {
  std::mutex mutex;
  MarkPtr last;
  bool timing = false;
};

MarkPtr last_record(void* event) {
  if (event == nullptr) return nullptr;
  auto* of = static_cast<Event*>(event);
  std::lock_guard<std::mutex> guard(of->mutex);
  return of->last;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override { return kDevice; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return the_device(); }
  void setDevice(c10::Device device) const override { check_ordinal(device); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Device exchangeDevice(c10::Device device) const override {
    check_ordinal(device);
    return the_device();
  }

  static c10::Stream as_torch(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, the_device(), id); }
  c10::Stream getStream(c10::Device) const noexcept override { return as_torch(current_id()); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_torch(0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    check_ordinal(device);
    return as_torch(pool_stream());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream to) const noexcept override { return as_torch(exchange_current(to.id())); }
  bool queryStream(const c10::Stream& of) const override { return stream(of.id()).idle(); }
  void synchronizeStream(const c10::Stream& of) const override {
    blocks("stream");
    drain(stream(of.id()));
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    blocks("device");
    drain_all();
  }

  void record(void** event, const c10::Stream& on, c10::DeviceIndex, c10::EventFlag flag) const override {
    if (*event == nullptr) *event = new Event;
    auto* into = static_cast<Event*>(*event);
    auto mark = stream(on.id()).mark();
    std::lock_guard<std::mutex> guard(into->mutex);
    into->last = mark;
    into->timing = flag == c10::EventFlag::BACKEND_DEFAULT;
  }
  void block(void* event, const c10::Stream& waits) const override {
    if (auto mark = last_record(event)) stream(waits.id()).push([mark] { mark->wait(); });
  }
  bool queryEvent(void* event) const override {
    auto mark = last_record(event);
    return mark == nullptr || mark->reached();
  }
  void synchronizeEvent(void* event) const override {
    blocks("event");
    if (auto mark = last_record(event)) wait_for(mark);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    auto *from = static_cast<Event*>(first), *to = static_cast<Event*>(second);
    TORCH_CHECK(from && to && from->timing && to->timing, "both events must have timing and be recorded");
    auto start = last_record(first), end = last_record(second);
    TORCH_CHECK(start->reached() && end->reached(), "both events must be reached before they are compared");
    return std::chrono::duration<double, std::milli>(end->when() - start->when()).count();
  }

  void recordDataPtrOnStream(const c10::DataPtr& pointer, const c10::Stream& on) const override {
    allocator().recordStream(pointer, on);
  }
};

// ---- random numbers ------------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  Generator() : c10::GeneratorImpl(the_device(), c10::DispatchKeySet(kKey)) {}

  void set_current_seed(uint64_t seed) override { state_ = {seed, 0}; }
  uint64_t current_seed() const override { return state_[0]; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return current_seed();
  }
  void set_offset(uint64_t offset) override { state_[1] = offset; }
  uint64_t get_offset() const override { return state_[1]; }
  void set_state(const c10::TensorImpl& state) override {
    TORCH_CHECK(state.numel() == sizeof(state_), "not a random state of the virtual device");
    memcpy(state_.data(), state.data(), sizeof(state_));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::empty({static_cast<int64_t>(sizeof(state_))}, at::kByte);
    memcpy(state.mutable_data_ptr(), state_.data(), sizeof(state_));
    return state.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator;
    copy->state_ = state_;
    return copy;
  }
  at::Generator next() {
    uint64_t mixed = state_[0] + 0x9E3779B97F4A7C15u * ++state_[1];  // splitmix64: near counts, far seeds
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
    return at::detail::createCPUGenerator(mixed ^ (mixed >> 31));
  }

 private:
  std::array<uint64_t, 2> state_{1234, 0};  // seed, operations that drew
};

// ---- what else torch asks ------------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator(); }
  at::Device getDeviceFromPtr(void* pointer) const override {
    TORCH_CHECK(on_device(pointer), "not a pointer of the virtual device");
    return the_device();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    resize_storage(storage, nbytes);
  }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

void register_device() {
  at::SetAllocator(kDevice, &allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  at::globalContext().lazyInitDevice(kDevice);
}

void check_ordinal(c10::Device device) {
  TORCH_CHECK(device.index() <= 0, "invalid device ordinal ", int(device.index()), ": there is one virtual device");
}

const at::Generator& default_generator() {
  static auto* one = new at::Generator(at::make_generator<Generator>());
  return *one;
}

at::Generator generator_of_operation(const std::optional<at::Generator>& generator) {
  at::Generator from = generator.has_value() && generator->defined() ? *generator : default_generator();
  TORCH_CHECK(from.device().type() == kDevice, "Expected a generator of the virtual device, not of ", from.device());
  std::lock_guard<std::mutex> guard(from.mutex());
  return static_cast<Generator*>(from.unsafeGetGeneratorImpl())->next();
}

void resize_storage(const c10::Storage& storage, size_t nbytes) {
  auto* of = storage.unsafeGetStorageImpl();
  auto fresh = allocator().allocate(nbytes);
  size_t kept = std::min(nbytes, of->nbytes());
  if (kept > 0) allocator().copy_data(fresh.get(), of->data(), kept);
  of->set_data_ptr_noswap(std::move(fresh));
  of->set_nbytes(nbytes);
}

at::Tensor host_view(const at::Tensor& tensor) {
  void* start = tensor.numel() > 0 ? reachable(tensor.const_data_ptr()) : nullptr;
  return at::from_blob(start, tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU).requires_grad(false));
}

}  // namespace virtual_device
