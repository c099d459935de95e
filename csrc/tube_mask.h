// The definition of a tube mask, once, for the torch operator, the DALI operator and CUDA.
//
// A spatial position's key is a 64-bit word of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) under the 64-bit seed as key and (position, sample lo, sample hi, epoch) as counter. The
// positions with the smallest (key, position) are masked. Integers only: every machine finds the same mask.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MVD_HOST_DEVICE __host__ __device__
#else
#define MVD_HOST_DEVICE
#endif

namespace mvd {

MVD_HOST_DEVICE inline uint64_t philox_key(uint64_t seed, uint32_t epoch, uint64_t sample, uint32_t position) {
  uint32_t x0 = position, x1 = static_cast<uint32_t>(sample), x2 = static_cast<uint32_t>(sample >> 32), x3 = epoch;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * x0;
    const uint64_t odd = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(odd >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(odd);
    x2 = static_cast<uint32_t>(even >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(even);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return x0 | uint64_t{x1} << 32;
}

// slice[p] = whether keys[p] is among the `masked` smallest; of equal keys the first ones are. Inlined, so that it is
// compiled for the instruction set of its caller.
__attribute__((always_inline)) inline void mask_smallest(const uint64_t* keys, int64_t positions, int64_t masked,
                                                         bool* slice) {
  // The largest limit that has at most `masked` keys below it, bit by bit from the top, until it has exactly as many:
  // among random keys that takes about log2(positions) + 1 bits.
  uint64_t limit = 0;
  int64_t below = 0;
  for (uint64_t bit = uint64_t{1} << 63; bit != 0 && below < masked; bit >>= 1) {
    int64_t count = 0;
    for (int64_t p = 0; p < positions; ++p) count += keys[p] < (limit | bit);
    if (count > masked) continue;
    limit |= bit;
    below = count;
  }
  for (int64_t p = 0; p < positions; ++p) slice[p] = keys[p] < limit;
  for (int64_t p = 0; below < masked; ++p) {  // all bits were needed: the remaining ones are equal to the limit
    if (keys[p] != limit) continue;
    slice[p] = true;
    ++below;
  }
}

}  // namespace mvd
