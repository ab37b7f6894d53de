// Sixteen lanes in AVX-512 (F, BW, DQ, VL), one a row of a tile.
// Included inside a translation unit's own namespace.

constexpr int kMaxTokens = FLUTE_TOKENS(12);                     // of gemv: 12 sums of a group, 12 totals, tables and codes
constexpr int kTileVectors = 2, kTileTokens = FLUTE_TOKENS(12);  // of the tile kernels: 24 sums, 2 weights, 1 input in 32 registers

using F16 = __m512;
using I16 = __m512i;

INLINE F16 zero() { return _mm512_setzero_ps(); }
INLINE F16 set1(float x) { return _mm512_set1_ps(x); }
INLINE F16 load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, F16 v) { _mm512_storeu_ps(p, v); }
INLINE F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
INLINE F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
INLINE F16 absolute(F16 v) { return _mm512_abs_ps(v); }
INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }

INLINE F16 from_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F16 from_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE void to_bf16(uint16_t* p, F16 v) {
  const __m512i u = _mm512_castps_si512(v), high = _mm512_srli_epi32(u, 16);
  __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1))));
  r = _mm512_srli_epi32(r, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_or_epi32(r, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
INLINE void to_f16(uint16_t* p, F16 v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

INLINE I16 load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
template <int SHIFT>
INLINE I16 shift_right(I16 v) {
  if constexpr (SHIFT == 0) return v;
  else return _mm512_srli_epi32(v, SHIFT);
}
template <int SHIFT>
INLINE I16 shift_left(I16 v) {
  return _mm512_slli_epi32(v, SHIFT);
}
// Bits of `mask` from a, the others from b.
INLINE I16 merge(uint32_t mask, I16 a, I16 b) { return _mm512_ternarylogic_epi32(_mm512_set1_epi32(int(mask)), a, b, 0xca); }
INLINE I16 and_mask(I16 v, uint32_t mask) { return _mm512_and_si512(v, _mm512_set1_epi32(int(mask))); }
INLINE I16 or_words(I16 a, I16 b) { return _mm512_or_si512(a, b); }
INLINE I16 add_words(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
// Words of a and b by turns, within each four: of the first two rows, and of the last two.
INLINE I16 interleave_low(I16 a, I16 b) { return _mm512_unpacklo_epi32(a, b); }
INLINE I16 interleave_high(I16 a, I16 b) { return _mm512_unpackhi_epi32(a, b); }
INLINE void store_words(void* p, I16 v) { _mm512_storeu_si512(p, v); }

template <int BITS>
struct Book {
  __m512 values;
};
template <int BITS>
INLINE Book<BITS> load_book(const float* p) {
  return {_mm512_loadu_ps(p)};
}
// The value of the code at bit SHIFT of every lane. vpermps reads four index bits: the table repeats instead.
template <int BITS, int SHIFT>
INLINE F16 lookup(const Book<BITS>& book, I16 words) {
  return _mm512_permutexvar_ps(shift_right<SHIFT>(words), book.values);
}
