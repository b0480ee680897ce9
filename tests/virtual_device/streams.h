// Streams (a thread each), marks in them, and how long work is held up for a test.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace virtual_device {

using Clock = std::chrono::steady_clock;
using Work = std::function<void()>;

// A place in a stream: one record of an event.
class Mark {
 public:
  void reach();
  bool reached();
  void wait();
  Clock::time_point when();  // of a mark that was reached

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
  Clock::time_point when_;
};
using MarkPtr = std::shared_ptr<Mark>;

// A queue of work that one thread does in order.
class Stream {
 public:
  explicit Stream(int64_t id);
  void push(Work work);
  MarkPtr mark();
  bool idle();

 private:
  void run();
  Work next();

  int64_t id_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool busy_ = false;
};

Stream& stream(int64_t id);
int64_t pool_stream();  // as CUDA has it: the next of 32, which come around
int64_t current_id();   // of the calling thread
int64_t exchange_current(int64_t id);
Stream& current_stream();

// The host waits, and hears of work that failed.
void wait_for(const MarkPtr& mark);
void drain(Stream& stream);
void drain_all();

// Held up for so many microseconds, each. A delayed copy spoils its target first.
struct Delays {
  std::atomic<int64_t> to_device{0}, to_host{0}, on_device{0}, operation{0};
};
Delays& delays();
void pause(const std::atomic<int64_t>& microseconds);

}  // namespace virtual_device
