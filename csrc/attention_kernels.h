// Softmax attention of one head without its matrix of scores in memory (FlashAttention, arXiv 2205.14135), forward and
// backward: blocks of queries against blocks of keys, sums in fp32. All seven products are those of tiles.h.

#include "tiles.h"

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kKeys = 192;  // a block of keys: whole panels, and whole tiles where keys are rows
constexpr int64_t kQueries = 48, kBackwardQueries = 96;  // a block of queries: whole tiles

// 2^x to 2 ulp; 0 below -150, NaN for NaN.
MVD_INLINE Vec power_of_2(Vec x) {
  x = max(splat(-160.0f), x);  // the second operand passes NaN on
  const Vec n = round(x), r = x - n;
  Vec p = splat(1.535336188319500e-4f);
  p = fma(p, r, splat(1.339887440266574e-3f));
  p = fma(p, r, splat(9.618437357674640e-3f));
  p = fma(p, r, splat(5.550332471162809e-2f));
  p = fma(p, r, splat(2.402264791363012e-1f));
  p = fma(p, r, splat(6.931472028550421e-1f));
  return scale_by_power(fma(p, r, splat(1.0f)), n);
}

// Keys past the last one get no weight.
MVD_INLINE void mask_keys(float* scores, int64_t rows, int64_t keys, int64_t padded) {
  if (keys == padded) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = keys; j < padded; ++j) scores[r * kKeys + j] = -kInfinity;
}

// Keys past the last are masked, and the largest score is found, before scores are scaled: what scales them must be
// positive, and its sign goes to the queries.
MVD_INLINE float positive(float scale) {
  constexpr float kSmallest = std::numeric_limits<float>::min();
  const float size = scale < 0 ? -scale : scale;
  return size < kSmallest ? kSmallest : size;
}
template <class E>
void negate(E* entries, int64_t count) {
  for (int64_t i = 0; i < count; ++i) assign(entries + i, -to_float(entries[i]));
}

// ---- forward ----

template <class T>
int64_t attention_scratch_bytes(int64_t keys, int64_t width) {
  using E = typename ElementOf<T>::type;
  const int64_t packed = 2 * round_up(keys, kKeys) * width + kQueries * width + kQueries * kKeys;
  return packed * static_cast<int64_t>(sizeof(E)) + (kQueries * (kKeys + width + 2)) * static_cast<int64_t>(sizeof(float));
}

// One row of scores to weights: maximum and sum go on from the blocks of keys before; `output` are the row's sums so far.
template <class E>
MVD_INLINE void weigh_row(const float* scores, int64_t padded, float scale, float& maximum, float& total, E* weights,
                          float* output, int64_t width) {
  Vec largest = load(scores);
  for (int64_t j = W; j < padded; j += W) largest = max(largest, load(scores + j));
  const float before = maximum, here = max_of(largest) * scale;
  if (here > maximum) maximum = here;
  if (maximum > before && before > -kInfinity) {
    const Vec shrink = power_of_2(splat(before - maximum));
    float lanes[W];
    store(lanes, shrink);
    total *= lanes[0];
    for (int64_t d = 0; d < width; d += W) store(output + d, load(output + d) * shrink);
  }
  const Vec factor = splat(scale), shift = splat(-maximum);
  Vec sums = zero();
  for (int64_t j = 0; j < padded; j += W) {
    const Vec weight = power_of_2(fma(load(scores + j), factor, shift));
    sums = sums + weight;
    store(weights + j, weight);
  }
  total += sum(sums);
}

