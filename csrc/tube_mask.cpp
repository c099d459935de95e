// Tube masks on the CPU: samples in parallel, each drawn by the definition in tube_mask.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "tube_mask.h"

namespace mvd {

struct TubeMaskCall {
  uint64_t seed;
  uint32_t epoch;
  int64_t slices, positions, masked;
  const int64_t* samples;  // [B]
  bool* mask;              // [B, slices, positions]
  int64_t* visible_indices;
  int64_t* masked_indices;
};

}  // namespace mvd

#define MVD_KERNELS "tube_mask_kernels.h"
#include "for_each_isa.h"

namespace {

constexpr int64_t kSamplesPerTask = 16;
constexpr int64_t kMostLanes = 8;

// -> mask bool [B, slices * positions], visible int64 [B, Nv], masked int64 [B, Nm]
std::tuple<at::Tensor, at::Tensor, at::Tensor> tube_mask(int64_t seed, int64_t epoch, const at::Tensor& samples,
                                                         int64_t slices, int64_t positions, int64_t masked) {
  TORCH_CHECK(samples.scalar_type() == at::kLong && samples.dim() == 1, "samples must be int64 [B]");
  TORCH_CHECK(0 <= masked && masked <= positions && slices >= 1, "0 <= masked <= positions, slices >= 1 must hold");
  const at::Tensor numbers = samples.contiguous();
  const int64_t batch = numbers.numel();
  const auto indices = numbers.options();
  at::Tensor mask_bn = at::empty({batch, slices * positions}, indices.dtype(at::kBool));
  at::Tensor visible_bn = at::empty({batch, slices * (positions - masked)}, indices);
  at::Tensor masked_bn = at::empty({batch, slices * masked}, indices);
  const mvd::TubeMaskCall call{static_cast<uint64_t>(seed),
                               static_cast<uint32_t>(epoch),
                               slices,
                               positions,
                               masked,
                               numbers.const_data_ptr<int64_t>(),
                               mask_bn.mutable_data_ptr<bool>(),
                               visible_bn.mutable_data_ptr<int64_t>(),
                               masked_bn.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, batch, kSamplesPerTask, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys(positions + kMostLanes);
    std::vector<int64_t> order(positions + 2);
    MVD_DISPATCH(draw)(call, begin, end, keys.data(), order.data());
  });
  return {mask_bn, visible_bn, masked_bn};
}

// The masks of given unsigned keys, int64 [B, P] -> bool [B, P]. For tests: Philox's keys are hardly ever equal.
at::Tensor tube_mask_of_keys(const at::Tensor& keys, int64_t masked) {
  TORCH_CHECK(keys.scalar_type() == at::kLong && keys.dim() == 2 && keys.is_contiguous(), "keys must be int64 [B, P]");
  TORCH_CHECK(0 <= masked && masked <= keys.size(1), "0 <= masked <= positions must hold");
  at::Tensor mask_bp = at::empty(keys.sizes(), keys.options().dtype(at::kBool));
  const auto* keys_in = reinterpret_cast<const uint64_t*>(keys.const_data_ptr<int64_t>());
  bool* mask_out = mask_bp.mutable_data_ptr<bool>();
  for (int64_t b = 0; b < keys.size(0); ++b)
    MVD_DISPATCH(mask_of_keys)(keys_in + b * keys.size(1), keys.size(1), masked, mask_out + b * keys.size(1));
  return mask_bp;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("tube_mask_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(tube_mask)));
  m.def("tube_mask_of_keys_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(tube_mask_of_keys)));
}
