// mvd_kernels._C: importing it registers the operators of the other files with torch.ops.mvd_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_features.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ operators of mvd_kernels";
  m.def("cpu_features", &mvd::cpu_features, "Names of the instruction sets this processor has, e.g. 'avx2'.");
  m.def("isa_names", &mvd::isa_names, "Instruction sets that the operators can use here, narrowest first.");
  m.def("isa_name", &mvd::isa_name, "The instruction set in use: the widest, or MVD_KERNELS_ISA.");
  m.def("set_isa", &mvd::set_isa, "Use another of isa_names(); not while an operator runs.");
  m.attr("compiler") = __VERSION__;
  m.attr("torch_version") = MVD_TORCH_VERSION;  // of the build, whose ABI it has
}