// Queries first to last of a head.
template <class T>
void attention_forward(const AttentionForward<T>& op, int64_t first, int64_t last, void* scratch) {
  using E = typename ElementOf<T>::type;
  const int64_t width = op.width, blocks = round_up(op.k.n, kKeys) / kKeys;
  float* scores = static_cast<float*>(scratch);  // [kQueries, kKeys]
  float* output = scores + kQueries * kKeys;     // [kQueries, D]
  float* maximum = output + kQueries * width;
  float* total = maximum + kQueries;
  E* weights = reinterpret_cast<E*>(total + kQueries);  // [kQueries, kKeys]
  E* queries = weights + kQueries * kKeys;
  E* keys = queries + kQueries * width;
  E* values = keys + blocks * kKeys * width;

  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t padded = round_up(at_most(op.k.n - b * kKeys, kKeys), kPanel);
    pack_transposed(op.k, b * kKeys, padded, width, keys + b * kKeys * width);
    pack(op.v, b * kKeys, padded, width, values + b * kKeys * width);
  }
  const float scale = positive(op.scale);
  for (int64_t i = first; i < last; i += kQueries) {
    const int64_t count = at_most(last - i, kQueries), rows = round_up(count, kTileRows);
    copy_rows(op.q, i, rows, width, queries);
    if (op.scale < 0) negate(queries, rows * width);
    for (int64_t r = 0; r < rows; ++r) maximum[r] = -kInfinity, total[r] = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = at_most(op.k.n - b * kKeys, kKeys), padded = round_up(n, kPanel);
      product<E>({queries, width, kStep<E>}, keys + b * kKeys * width, width / kStep<E>, scores, rows, padded, kKeys, false);
      mask_keys(scores, rows, n, padded);
      for (int64_t r = 0; r < rows; ++r)
        weigh_row(scores + r * kKeys, padded, scale, maximum[r], total[r], weights + r * kKeys, output + r * width, width);
      product<E>({weights, kKeys, kStep<E>}, values + b * kKeys * width, padded / kStep<E>, output, rows, width, width, b > 0);
    }
    for (int64_t r = 0; r < count; ++r) {
      const Vec factor = splat(1.0f / total[r]);
      for (int64_t d = 0; d < width; d += W)
        store(op.out + (i + r) * op.out_stride + d, load(output + r * width + d) * factor);
      op.lse[i + r] = maximum[r] + __builtin_log2f(total[r]);
    }
  }
}

// ---- backward ----

template <class T>
int64_t attention_backward_scratch_bytes(int64_t queries, int64_t width) {
  using E = typename ElementOf<T>::type;
  const int64_t n = round_up(queries, kBackwardQueries), tile_entries = kBackwardQueries * kKeys;
  const int64_t packed = 4 * n * width + 3 * kKeys * width + 3 * tile_entries;
  const int64_t sums = n * width + 2 * kKeys * width + 2 * tile_entries + 2 * n;
  return packed * static_cast<int64_t>(sizeof(E)) + sums * static_cast<int64_t>(sizeof(float));
}

// Two rows of W weights side by side, as steps of a product along the rows; floats lie as they are.
MVD_INLINE void store_step(float* p, Vec a, Vec b, int64_t row) {
  store(p, a);
  store(p + row, b);
}
MVD_INLINE void store_step(bf16* p, Vec a, Vec b, int64_t) { store_interleaved(p, a, b); }

// Rows of scores and of the weights' gradients -> weights (for the products along queries) and gradients of the scaled
// scores, along keys (`by_key`) and along queries. Floats need no second layout.
template <class E>
void differentiate_rows(const float* scores, const float* grads, int64_t rows, int64_t padded, float scale_2, float scale,
                        const float* lse, const float* delta, E* weights, E* by_query, E* by_key) {
  for (int64_t r = 0; r < rows; r += 2) {
    for (int64_t j = 0; j < padded; j += W) {
      Vec weight[2], grad[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (r + i) * kKeys + j;
        weight[i] = power_of_2(fma(load(scores + at), splat(scale_2), splat(-lse[r + i])));
        grad[i] = weight[i] * (load(grads + at) - splat(delta[r + i])) * splat(scale);
        if (kStep<E> == 2) store(by_key + at, grad[i]);
      }
      store_step(weights + r * kKeys + j * kStep<E>, weight[0], weight[1], kKeys);
      store_step(by_query + r * kKeys + j * kStep<E>, grad[0], grad[1], kKeys);
    }
  }
}

template <class T>
MVD_INLINE void write_rows(const float* from, int64_t rows, int64_t width, T* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; d += W) store(to + r * stride + d, load(from + r * width + d));
}

