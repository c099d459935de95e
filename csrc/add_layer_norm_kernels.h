// add_layer_norm on whole rows, which stay in the first-level cache: the passes over a row after the first are cheap, so
// the variance is taken around the mean that is already known. Arithmetic and sums are fp32; T is what memory holds.

// 2 W entries of a row. AVX2 takes the even and the odd entries of bf16 apart, as that is one instruction each, while
// neighbours would have to be shuffled. So float arrays that meet rows of T are laid out in the same order: those of
// weight and bias, and the sums for their gradients. They are padded to whole steps.
constexpr int kStep = 2 * W;
struct Two {
  Vec a, b;
};

MVD_INLINE Two both(float x) { return {splat(x), splat(x)}; }
MVD_INLINE Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
MVD_INLINE Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
MVD_INLINE Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
MVD_INLINE Two fma(Two x, Two y, Two z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }
MVD_INLINE float total(Two x) { return sum(x.a + x.b); }

template <class T>
MVD_INLINE Two load_two(const T* p) {
  return {load(p), load(p + W)};
}
template <class T>
MVD_INLINE void store_two(T* p, Two x) {
  store(p, x.a);
  store(p + W, x.b);
}

#if defined(MVD_ISA_AVX2)
constexpr bool kEvenOdd = true;
MVD_INLINE Two load_two(const bf16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i odd = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))}, {_mm256_castsi256_ps(odd)}};
}
// Rounded to bf16 in the upper half of each lane, which is right for NaN only where its lower half is zero: so are those
// of bf16 numbers and of arithmetic, and clean() makes all others.
MVD_INLINE __m256i rounded(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
}
MVD_INLINE void store_two(bf16* p, Two x) {
  const __m256i even = _mm256_srli_epi32(rounded(x.a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded(x.b), 0xAA));
}
#else
constexpr bool kEvenOdd = false;
#endif

// x, rounded to T and back.
template <class T>
MVD_INLINE Two as_stored(Two x) {
  T entries[kStep];
  store_two(entries, x);
  return load_two(entries);
}
#if defined(MVD_ISA_AVX512)
template <>
MVD_INLINE Two as_stored<bf16>(Two x) {
  return {widen(narrow(x.a)), widen(narrow(x.b))};
}
#endif

MVD_INLINE float clean(float x) { return x == x ? x : std::numeric_limits<float>::quiet_NaN(); }

// Where column j is in a float array that is laid out for T.
template <class T>
MVD_INLINE int64_t place(int64_t j) {
  return kEvenOdd && sizeof(T) == 2 ? j / kStep * kStep + j % 2 * W + j % kStep / 2 : j;
}

template <class T, class S>
void add_layer_norm_lay_out(const S* columns, int64_t width, float* out) {
  std::fill_n(out, (width + kStep - 1) / kStep * kStep, 0.0f);
  for (int64_t j = 0; j < width; ++j) out[place<T>(j)] = clean(to_float(columns[j]));
}
MVD_INLINE void round_to(float x, float* out) { *out = x; }
MVD_INLINE void round_to(float x, bf16* out) { *out = to_bf16(x); }
template <class T, class S>
void add_layer_norm_take_out(const float* laid_out, int64_t width, S* columns) {
  for (int64_t j = 0; j < width; ++j) round_to(laid_out[place<T>(j)], columns + j);
}

// The entries at `row + j`, `columns` of them or, in a row's last step, fewer: then zeros follow.
struct Whole {};
template <class T>
MVD_INLINE Two load_two(const T* p, Whole) {
  return load_two(p);
}
template <class T>
MVD_INLINE Two load_two(const T* p, int n) {
  T entries[kStep] = {};
  std::memcpy(entries, p, n * sizeof(T));
  return load_two(entries);
}
template <class T>
MVD_INLINE void store_two(T* p, Two x, Whole) {
  store_two(p, x);
}
template <class T>
MVD_INLINE void store_two(T* p, Two x, int n) {
  T entries[kStep];
  store_two(entries, x);
  std::memcpy(p, entries, n * sizeof(T));
}
// x, and zero past the first n columns.
template <class T>
MVD_INLINE Two keep(Two x, Whole) {
  return x;
}
template <class T>
MVD_INLINE Two keep(Two x, int n) {
  float ones[kStep] = {};
  for (int j = 0; j < n; ++j) ones[place<T>(j)] = 1;
  return x * load_two(ones);
}

#define MVD_COLUMNS(j, n, way) [&](int64_t j, auto n, [[maybe_unused]] int way) __attribute__((always_inline))

// f(j, n, way) for the steps of a row from column j on; n is Whole or the number of columns that the last one has. `way`
// tells which of two sums it belongs to: a single one would wait for its own last addition.
template <class F>
MVD_INLINE void for_columns(int64_t width, F f) {
  int64_t j = 0;
  for (; j + 2 * kStep <= width; j += 2 * kStep) {
    f(j, Whole{}, 0);
    f(j + kStep, Whole{}, 1);
  }
  if (j + kStep <= width) {
    f(j, Whole{}, 0);
    j += kStep;
  }
  if (j < width) f(j, static_cast<int>(width - j), 1);
}

