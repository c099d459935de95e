// Vectors of W floats, for the instruction set being compiled: no include guard, as for_each_isa.h includes this once
// per set, in a namespace of its own. All functions are inlined into kernels; pointers need no alignment.
//
// Partial loads read n < W elements and fill with zeros; partial stores write n elements and no others.

#if defined(MVD_ISA_AVX512)

constexpr int W = 16;
struct Vec {
  __m512 v;
};

MVD_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
MVD_INLINE Vec splat(float x) { return {_mm512_set1_ps(x)}; }
MVD_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
MVD_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
MVD_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
MVD_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
MVD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a b + c
MVD_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
MVD_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
MVD_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
MVD_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
MVD_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }  // to nearest, ties to even
#if defined(MVD_EMULATE_AVX512)  // releases of the emulation lack these
MVD_INLINE float sum(Vec a) {
  float lanes[W], total = 0;
  _mm512_storeu_ps(lanes, a.v);
  for (const float lane : lanes) total += lane;
  return total;
}
MVD_INLINE float max_of(Vec a) {
  float lanes[W];
  _mm512_storeu_ps(lanes, a.v);
  return *std::max_element(lanes, lanes + W);
}
#else
MVD_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
MVD_INLINE float max_of(Vec a) { return _mm512_reduce_max_ps(a.v); }
#endif
// Where a < b (false for NaN): x, else y.
MVD_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// a 2^n for whole n.
MVD_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }

MVD_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
MVD_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
#if defined(MVD_EMULATE_AVX512)  // the emulation lacks these conversions, and masked memory access
MVD_INLINE Vec widen(__m256i x) {
  float lanes[W];
  bf16 bits[W];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits), x);
  for (int i = 0; i < W; ++i) lanes[i] = to_float(bits[i]);
  return load(lanes);
}
MVD_INLINE __m256i narrow(Vec a) {
  float lanes[W];
  uint16_t bits[W];
  _mm512_storeu_ps(lanes, a.v);
  for (int i = 0; i < W; ++i) bits[i] = to_bf16(lanes[i]).bits;
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits));
}
#else
MVD_INLINE Vec widen(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
MVD_INLINE __m256i narrow(Vec a) {
  // The instruction takes subnormal numbers as zero; adding them as integers would cost more than it gives.
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
}
#endif
MVD_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
MVD_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
#if defined(MVD_EMULATE_AVX512)
template <class T>
MVD_INLINE Vec load(const T* p, int n) {
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
MVD_INLINE void store(T* p, Vec a, int n) {
  T lanes[W];
  store(lanes, a);
  std::memcpy(p, lanes, n * sizeof(T));
}
#else
MVD_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
MVD_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
MVD_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
MVD_INLINE Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
MVD_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }
#endif

// Rounded: a[0], b[0], a[1], b[1], ...
#if defined(MVD_EMULATE_AVX512)
MVD_INLINE void store_interleaved(bf16* p, Vec a, Vec b) {
  bf16 even[W], odd[W];
  store(even, a);
  store(odd, b);
  for (int i = 0; i < W; ++i) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
}
#else
MVD_INLINE void store_interleaved(bf16* p, Vec a, Vec b) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(b)), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(a)), high));
}
#endif

// W pairs of bf16; dot adds both products of a lane to the lane of `sum`.
constexpr bool kHasPairs = true;
struct Pairs {
  __m512i v;
};
MVD_INLINE Pairs load_pairs(const bf16* p) { return {_mm512_loadu_si512(p)}; }
MVD_INLINE Pairs splat_pair(const bf16* p) {
  int32_t both;
  std::memcpy(&both, p, 4);
  return {_mm512_set1_epi32(both)};
}
#if defined(MVD_EMULATE_AVX512)
MVD_INLINE Vec dot(Vec sum, Pairs a, Pairs b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const Vec even = {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16)),
                                  _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16)))};
  const Vec odd = {_mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(a.v, high)),
                                 _mm512_castsi512_ps(_mm512_and_si512(b.v, high)))};
  return sum + (even + odd);
}
#else
MVD_INLINE Vec dot(Vec sum, Pairs a, Pairs b) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

