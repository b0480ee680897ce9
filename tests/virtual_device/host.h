// What the device tells its host: faults, failed work, and calls that block.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace virtual_device {

// Something that no correct program does. Kept until the tests ask for it.
void fault(std::string what);
std::vector<std::string> take_faults();

// Work on a stream failed: a fault, and an error for the next host thread that waits for the device.
void fail(std::string what);
void raise_failure();

// The host waits for the device in this call; `nbytes` where something is transferred.
void blocks(const char* kind, const std::string& name = "", int64_t nbytes = 0);

using Reporter = void (*)(const char* kind, const std::string& name, int64_t nbytes);
void report_blocking_to(Reporter reporter);  // null: to nobody

// While one lives, blocking calls of this thread are part of another that was reported already.
struct Quiet {
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

// While one lives, this thread does not hold Python's lock. A wait must not, or nobody else gets on.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void* state_ = nullptr;
};

}  // namespace virtual_device
