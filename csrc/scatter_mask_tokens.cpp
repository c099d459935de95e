// scatter_mask_tokens on the CPU: one product per decoder, then one pass that writes all rows with their positions.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "gemm.h"
#include "token_rows.h"

namespace {

// -> [B, Nv + Nm, C] of one decoder; matrix [B Nv, E] holds x in the type of the product
at::Tensor scatter(const at::Tensor& matrix, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   const at::Tensor& mask_token, const at::Tensor& pos, const at::Tensor& visible,
                   const at::Tensor& masked) {
  const int64_t batch = visible.size(0), seen = visible.size(1), unseen = masked.size(1), width = weight.size(0);
  at::Tensor out = at::empty({batch, seen + unseen, width}, weight.options());
  at::Tensor product = at::empty({batch, seen, width}, matrix.options());
  mvd::gemm(product.view({-1, width}), matrix, weight.to(matrix.scalar_type()).t());
  mvd::write_rows(out.narrow(1, 0, seen), product, bias, pos, visible);
  const at::Tensor token = mask_token.to(at::kFloat).contiguous().view({1, 1, width});
  mvd::write_rows(out.narrow(1, seen, unseen), token.expand({batch, unseen, width}), std::nullopt, pos, masked);
  return out;
}

// x [B, Nv, E]; of each decoder weight [C, E], bias [C] (or an empty list), mask token [C], pos [1, N, C]
std::vector<at::Tensor> scatter_mask_tokens(const at::Tensor& x, at::TensorList weights, at::TensorList biases,
                                            at::TensorList mask_tokens, at::TensorList pos,
                                            const at::Tensor& visible_index, const at::Tensor& masked_index) {
  const at::Tensor visible = visible_index.contiguous(), masked = masked_index.contiguous();
  const at::Tensor matrix = x.reshape({-1, x.size(2)}).to(mvd::gemm_type(x.scalar_type()));
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    mvd::check_index("visible_index", visible, pos[i].size(1));
    mvd::check_index("masked_index", masked, pos[i].size(1));
    const auto bias = biases.empty() ? std::nullopt : std::optional(biases[i]);
    outputs.push_back(scatter(matrix, weights[i], bias, mask_tokens[i], pos[i], visible, masked));
  }
  return outputs;
}

// The visible rows of all gradients side by side: [B, Nv, sum C] in the type of the product.
at::Tensor visible_rows(at::TensorList grads, int64_t seen, at::ScalarType type) {
  int64_t width = 0;
  for (const at::Tensor& grad : grads) width += grad.size(2);
  at::Tensor out = at::empty({grads[0].size(0), seen, width}, grads[0].options().dtype(type));
  int64_t column = 0;
  for (const at::Tensor& grad : grads) {
    out.narrow(2, column, grad.size(2)).copy_(grad.narrow(1, 0, seen));
    column += grad.size(2);
  }
  return out;
}

// Gradients of x, then of each decoder's weight, bias, mask token and pos, those of them that are `needed`, in the order
// x, weights, biases, mask tokens, positions. All but those of x and the weights are fp32; tokens: N.
std::vector<at::Tensor> scatter_mask_tokens_backward(at::TensorList gradients, const at::Tensor& x,
                                                     at::TensorList weights, const at::Tensor& visible_index,
                                                     const at::Tensor& masked_index, const c10::List<bool>& needed,
                                                     int64_t tokens) {
  const at::Tensor visible = visible_index.contiguous(), masked = masked_index.contiguous();
  const int64_t seen = visible.size(1), unseen = masked.size(1);
  const size_t decoders = weights.size();
  const auto type = mvd::gemm_type(x.scalar_type());
  std::vector<at::Tensor> grads, result;
  for (const at::Tensor& grad : gradients) grads.push_back(grad.contiguous());
  const auto is_needed = [&](size_t what, size_t decoder) { return needed.get(1 + what * decoders + decoder); };

  bool has_products = needed.get(0);
  for (size_t i = 0; i < decoders; ++i) has_products |= is_needed(0, i);
  at::Tensor matrix;
  if (has_products) {
    const at::Tensor rows = visible_rows(grads, seen, type);
    matrix = rows.view({-1, rows.size(2)});
  }
  if (needed.get(0)) {
    // One product over the columns of all decoders sums their shares in fp32.
    std::vector<at::Tensor> stacked(weights.begin(), weights.end());
    const at::Tensor weight = decoders == 1 ? weights[0] : at::cat(stacked);
    result.push_back(at::empty(x.sizes(), x.options()));
    mvd::gemm(result.back().view({-1, x.size(2)}), matrix, weight.to(type));
  }
  const at::Tensor input = x.reshape({-1, x.size(2)}).to(type);
  for (size_t i = 0, column = 0; i < decoders; column += weights[i++].size(0)) {
    if (!is_needed(0, i)) continue;
    result.push_back(at::empty(weights[i].sizes(), weights[i].options()));
    mvd::gemm(result.back(), matrix.narrow(1, column, weights[i].size(0)).t(), input);
  }
  for (size_t i = 0; i < decoders; ++i)
    if (is_needed(1, i)) result.push_back(mvd::sum_rows(grads[i].narrow(1, 0, seen)));
  for (size_t i = 0; i < decoders; ++i)
    if (is_needed(2, i)) result.push_back(mvd::sum_rows(grads[i].narrow(1, seen, unseen)));
  for (size_t i = 0; i < decoders; ++i)
    if (is_needed(3, i)) {
      result.push_back(at::zeros({1, tokens, weights[i].size(0)}, grads[i].options().dtype(at::kFloat)));
      mvd::sum_rows_by_token(result.back(), grads[i].narrow(1, 0, seen), visible);
      mvd::sum_rows_by_token(result.back(), grads[i].narrow(1, seen, unseen), masked);
    }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("scatter_mask_tokens_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(scatter_mask_tokens)));
  m.def("scatter_mask_tokens_backward_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(scatter_mask_tokens_backward)));
}
