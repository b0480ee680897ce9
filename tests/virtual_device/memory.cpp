#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "host.h"

namespace virtual_device {
namespace {

constexpr size_t kSpace = size_t(1) << 38;  // of addresses; only what is written takes memory
constexpr size_t kPage = 4096;
constexpr int kPoison = 0xFF;
constexpr size_t kAll = 0;  // torch keeps figures for all blocks, small and large ones

struct Space {
  char* seen = nullptr;     // by torch: no access
  char* touched = nullptr;  // by the streams' threads
  Space() {
    int file = memfd_create("virtual-device", MFD_CLOEXEC);
    TORCH_CHECK(file >= 0 && ftruncate(file, kSpace) == 0, "no memory for the virtual device");
    seen = map(file, PROT_NONE);
    touched = map(file, PROT_READ | PROT_WRITE);
    close(file);
  }
  static char* map(int file, int access) {
    void* start = mmap(nullptr, kSpace, access, MAP_SHARED | MAP_NORESERVE, file, 0);
    TORCH_CHECK(start != MAP_FAILED, "no addresses for the virtual device");
    madvise(start, kSpace, MADV_DONTDUMP);
    madvise(start, kSpace, MADV_DONTFORK);  // as with a card: nothing of it is a child's
    return static_cast<char*>(start);
  }
};
Space& space() {
  static auto* all = new Space;
  return *all;
}

size_t rounded(size_t nbytes) {
  size_t unit = nbytes < (size_t(1) << 20) ? 512 : size_t(2) << 20;
  return (nbytes + unit - 1) / unit * unit;
}

void poison(char* pointer, size_t nbytes) { memset(reachable(pointer), kPoison, nbytes); }

void check_poison(char* pointer, size_t nbytes) {
  const char* bytes = reachable(pointer);
  bool intact = bytes[0] == static_cast<char>(kPoison) && memcmp(bytes, bytes + 1, nbytes - 1) == 0;
  if (!intact) fault("device memory was written after it was freed (" + std::to_string(nbytes) + " bytes)");
}

void free_block(void* context) {
  if (context != nullptr) allocator().release(static_cast<char*>(context));
}

}  // namespace

bool on_device(const void* pointer) {
  auto* at = static_cast<const char*>(pointer);
  return at >= space().seen && at < space().seen + kSpace;
}

char* reachable(const void* pointer) {
  if (pointer == nullptr) return nullptr;
  TORCH_CHECK(on_device(pointer), "not a pointer of the virtual device");
  return space().touched + (static_cast<const char*>(pointer) - space().seen);
}

// ---- the allocator -------------------------------------------------------------------------------

CachingAllocator& allocator() {
  static auto* one = new CachingAllocator;
  return *one;
}

c10::DataPtr CachingAllocator::allocate(size_t nbytes) {
  c10::Device device(c10::DeviceType::PrivateUse1, 0);
  if (nbytes == 0) return {nullptr, nullptr, &free_block, device};
  char* pointer = take(nbytes);
  if (pointer == nullptr) {
    blocks("allocation", "no memory left: the cache is emptied", nbytes);
    Quiet part_of_it;
    emptyCache();
    pointer = take(nbytes);
  }
  if (pointer == nullptr) {
    std::lock_guard<std::mutex> guard(mutex_);
    ++stats_.num_ooms;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "The virtual device is out of memory. Tried to allocate ", nbytes, " bytes; ",
        stats_.allocated_bytes[kAll].current, " of ", capacity_, " are allocated");
  }
  return {pointer, pointer, &free_block, device};
}

c10::DeleterFnPtr CachingAllocator::raw_deleter() const { return &free_block; }

void CachingAllocator::copy_data(void* target, const void* source, size_t nbytes) const {
  char *to = reachable(target), *from = reachable(source);
  current_stream().push([=] { memcpy(to, from, nbytes); });
}

