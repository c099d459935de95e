// Tube masks on the CPU: samples in parallel, each drawn by the definition in tube_mask.h.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "tube_mask.h"

namespace {

constexpr int64_t kSamplesPerTask = 16;

// Ascending token indices of one sample: the positions of a slice, shifted by whole slices.
void write_indices(const int64_t* positions, int64_t count, int64_t slices, int64_t stride, int64_t* out) {
  for (int64_t t = 0; t < slices; ++t)
    for (int64_t i = 0; i < count; ++i) *out++ = t * stride + positions[i];
}

// -> mask bool [B, slices * positions], visible int64 [B, Nv], masked int64 [B, Nm]
std::tuple<at::Tensor, at::Tensor, at::Tensor> tube_mask(int64_t seed, int64_t epoch, const at::Tensor& samples,
                                                         int64_t slices, int64_t positions, int64_t masked) {
  TORCH_CHECK(samples.scalar_type() == at::kLong && samples.dim() == 1, "samples must be int64 [B]");
  TORCH_CHECK(0 <= masked && masked <= positions && slices >= 0, "0 <= masked <= positions must hold");
  const at::Tensor numbers = samples.contiguous();
  const int64_t batch = numbers.numel(), visible = positions - masked;
  const auto indices = numbers.options();
  at::Tensor mask_bn = at::empty({batch, slices * positions}, indices.dtype(at::kBool));
  at::Tensor visible_bn = at::empty({batch, slices * visible}, indices);
  at::Tensor masked_bn = at::empty({batch, slices * masked}, indices);

  const int64_t* sample = numbers.const_data_ptr<int64_t>();
  bool* mask_out = mask_bn.mutable_data_ptr<bool>();
  int64_t* visible_out = visible_bn.mutable_data_ptr<int64_t>();
  int64_t* masked_out = masked_bn.mutable_data_ptr<int64_t>();

  at::parallel_for(0, batch, kSamplesPerTask, [&](int64_t begin, int64_t end) {
    mvd::TubeMaskSampler sampler(seed, static_cast<uint32_t>(epoch), positions, masked);
    const auto slice = std::make_unique<bool[]>(positions);
    std::vector<int64_t> order(positions);  // visible positions from the front, masked ones behind them
    for (int64_t b = begin; b < end; ++b) {
      sampler.draw(static_cast<uint64_t>(sample[b]), slice.get());
      int64_t* next_visible = order.data();
      int64_t* next_masked = order.data() + visible;
      for (int64_t p = 0; p < positions; ++p) {
        int64_t*& next = slice[p] ? next_masked : next_visible;
        *next++ = p;
      }
      for (int64_t t = 0; t < slices; ++t)
        std::memcpy(mask_out + (b * slices + t) * positions, slice.get(), positions * sizeof(bool));
      write_indices(order.data(), visible, slices, positions, visible_out + b * slices * visible);
      write_indices(order.data() + visible, masked, slices, positions, masked_out + b * slices * masked);
    }
  });
  return {mask_bn, visible_bn, masked_bn};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("tube_mask_cpp(int seed, int epoch, Tensor samples, int slices, int positions, int masked) "
        "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(mvd_kernels, CPU, m) { m.impl("tube_mask_cpp", &tube_mask); }
