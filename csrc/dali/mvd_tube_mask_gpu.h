// One launch of the CUDA tube-mask kernel; passed by value, so it must stay below 4 KiB.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mvd {

struct TubeMaskLaunch {
  static constexpr int kMaxSamples = 128;
  int samples, slices, positions, masked;
  const int64_t* numbers[kMaxSamples];  // each: seed, epoch, sample
  bool* masks[kMaxSamples];             // each: [slices * positions]
};

cudaError_t launch_tube_mask(const TubeMaskLaunch& launch, cudaStream_t stream);

}  // namespace mvd
