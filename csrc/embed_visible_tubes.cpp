// embed_visible_tubes on the CPU: the visible tubes are gathered into a matrix, one product projects them, and one pass
// adds bias and positions. Backward gathers again rather than keep the tubes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "gemm.h"
#include "token_rows.h"

#define MVD_KERNELS "embed_visible_tubes_kernels.h"
#include "for_each_isa.h"

namespace {

using mvd::bf16;
constexpr int64_t kTubesPerTask = 8;

// A clip cut into tubes: B clips, `grid` tubes along time, height and width.
struct Geometry {
  int64_t slices, side, values;  // of a tube: frames, pixels along height and width, numbers
  int64_t height, width, tokens;  // of the clip in tubes
  int64_t batch_stride, strides[4];

  // video [B, 3, T, H, W], any strides; weight [D, 3, t, p, p]
  Geometry(const at::Tensor& video, const at::Tensor& weight)
      : slices(weight.size(2)), side(weight.size(3)), values(3 * slices * side * side),
        height(video.size(3) / side), width(video.size(4) / side), tokens(video.size(2) / slices * height * width),
        batch_stride(video.stride(0)),
        strides{video.stride(1), video.stride(2), video.stride(3), video.stride(4)} {}

  // Offset of a token's first pixel.
  int64_t corner(int64_t clip, int64_t token) const {
    const int64_t t = token / (height * width), y = token / width % height, x = token % width;
    return clip * batch_stride + t * slices * strides[1] + (y * strides[2] + x * strides[3]) * side;
  }
};

template <class S, class O>
void gather(const at::Tensor& video, const Geometry& cut, const at::Tensor& index, const float* scale,
            const float* shift, O* out) {
  const S* first = static_cast<const S*>(video.const_data_ptr());
  const int64_t* token = index.const_data_ptr<int64_t>();
  const int64_t rows = index.size(1);
  const bool interleaved = cut.strides[0] == 1 && cut.strides[3] == 3;
  at::parallel_for(0, index.numel(), kTubesPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const S* corner = first + cut.corner(i / rows, token[i]);
      O* to = out + i * cut.values;
      if constexpr (sizeof(S) == 1) {
        if (interleaved) {
          MVD_DISPATCH(gather_interleaved<O>)(corner, cut.strides, cut.slices, cut.side, scale, shift, to);
          continue;
        }
      } else if (cut.strides[3] == 1) {
        MVD_DISPATCH(gather_rows<S, O>)(corner, cut.strides, cut.slices, cut.side, to);
        continue;
      }
      MVD_DISPATCH(gather_strided<S, O>)(corner, cut.strides, cut.slices, cut.side, scale, shift, to);
    }
  });
}

// The tubes at index [B, Nv] of video [B, 3, T, H, W] -> [B Nv, 3 t p p] in `type`; bytes as (x / 255 - mean) / std.
at::Tensor gather_tubes(const at::Tensor& video, const Geometry& cut, const at::Tensor& index,
                        at::ArrayRef<double> mean, at::ArrayRef<double> std, at::ScalarType type) {
  at::Tensor out = at::empty({index.numel(), cut.values}, video.options().dtype(type));
  float scale[3] = {}, shift[3] = {};
  for (size_t c = 0; c < mean.size(); ++c) {
    scale[c] = static_cast<float>(1 / (255 * std[c]));
    shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  const auto to = [&](auto* first) {
    if (video.scalar_type() == at::kByte)
      gather<uint8_t>(video, cut, index, scale, shift, first);
    else if (video.scalar_type() == at::kFloat)
      gather<float>(video, cut, index, scale, shift, first);
    else if (video.scalar_type() == at::kBFloat16)
      gather<bf16>(video, cut, index, scale, shift, first);
    else
      TORCH_CHECK(false, "video must be uint8, fp32 or bf16, not ", video.scalar_type());
  };
  if (type == at::kFloat)
    to(static_cast<float*>(out.data_ptr()));
  else
    to(static_cast<bf16*>(out.data_ptr()));
  return out;
}

// The clip as [B, 3, T, H, W]; uint8 clips are [B, T, H, W, 3].
at::Tensor channels_first(const at::Tensor& video) {
  return video.scalar_type() == at::kByte ? video.permute({0, 4, 1, 2, 3}) : video;
}

// -> [B, Nv, D]
at::Tensor embed_visible_tubes(const at::Tensor& video, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& pos, const at::Tensor& visible_index,
                               at::ArrayRef<double> mean, at::ArrayRef<double> std) {
  const at::Tensor clip = channels_first(video), index = visible_index.contiguous();
  const Geometry cut(clip, weight);
  mvd::check_index("visible_index", index, cut.tokens);
  const int64_t width = weight.size(0);
  const auto type = mvd::gemm_type(weight.scalar_type());
  const at::Tensor tubes = gather_tubes(clip, cut, index, mean, std, type);
  at::Tensor product = at::empty({index.size(0), index.size(1), width}, tubes.options());
  mvd::gemm(product.view({-1, width}), tubes, weight.flatten(1).to(type).t());
  const bool same = type == weight.scalar_type();
  if (same && !bias && !pos) return product;
  at::Tensor out = same ? product : at::empty(product.sizes(), weight.options());
  mvd::write_rows(out, product, bias, pos, index);
  return out;
}

template <class S, class O>
void add_tubes(const S* tubes, const Geometry& cut, const at::Tensor& index, O* video) {
  const int64_t* token = index.const_data_ptr<int64_t>();
  const int64_t rows = index.size(1), plane = cut.values / 3;
  // A thread owns channels of clips, so tubes that are there twice are added one after the other.
  at::parallel_for(0, 3 * index.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / 3, c = i % 3;
      for (int64_t r = b * rows; r < (b + 1) * rows; ++r)
        MVD_DISPATCH(add_tube_channel<S, O>)(tubes + r * cut.values + c * plane, cut.strides, cut.slices, cut.side,
                                             video + cut.corner(b, token[r]) + c * cut.strides[0]);
    }
  });
}

