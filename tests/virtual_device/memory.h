// Memory of the device, and host memory that its copies may use without blocking.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#include "streams.h"

namespace virtual_device {

// Device memory is mapped twice: where torch sees it, without access, and where the streams' threads see it.
bool on_device(const void* pointer);
char* reachable(const void* pointer);  // the second address of a device pointer

// A stream-ordered caching allocator with CUDA's rules: a freed block may be had again at once by its own
// stream, by no other, and after the streams it was recorded on. A block is filled with 0xFF (NaN, -1) when it
// is made and when it is freed, in the order of its stream, and must still be so when it is handed out again.
class CachingAllocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* target, const void* source, size_t nbytes) const override;

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t pool = {0, 0}) override;
  void recordStream(const c10::DataPtr& pointer, c10::Stream stream) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override;

  void limit(size_t capacity);
  size_t capacity();
  void release(char* pointer);

 private:
  struct Block {
    size_t nbytes;
    int64_t stream;
    std::set<int64_t> others;  // streams it was recorded on
  };
  struct Freed {
    char* pointer;
    Block block;
    std::vector<MarkPtr> awaited;
  };
  char* take(size_t nbytes);
  void recycle(char* pointer, const Block& block);
  void recycle_awaited();

  std::mutex mutex_;
  size_t top_ = 4096;
  size_t capacity_ = size_t(8) << 30;
  c10::CachingDeviceAllocator::DeviceStats stats_;
  std::unordered_map<char*, Block> live_;
  std::map<int64_t, std::multimap<size_t, char*>> idle_;  // by stream and size
  std::vector<Freed> awaited_;
};
CachingAllocator& allocator();

// Registered and allocated pinned memory of the host. The two calls answer as CUDA's do: 0, 712 (registered
// already), 713 (not registered). Unregistering what a copy reads or writes is a fault.
int register_host(uintptr_t address, size_t nbytes);
int unregister_host(uintptr_t address);
bool pinned(const void* pointer);
c10::Allocator& pinned_allocator();

// Host memory from when a copy is enqueued until it has ended.
class InFlight {
 public:
  InFlight(const void* pointer, size_t nbytes);
  void landed();

 private:
  std::multimap<uintptr_t, size_t>::iterator place_;
};

}  // namespace virtual_device
