#include "cpu_features.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace mvd {
namespace {

bool has(const std::vector<std::string>& features, std::initializer_list<const char*> wanted) {
  return std::all_of(wanted.begin(), wanted.end(), [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  });
}

const std::vector<std::string>& supported() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found{"portable"};
    const auto features = cpu_features();
    if (has(features, {"avx2", "fma", "f16c"})) found.emplace_back("avx2");
#if defined(MVD_EMULATE_AVX512)
    found.emplace_back("avx512");
#else
    if (has(features, {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"}))
      found.emplace_back("avx512");
#endif
    return found;
  }();
  return names;
}

Isa parse(const std::string& name) {
  const auto& names = supported();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string choices;
    for (const auto& choice : names) choices += (choices.empty() ? "" : ", ") + choice;
    throw std::invalid_argument("instruction set '" + name + "' is not one of this processor's: " + choices);
  }
  return static_cast<Isa>(found - names.begin());
}

Isa& current() {
  static Isa chosen = [] {
    const char* wanted = std::getenv("MVD_KERNELS_ISA");
    return parse(wanted && *wanted ? wanted : supported().back());
  }();
  return chosen;
}

}  // namespace

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
  MVD_ADD_IF_SUPPORTED("avx512dq");
  MVD_ADD_IF_SUPPORTED("avx512vl");
  MVD_ADD_IF_SUPPORTED("avx512vnni");
  MVD_ADD_IF_SUPPORTED("avx512bf16");
#undef MVD_ADD_IF_SUPPORTED
#endif
  return found;
}

Isa isa() { return current(); }
std::vector<std::string> isa_names() { return supported(); }
std::string isa_name() { return supported()[static_cast<size_t>(current())]; }
void set_isa(const std::string& name) { current() = parse(name); }

}  // namespace mvd
