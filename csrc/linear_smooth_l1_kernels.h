// A linear head's predictions, a block of rows at a time, to their smooth-L1 loss and its gradient while they are in a
// cache. Predictions, differences and losses are fp32; only the gradient is rounded to T.

#include "tiles.h"

constexpr int64_t kLossRows = 96;  // of a block: whole tiles

// ---- the weight, packed once for all blocks ----

template <class T>
int64_t smooth_l1_packed_bytes(int64_t depth, int64_t width) {
  using E = typename ElementOf<T>::type;
  return round_up(width, kPanel) * whole_steps<E>(depth) * static_cast<int64_t>(sizeof(E));
}

inline int64_t smooth_l1_panels(int64_t width) { return round_up(width, kPanel) / kPanel; }

template <class T>
void smooth_l1_pack(const SmoothL1Head<T>& head, int64_t first_panel, int64_t last_panel) {
  using E = typename ElementOf<T>::type;
  E* out = static_cast<E*>(head.packed) + first_panel * kPanel * whole_steps<E>(head.depth);
  pack_transposed(head.weight, first_panel * kPanel, (last_panel - first_panel) * kPanel, head.depth, out);
}

// ---- the loss ----

template <class Y>
MVD_INLINE void row_statistics(const Y* row, int64_t width, float eps, float& mean, float& rstd) {
  float total = 0;
  for (int64_t j = 0; j < width; j += W) total += sum(j + W <= width ? load(row + j) : load(row + j, int(width - j)));
  mean = total / width;
  const Vec centre = splat(mean);
  float spread = 0;
  for (int64_t j = 0; j < width; j += W) {
    const int n = static_cast<int>(width - j);
    const Vec d = n >= W ? load(row + j) - centre : load(row + j, n) - centre;
    float lanes[W];
    store(lanes, d * d);
    for (int i = n; i < W; ++i) lanes[i] = 0;
    spread += sum(load(lanes));
  }
  rstd = 1.0f / __builtin_sqrtf(spread / width + eps);
}

// W lanes of the difference d -> loss; d becomes the gradient.
MVD_INLINE Vec smooth_l1(Vec& d, Vec beta, Vec inverse_beta, Vec half_beta) {
  const Vec size = abs(d), scaled = d * inverse_beta;
  // Written so that NaN is in neither branch's way: it stays NaN in both. Beyond beta, d / |d| is the sign.
  const Vec zero_sized = zero();
  const Vec sign = select_less(d, zero_sized, splat(-1.0f), select_less(zero_sized, d, splat(1.0f), d));
  const Vec loss = select_less(size, beta, splat(0.5f) * d * scaled, size - half_beta);
  d = select_less(size, beta, scaled, sign);
  return loss;
}

// The row's predictions, without bias -> sum of its losses. gradient, bias and column_sums may be null.
template <class T, class Y>
float loss_row(const SmoothL1<T, Y>& op, const float* prediction, int64_t row, float* column_sums) {
  const int64_t width = op.head.width;
  T* gradient = op.gradient ? op.gradient + row * width : nullptr;
  const Y* target = op.target + op.target_rows[row] * width;
  float mean = 0, rstd = 1;
  if (op.normalize) row_statistics(target, width, op.eps, mean, rstd);
  const Vec centre = splat(mean), factor = splat(rstd), beta = splat(op.beta), half_beta = splat(0.5f * op.beta);
  const Vec inverse_beta = splat(op.beta > 0 ? 1.0f / op.beta : 0.0f);
  Vec total = zero();
  int64_t j = 0;
  for (; j + W <= width; j += W) {
    Vec d = load(prediction + j) - (load(target + j) - centre) * factor;
    if (op.bias) d = d + load(op.bias + j);
    total = total + smooth_l1(d, beta, inverse_beta, half_beta);
    if (gradient) store(gradient + j, d);
    if (column_sums) store(column_sums + j, load(column_sums + j) + d);
  }
  float rest = 0;
  if (const int n = static_cast<int>(width - j); n > 0) {
    Vec d = load(prediction + j, n) - (load(target + j, n) - centre) * factor;
    if (op.bias) d = d + load(op.bias + j, n);
    float lanes[W];
    store(lanes, smooth_l1(d, beta, inverse_beta, half_beta));
    for (int i = 0; i < n; ++i) rest += lanes[i];
    if (gradient) store(gradient + j, d, n);
    if (column_sums) store(column_sums + j, load(column_sums + j, n) + d, n);
  }
  return sum(total) + rest;
}

// ---- blocks of rows ----

template <class T>
int64_t smooth_l1_scratch_bytes(int64_t depth, int64_t width) {
  using E = typename ElementOf<T>::type;
  return kLossRows * (round_up(width, kPanel) * static_cast<int64_t>(sizeof(float)) +
                      whole_steps<E>(depth) * static_cast<int64_t>(sizeof(E)));
}

inline int64_t smooth_l1_blocks(int64_t rows) { return round_up(rows, kLossRows) / kLossRows; }

// The losses of a block's rows, and the sums of their gradients over rows.
template <class T, class Y>
void smooth_l1_block(const SmoothL1<T, Y>& op, int64_t block, void* scratch, float* losses, float* column_sums) {
  using E = typename ElementOf<T>::type;
  const int64_t first = block * kLossRows, rows = at_most(op.x.n - first, kLossRows), depth = op.head.depth;
  const int64_t padded = round_up(op.head.width, kPanel), row = whole_steps<E>(depth);
  float* predictions = static_cast<float*>(scratch);  // [kLossRows, padded]
  E* inputs = reinterpret_cast<E*>(predictions + kLossRows * padded);
  copy_rows(op.x, first, round_up(rows, kTileRows), depth, inputs);
  product<E>({inputs, row, kStep<E>}, static_cast<const E*>(op.head.packed), row / kStep<E>, predictions, rows, padded,
             padded, false);
  for (int64_t r = 0; r < rows; ++r)
    losses[first + r] = loss_row(op, predictions + r * padded, first + r, column_sums);
}
