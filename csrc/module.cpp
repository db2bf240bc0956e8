// The Python module: what was built, and which instruction set is in use. What computes goes through torch.ops.gptcore.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

#ifndef GPTCORE_TORCH
#define GPTCORE_TORCH "unknown"
#endif

namespace py = pybind11;

constexpr int kAbi = 1;  // the operators' schemas; gptcore/kernels.py refuses a library with another number

static py::tuple isas() {
  py::list names;
  for (const gptcore::Isa* const* isa = gptcore::all_isas(); *isa; ++isa) names.append((*isa)->name);
  return py::tuple(names);
}

static py::dict build_info() {
  py::dict info;
  info["abi"] = kAbi;
  info["compiler"] =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["torch"] = GPTCORE_TORCH;
  info["isas"] = isas();
  info["gpu"] = false;  // becomes true in a build with GPU code under a torch that has a GPU runtime
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptcore's native code: importing it registers torch.ops.gptcore.";
  m.def("build_info", build_info, "What was built: abi, compiler, torch, isas, gpu.");
  m.def("isas", isas, "The instruction sets that this machine can run, best first.");
  m.def("isa", [] { return gptcore::isa().name; }, "The instruction set in use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (gptcore::set_isa(name.c_str())) return;
        std::string names;
        for (py::handle other : isas()) names += (names.empty() ? "" : ", ") + py::cast<std::string>(other);
        throw py::value_error("isa: expected one of " + names + ", got " + name);
      },
      py::arg("name"), "Use another instruction set, in this whole process.");
}
