// What the processor (and the system's saved registers) can do, asked at run time.
#pragma once

#include <string>
#include <vector>

namespace mvd {

// The instruction sets that operators are compiled for, each including the ones before it.
// avx512 means F, BW, DQ, VL, VNNI and BF16 together: Zen 4, Cooper Lake, Sapphire Rapids and newer.
enum class Isa { portable, avx2, avx512 };

// Names among avx2, fma, f16c, avx512f, ..., avx512vnni, avx512bf16; empty on processors that are not x86-64.
std::vector<std::string> cpu_features();

// The widest set that this processor has, or the narrower one chosen by set_isa or, at start, MVD_KERNELS_ISA.
Isa isa();

// Names of the sets that this processor has, narrowest first; of the one in use; and choosing another
// (std::invalid_argument where it is not among them). For tests and measurements, while no operator runs.
std::vector<std::string> isa_names();
std::string isa_name();
void set_isa(const std::string& name);

}  // namespace mvd
