// The definition of a tube mask, once, for the torch operator, the DALI operator and CUDA.
//
// A spatial position's key is a 64-bit word of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011) under the 64-bit seed as key and (position, sample lo, sample hi, epoch) as counter. The
// positions with the smallest (key, position) are masked. Integers only: every machine finds the same mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

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

// Draws one sample's 2-D mask. It keeps its scratch memory from call to call: one object per thread.
class TubeMaskSampler {
 public:
  TubeMaskSampler(uint64_t seed, uint32_t epoch, int64_t positions, int64_t masked)
      : seed_(seed), epoch_(epoch), masked_(masked), keys_(positions), sorted_(positions) {}

  // slice[p] = whether position p is masked; `masked` of `positions` are.
  void draw(uint64_t sample, bool* slice) {
    const size_t positions = keys_.size();
    if (masked_ == 0 || masked_ == static_cast<int64_t>(positions)) {
      std::fill_n(slice, positions, masked_ != 0);
      return;
    }
    for (size_t p = 0; p < positions; ++p) keys_[p] = philox_key(seed_, epoch_, sample, static_cast<uint32_t>(p));
    sorted_ = keys_;
    const auto limit = sorted_.begin() + (masked_ - 1);
    std::nth_element(sorted_.begin(), limit, sorted_.end());
    // Equal keys are taken in order of position: those below the limit first, then as many at the limit as remain.
    int64_t ties = masked_ - std::count_if(keys_.begin(), keys_.end(), [&](uint64_t key) { return key < *limit; });
    for (size_t p = 0; p < positions; ++p) slice[p] = keys_[p] < *limit || (keys_[p] == *limit && ties-- > 0);
  }

 private:
  const uint64_t seed_;
  const uint32_t epoch_;
  const int64_t masked_;
  std::vector<uint64_t> keys_, sorted_;
};

}  // namespace mvd
