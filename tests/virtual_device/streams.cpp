#include "streams.h"

#include <Python.h>
#include <pthread.h>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/Exception.h>

#include <array>
#include <string>
#include <thread>
#include <utility>

#include "host.h"

namespace virtual_device {
namespace {

constexpr int64_t kPool = 32;
thread_local int64_t current = 0;
thread_local int quiet = 0;

// What is global here is never destroyed: the threads of streams outlive main().
struct Telling {
  std::mutex mutex;
  std::vector<std::string> faults;
  std::string failure;
  std::atomic<Reporter> reporter{nullptr};
};
Telling& telling() {
  static auto* one = new Telling;
  return *one;
}

struct Streams {
  std::mutex mutex;
  std::array<Stream*, kPool + 1> made{};
  int64_t turn = 0;
};
Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

}  // namespace

// ---- what the host is told -----------------------------------------------------------------------

void fault(std::string what) {
  std::lock_guard<std::mutex> guard(telling().mutex);
  if (telling().faults.size() < 100) telling().faults.push_back(std::move(what));
}

std::vector<std::string> take_faults() {
  std::lock_guard<std::mutex> guard(telling().mutex);
  return std::exchange(telling().faults, {});
}

void fail(std::string what) {
  fault("work on a stream failed: " + what);
  std::lock_guard<std::mutex> guard(telling().mutex);
  if (telling().failure.empty()) telling().failure = std::move(what);
}

void raise_failure() {
  std::string what;
  {
    std::lock_guard<std::mutex> guard(telling().mutex);
    what = std::exchange(telling().failure, {});
  }
  TORCH_CHECK(what.empty(), "the virtual device failed before this call: ", what);
}

void report_blocking_to(Reporter reporter) { telling().reporter = reporter; }

void blocks(const char* kind, const std::string& name, int64_t nbytes) {
  Reporter reporter = telling().reporter;
  if (reporter != nullptr && quiet == 0) reporter(kind, name, nbytes);
}

Quiet::Quiet() { ++quiet; }
Quiet::~Quiet() { --quiet; }

WithoutGil::WithoutGil() {
  if (Py_IsInitialized() && PyGILState_Check()) state_ = PyEval_SaveThread();
}
WithoutGil::~WithoutGil() {
  if (state_ != nullptr) PyEval_RestoreThread(static_cast<PyThreadState*>(state_));
}

// ---- marks and streams ---------------------------------------------------------------------------

void Mark::reach() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    reached_ = true;
    when_ = Clock::now();
  }
  changed_.notify_all();
}

bool Mark::reached() {
  std::lock_guard<std::mutex> guard(mutex_);
  return reached_;
}

void Mark::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return reached_; });
}

Clock::time_point Mark::when() {
  std::lock_guard<std::mutex> guard(mutex_);
  return when_;
}

Stream::Stream(int64_t id) : id_(id) {
  std::thread([this] { run(); }).detach();
}

void Stream::push(Work work) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    queue_.push_back(std::move(work));
  }
  changed_.notify_one();
}

MarkPtr Stream::mark() {
  auto mark = std::make_shared<Mark>();
  push([mark] { mark->reach(); });
  return mark;
}

bool Stream::idle() {
  std::lock_guard<std::mutex> guard(mutex_);
  return queue_.empty() && !busy_;
}

Work Stream::next() {
  std::unique_lock<std::mutex> lock(mutex_);
  busy_ = false;
  changed_.wait(lock, [this] { return !queue_.empty(); });
  busy_ = true;
  Work work = std::move(queue_.front());
  queue_.pop_front();
  return work;
}

void Stream::run() {
  pthread_setname_np(pthread_self(), ("virtual-" + std::to_string(id_)).c_str());
  at::set_num_threads(1);  // sums in one order, whatever the machine
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  while (true) {
    Work work = next();
    try {
      work();
    } catch (const c10::Error& error) {
      fail(error.what_without_backtrace());
    } catch (const std::exception& error) {
      fail(error.what());
    }
  }
}

Stream& stream(int64_t id) {
  std::lock_guard<std::mutex> guard(streams().mutex);
  TORCH_CHECK(id >= 0 && id <= kPool, "the virtual device has no stream ", id);
  auto& made = streams().made[id];
  if (made == nullptr) made = new Stream(id);
  return *made;
}

int64_t pool_stream() {
  std::lock_guard<std::mutex> guard(streams().mutex);
  return 1 + streams().turn++ % kPool;
}

int64_t current_id() { return current; }
int64_t exchange_current(int64_t id) { return std::exchange(current, id); }
Stream& current_stream() { return stream(current); }

void wait_for(const MarkPtr& mark) {
  {
    WithoutGil unlocked;
    mark->wait();
  }
  raise_failure();
}

void drain(Stream& stream) { wait_for(stream.mark()); }

void drain_all() {
  std::array<Stream*, kPool + 1> all;
  {
    std::lock_guard<std::mutex> guard(streams().mutex);
    all = streams().made;
  }
  for (auto* each : all) {
    if (each != nullptr) drain(*each);
  }
}

Delays& delays() {
  static auto* all = new Delays;
  return *all;
}

void pause(const std::atomic<int64_t>& microseconds) {
  if (int64_t time = microseconds.load(); time > 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(time));
  }
}

}  // namespace virtual_device
