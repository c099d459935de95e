// Rows of tokens, for the instruction set being compiled (see for_each_isa.h).

// Calls step(c) for every W columns c of a row, and step(c, n) for the n < W columns that remain.
template <class F>
MVD_INLINE void for_columns(int64_t width, F step) {
  int64_t c = 0;
  for (; c + W <= width; c += W) step(c);
  if (c < width) step(c, static_cast<int>(width - c));
}

// out = base + bias + pos, rounded once; bias and pos may be null.
template <class S, class P, class O>
void write_row(const S* base, const float* bias, const P* pos, int64_t width, O* out) {
  for_columns(width, [&](int64_t c, auto... n) {
    Vec x = load(base + c, n...);
    if (bias) x = x + load(bias + c, n...);
    if (pos) x = x + load(pos + c, n...);
    store(out + c, x, n...);
  });
}

// sums += row.
template <class T>
void add_row(const T* row, int64_t width, float* sums) {
  for_columns(width, [&](int64_t c, auto... n) { store(sums + c, load(sums + c, n...) + load(row + c, n...), n...); });
}

// sums += each of `count` rows, `stride` elements apart: four at a time, so that the sums are read less often.
template <class T>
void add_rows(const T* rows, int64_t stride, int64_t count, int64_t width, float* sums) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) {
    const T *a = rows + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    for_columns(width, [&](int64_t i, auto... n) {
      const Vec four = (load(a + i, n...) + load(b + i, n...)) + (load(c + i, n...) + load(d + i, n...));
      store(sums + i, load(sums + i, n...) + four, n...);
    });
  }
  for (; r < count; ++r) add_row(rows + r * stride, width, sums);
}
