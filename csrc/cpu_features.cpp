#include "cpu_features.h"

namespace mvd {

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The builtin takes literals only.
#define MVD_ADD_IF_SUPPORTED(name) \
  if (__builtin_cpu_supports(name)) found.emplace_back(name)
  MVD_ADD_IF_SUPPORTED("avx2");
  MVD_ADD_IF_SUPPORTED("fma");
  MVD_ADD_IF_SUPPORTED("f16c");
  MVD_ADD_IF_SUPPORTED("avx512f");
  MVD_ADD_IF_SUPPORTED("avx512bw");
  MVD_ADD_IF_SUPPORTED("avx512vnni");
  MVD_ADD_IF_SUPPORTED("avx512bf16");
#undef MVD_ADD_IF_SUPPORTED
#endif
  return found;
}

}  // namespace mvd
