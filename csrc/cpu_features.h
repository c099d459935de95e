// What the processor (and the system's saved registers) can do, asked at run time.
#pragma once

#include <string>
#include <vector>

namespace mvd {

// Names among avx2, fma, f16c, avx512f, avx512bw, avx512vnni, avx512bf16; empty on processors that are not x86-64.
std::vector<std::string> cpu_features();

}  // namespace mvd