#elif defined(MVD_ISA_AVX2)

constexpr int W = 8;
struct Vec {
  __m256 v;
};

MVD_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
MVD_INLINE Vec splat(float x) { return {_mm256_set1_ps(x)}; }
MVD_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
MVD_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
MVD_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
MVD_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
MVD_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MVD_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
MVD_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
MVD_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
MVD_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
MVD_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
MVD_INLINE float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
MVD_INLINE float max_of(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
MVD_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
MVD_INLINE Vec scale_by_power(Vec a, Vec n) {
  // In two halves, so that the result may be subnormal or overflow.
  const __m256i whole = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(n.v, _mm256_set1_ps(252)), _mm256_set1_ps(-252)));
  const __m256i half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, power(half)), power(_mm256_sub_epi32(whole, half)))};
}

MVD_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
MVD_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
MVD_INLINE Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
MVD_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
MVD_INLINE void store(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }

MVD_INLINE Vec load(const bf16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
MVD_INLINE void store(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
MVD_INLINE Vec load(const bf16* p, int n) {
  bf16 lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(bf16));
  return load(lanes);
}
MVD_INLINE void store(bf16* p, Vec a, int n) {
  bf16 lanes[W];
  store(lanes, a);
  std::memcpy(p, lanes, n * sizeof(bf16));
}

constexpr bool kHasPairs = false;  // bf16 is widened to float before it is multiplied

#else  // portable: what the others mean, in plain C++

constexpr int W = 16;
struct Vec {
  float v[W];
};

template <class F>
MVD_INLINE Vec lanes(F f) {
  Vec r;
  for (int i = 0; i < W; ++i) r.v[i] = f(i);
  return r;
}
MVD_INLINE Vec splat(float x) { return lanes([&](int) { return x; }); }
MVD_INLINE Vec zero() { return splat(0); }
MVD_INLINE Vec operator+(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
MVD_INLINE Vec operator-(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
MVD_INLINE Vec operator*(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
MVD_INLINE Vec operator/(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
MVD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
MVD_INLINE Vec max(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
MVD_INLINE Vec min(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
MVD_INLINE Vec abs(Vec a) { return lanes([&](int i) { return std::fabs(a.v[i]); }); }
MVD_INLINE Vec sqrt(Vec a) { return lanes([&](int i) { return std::sqrt(a.v[i]); }); }
MVD_INLINE Vec round(Vec a) { return lanes([&](int i) { return std::nearbyint(a.v[i]); }); }
MVD_INLINE float sum(Vec a) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += a.v[i];
  return total;
}
MVD_INLINE float max_of(Vec a) { return *std::max_element(a.v, a.v + W); }
MVD_INLINE Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
MVD_INLINE Vec scale_by_power(Vec a, Vec n) {
  return lanes([&](int i) { return n.v[i] == n.v[i] ? std::ldexp(a.v[i], static_cast<int>(n.v[i])) : n.v[i]; });
}

template <class T>
MVD_INLINE Vec load(const T* p, int n = W) {
  return lanes([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
MVD_INLINE void store(float* p, Vec a, int n = W) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}
MVD_INLINE void store(bf16* p, Vec a, int n = W) {
  for (int i = 0; i < n; ++i) p[i] = to_bf16(a.v[i]);
}

MVD_INLINE void store_interleaved(bf16* p, Vec a, Vec b) {
  for (int i = 0; i < W; ++i) {
    p[2 * i] = to_bf16(a.v[i]);
    p[2 * i + 1] = to_bf16(b.v[i]);
  }
}

constexpr bool kHasPairs = true;  // slow here, but the same layout as AVX-512: what runs there is tested everywhere
struct Pairs {
  bf16 v[2 * W];
};
MVD_INLINE Pairs load_pairs(const bf16* p) {
  Pairs r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
MVD_INLINE Pairs splat_pair(const bf16* p) {
  Pairs r;
  for (int i = 0; i < 2 * W; ++i) r.v[i] = p[i % 2];
  return r;
}
MVD_INLINE Vec dot(Vec sum, Pairs a, Pairs b) {
  return lanes([&](int i) {
    return sum.v[i] + (to_float(a.v[2 * i]) * to_float(b.v[2 * i]) + to_float(a.v[2 * i + 1]) * to_float(b.v[2 * i + 1]));
  });
}

#endif

#if defined(MVD_ISA_AVX2)  // never called: lets code that tests kHasPairs compile
struct Pairs {};
MVD_INLINE Pairs load_pairs(const bf16*) { return {}; }
MVD_INLINE Pairs splat_pair(const bf16*) { return {}; }
MVD_INLINE Vec dot(Vec sum, Pairs, Pairs) { return sum; }
MVD_INLINE void store_interleaved(bf16*, Vec, Vec) {}
#endif

// W sums of int32, and 4 W bytes: dot adds the products of four bytes of a and of b to each sum. Bytes of `a` are
// what store_rounded leaves, whole numbers up to +-127 plus kByteOffset; those of `b` are signed, up to +-127.
#if defined(MVD_ISA_AVX512) && !defined(MVD_EMULATE_AVX512)
constexpr int kByteOffset = 128;  // the instruction multiplies unsigned by signed
struct Ints {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
MVD_INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
MVD_INLINE Ints load_ints(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
MVD_INLINE Vec to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
MVD_INLINE Bytes load_bytes(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
MVD_INLINE Bytes splat_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
MVD_INLINE Ints dot(Ints sum, Bytes a, Bytes b) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }
// Rounded to whole numbers, ties to even: W bytes.
MVD_INLINE void store_rounded(uint8_t* p, Vec a) {
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(kByteOffset));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(whole));
}
#elif defined(MVD_ISA_AVX2)
constexpr int kByteOffset = 0;
struct Ints {
  __m256i v;
};
struct Bytes {
  __m256i v;
};
MVD_INLINE Ints zero_ints() { return {_mm256_setzero_si256()}; }
MVD_INLINE Ints load_ints(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
MVD_INLINE Vec to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
MVD_INLINE Bytes load_bytes(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
MVD_INLINE Bytes splat_bytes(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
MVD_INLINE Ints dot(Ints sum, Bytes a, Bytes b) {
  // Two products are added in 16 bits, where they saturate: they do not reach that with both factors up to 127, so b's
  // sign goes to a.
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b.v), _mm256_sign_epi8(a.v, b.v));
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
MVD_INLINE void store_rounded(uint8_t* p, Vec a) {
  const __m256i whole = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
#else
constexpr int kByteOffset = 128;  // as with AVX-512, so that its corrections are tested everywhere
struct Ints {
  int32_t v[W];
};
struct Bytes {
  uint8_t v[4 * W];
};
MVD_INLINE Ints zero_ints() { return {}; }
MVD_INLINE Ints load_ints(const int8_t* p) {
  Ints r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
MVD_INLINE Vec to_floats(Ints a) {
  float r[W];
  for (int i = 0; i < W; ++i) r[i] = static_cast<float>(a.v[i]);
  return load(r);
}
MVD_INLINE Bytes load_bytes(const int8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
MVD_INLINE Bytes splat_bytes(const uint8_t* p) {
  Bytes r;
  for (int i = 0; i < W; ++i) std::memcpy(r.v + 4 * i, p, 4);
  return r;
}
MVD_INLINE Ints dot(Ints sum, Bytes a, Bytes b) {
  for (int i = 0; i < 4 * W; ++i) sum.v[i / 4] += a.v[i] * static_cast<int8_t>(b.v[i]);
  return sum;
}
MVD_INLINE void store_rounded(uint8_t* p, Vec a) {
  float rounded[W];
  store(rounded, round(a));
  for (int i = 0; i < W; ++i) p[i] = static_cast<uint8_t>(static_cast<int>(rounded[i]) + kByteOffset);
}
#endif

// e^x to 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial for e^r. 0 below -104, infinity above 89, NaN for NaN.
MVD_INLINE Vec exp(Vec x) {
  const Vec low = splat(-104.0f), high = splat(89.0f);
  const Vec inside = min(high, max(low, x));  // the second operand passes NaN on
  const Vec n = round(inside * splat(1.44269504f));
  Vec r = fma(n, splat(-0.693359375f), inside);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return scale_by_power(p, n);
}
