#include "gemm.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cpu_features.h"

namespace mvd {
namespace {

// Where autocast is on, it would take the fp32 products below for ones to be done in bf16.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

}  // namespace

at::ScalarType gemm_type(at::ScalarType type) {
  return type == at::kBFloat16 && isa() != Isa::avx512 ? at::kFloat : type;
}

void gemm(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto type = gemm_type(a.scalar_type());
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
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto type = gemm_type(a.scalar_type());
  if (out.scalar_type() == type)
    at::addmm_out(out, bias.to(type), a.to(type), b.to(type));
  else
    out.copy_(at::addmm(bias.to(type), a.to(type), b.to(type)));
}

}  // namespace mvd
