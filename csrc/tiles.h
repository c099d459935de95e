// Products C = A B or C += A B with a small C, for operators that fuse what follows a product: for one instruction set, as
// simd.h. C is fp32. B lies packed, in panels of kVectors vectors of columns, step by step; a step is one row of B, or two
// where bf16 is multiplied in pairs (E = bf16: the entries of a step lie side by side). A is read one step of one row at a
// time and broadcast, so it may lie transposed.

constexpr int kTileRows = 6;
constexpr int kVectors = W == 8 ? 2 : 4;  // of a tile: with kTileRows, as many sums as the registers hold
constexpr int64_t kPanel = kVectors * W;

template <class T>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<bf16> {
  using type = std::conditional_t<kHasPairs, bf16, float>;
};
template <class E>
constexpr int64_t kStep = std::is_same_v<E, bf16> ? 2 : 1;  // rows of B, columns of A in a step

MVD_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
MVD_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }
MVD_INLINE void assign(float* p, float x) { *p = x; }
MVD_INLINE void assign(bf16* p, float x) { *p = to_bf16(x); }
MVD_INLINE void assign(bf16* p, bf16 x) { *p = x; }
MVD_INLINE void assign(float* p, bf16 x) { *p = to_float(x); }

// ---- products ----

MVD_INLINE Vec load_step(const float* b) { return load(b); }
MVD_INLINE Pairs load_step(const bf16* b) { return load_pairs(b); }
MVD_INLINE Vec splat_step(const float* a) { return splat(*a); }
MVD_INLINE Pairs splat_step(const bf16* a) { return splat_pair(a); }
MVD_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
MVD_INLINE Vec multiply_add(Pairs a, Pairs b, Vec sum) { return dot(sum, a, b); }

// A's step s of row r is at a + r * row + s * step (in entries).
template <class E>
struct Left {
  const E* a;
  int64_t row, step;
};

template <class E, int kColumns>
MVD_INLINE void tile(Left<E> left, const E* b, int64_t steps, float* c, int64_t c_row, bool add) {
  Vec sums[kTileRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) sums[r][j] = add ? load(c + r * c_row + j * W) : zero();
  for (int64_t s = 0; s < steps; ++s) {
    decltype(load_step(b)) columns[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) columns[j] = load_step(b + j * W * kStep<E>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto row = splat_step(left.a + r * left.row);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sums[r][j] = multiply_add(row, columns[j], sums[r][j]);
    }
    left.a += left.step;
    b += kColumns * W * kStep<E>;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) store(c + r * c_row + j * W, sums[r][j]);
}

// C [rows, columns] = A B, or += with `add`; rows of A and C are there up to the next multiple of kTileRows, columns a
// multiple of W (or of kPanel, where panels are whole).
template <class E>
void product(Left<E> left, const E* b, int64_t steps, float* c, int64_t rows, int64_t columns, int64_t c_row, bool add) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    const E* panel = b + j * steps * kStep<E>;
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Left<E> here = {left.a + r * left.row, left.row, left.step};
      float* out = c + r * c_row + j;
      const int64_t vectors = at_most(columns - j, kPanel) / W;
      if (vectors == kVectors)
        tile<E, kVectors>(here, panel, steps, out, c_row, add);
      else if (vectors == 3)
        tile<E, 3>(here, panel, steps, out, c_row, add);
      else if (vectors == 2)
        tile<E, 2>(here, panel, steps, out, c_row, add);
      else
        tile<E, 1>(here, panel, steps, out, c_row, add);
    }
  }
}

// ---- packing ----
// Of rows of a matrix from `first` on; rows past its last are zero, and so is what fills a last step.

template <class E>
MVD_INLINE int64_t whole_steps(int64_t entries) {
  return round_up(entries, kStep<E>);
}

// B = X^T: columns are rows of x, `rows` of them, a multiple of kPanel; steps go along its `width` columns.
template <class T, class E>
void pack_transposed(Rows<T> x, int64_t first, int64_t rows, int64_t width, E* out) {
  for (int64_t r = 0; r < rows; r += kPanel, first += kPanel, out += kPanel * whole_steps<E>(width)) {
    const int64_t there = at_most(x.n - first, kPanel);
    if (there < kPanel || width % kStep<E> != 0) std::fill_n(out, kPanel * whole_steps<E>(width), E{});
    const T* from = x.data + first * x.stride;
    for (int64_t d = 0; d < width; d += kStep<E>)
      for (int64_t column = 0; column < there; ++column)
        for (int64_t i = 0; i < at_most(width - d, kStep<E>); ++i)
          assign(out + d * kPanel + column * kStep<E> + i, from[column * x.stride + d + i]);
  }
}

// B = X: columns are those of x, steps go along its rows; `rows` a multiple of kStep.
template <class T, class E>
void pack(Rows<T> x, int64_t first, int64_t rows, int64_t width, E* out) {
  for (int64_t j = 0; j < width; j += kPanel) {
    const int64_t columns = at_most(width - j, kPanel);
    E* panel = out + j * rows;
    for (int64_t r = 0; r < rows; ++r) {
      E* row = panel + r / kStep<E> * columns * kStep<E> + r % kStep<E>;
      const T* from = x.data + (first + r) * x.stride + j;
      const bool there = first + r < x.n;
      for (int64_t d = 0; d < columns; ++d) assign(row + d * kStep<E>, there ? from[d] : T{});
    }
  }
}

// A = X: rows as they are.
template <class T, class E>
void copy_rows(Rows<T> x, int64_t first, int64_t rows, int64_t width, E* out) {
  for (int64_t r = 0; r < rows; ++r, out += whole_steps<E>(width)) {
    const int64_t there = first + r < x.n ? width : 0;
    const T* from = x.data + (first + r) * x.stride;
    for (int64_t d = 0; d < there; ++d) assign(out + d, from[d]);
    for (int64_t d = there; d < whole_steps<E>(width); ++d) out[d] = E{};
  }
}