char* CachingAllocator::take(size_t nbytes) {
  std::lock_guard<std::mutex> guard(mutex_);
  recycle_awaited();
  size_t size = rounded(nbytes);
  auto& pool = idle_[current_id()];
  auto found = pool.lower_bound(size);
  char* pointer = nullptr;
  if (found != pool.end() && found->first <= size + std::max<size_t>(size / 4, 512)) {
    size = found->first;
    pointer = found->second;
    pool.erase(found);
    current_stream().push([=] { check_poison(pointer, size); });
  } else {
    if (stats_.reserved_bytes[kAll].current + size > capacity_) return nullptr;
    pointer = space().seen + top_;
    top_ += size + kPage;
    TORCH_CHECK(top_ < kSpace, "the virtual device has no addresses left");
    stats_.reserved_bytes[kAll].increase(size);
    current_stream().push([=] { poison(pointer, size); });
  }
  live_[pointer] = Block{size, current_id(), {}};
  stats_.allocation[kAll].increase(1);
  stats_.allocated_bytes[kAll].increase(size);
  stats_.requested_bytes[kAll].increase(nbytes);
  return pointer;
}

void CachingAllocator::release(char* pointer) {
  std::lock_guard<std::mutex> guard(mutex_);
  auto found = live_.find(pointer);
  if (found == live_.end()) return fault("device memory was freed twice");
  Block block = found->second;
  live_.erase(found);
  stats_.allocation[kAll].decrease(1);
  stats_.allocated_bytes[kAll].decrease(block.nbytes);
  if (block.others.empty()) return recycle(pointer, block);
  Freed freed{pointer, block, {}};
  for (auto other : block.others) freed.awaited.push_back(stream(other).mark());
  awaited_.push_back(std::move(freed));
}

void CachingAllocator::recycle(char* pointer, const Block& block) {
  size_t nbytes = block.nbytes;
  stream(block.stream).push([=] { poison(pointer, nbytes); });
  idle_[block.stream].emplace(nbytes, pointer);
}

void CachingAllocator::recycle_awaited() {
  auto over = [this](Freed& freed) {
    for (auto& mark : freed.awaited) {
      if (!mark->reached()) return false;
    }
    recycle(freed.pointer, freed.block);
    return true;
  };
  awaited_.erase(std::remove_if(awaited_.begin(), awaited_.end(), over), awaited_.end());
}

void CachingAllocator::emptyCache(c10::MempoolId_t) {
  drain_all();
  std::lock_guard<std::mutex> guard(mutex_);
  recycle_awaited();
  for (auto& [stream_id, pool] : idle_) {
    for (auto& [nbytes, pointer] : pool) {
      auto give_back = [pointer = pointer, nbytes = nbytes] {
        check_poison(pointer, nbytes);
        madvise(reachable(pointer), nbytes, MADV_REMOVE);
      };
      stream(stream_id).push(give_back);  // behind the poison of what was recycled just now
      stats_.reserved_bytes[kAll].decrease(nbytes);
    }
    pool.clear();
  }
}

void CachingAllocator::recordStream(const c10::DataPtr& pointer, c10::Stream stream) {
  std::lock_guard<std::mutex> guard(mutex_);
  auto found = live_.find(static_cast<char*>(pointer.get_context()));
  if (found != live_.end() && found->second.stream != stream.id()) found->second.others.insert(stream.id());
}

c10::CachingDeviceAllocator::DeviceStats CachingAllocator::getDeviceStats(c10::DeviceIndex) {
  std::lock_guard<std::mutex> guard(mutex_);
  return stats_;
}

void CachingAllocator::resetAccumulatedStats(c10::DeviceIndex) {
  std::lock_guard<std::mutex> guard(mutex_);
  for (auto* each : {&stats_.allocation, &stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.requested_bytes}) {
    (*each)[kAll].reset_accumulated();
  }
  stats_.num_ooms = 0;
}

void CachingAllocator::resetPeakStats(c10::DeviceIndex) {
  std::lock_guard<std::mutex> guard(mutex_);
  for (auto* each : {&stats_.allocation, &stats_.allocated_bytes, &stats_.reserved_bytes, &stats_.requested_bytes}) {
    (*each)[kAll].reset_peak();
  }
}

