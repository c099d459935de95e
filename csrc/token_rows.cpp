#include "token_rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#define MVD_KERNELS "token_rows_kernels.h"
#include "for_each_isa.h"

namespace mvd {
namespace {

constexpr int64_t kElementsPerTask = 1 << 15;
constexpr int64_t kRowsPerSum = 64;      // rows of one partial sum
constexpr int64_t kColumnsPerTask = 64;  // of sums by token

template <class T>
T* pointer(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// f(zero of the tensor's element type)
template <class F>
void with_type(const at::Tensor& x, F f) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "fp32 or bf16, not ", x.scalar_type());
  if (x.scalar_type() == at::kFloat)
    f(float{});
  else
    f(bf16{});
}

int64_t rows_per_task(int64_t width) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, width)); }

template <class S, class P, class O>
void write_typed_rows(const at::Tensor& out, const at::Tensor& base, const float* bias, const P* pos,
                      int64_t pos_clip, const at::Tensor& index) {
  const int64_t rows = out.size(1), width = out.size(2);
  const int64_t *token = index.const_data_ptr<int64_t>();
  const S* base_first = pointer<const S>(base);
  O* out_first = pointer<O>(out);
  const int64_t base_clip = base.stride(0), base_row = base.stride(1), out_clip = out.stride(0), out_row = out.stride(1);
  at::parallel_for(0, out.size(0) * rows, rows_per_task(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / rows, r = i % rows;
      const P* pos_row = pos ? pos + b * pos_clip + token[i] * width : nullptr;
      MVD_DISPATCH(write_row<S, P, O>)(base_first + b * base_clip + r * base_row, bias, pos_row, width,
                              out_first + b * out_clip + r * out_row);
    }
  });
}

}  // namespace

void check_index(const char* name, const at::Tensor& index, int64_t tokens) {
  const int64_t* first = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i)
    TORCH_CHECK_VALUE(0 <= first[i] && first[i] < tokens, name, " holds ", first[i], "; token indices must be at least 0 ",
                      "and below ", tokens, ", the number of tokens");
}

void write_rows(const at::Tensor& out, const at::Tensor& base, const std::optional<at::Tensor>& bias,
                const std::optional<at::Tensor>& pos, const at::Tensor& index) {
  const at::Tensor bias_c = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const at::Tensor pos_bnc = pos ? pos->contiguous() : at::Tensor();
  const float* bias_first = bias ? pointer<const float>(bias_c) : nullptr;
  const int64_t pos_clip = pos && pos->size(0) > 1 ? pos_bnc.size(1) * pos_bnc.size(2) : 0;
  with_type(out, [&](auto o) {
    with_type(base, [&](auto s) {
      with_type(pos ? pos_bnc : base, [&](auto p) {
        using P = decltype(p);
        const P* pos_first = pos ? pointer<const P>(pos_bnc) : nullptr;
        write_typed_rows<decltype(s), P, decltype(o)>(out, base, bias_first, pos_first, pos_clip, index);
      });
    });
  });
}

at::Tensor sum_rows(const at::Tensor& rows_brc) {
  const int64_t batch = rows_brc.size(0), rows = rows_brc.size(1), width = rows_brc.size(2);
  const int64_t parts = (rows + kRowsPerSum - 1) / kRowsPerSum;  // of a clip
  const at::Tensor partial = at::zeros({batch * parts, width}, rows_brc.options().dtype(at::kFloat));
  at::Tensor total = at::zeros({width}, partial.options());
  float* partial_first = partial.mutable_data_ptr<float>();
  with_type(rows_brc, [&](auto t) {
    using T = decltype(t);
    const T* first = pointer<const T>(rows_brc);
    const int64_t clip_stride = rows_brc.stride(0), stride = rows_brc.stride(1);
    at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / parts, r = i % parts * kRowsPerSum;
        MVD_DISPATCH(add_rows<T>)(first + b * clip_stride + r * stride, stride, std::min(kRowsPerSum, rows - r), width,
                               partial_first + i * width);
      }
    });
  });
  MVD_DISPATCH(add_rows<float>)(partial_first, width, batch * parts, width, total.mutable_data_ptr<float>());
  return total;
}

void sum_rows_by_token(const at::Tensor& sums, const at::Tensor& rows_brc, const at::Tensor& index) {
  const int64_t batch = rows_brc.size(0), rows = rows_brc.size(1), width = rows_brc.size(2);
  const int64_t sums_clip = sums.size(0) > 1 ? sums.stride(0) : 0;
  const int64_t* token = index.const_data_ptr<int64_t>();
  float* sums_first = sums.mutable_data_ptr<float>();
  with_type(rows_brc, [&](auto t) {
    using T = decltype(t);
    const T* first = pointer<const T>(rows_brc);
    const int64_t clip_stride = rows_brc.stride(0), stride = rows_brc.stride(1);
    // A thread owns columns, so rows of the same token are added one after the other.
    const int64_t tasks = (width + kColumnsPerTask - 1) / kColumnsPerTask;
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t column = begin * kColumnsPerTask, count = std::min(width, end * kColumnsPerTask) - column;
      for (int64_t i = 0; i < batch * rows; ++i) {
        const int64_t b = i / rows, r = i % rows;
        MVD_DISPATCH(add_row<T>)(first + b * clip_stride + r * stride + column, count,
                              sums_first + b * sums_clip + token[i] * width + column);
      }
    });
  });
}

}  // namespace mvd
