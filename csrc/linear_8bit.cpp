// A linear layer in 8 bits on the CPU: all rows of x are brought to 8 bits first, then blocks of them are multiplied
// with one panel of weights at a time, both being what a core's own cache holds.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "simd_types.h"

namespace mvd {

constexpr int64_t kGroup = 4;        // entries along the depth whose products one instruction adds up
constexpr int64_t kPanel = 64;       // columns that are packed together
constexpr int64_t kRowStep = 12;     // rows of `values` are there up to a multiple of every instruction set's tile
constexpr int64_t kStrideStep = 16;  // and their entries up to one of every vector
constexpr float kSmallest = 1e-30f;  // a row's largest entry counts as this at least, so that 1 / it is finite

template <class T>
struct Linear8bit {
  const T* x;                 // [rows, depth]
  uint8_t* values;            // rows of x in 8 bits, `stride` apart
  float* scale;               // [rows]
  const int8_t* packed;       // see pack_panel
  const float* weight_scale;  // [width]
  const float* bias;          // [width] or null
  T* out;                     // [rows, width]
  int64_t rows, depth, width, stride;
  int64_t steps;  // groups of kGroup entries in the depth
  bool gelu;
};

}  // namespace mvd

#define MVD_KERNELS "linear_8bit_kernels.h"
#include "for_each_isa.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlockBytes = 160 << 10;  // of x in a block: with a panel, what a core's second cache holds
constexpr int64_t kLargestBlock = 192;      // rows

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// A panel holds 64 columns, each being a row of the weight: first, for each column, the int32 that takes away what 128
// added to every entry of x adds to its sum; then the columns' entries, four of each column at a time. What lies beyond
// the weight is zero.
void pack_panel(const int8_t* weight, int64_t columns, int64_t depth, int8_t* out) {
  std::memset(out, 0, (ceil_div(depth, mvd::kGroup) + 1) * mvd::kPanel * mvd::kGroup);
  for (int64_t j = 0; j < columns; ++j) {
    const int8_t* column = weight + j * depth;
    int8_t* to = out + j * mvd::kGroup;
    int32_t start = 0;
    for (int64_t k = 0; k < depth; ++k) start -= 128 * column[k];
    std::memcpy(to, &start, sizeof(start));
    for (int64_t k = 0; k < depth; k += mvd::kGroup) {
      to += mvd::kPanel * mvd::kGroup;
      std::memcpy(to, column + k, std::min(mvd::kGroup, depth - k));
    }
  }
}

// weight int8 [D, C] -> int8 [panels, bytes of a panel]; the same for all instruction sets.
Tensor pack(const Tensor& weight_any) {
  TORCH_CHECK(weight_any.dim() == 2 && weight_any.scalar_type() == at::kChar, "the weight is int8 [D, C]");
  const Tensor weight = weight_any.contiguous();
  const int64_t width = weight.size(0), depth = weight.size(1), panels = ceil_div(width, mvd::kPanel);
  const int64_t bytes = (ceil_div(depth, mvd::kGroup) + 1) * mvd::kPanel * mvd::kGroup;
  const Tensor packed = at::empty({panels, bytes}, weight.options());
  const int8_t* from = weight.const_data_ptr<int8_t>();
  int8_t* to = packed.mutable_data_ptr<int8_t>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * mvd::kPanel;
      pack_panel(from + first * depth, std::min(mvd::kPanel, width - first), depth, to + i * bytes);
    }
  });
  return packed;
}

template <class T>
void run(mvd::Linear8bit<T> op) {
  at::parallel_for(0, op.rows, 16, [&](int64_t begin, int64_t end) { MVD_DISPATCH(quantize_rows<T>)(op, begin, end); });
  const int64_t fitting = kBlockBytes / op.stride / mvd::kRowStep * mvd::kRowStep;
  const int64_t block = std::clamp(fitting, mvd::kRowStep, kLargestBlock);
  const int64_t panels = ceil_div(op.width, mvd::kPanel), blocks = ceil_div(op.rows, block);
  // Block by block, so that a thread keeps its block's rows while it goes through the panels.
  at::parallel_for(0, blocks * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / panels * block;
      MVD_DISPATCH(multiply_panel<T>)(op, first, std::min(first + block, op.rows), i % panels);
    }
  });
}

template <class T>
void run(const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& bias, bool gelu,
         const Tensor& out) {
  const int64_t depth = x.size(-1), rows = x.numel() / depth;
  const int64_t stride = round_up(depth, mvd::kStrideStep);
  const Tensor values = at::empty({round_up(rows, mvd::kRowStep), stride}, at::kByte);
  const Tensor scales = at::empty({rows}, at::kFloat);
  run<T>({static_cast<const T*>(x.const_data_ptr()), values.mutable_data_ptr<uint8_t>(),
          scales.mutable_data_ptr<float>(), packed.const_data_ptr<int8_t>(), scale.const_data_ptr<float>(),
          bias ? bias->const_data_ptr<float>() : nullptr, static_cast<T*>(out.mutable_data_ptr()), rows, depth,
          scale.numel(), stride, ceil_div(depth, mvd::kGroup), gelu});
}

// x [..., C], weight int8 [D, C], scale fp32 [D], the weight packed (or it is now), bias [D] -> [..., D] in x's dtype
Tensor linear_8bit(const Tensor& x_any, const Tensor& weight, const Tensor& scale_any,
                   const OptionalTensor& packed_weight, const OptionalTensor& bias_any, bool gelu) {
  const Tensor packed_any = packed_weight ? *packed_weight : pack(weight);
  TORCH_CHECK(x_any.dim() >= 1 && x_any.size(-1) > 0, "x is [..., C], C at least 1");
  const int64_t bytes = (ceil_div(x_any.size(-1), mvd::kGroup) + 1) * mvd::kPanel * mvd::kGroup;
  TORCH_CHECK(packed_any.dim() == 2 && packed_any.size(1) == bytes && packed_any.scalar_type() == at::kChar &&
                  packed_any.size(0) == ceil_div(scale_any.numel(), mvd::kPanel),
              "the packed weight must fit x and the scale");
  TORCH_CHECK(!bias_any || bias_any->numel() == scale_any.numel(), "bias and scale must have the same size");
  TORCH_CHECK(x_any.scalar_type() == at::kFloat || x_any.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  const Tensor x = x_any.contiguous(), packed = packed_any.contiguous(), scale = scale_any.to(at::kFloat).contiguous();
  const OptionalTensor bias = bias_any ? OptionalTensor(bias_any->to(at::kFloat).contiguous()) : std::nullopt;
  auto sizes = x.sizes().vec();
  sizes.back() = scale.numel();
  const Tensor out = at::empty(sizes, x.options());
  if (out.numel()) {
    if (x.scalar_type() == at::kFloat)
      run<float>(x, packed, scale, bias, gelu, out);
    else
      run<mvd::bf16>(x, packed, scale, bias, gelu, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("linear_8bit_pack_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(pack)));
  m.def("linear_8bit_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_8bit)));
}
