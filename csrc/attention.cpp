// Attention on the CPU: heads in parallel, and blocks of a head's queries where there are more threads than heads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "simd_types.h"

namespace mvd {

template <class T>
struct AttentionForward {
  Rows<T> q, k, v;
  T* out;  // [n, D], rows out_stride apart
  int64_t out_stride, width;
  float* lse;   // [n]: base-2 logarithm of the sum of 2^(scaled score * log2 e)
  float scale;  // times log2 e
};

template <class T>
struct AttentionBackward {
  Rows<T> q, k, v, out, grad;   // grad: of the output
  T *grad_q, *grad_k, *grad_v;  // rows `stride` apart
  int64_t stride, width;
  const float* lse;
  float scale;  // plain
};

}  // namespace mvd

#define MVD_KERNELS "attention_kernels.h"
#include "for_each_isa.h"

namespace {

using at::Tensor;

constexpr int64_t kLanes = 16;  // head widths are multiples of every instruction set's vector
constexpr float kLog2E = 1.44269504f;

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes(), "q, k, v must be [B, N, H, D], k and v alike");
  TORCH_CHECK(q.size(0) == k.size(0) && q.size(2) == k.size(2) && q.size(3) == k.size(3), "q must fit k");
  TORCH_CHECK(q.size(3) % kLanes == 0, "D must be a multiple of ", kLanes);
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16, "q must be float32 or bfloat16");
  TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v must have one dtype");
}

// The last dimension contiguous; nothing else need be.
Tensor with_rows(const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// A head's [N, D] inside [B, N, H, D].
int64_t offset(const Tensor& t, int64_t head) {
  const int64_t heads = t.size(2);
  return head / heads * t.stride(0) + head % heads * t.stride(2);
}
template <class T>
mvd::Rows<T> input(const Tensor& t, int64_t head) {
  return {static_cast<const T*>(t.const_data_ptr()) + offset(t, head), t.stride(1), t.size(1)};
}
template <class T>
T* output(const Tensor& t, int64_t head) {
  return static_cast<T*>(t.mutable_data_ptr()) + offset(t, head);
}

// run(task, scratch) for all tasks, each thread with scratch memory of its own.
template <class F>
void in_parallel(int64_t tasks, int64_t bytes, F run) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({bytes}, at::kByte);
    for (int64_t task = begin; task < end; ++task) run(task, scratch.mutable_data_ptr());
  });
}

template <class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, float scale, const Tensor& out, const Tensor& lse) {
  const int64_t heads = q.size(0) * q.size(2), queries = q.size(1), width = q.size(3);
  // Every task packs its head's keys and values, so a head is cut only where threads would have nothing to do.
  const int64_t parts = std::min(queries, std::max<int64_t>(1, at::get_num_threads() / heads));
  const int64_t per_part = (queries + parts - 1) / parts;
  const int64_t bytes = MVD_DISPATCH(attention_scratch_bytes<T>)(k.size(1), width);
  in_parallel(heads * parts, bytes, [&](int64_t task, void* scratch) {
    const int64_t head = task / parts, first = task % parts * per_part;
    const mvd::AttentionForward<T> op = {input<T>(q, head), input<T>(k, head), input<T>(v, head), output<T>(out, head),
                                         out.stride(1), width, lse.mutable_data_ptr<float>() + head * queries,
                                         scale * kLog2E};
    MVD_DISPATCH(attention_forward<T>)(op, first, std::min(first + per_part, queries), scratch);
  });
}

template <class T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const Tensor& lse, float scale, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  const int64_t heads = q.size(0) * q.size(2), queries = q.size(1), width = q.size(3);
  const int64_t bytes = MVD_DISPATCH(attention_backward_scratch_bytes<T>)(queries, width);
  in_parallel(heads, bytes, [&](int64_t head, void* scratch) {
    const mvd::AttentionBackward<T> op = {
        input<T>(q, head), input<T>(k, head), input<T>(v, head), input<T>(out, head), input<T>(grad, head),
        output<T>(grad_q, head), output<T>(grad_k, head), output<T>(grad_v, head), grad_q.stride(1), width,
        lse.const_data_ptr<float>() + head * queries, scale};
    MVD_DISPATCH(attention_backward<T>)(op, scratch);
  });
}

// -> softmax(scale q k^T) v [B, Nq, H, D] and base-2 log-sum-exp fp32 [B, H, Nq]
std::tuple<Tensor, Tensor> attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, double scale) {
  check(q_any, k_any, v_any);
  const Tensor q = with_rows(q_any), k = with_rows(k_any), v = with_rows(v_any);
  const Tensor out = at::empty(q.sizes(), q.options());
  const Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  if (out.numel()) {
    if (q.scalar_type() == at::kFloat)
      forward<float>(q, k, v, scale, out, lse);
    else
      forward<mvd::bf16>(q, k, v, scale, out, lse);
  }
  return {out, lse};
}

// -> gradients of q, k, v, contiguous
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_any, const Tensor& q_any, const Tensor& k_any,
                                                      const Tensor& v_any, const Tensor& out, const Tensor& lse,
                                                      double scale) {
  check(q_any, k_any, v_any);
  TORCH_CHECK(grad_any.sizes() == q_any.sizes() && out.sizes() == q_any.sizes(), "gradient and output must be like q");
  const Tensor q = with_rows(q_any), k = with_rows(k_any), v = with_rows(v_any), grad = with_rows(grad_any);
  const Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), q.options()),
               grad_v = at::empty(k.sizes(), q.options());
  if (!q.numel()) {
    grad_k.zero_();
    grad_v.zero_();
  } else {
    if (q.scalar_type() == at::kFloat)
      backward<float>(grad, q, k, v, out, lse, scale, grad_q, grad_k, grad_v);
    else
      backward<mvd::bf16>(grad, q, k, v, out, lse, scale, grad_q, grad_k, grad_v);
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("attention_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attention)));
  m.def("attention_backward_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attention_backward)));
}
