// A linear head and its smooth-L1 loss on the CPU. Predictions exist a block of rows at a time in each thread; the
// targets' rows are read where they lie. The gradients' products go through ATen to oneDNN.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "gemm.h"
#include "simd_types.h"

namespace mvd {

template <class T>
struct SmoothL1Head {
  Rows<T> weight;  // [width, depth]
  int64_t depth, width;
  void* packed;
};

template <class T, class Y>
struct SmoothL1 {
  SmoothL1Head<T> head;
  Rows<T> x;    // [rows, depth]
  T* gradient;  // by the predictions [rows, width], or null
  const Y* target;
  const int64_t* target_rows;  // the target's row of each row
  const float* bias;           // [width] or null
  float beta, eps;
  bool normalize;
};

}  // namespace mvd

#define MVD_KERNELS "linear_smooth_l1_kernels.h"
#include "for_each_isa.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr float kTargetEps = 1e-6f;

// Row of target [B * N, D] for every row of x [B * M, C].
Tensor target_rows(const OptionalTensor& index, int64_t batch, int64_t rows_per_clip, int64_t tokens) {
  Tensor rows = at::empty({batch * rows_per_clip}, at::kLong);
  const Tensor chosen = index ? index->contiguous() : Tensor();
  const int64_t* from = index ? chosen.const_data_ptr<int64_t>() : nullptr;
  int64_t* to = rows.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    const int64_t token = from ? from[i] : i % rows_per_clip;
    TORCH_CHECK_VALUE(0 <= token && token < tokens, "index holds ", token, "; target has the tokens 0 to ", tokens - 1);
    to[i] = i / rows_per_clip * tokens + token;
  }
  return rows;
}

template <class T>
mvd::Rows<T> rows_of(const Tensor& matrix) {
  return {static_cast<const T*>(matrix.const_data_ptr()), matrix.stride(0), matrix.size(0)};
}

// The weight [D, C] as the blocks' products read it.
template <class T>
mvd::SmoothL1Head<T> pack(const Tensor& weight, Tensor& memory) {
  const int64_t width = weight.size(0), depth = weight.size(1);
  memory = at::empty({MVD_DISPATCH(smooth_l1_packed_bytes<T>)(depth, width)}, at::kByte);
  const mvd::SmoothL1Head<T> head = {rows_of<T>(weight), depth, width, memory.mutable_data_ptr()};
  at::parallel_for(0, MVD_DISPATCH(smooth_l1_panels)(width), 1,
                   [&](int64_t begin, int64_t end) { MVD_DISPATCH(smooth_l1_pack<T>)(head, begin, end); });
  return head;
}

// What all blocks of rows read and write. Each sums its own bias gradients; blocks are added up in order, whatever the
// threads.
struct Work {
  Tensor x, weight, bias, target, target_rows, gradient, losses, column_sums;
  float beta;
  bool normalize;
};

template <class T, class Y>
void run(const Work& work) {
  Tensor packed;
  const mvd::SmoothL1<T, Y> op = {pack<T>(work.weight, packed),
                                  rows_of<T>(work.x),
                                  work.gradient.defined() ? static_cast<T*>(work.gradient.mutable_data_ptr()) : nullptr,
                                  static_cast<const Y*>(work.target.const_data_ptr()),
                                  work.target_rows.const_data_ptr<int64_t>(),
                                  work.bias.defined() ? work.bias.const_data_ptr<float>() : nullptr,
                                  work.beta,
                                  kTargetEps,
                                  work.normalize};
  float* losses = work.losses.mutable_data_ptr<float>();
  float* sums = work.column_sums.defined() ? work.column_sums.mutable_data_ptr<float>() : nullptr;
  const int64_t bytes = MVD_DISPATCH(smooth_l1_scratch_bytes<T>)(op.head.depth, op.head.width);
  at::parallel_for(0, MVD_DISPATCH(smooth_l1_blocks)(op.x.n), 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({bytes}, at::kByte);
    for (int64_t block = begin; block < end; ++block) {
      float* columns = sums ? sums + block * op.head.width : nullptr;
      MVD_DISPATCH(smooth_l1_block<T, Y>)(op, block, scratch.mutable_data_ptr(), losses, columns);
    }
  });
}

template <class T>
void run(const Work& work) {
  work.target.scalar_type() == at::kFloat ? run<T, float>(work) : run<T, mvd::bf16>(work);
}

// x [B, M, C], weight [D, C], target [B, N, D], index [B, M] -> sum of the losses, and its gradients by x, weight and
// bias (fp32) where they are needed.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_smooth_l1(const Tensor& x, const Tensor& weight,
                                                            const OptionalTensor& bias, const Tensor& target_any,
                                                            const OptionalTensor& index, double beta, bool normalize,
                                                            bool need_x, bool need_weight, bool need_bias) {
  TORCH_CHECK(x.dim() == 3 && target_any.dim() == 3 && weight.dim() == 2, "x and target are 3-D, weight is 2-D");
  TORCH_CHECK(x.size(2) == weight.size(1) && target_any.size(2) == weight.size(0), "widths of x, weight, target");
  const int64_t rows = x.size(0) * x.size(1), width = weight.size(0);
  const auto type = mvd::gemm_type(x.scalar_type());
  const bool known = target_any.scalar_type() == at::kFloat || target_any.scalar_type() == at::kBFloat16;

  Work work;
  work.x = x.reshape({rows, x.size(2)}).to(type).contiguous();
  work.weight = weight.to(type).contiguous();
  work.bias = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  work.target = (known ? target_any : target_any.to(at::kFloat)).contiguous();
  work.target_rows = target_rows(index, x.size(0), x.size(1), target_any.size(1));
  work.losses = at::empty({rows}, at::kFloat);
  if (need_x || need_weight) work.gradient = at::empty({rows, width}, work.x.options());
  if (need_bias) work.column_sums = at::zeros({MVD_DISPATCH(smooth_l1_blocks)(rows), width}, at::kFloat);
  work.beta = static_cast<float>(beta);
  work.normalize = normalize;
  type == at::kFloat ? run<float>(work) : run<mvd::bf16>(work);

  const auto none = x.options();
  Tensor grad_x = need_x ? at::empty(x.sizes(), none) : at::empty({0}, none);
  Tensor grad_weight = need_weight ? at::empty(weight.sizes(), weight.options()) : at::empty({0}, weight.options());
  if (need_x) mvd::gemm(grad_x.view({rows, x.size(2)}), work.gradient, work.weight);
  if (need_weight) mvd::gemm(grad_weight, work.gradient.t(), work.x);
  const Tensor grad_bias = need_bias ? work.column_sums.sum(0) : at::empty({0}, at::kFloat);
  return {work.losses.sum(at::kDouble).to(at::kFloat), grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("linear_smooth_l1_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(linear_smooth_l1)));
}
