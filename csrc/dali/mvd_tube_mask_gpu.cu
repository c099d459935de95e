// One block per sample: keys into shared memory, then each position counts the positions that come before it.
#include "mvd_tube_mask_gpu.h"
#include "tube_mask.h"

namespace mvd {
namespace {

constexpr int kThreads = 256;

__global__ void tube_mask_kernel(const TubeMaskLaunch launch) {
  extern __shared__ uint64_t keys[];
  const int64_t* numbers = launch.numbers[blockIdx.x];
  bool* mask = launch.masks[blockIdx.x];
  for (int p = threadIdx.x; p < launch.positions; p += kThreads)
    keys[p] = philox_key(numbers[0], static_cast<uint32_t>(numbers[1]), numbers[2], p);
  __syncthreads();
  for (int p = threadIdx.x; p < launch.positions; p += kThreads) {
    int rank = 0;
    for (int q = 0; q < launch.positions; ++q) rank += keys[q] < keys[p] || (keys[q] == keys[p] && q < p);
    for (int t = 0; t < launch.slices; ++t) mask[t * launch.positions + p] = rank < launch.masked;
  }
}

}  // namespace

cudaError_t launch_tube_mask(const TubeMaskLaunch& launch, cudaStream_t stream) {
  tube_mask_kernel<<<launch.samples, kThreads, launch.positions * sizeof(uint64_t), stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace mvd
