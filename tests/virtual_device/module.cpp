// What Python may ask of the device beside what torch does.
#include <torch/extension.h>

#include "device.h"
#include "host.h"
#include "memory.h"
#include "streams.h"

namespace virtual_device {
namespace {

py::object* reporter = nullptr;  // Python's function; never freed at exit, when there is no interpreter

void report(const char* kind, const std::string& name, int64_t nbytes) {
  py::gil_scoped_acquire gil;
  if (reporter == nullptr) return;
  try {
    (*reporter)(kind, name, nbytes);
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("the report of a blocking call");
  }
}

void report_to(const py::object& function) {
  delete reporter;
  reporter = function.is_none() ? nullptr : new py::object(function);
  report_blocking_to(reporter == nullptr ? nullptr : &report);
}

void set_delays(double to_device, double to_host, double on_device, double operation) {
  auto microseconds = [](double seconds) { return int64_t(seconds * 1e6); };
  delays().to_device = microseconds(to_device);
  delays().to_host = microseconds(to_host);
  delays().on_device = microseconds(on_device);
  delays().operation = microseconds(operation);
}

}  // namespace
}  // namespace virtual_device

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace virtual_device;
  m.def("register_device", &register_device);
  m.def("set_delays", &set_delays);
  m.def("report_blocking_to", &report_to);
  m.def("take_faults", &take_faults);
  m.def("synchronize", &drain_all, py::call_guard<py::gil_scoped_release>());
  m.def("capacity", [] { return allocator().capacity(); });
  m.def("limit", [](size_t capacity) { allocator().limit(capacity); });
  m.def("register_host", &register_host);
  m.def("unregister_host", &unregister_host);
  m.def("get_rng_state", [] { return default_generator().get_state(); });
  m.def("set_rng_state", [](const at::Tensor& state) {
    at::Generator generator = default_generator();
    generator.set_state(state);
  });
  m.def("seed", [] { return default_generator().current_seed(); });
  m.def("manual_seed", [](uint64_t seed) {
    at::Generator generator = default_generator();
    generator.set_current_seed(seed);
  });
}