template <class T>
MVD_INLINE float dot_rows(const T* a, const T* b, int64_t width) {
  Vec sums = zero();
  for (int64_t d = 0; d < width; d += W) sums = fma(load(a + d), load(b + d), sums);
  return sum(sums);
}

// A whole head.
template <class T>
void attention_backward(const AttentionBackward<T>& op, void* scratch) {
  using E = typename ElementOf<T>::type;
  constexpr int64_t M = kBackwardQueries, kTile = M * kKeys;
  const int64_t width = op.width, n = round_up(op.q.n, M), blocks = n / M, steps = width / kStep<E>;
  float* grad_q = static_cast<float*>(scratch);  // [n, D]
  float* grad_k = grad_q + n * width;            // [kKeys, D]
  float* grad_v = grad_k + kKeys * width;
  float* scores = grad_v + kKeys * width;
  float* grads = scores + kTile;
  float* lse = grads + kTile;  // [n]
  float* delta = lse + n;
  E* queries = reinterpret_cast<E*>(delta + n);
  E* queries_packed = queries + n * width;
  E* outer = queries_packed + n * width;  // gradients of the output
  E* outer_packed = outer + n * width;
  E* keys_transposed = outer_packed + n * width;
  E* keys_packed = keys_transposed + kKeys * width;
  E* values_transposed = keys_packed + kKeys * width;
  E* weights = values_transposed + kKeys * width;
  E* by_query = weights + kTile;
  E* by_key = kStep<E> == 2 ? by_query + kTile : by_query;

  copy_rows(op.q, 0, n, width, queries);
  if (op.scale < 0) negate(queries, n * width);
  copy_rows(op.grad, 0, n, width, outer);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t rows = round_up(at_most(op.q.n - i * M, M), kTileRows);
    pack(op.q, i * M, rows, width, queries_packed + i * M * width);
    pack(op.grad, i * M, rows, width, outer_packed + i * M * width);
  }
  for (int64_t r = 0; r < n; ++r) {
    const bool there = r < op.q.n;
    lse[r] = there ? op.lse[r] : 0.0f;
    delta[r] = there ? dot_rows(op.out.data + r * op.out.stride, op.grad.data + r * op.grad.stride, width) : 0.0f;
  }

  for (int64_t j = 0; j < op.k.n; j += kKeys) {
    const int64_t count = at_most(op.k.n - j, kKeys), padded = round_up(count, kPanel);
    pack_transposed(op.k, j, padded, width, keys_transposed);
    pack_transposed(op.v, j, padded, width, values_transposed);
    pack(op.k, j, padded, width, keys_packed);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t at = i * M * width, rows = round_up(at_most(op.q.n - i * M, M), kTileRows);
      product<E>({queries + at, width, kStep<E>}, keys_transposed, steps, scores, rows, padded, kKeys, false);
      product<E>({outer + at, width, kStep<E>}, values_transposed, steps, grads, rows, padded, kKeys, false);
      mask_keys(scores, rows, count, padded);
      differentiate_rows(scores, grads, rows, padded, positive(op.scale * 1.44269504f), op.scale, lse + i * M, delta + i * M, weights,
                         by_query, by_key);
      const Left<E> of_keys = {by_key, kKeys, kStep<E>};
      product<E>(of_keys, keys_packed, padded / kStep<E>, grad_q + at, rows, width, width, j > 0);
      // Tiles of keys: A lies transposed, a step further being kStep rows of queries.
      const int64_t step = kStep<E> * kKeys;
      product<E>({weights, kStep<E>, step}, outer_packed + at, rows / kStep<E>, grad_v, count, width, width, i > 0);
      product<E>({by_query, kStep<E>, step}, queries_packed + at, rows / kStep<E>, grad_k, count, width, width, i > 0);
    }
    write_rows(grad_k, count, width, op.grad_k + j * op.stride, op.stride);
    write_rows(grad_v, count, width, op.grad_v + j * op.stride, op.stride);
  }
  write_rows(grad_q, op.q.n, width, op.grad_q, op.stride);
}
