// mvd_kernels._C: importing it registers the operators of the other files with torch.ops.mvd_kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_features.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ operators of mvd_kernels";
  m.def("cpu_features", &mvd::cpu_features, "Names of the instruction sets this processor has, e.g. 'avx2'.");
  m.attr("compiler") = __VERSION__;
}
