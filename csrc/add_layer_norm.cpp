// Residual addition and LayerNorm on the CPU: rows in parallel, each read from memory once.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "simd_types.h"

namespace mvd {

// Rows of `width` entries; pointers to what is not there are null. Row r belongs to sample r / rows_per_sample. Weight
// and bias are laid out for T.
template <class T>
struct AddLayerNorm {
  int64_t width, rows_per_sample;
  float eps;
  const T *x, *branch;
  const float *scale, *weight, *bias;
  T *sum, *normed;
  float *mean, *rstd;
};

template <class T>
struct AddLayerNormBackward {
  int64_t width, rows_per_sample;
  const T *grad_sum, *grad_normed, *sum;
  const float *scale, *weight, *mean, *rstd;
  T *grad_x, *grad_branch;
};

}  // namespace mvd

#define MVD_KERNELS "add_layer_norm_kernels.h"
#include "for_each_isa.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kEntriesPerTask = 16384;
constexpr int64_t kPadding = 32;  // a multiple of every instruction set's step
// The rows are cut into at most so many blocks, however many threads there are: each has its own sums for the
// gradients of weight and bias, which are added up in order.
constexpr int64_t kBlocks = 64, kRowsPerBlock = 16;

template <class T>
const T* input(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T>
T* output(const Tensor& t) {
  return t.defined() && t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

Tensor contiguous(const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); }
Tensor as_float(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
Tensor as_float(const OptionalTensor& t) { return t ? as_float(*t) : Tensor(); }

int64_t padded(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// [D] in fp32 or bf16 -> fp32 [padded D], in the order that rows of T are computed in.
template <class T>
Tensor laid_out(const Tensor& columns_any) {
  const Tensor columns = columns_any.contiguous();
  const int64_t width = columns.numel();
  Tensor out = at::empty({padded(width)}, at::kFloat);
  if (columns.scalar_type() == at::kFloat)
    MVD_DISPATCH(add_layer_norm_lay_out<T, float>)(input<float>(columns), width, output<float>(out));
  else
    MVD_DISPATCH(add_layer_norm_lay_out<T, mvd::bf16>)(input<mvd::bf16>(columns), width, output<float>(out));
  return out;
}

// The reverse: a new tensor like `columns`.
template <class T>
Tensor taken_out(const float* laid_out, const Tensor& columns) {
  Tensor out = at::empty({columns.numel()}, columns.options());
  if (columns.scalar_type() == at::kFloat)
    MVD_DISPATCH(add_layer_norm_take_out<T, float>)(laid_out, out.numel(), output<float>(out));
  else
    MVD_DISPATCH(add_layer_norm_take_out<T, mvd::bf16>)(laid_out, out.numel(), output<mvd::bf16>(out));
  return out;
}

int64_t rows_of(const Tensor& x) { return x.size(-1) ? x.numel() / x.size(-1) : 0; }
int64_t rows_per_sample(const Tensor& x, const OptionalTensor& scale) {
  return scale ? std::max<int64_t>(rows_of(x) / std::max<int64_t>(scale->numel(), 1), 1) : 1;
}

void check(const Tensor& x, std::initializer_list<const Tensor*> like, std::initializer_list<const Tensor*> columns) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x must be float32 or bfloat16");
  for (const Tensor* t : like)
    TORCH_CHECK(!t->defined() || (t->sizes() == x.sizes() && t->scalar_type() == x.scalar_type()),
                "all must have the shape and dtype of x");
  for (const Tensor* t : columns)
    TORCH_CHECK(x.dim() >= 1 && t->numel() == x.size(-1) &&
                    (t->scalar_type() == at::kFloat || t->scalar_type() == at::kBFloat16),
                "weight and bias must have a float32 or bfloat16 entry per column of x");
}

template <class T>
void run_forward(const mvd::AddLayerNorm<T>& op, int64_t rows) {
  const int64_t grain = std::max<int64_t>(1, kEntriesPerTask / std::max<int64_t>(1, op.width));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const Tensor row = at::empty({padded(op.width)}, at::kFloat);
    MVD_DISPATCH(add_layer_norm_rows<T>)(op, begin, end, row.mutable_data_ptr<float>());
  });
}