std::pair<size_t, size_t> CachingAllocator::getMemoryInfo(c10::DeviceIndex) {
  std::lock_guard<std::mutex> guard(mutex_);
  size_t reserved = stats_.reserved_bytes[kAll].current;
  return {capacity_ - std::min(capacity_, reserved), capacity_};
}

void CachingAllocator::limit(size_t capacity) {
  std::lock_guard<std::mutex> guard(mutex_);
  capacity_ = capacity;
}

size_t CachingAllocator::capacity() {
  std::lock_guard<std::mutex> guard(mutex_);
  return capacity_;
}

// ---- pinned host memory --------------------------------------------------------------------------

namespace {

using Ranges = std::multimap<uintptr_t, size_t>;

struct Host {
  std::mutex mutex;
  Ranges pinned, flying;
  std::multimap<size_t, char*> idle;  // allocated pinned memory that nobody has
};
Host& host() {
  static auto* one = new Host;
  return *one;
}

bool touched(const Ranges& ranges, uintptr_t start, size_t nbytes) {
  return std::any_of(ranges.begin(), ranges.end(), [=](const auto& range) {
    return start < range.first + range.second && range.first < start + nbytes;
  });
}

size_t whole_pages(size_t nbytes) { return (nbytes + kPage - 1) / kPage * kPage; }

// Allocated pinned memory is handed out again when the copies that use it have ended, never given back.
struct PinnedAllocator final : c10::Allocator {
  struct Context {
    char* start;
    size_t nbytes;
  };
  static void give(void* context) {
    auto* block = static_cast<Context*>(context);
    {
      std::lock_guard<std::mutex> guard(host().mutex);
      host().idle.emplace(block->nbytes, block->start);
    }
    delete block;
  }
  static char* take(size_t nbytes) {
    std::lock_guard<std::mutex> guard(host().mutex);
    auto [first, last] = host().idle.equal_range(nbytes);
    for (auto each = first; each != last; ++each) {
      char* start = each->second;
      if (!touched(host().flying, reinterpret_cast<uintptr_t>(start), nbytes)) {
        host().idle.erase(each);
        return start;
      }
    }
    void* start = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(start != MAP_FAILED, "no pinned memory for the virtual device");
    host().pinned.emplace(reinterpret_cast<uintptr_t>(start), nbytes);
    return static_cast<char*>(start);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, c10::Device(c10::kCPU)};
    char* start = take(whole_pages(nbytes));
    return {start, new Context{start, whole_pages(nbytes)}, &give, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t nbytes) const override { memcpy(target, source, nbytes); }
};

}  // namespace

int register_host(uintptr_t address, size_t nbytes) {
  std::lock_guard<std::mutex> guard(host().mutex);
  if (touched(host().pinned, address, nbytes)) return 712;
  host().pinned.emplace(address, nbytes);
  return 0;
}

int unregister_host(uintptr_t address) {
  std::lock_guard<std::mutex> guard(host().mutex);
  auto found = host().pinned.find(address);
  if (found == host().pinned.end()) return 713;
  if (touched(host().flying, address, found->second)) fault("host memory was unregistered while a copy uses it");
  host().pinned.erase(found);
  return 0;
}

bool pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(host().mutex);
  return touched(host().pinned, reinterpret_cast<uintptr_t>(pointer), 1);
}

c10::Allocator& pinned_allocator() {
  static auto* one = new PinnedAllocator;
  return *one;
}

InFlight::InFlight(const void* pointer, size_t nbytes) {
  std::lock_guard<std::mutex> guard(host().mutex);
  place_ = host().flying.emplace(reinterpret_cast<uintptr_t>(pointer), nbytes);
}

void InFlight::landed() {
  std::lock_guard<std::mutex> guard(host().mutex);
  host().flying.erase(place_);
}

}  // namespace virtual_device
