// The GPU operator of fn.mvd_tube_mask; built where nvcc is found.
#include <algorithm>

#include "dali/core/cuda_error.h"
#include "mvd_tube_mask.h"
#include "mvd_tube_mask_gpu.h"

namespace mvd {

class DaliTubeMaskGPU : public DaliTubeMask<dali::GPUBackend> {
 public:
  using DaliTubeMask<dali::GPUBackend>::DaliTubeMask;

 protected:
  void RunImpl(dali::Workspace& ws) override {
    const auto& numbers = ws.Input<dali::GPUBackend>(0);
    auto& masks = ws.Output<dali::GPUBackend>(0);
    const int samples = numbers.num_samples();
    for (int first = 0; first < samples; first += TubeMaskLaunch::kMaxSamples) {
      TubeMaskLaunch launch;
      launch.samples = std::min(samples - first, TubeMaskLaunch::kMaxSamples);
      launch.slices = slices();
      launch.positions = positions();
      launch.masked = masked();
      for (int i = 0; i < launch.samples; ++i) {
        launch.numbers[i] = numbers.tensor<int64_t>(first + i);
        launch.masks[i] = masks.mutable_tensor<bool>(first + i);
      }
      CUDA_CALL(launch_tube_mask(launch, ws.stream()));
    }
  }
};

}  // namespace mvd

namespace dali {  // the macros name DALI's types without their namespace
DALI_REGISTER_OPERATOR(MvdTubeMask, ::mvd::DaliTubeMaskGPU, GPU);
}  // namespace dali
