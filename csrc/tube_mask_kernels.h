// Tube masks of samples, many positions at a time; compiled by for_each_isa.h. The definition is in tube_mask.h.

// kLanes positions, each in a 64-bit lane. Philox multiplies the low halves, and ignores what is in the high ones.
#if defined(MVD_ISA_AVX512) && !defined(MVD_EMULATE_AVX512)

constexpr int kLanes = 8;
using Lanes = __m512i;
MVD_INLINE Lanes all_lanes(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
MVD_INLINE Lanes positions_from(int64_t p) {
  return _mm512_add_epi64(_mm512_set1_epi64(p), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
MVD_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
MVD_INLINE Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
MVD_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
MVD_INLINE Lanes join(Lanes low, Lanes top) { return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(top, 32)); }
MVD_INLINE void store_lanes(uint64_t* out, Lanes a) { _mm512_storeu_si512(out, a); }

#elif defined(MVD_ISA_AVX2)

constexpr int kLanes = 4;
using Lanes = __m256i;
MVD_INLINE Lanes all_lanes(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
MVD_INLINE Lanes positions_from(int64_t p) {
  return _mm256_add_epi64(_mm256_set1_epi64x(p), _mm256_setr_epi64x(0, 1, 2, 3));
}
MVD_INLINE Lanes multiply_low(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
MVD_INLINE Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
MVD_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
MVD_INLINE Lanes join(Lanes low, Lanes top) { return _mm256_blend_epi32(low, _mm256_slli_epi64(top, 32), 0xAA); }
MVD_INLINE void store_lanes(uint64_t* out, Lanes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), a); }

#else

constexpr int kLanes = 1;
using Lanes = uint64_t;
MVD_INLINE Lanes all_lanes(uint64_t x) { return x; }
MVD_INLINE Lanes positions_from(int64_t p) { return static_cast<uint64_t>(p); }
MVD_INLINE Lanes multiply_low(Lanes a, Lanes b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
MVD_INLINE Lanes high(Lanes a) { return a >> 32; }
MVD_INLINE Lanes exclusive_or(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
MVD_INLINE Lanes join(Lanes low, Lanes top) { return (low & 0xFFFFFFFFu) | top << 32; }
MVD_INLINE void store_lanes(uint64_t* out, Lanes a) { *out = a; }

#endif

// philox_key of kLanes positions from p on.
MVD_INLINE void store_keys(uint64_t seed, uint32_t epoch, uint64_t sample, int64_t p, uint64_t* out) {
  Lanes x0 = positions_from(p), x1 = all_lanes(sample), x2 = all_lanes(sample >> 32), x3 = all_lanes(epoch);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Lanes even = multiply_low(x0, all_lanes(0xD2511F53u));
    const Lanes odd = multiply_low(x2, all_lanes(0xCD9E8D57u));
    x0 = exclusive_or(high(odd), x1, all_lanes(k0));
    x1 = odd;
    x2 = exclusive_or(high(even), x3, all_lanes(k1));
    x3 = even;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_lanes(out, join(x0, x1));
}

// Ascending token indices of one sample: the positions of a slice, shifted by whole slices.
MVD_INLINE void write_indices(const int64_t* positions, int64_t count, int64_t slices, int64_t stride, int64_t* out) {
  for (int64_t t = 0; t < slices; ++t, out += count)
    for (int64_t i = 0; i < count; ++i) out[i] = t * stride + positions[i];
}

// Samples begin to end - 1. Scratch: `keys` for positions + kLanes - 1 numbers, `order` for positions + 2.
inline void draw(const TubeMaskCall& call, int64_t begin, int64_t end, uint64_t* keys, int64_t* order) {
  const int64_t slices = call.slices, positions = call.positions, masked = call.masked, visible = positions - masked;
  int64_t* const masked_order = order + visible + 1;
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t p = 0; p < positions; p += kLanes)
      store_keys(call.seed, call.epoch, static_cast<uint64_t>(call.samples[b]), p, keys + p);
    bool* mask = call.mask + b * slices * positions;
    mask_smallest(keys, positions, masked, mask);
    for (int64_t p = 0, v = 0, m = 0; p < positions; ++p) {  // written to both; what is wrong is overwritten
      order[v] = masked_order[m] = p;
      m += mask[p];
      v += !mask[p];
    }
    for (int64_t t = 1; t < slices; ++t) std::memcpy(mask + t * positions, mask, positions * sizeof(bool));
    write_indices(order, visible, slices, positions, call.visible_indices + b * slices * visible);
    write_indices(masked_order, masked, slices, positions, call.masked_indices + b * slices * masked);
  }
}

inline void mask_of_keys(const uint64_t* keys, int64_t positions, int64_t masked, bool* mask) {
  mask_smallest(keys, positions, masked, mask);
}
