// A linear layer in 8 bits: rows of x are brought to 8 bits, each with a scale of its own, multiplied with packed
// weights in whole numbers, and scaled, biased and activated before they leave the registers.

constexpr int kTileRows = W == 8 ? 4 : 6;
constexpr int kVectors = W == 8 ? 2 : 4;  // of a tile: with kTileRows, as many sums as the registers hold
constexpr int64_t kTileColumns = kVectors * W;
static_assert(kPanel % kTileColumns == 0 && kRowStep % kTileRows == 0 && kStrideStep % W == 0);

// ---- rows of x ----

// -> largest magnitude; NaN where the row holds a NaN or an infinity.
template <class T>
MVD_INLINE float largest_of(const T* row, int64_t depth) {
  Vec largest = zero(), poison = zero();
  const auto see = [&](Vec x) {
    largest = max(largest, abs(x));
    poison = fma(x, zero(), poison);  // NaN for NaN and for infinity, which max may lose
  };
  int64_t k = 0;
  for (; k + W <= depth; k += W) see(load(row + k));
  if (k < depth) see(load(row + k, static_cast<int>(depth - k)));
  return max_of(largest) + sum(poison);
}

// Operation by operation as `_quantize` in linear_8bit.py does it, so that the whole numbers are the same.
template <class T>
void quantize_row(const Linear8bit<T>& op, int64_t row) {
  const T* x = op.x + row * op.depth;
  uint8_t* values = op.values + row * op.stride;
  float largest = largest_of(x, op.depth);
  op.scale[row] = largest;
  if (largest != largest) {  // the scale makes the whole row NaN
    std::memset(values, kByteOffset, op.stride);
    return;
  }
  largest = largest < kSmallest ? kSmallest : largest;
  op.scale[row] = largest * static_cast<float>(1.0 / 127.0);
  const Vec factor = splat(1.0f / largest * 127.0f);
  int64_t k = 0;
  for (; k + W <= op.depth; k += W) store_rounded(values + k, load(x + k) * factor);
  if (k < op.depth) store_rounded(values + k, load(x + k, static_cast<int>(op.depth - k)) * factor);
}

template <class T>
void quantize_rows(const Linear8bit<T>& op, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) quantize_row(op, row);
}

// ---- products ----

// x Phi(x), Phi being the normal distribution: 1/2 + x S(x^2) with S a polynomial fitted up to |x| = 5.5, beyond which
// Phi is 0 or 1. Off by at most 5e-7, or 4e-7 of the result, whichever is more.
MVD_INLINE Vec gelu(Vec x) {
  constexpr float kEdge = 5.5f;
  const Vec edge = splat(kEdge), inside = max(splat(-kEdge), min(edge, x));  // the second operand passes NaN on
  const Vec t = fma(inside * inside, splat(2.0f / (kEdge * kEdge)), splat(-1.0f));
  constexpr float kCoefficients[] = {-0.00134761552f, 0.00108934406f,  -0.00128815446f, 0.0041652359f,  -0.00761280855f,
                                     0.0105058132f,   -0.0147022096f,  0.0202783906f,   -0.0261051121f, 0.0320828541f,
                                     -0.0387880044f,  0.0477369454f,   -0.0641724544f,  0.128551937f};
  Vec s = splat(0.000514932718f);
#pragma GCC unroll 16
  for (const float coefficient : kCoefficients) s = fma(s, t, splat(coefficient));
  const Vec distribution = fma(inside, s, splat(0.5f));
  return select_less(x, splat(-kEdge), zero(), x * distribution);
}

template <class T>
MVD_INLINE void store_first(T* p, Vec a, int64_t n) {
  n >= W ? store(p, a) : store(p, a, static_cast<int>(n));
}
MVD_INLINE Vec load_first(const float* p, int64_t n) { return n >= W ? load(p) : load(p, static_cast<int>(n)); }

// Sums of a tile whose first row and column these are -> output.
template <bool kGelu, class T>
MVD_INLINE void finish_tile(const Linear8bit<T>& op, int64_t row, int64_t column, Ints (&sums)[kTileRows][kVectors]) {
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    const int64_t n = op.width - column - j * W;
    if (n <= 0) break;
    const Vec scale = load_first(op.weight_scale + column + j * W, n);
    const Vec bias = op.bias ? load_first(op.bias + column + j * W, n) : zero();
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      if (row + r >= op.rows) break;
      const Vec y = fma(to_floats(sums[r][j]) * splat(op.scale[row + r]), scale, bias);
      store_first(op.out + (row + r) * op.width + column + j * W, kGelu ? gelu(y) : y, n);
    }
  }
}

// `start`: what kByteOffset adds to the sums, subtracted; `b`: weights of the tile's columns, kPanel to a step.
template <bool kGelu, class T>
MVD_INLINE void multiply_tile(const Linear8bit<T>& op, int64_t row, int64_t column, const int8_t* start,
                              const int8_t* b) {
  Ints sums[kTileRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[r][j] = kByteOffset ? load_ints(start + j * W * kGroup) : zero_ints();
  const uint8_t* a = op.values + row * op.stride;
  for (int64_t step = 0; step < op.steps; ++step) {
    Bytes columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) columns[j] = load_bytes(b + j * W * kGroup);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Bytes four = splat_bytes(a + r * op.stride);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sums[r][j] = dot(sums[r][j], four, columns[j]);
    }
    a += kGroup;
    b += kPanel * kGroup;
  }
  finish_tile<kGelu>(op, row, column, sums);
}

// Rows first to last, columns of one panel.
template <class T>
void multiply_panel(const Linear8bit<T>& op, int64_t first, int64_t last, int64_t panel) {
  const int8_t* start = op.packed + panel * kPanel * kGroup * (op.steps + 1);
  for (int64_t j = 0; j < kPanel && panel * kPanel + j < op.width; j += kTileColumns) {
    const int8_t *here = start + j * kGroup, *b = here + kPanel * kGroup;
    for (int64_t row = first; row < last; row += kTileRows)
      op.gelu ? multiply_tile<true>(op, row, panel * kPanel + j, here, b)
              : multiply_tile<false>(op, row, panel * kPanel + j, here, b);
  }
}
