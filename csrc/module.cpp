// The Python module: what was built, and which instruction set is in use. What computes goes through torch.ops.gptcore.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "gpu/present.h"

#ifndef GPTCORE_TORCH
#define GPTCORE_TORCH "unknown"
#endif

namespace py = pybind11;

constexpr int kAbi = 4;  // the operators' schemas; gptcore/kernels.py refuses a library with another number

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
  info["gpu"] = gptcore::gpu_present();
  return info;
}

template <class Fields>
static py::tuple names_of(const Fields& fields) {
  py::list names;
  for (const auto& field : fields) names.append(field.name);
  return py::tuple(names);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptcore's native code: importing it registers torch.ops.gptcore.";
  m.def("build_info", build_info, "What was built: abi, compiler, torch, isas, gpu.");
  m.def("plan_fields", [] { return names_of(gptcore::kPlan); }, "decode_'s plan: its numbers by name, in order.");
  m.def("constant_fields", [] { return names_of(gptcore::kConstants); }, "decode_'s constants by name, in order.");
  m.def("model_leaves", [] { return names_of(gptcore::model_leaves({})); }, "decode_'s first weights: w, b, scale of each.");
  m.def("block_leaves", [] { return names_of(gptcore::block_leaves({})); }, "Then these of every layer, as many times.");
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
