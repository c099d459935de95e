// Matrix products, left to torch's libraries (oneDNN, MKL), which are at the processor's peak - where it can do bf16.
#pragma once

#include <ATen/core/Tensor.h>

namespace mvd {

// What products of tensors of this type are computed in: float for bf16 where the processor does not multiply bf16.
at::ScalarType gemm_type(at::ScalarType type);

// out = a b, or out += a b: 2-D, any strides, a and b both fp32 or both bf16, out fp32 or bf16. Sums are fp32.
// bf16 on processors without bf16 arithmetic goes through fp32 copies, as torch's own loop is many times slower there.
void gemm(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate = false);

// out = a b + bias, bias of the columns.
void gemm_bias(at::Tensor out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias);

}  // namespace mvd
