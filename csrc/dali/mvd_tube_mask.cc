// The schema of fn.mvd_tube_mask and its CPU operator.
#include "mvd_tube_mask.h"

#include <cstring>
#include <vector>

#include "tube_mask.h"

namespace mvd {

class DaliTubeMaskCPU : public DaliTubeMask<dali::CPUBackend> {
 public:
  using DaliTubeMask<dali::CPUBackend>::DaliTubeMask;

 protected:
  void RunImpl(dali::Workspace& ws) override {
    const auto& numbers = ws.Input<dali::CPUBackend>(0);
    auto& masks = ws.Output<dali::CPUBackend>(0);
    auto& pool = ws.GetThreadPool();
    for (int i = 0; i < numbers.num_samples(); ++i)
      pool.AddWork([&, i](int) { draw(numbers.tensor<int64_t>(i), masks.mutable_tensor<bool>(i)); });
    pool.RunAll();
  }

 private:
  void draw(const int64_t* numbers, bool* mask) const {
    std::vector<uint64_t> keys(positions());
    for (int64_t p = 0; p < positions(); ++p)
      keys[p] = philox_key(numbers[0], static_cast<uint32_t>(numbers[1]), numbers[2], static_cast<uint32_t>(p));
    mask_smallest(keys.data(), positions(), masked(), mask);
    for (int64_t t = 1; t < slices(); ++t) std::memcpy(mask + t * positions(), mask, positions() * sizeof(bool));
  }
};

}  // namespace mvd

namespace dali {  // the macros name DALI's types without their namespace
DALI_REGISTER_OPERATOR(MvdTubeMask, ::mvd::DaliTubeMaskCPU, CPU);

DALI_SCHEMA(MvdTubeMask)
    .DocStr(R"(Tube masks of masked video models.

Input: per sample three int64 numbers (seed, epoch, sample). Output: bool [time * height * width], True = masked, equal
to ``mvd_kernels.tube_mask`` for the same numbers.)")
    .NumInput(1)
    .NumOutput(1)
    .AddArg("grid", "Tokens along time, height and width.", DALI_INT_VEC)
    .AddArg("masked", "Positions masked in every time slice.", DALI_INT32);

}  // namespace dali