// -> sum (without entries where there is no branch), normed, mean [rows], rstd [rows]
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x_any, const OptionalTensor& branch_any,
                                                          const Tensor& weight, const Tensor& bias, double eps,
                                                          const OptionalTensor& scale_any) {
  const Tensor x = x_any.contiguous(), branch = contiguous(branch_any), scale = as_float(scale_any);
  check(x, {&branch}, {&weight, &bias});
  const int64_t rows = rows_of(x);
  Tensor sum = branch.defined() ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor normed = at::empty_like(x);
  Tensor mean = at::empty({rows}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);

  const auto run = [&]<class T>(T) {
    const Tensor factors = laid_out<T>(weight), terms = laid_out<T>(bias);
    run_forward<T>({x.size(-1), rows_per_sample(x, scale_any), static_cast<float>(eps), input<T>(x), input<T>(branch),
                    input<float>(scale), input<float>(factors), input<float>(terms), output<T>(sum), output<T>(normed),
                    output<float>(mean), output<float>(rstd)},
                   rows);
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(mvd::bf16{});
  return {sum, normed, mean, rstd};
}

// `partial` [blocks, 2, padded D], or undefined: sums for the gradients of weight and bias.
template <class T>
void run_backward(const mvd::AddLayerNormBackward<T>& op, int64_t rows, int64_t blocks, const Tensor& partial) {
  const int64_t rows_per_block = (rows + blocks - 1) / blocks, width = padded(op.width);
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float* grad_weight = output<float>(partial);
      if (grad_weight) std::fill_n(grad_weight += block * 2 * width, 2 * width, 0.0f);
      float* grad_bias = grad_weight ? grad_weight + width : nullptr;
      const int64_t begin = std::min(rows, block * rows_per_block), end = std::min(rows, begin + rows_per_block);
      MVD_DISPATCH(add_layer_norm_backward_rows<T>)(op, begin, end, grad_weight, grad_bias);
    }
  });
}

// -> gradients of x, branch, weight and bias, each without entries where it is not needed
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const OptionalTensor& grad_sum_any, const Tensor& grad_normed_any, const Tensor& sum_any, const Tensor& weight,
    const Tensor& bias, const Tensor& mean, const Tensor& rstd, const OptionalTensor& scale_any, bool need_x,
    bool need_branch, bool need_affine) {
  const Tensor grad_sum = contiguous(grad_sum_any), grad_normed = grad_normed_any.contiguous();
  const Tensor sum = sum_any.contiguous(), scale = as_float(scale_any);
  check(sum, {&grad_sum, &grad_normed}, {&weight, &bias});
  const int64_t rows = rows_of(sum), width = sum.size(-1);
  TORCH_CHECK(mean.numel() == rows && rstd.numel() == rows, "mean and rstd must have an entry per row");
  Tensor grad_x = need_x ? at::empty_like(sum) : at::empty({0}, sum.options());
  Tensor grad_branch = need_branch ? at::empty_like(sum) : at::empty({0}, sum.options());
  Tensor grad_weight = at::empty({0}, weight.options()), grad_bias = at::empty({0}, bias.options());
  const int64_t blocks = std::clamp<int64_t>(rows / kRowsPerBlock, 1, kBlocks);
  const Tensor partial = need_affine ? at::empty({blocks, 2, padded(width)}, mean.options()) : Tensor();

  const auto run = [&]<class T>(T) {
    const Tensor factors = laid_out<T>(weight);
    run_backward<T>({width, rows_per_sample(sum, scale_any), input<T>(grad_sum), input<T>(grad_normed), input<T>(sum),
                     input<float>(scale), input<float>(factors), input<float>(mean), input<float>(rstd),
                     output<T>(grad_x), output<T>(grad_branch)},
                    rows, blocks, partial);
    if (!need_affine) return;
    const Tensor sums = blocks == 1 ? partial : partial.sum(0);
    grad_weight = taken_out<T>(input<float>(sums), weight);
    grad_bias = taken_out<T>(input<float>(sums) + padded(width), bias);
  };
  sum.scalar_type() == at::kFloat ? run(float{}) : run(mvd::bf16{});
  return {grad_x, grad_branch, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("add_layer_norm_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(add_layer_norm)));
  m.def("add_layer_norm_backward_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(add_layer_norm_backward)));
}
