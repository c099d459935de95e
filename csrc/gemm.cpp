#include "gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "cpu_features.h"

namespace mvd {
namespace {

// What the product is computed in: bf16 only where the processor multiplies it.
at::ScalarType compute_type(const at::Tensor& a) {
  return a.scalar_type() == at::kBFloat16 && isa() != Isa::avx512 ? at::kFloat : a.scalar_type();
}

}  // namespace

void gemm(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const auto type = compute_type(a);
  if (!accumulate && out.scalar_type() == type) {
    at::mm_out(out, a.to(type), b.to(type));
    return;
  }
  const at::Tensor product = at::mm(a.to(type), b.to(type));
  if (accumulate)
    out.add_(product);
  else
    out.copy_(product);
}

void gemm_bias(at::Tensor out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  const auto type = compute_type(a);
  if (out.scalar_type() == type)
    at::addmm_out(out, bias.to(type), a.to(type), b.to(type));
  else
    out.copy_(at::addmm(bias.to(type), a.to(type), b.to(type)));
}

}  // namespace mvd