// row = x + scale * branch, rounded, also to `out`; or x, where there is no branch. -> the sum of its entries.
template <class T>
MVD_INLINE float add_row(const T* x, const T* branch, float scale, int64_t width, T* out, float* row) {
  Two sums[2] = {both(0), both(0)};
  const Two factor = both(scale);
  for_columns(width, MVD_COLUMNS(j, n, way) {
    Two entries = load_two(x + j, n);
    if (branch) {
      entries = as_stored<T>(fma(factor, load_two(branch + j, n), entries));
      store_two(out + j, entries, n);
    }
    store_two(row + j, entries);
    sums[way] = sums[way] + entries;
  });
  return total(sums[0] + sums[1]);
}

// Sum of squared distances from the mean.
template <class T>
MVD_INLINE float spread_of_row(const float* row, float mean, int64_t width) {
  Two sums[2] = {both(0), both(0)};
  const Two centre = both(mean);
  for_columns(width, MVD_COLUMNS(j, n, way) {
    const Two distance = keep<T>(load_two(row + j) - centre, n);
    sums[way] = fma(distance, distance, sums[way]);
  });
  return total(sums[0] + sums[1]);
}

// `row`: memory for the entries of a row, in whole steps, as laid out for T.
template <class T>
void add_layer_norm_rows(const AddLayerNorm<T>& op, int64_t begin, int64_t end, float* row) {
  const int64_t width = op.width;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t start = r * width;
    const float scale = op.scale ? clean(op.scale[r / op.rows_per_sample]) : 1.0f;
    const T* branch = op.branch ? op.branch + start : nullptr;
    const float mean = add_row(op.x + start, branch, scale, width, op.sum + start, row) / width;
    const float rstd = 1.0f / std::sqrt(spread_of_row<T>(row, mean, width) / width + op.eps);
    op.mean[r] = mean;
    op.rstd[r] = rstd;

    const Two centre = both(mean), factor = both(rstd);
    for_columns(width, MVD_COLUMNS(j, n, way) {
      const Two h = (load_two(row + j) - centre) * factor;
      store_two(op.normed + start + j, fma(h, load_two(op.weight + j), load_two(op.bias + j)), n);
    });
  }
}

// With y = weight * h + bias, h = (sum - mean) * rstd and g = grad_y * weight:
// grad_sum += rstd * (g - average(g) - h * average(g * h)); grad_weight += grad_y * h; grad_bias += grad_y.

// The sums over a row's g and g h.
struct OfRow {
  float g, gh;
};

// kRows rows from `first` on: their sums, and what they add to the gradients of weight and bias (may be null), which are
// read and written once for all of them.
template <int kRows, class T>
MVD_INLINE void sum_rows(const AddLayerNormBackward<T>& op, int64_t first, float* grad_weight, float* grad_bias,
                         OfRow* sums) {
  Two of_g[kRows], of_gh[kRows], centre[kRows], factor[kRows];
  for (int i = 0; i < kRows; ++i) {
    of_g[i] = of_gh[i] = both(0);
    centre[i] = both(op.mean[first + i]);
    factor[i] = both(op.rstd[first + i]);
  }
  for_columns(op.width, MVD_COLUMNS(j, n, way) {
    const Two weight = load_two(op.weight + j);
    Two to_weight = both(0), to_bias = both(0);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = (first + i) * op.width + j;
      const Two grad = load_two(op.grad_normed + at, n);
      const Two h = (load_two(op.sum + at, n) - centre[i]) * factor[i];
      const Two g = grad * weight;
      of_g[i] = of_g[i] + g;
      of_gh[i] = fma(g, h, of_gh[i]);
      to_weight = fma(grad, h, to_weight);
      to_bias = to_bias + grad;
    }
    if (grad_weight) {
      store_two(grad_weight + j, load_two(grad_weight + j) + to_weight);
      store_two(grad_bias + j, load_two(grad_bias + j) + to_bias);
    }
  });
  for (int i = 0; i < kRows; ++i) sums[i] = {total(of_g[i]), total(of_gh[i])};
}

template <class T>
MVD_INLINE void differentiate_row(const AddLayerNormBackward<T>& op, int64_t row, OfRow sums) {
  const int64_t width = op.width, start = row * width;
  const float rstd = op.rstd[row];
  const Two centre = both(op.mean[row]), factor = both(rstd);
  const Two scale = both(op.scale ? clean(op.scale[row / op.rows_per_sample]) : 1.0f);
  const Two average = both(sums.g / width), slope = both(-sums.gh / width * rstd);
  for_columns(width, MVD_COLUMNS(j, n, way) {
    const Two g = load_two(op.grad_normed + start + j, n) * load_two(op.weight + j);
    Two grad = fma(load_two(op.sum + start + j, n) - centre, slope, g - average);
    grad = op.grad_sum ? fma(grad, factor, load_two(op.grad_sum + start + j, n)) : grad * factor;
    if (op.grad_x) store_two(op.grad_x + start + j, grad, n);
    if (op.grad_branch) store_two(op.grad_branch + start + j, grad * scale, n);
  });
}

template <class T>
void add_layer_norm_backward_rows(const AddLayerNormBackward<T>& op, int64_t begin, int64_t end, float* grad_weight,
                                  float* grad_bias) {
  const bool rows_too = op.grad_x || op.grad_branch;
  for (int64_t row = begin; row < end;) {
    OfRow sums[2];
    const int64_t count = row + 1 < end ? 2 : 1;
    if (count == 2)
      sum_rows<2>(op, row, grad_weight, grad_bias, sums);
    else
      sum_rows<1>(op, row, grad_weight, grad_bias, sums);
    for (int64_t i = 0; i < count && rows_too; ++i) differentiate_row(op, row + i, sums[i]);
    row += count;
  }
}

#undef MVD_COLUMNS
