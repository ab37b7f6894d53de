// A tile of 32 tokens for the vector-LUT kernel in AVX-512 (BW), as those of lanes_avx2.inc.h.
// Included inside a translation unit's own namespace.

struct Lanes32 {
  static constexpr int kTokens = 32;
  using Reg = __m512i;
  INLINE static Reg zero() { return _mm512_setzero_si512(); }
  INLINE static Reg load(const int16_t* p) { return _mm512_loadu_si512(p); }
  INLINE static void store(int16_t* p, Reg v) { _mm512_storeu_si512(p, v); }
  INLINE static Reg add(Reg a, Reg b) { return _mm512_add_epi16(a, b); }
  INLINE static Reg products(const float* x, float c) {
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(c)));
    const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), _mm512_set1_ps(c)));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, first, _mm512_slli_epi32(second, 16));
  }
  INLINE static void flush(Reg v, const float* unit, float scale, float* sums, bool clear) {
    const __m512 s = _mm512_set1_ps(scale);
    const __m512 first = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16)), second = _mm512_cvtepi32_ps(_mm512_srai_epi32(v, 16));
    const __m512 a = clear ? _mm512_setzero_ps() : _mm512_loadu_ps(sums), b = clear ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + 16);
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(first, _mm512_mul_ps(_mm512_loadu_ps(unit), s), a));
    _mm512_storeu_ps(sums + 16, _mm512_fmadd_ps(second, _mm512_mul_ps(_mm512_loadu_ps(unit + 16), s), b));
  }
};
