// Included once, before simd.h: what vectors are made from. Everything from other headers is included here, outside
// the regions that are compiled for one instruction set, so that no inline function of theirs is compiled for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(MVD_EMULATE_AVX512)  // `make emulate`: AVX-512 intrinsics as plain C, on processors that have none
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#elif defined(__x86_64__)
#include <immintrin.h>
#endif

#define MVD_INLINE inline __attribute__((always_inline))

namespace mvd {

// bfloat16 bits; the same bytes as at::BFloat16.
struct bf16 {
  uint16_t bits;
};

MVD_INLINE float to_float(float x) { return x; }
MVD_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
MVD_INLINE bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// The rows of a matrix [n, any], `stride` entries apart.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, n;
};

}  // namespace mvd
