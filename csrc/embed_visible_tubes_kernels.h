// Tubes of a clip, for the instruction set being compiled (see for_each_isa.h). A tube is 3 channels x `slices` frames
// x `side` x `side` pixels, in that order once gathered; a clip's strides are those of (channel, frame, row, column).

constexpr int kGroup = 16;  // pixels whose three channels are told apart at once

#if defined(MVD_ISA_AVX2) || defined(MVD_ISA_AVX512)

// For 16 bytes from byte 16 * part of interleaved pixels: where those of a channel are, in their place among 16.
struct Selection {
  alignas(16) int8_t byte[3][3][kGroup];  // [channel][part][pixel]; -1 gives zero
  constexpr Selection() : byte() {
    for (int channel = 0; channel < 3; ++channel)
      for (int part = 0; part < 3; ++part)
        for (int pixel = 0; pixel < kGroup; ++pixel) {
          const int at = 3 * pixel + channel - 16 * part;
          byte[channel][part][pixel] = static_cast<int8_t>(0 <= at && at < 16 ? at : -1);
        }
  }
};
constexpr Selection kSelection;

// planes[c] = channel c of 16 pixels.
MVD_INLINE void split_channels(const uint8_t* pixels, uint8_t (*planes)[kGroup]) {
  for (int channel = 0; channel < 3; ++channel) {
    __m128i plane = _mm_setzero_si128();
    for (int part = 0; part < 3; ++part) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + 16 * part));
      const auto* select = reinterpret_cast<const __m128i*>(kSelection.byte[channel][part]);
      plane = _mm_or_si128(plane, _mm_shuffle_epi8(bytes, _mm_load_si128(select)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(planes[channel]), plane);
  }
}

MVD_INLINE Vec load_bytes(const uint8_t* p) {
#if defined(MVD_EMULATE_AVX512) && defined(MVD_ISA_AVX512)  // the emulation lacks these conversions
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = p[i];
  return load(lanes);
#elif defined(MVD_ISA_AVX512)
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#else
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#endif
}

#else

MVD_INLINE void split_channels(const uint8_t* pixels, uint8_t (*planes)[kGroup]) {
  for (int i = 0; i < 3 * kGroup; ++i) planes[i % 3][i / 3] = pixels[i];
}
MVD_INLINE Vec load_bytes(const uint8_t* p) {
  return lanes([&](int i) { return static_cast<float>(p[i]); });
}

#endif

// One row of `side` interleaved pixels: channel c, scaled and shifted, to out + c * plane.
template <class O>
MVD_INLINE void gather_pixels(const uint8_t* pixels, int64_t side, const float* scale, const float* shift, O* out,
                              int64_t plane) {
  for (int64_t start = 0; start < side; start += kGroup) {
    const int count = static_cast<int>(std::min<int64_t>(kGroup, side - start));
    uint8_t padded[3 * kGroup] = {}, planes[3][kGroup];
    if (count < kGroup) std::memcpy(padded, pixels + 3 * start, 3 * count);  // reads nothing behind the row
    split_channels(count < kGroup ? padded : pixels + 3 * start, planes);
    for (int c = 0; c < 3; ++c)
      for (int i = 0; i < count; i += W) {
        const Vec x = fma(load_bytes(planes[c] + i), splat(scale[c]), splat(shift[c]));
        O* to = out + c * plane + start + i;
        if (count - i >= W)
          store(to, x);
        else
          store(to, x, count - i);
      }
  }
}

// Interleaved bytes, of which `strides` gives those of frames and rows only.
template <class O>
void gather_interleaved(const uint8_t* corner, const int64_t* strides, int64_t slices, int64_t side, const float* scale,
                        const float* shift, O* out) {
  for (int64_t t = 0; t < slices; ++t)
    for (int64_t y = 0; y < side; ++y)
      gather_pixels(corner + t * strides[1] + y * strides[2], side, scale, shift, out + (t * side + y) * side,
                    slices * side * side);
}

// Rows of any element type and strides; bytes are scaled and shifted.
template <class S, class O>
void gather_strided(const S* corner, const int64_t* strides, int64_t slices, int64_t side, const float* scale,
                    const float* shift, O* out) {
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t t = 0; t < slices; ++t)
      for (int64_t y = 0; y < side; ++y, out += side) {
        const S* row = corner + c * strides[0] + t * strides[1] + y * strides[2];
        for (int64_t x = 0; x < side; ++x) {
          float value;
          if constexpr (sizeof(S) == 1)
            value = row[x * strides[3]] * scale[c] + shift[c];
          else
            value = to_float(row[x * strides[3]]);
          if constexpr (sizeof(O) == 2)
            out[x] = to_bf16(value);
          else
            out[x] = value;
        }
      }
}

// Rows of floats that lie side by side.
template <class S, class O>
void gather_rows(const S* corner, const int64_t* strides, int64_t slices, int64_t side, O* out) {
  for (int64_t c = 0; c < 3; ++c)
    for (int64_t t = 0; t < slices; ++t)
      for (int64_t y = 0; y < side; ++y, out += side) {
        const S* row = corner + c * strides[0] + t * strides[1] + y * strides[2];
        int64_t x = 0;
        for (; x + W <= side; x += W) store(out + x, load(row + x));
        if (x < side) store(out + x, load(row + x, static_cast<int>(side - x)), static_cast<int>(side - x));
      }
}

// Adds one channel [slices, side, side] of a tube to a contiguous clip.
template <class S, class O>
void add_tube_channel(const S* tube, const int64_t* strides, int64_t slices, int64_t side, O* corner) {
  for (int64_t t = 0; t < slices; ++t)
    for (int64_t y = 0; y < side; ++y, tube += side) {
      O* row = corner + t * strides[1] + y * strides[2];
      int64_t x = 0;
      for (; x + W <= side; x += W) store(row + x, load(row + x) + load(tube + x));
      const int rest = static_cast<int>(side - x);
      if (rest) store(row + x, load(row + x, rest) + load(tube + x, rest), rest);
    }
}
