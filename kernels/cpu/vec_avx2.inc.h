// Sixteen lanes in AVX2, FMA and F16C, as two registers of eight rows.
// Included inside a translation unit's own namespace.

constexpr int kMaxTokens = FLUTE_TOKENS(4);                     // of gemv: 8 of the 16 registers are sums
constexpr int kTileVectors = 1, kTileTokens = FLUTE_TOKENS(6);  // of the tile kernels: 12 sums, 2 weights, 1 input in 16 registers

struct F16 {
  __m256 a, b;
};
struct I16 {
  __m256i a, b;
};

INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE F16 set1(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, F16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
INLINE F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE F16 absolute(F16 v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
}
INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }

INLINE __m256 from_bf16_8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F16 from_bf16(const uint16_t* p) { return {from_bf16_8(p), from_bf16_8(p + 8)}; }
INLINE F16 from_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
INLINE __m256i to_bf16_8(__m256 v) {
  const __m256i u = _mm256_castps_si256(v), high = _mm256_srli_epi32(u, 16);
  const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(high, _mm256_set1_epi32(1))));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(r, 16), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}
INLINE void to_bf16(uint16_t* p, F16 v) {
  // packus works in 128-bit lanes: put its quarters back in order.
  const __m256i packed = _mm256_packus_epi32(to_bf16_8(v.a), to_bf16_8(v.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void to_f16(uint16_t* p, F16 v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
}

INLINE I16 load_words(const uint32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
template <int SHIFT>
INLINE I16 shift_right(I16 v) {
  if constexpr (SHIFT == 0) return v;
  else return {_mm256_srli_epi32(v.a, SHIFT), _mm256_srli_epi32(v.b, SHIFT)};
}
template <int SHIFT>
INLINE I16 shift_left(I16 v) {
  return {_mm256_slli_epi32(v.a, SHIFT), _mm256_slli_epi32(v.b, SHIFT)};
}
// Bits of `mask` from x, the others from y.
INLINE I16 merge(uint32_t mask, I16 x, I16 y) {
  const __m256i m = _mm256_set1_epi32(int(mask));
  return {_mm256_or_si256(_mm256_and_si256(m, x.a), _mm256_andnot_si256(m, y.a)),
          _mm256_or_si256(_mm256_and_si256(m, x.b), _mm256_andnot_si256(m, y.b))};
}
INLINE I16 and_mask(I16 v, uint32_t mask) {
  const __m256i m = _mm256_set1_epi32(int(mask));
  return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)};
}
INLINE I16 or_words(I16 x, I16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INLINE I16 add_words(I16 x, I16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
// Words of x and y by turns, within each four: of the first two rows, and of the last two.
INLINE I16 interleave_low(I16 x, I16 y) { return {_mm256_unpacklo_epi32(x.a, y.a), _mm256_unpacklo_epi32(x.b, y.b)}; }
INLINE I16 interleave_high(I16 x, I16 y) { return {_mm256_unpackhi_epi32(x.a, y.a), _mm256_unpackhi_epi32(x.b, y.b)}; }
INLINE void store_words(void* p, I16 v) {
  _mm256_storeu_si256((__m256i*)p, v.a);
  _mm256_storeu_si256((__m256i*)p + 1, v.b);
}

template <int BITS>
struct Book {
  __m256 low, high;
};
template <int BITS>
INLINE Book<BITS> load_book(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
// The value of the code at bit SHIFT of every lane. vpermps reads three index bits, so four-bit codes take two
// lookups and a blend on the code's top bit, moved to the sign.
template <int BITS, int SHIFT>
INLINE __m256 lookup_8(const Book<BITS>& book, __m256i words, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(book.low, index);
  if constexpr (BITS < 4) return low;
  else {
    const __m256 high = _mm256_permutevar8x32_ps(book.high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - SHIFT)));
  }
}
template <int BITS, int SHIFT>
INLINE F16 lookup(const Book<BITS>& book, I16 words) {
  const I16 index = shift_right<SHIFT>(words);
  return {lookup_8<BITS, SHIFT>(book, words.a, index.a), lookup_8<BITS, SHIFT>(book, words.b, index.b)};
}