// grad [B Nv, D] -> gradient of the float clip, zero outside the visible tubes
at::Tensor video_gradient(const at::Tensor& grad, const at::Tensor& video, const at::Tensor& weight,
                          const at::Tensor& index) {
  at::Tensor out = at::zeros(video.sizes(), video.options());
  const Geometry cut(out, weight);
  at::Tensor tubes = at::empty({index.numel(), cut.values}, grad.options());
  mvd::gemm(tubes, grad, weight.flatten(1).to(grad.scalar_type()));
  const auto to = [&](auto* first) {
    if (tubes.scalar_type() == at::kFloat)
      add_tubes(static_cast<const float*>(tubes.const_data_ptr()), cut, index, first);
    else
      add_tubes(static_cast<const bf16*>(tubes.const_data_ptr()), cut, index, first);
  };
  if (video.scalar_type() == at::kFloat)
    to(static_cast<float*>(out.data_ptr()));
  else
    to(static_cast<bf16*>(out.data_ptr()));
  return out;
}

// Those of the gradients of (video, weight, bias, pos) that are needed; bias and pos fp32, pos [pos_clips, N, D].
std::vector<at::Tensor> embed_visible_tubes_backward(const at::Tensor& grad, const at::Tensor& video,
                                                     const at::Tensor& weight, const at::Tensor& visible_index,
                                                     at::ArrayRef<double> mean, at::ArrayRef<double> std,
                                                     const c10::List<bool>& needed, int64_t pos_clips) {
  const at::Tensor clip = channels_first(video), index = visible_index.contiguous(), rows = grad.contiguous();
  const Geometry cut(clip, weight);
  const auto type = mvd::gemm_type(weight.scalar_type());
  const int64_t width = weight.size(0);
  const at::Tensor matrix = needed.get(0) || needed.get(1) ? rows.view({-1, width}).to(type) : at::Tensor();
  std::vector<at::Tensor> result;
  if (needed.get(0)) result.push_back(video_gradient(matrix, video, weight, index));
  if (needed.get(1)) {
    result.push_back(at::empty(weight.sizes(), weight.options()));
    mvd::gemm(result.back().view({width, -1}), matrix.t(), gather_tubes(clip, cut, index, mean, std, type));
  }
  if (needed.get(2)) result.push_back(mvd::sum_rows(rows));
  if (needed.get(3)) {
    result.push_back(at::zeros({pos_clips, cut.tokens, width}, rows.options().dtype(at::kFloat)));
    mvd::sum_rows_by_token(result.back(), rows, index);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mvd_kernels, m) {
  m.def("embed_visible_tubes_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(embed_visible_tubes)));
  m.def("embed_visible_tubes_backward_cpp", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(embed_visible_tubes_backward)));
}
