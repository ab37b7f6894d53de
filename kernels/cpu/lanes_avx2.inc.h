// Tiles of 8 and 16 tokens for the vector-LUT kernel in AVX2: 16-bit lanes, of which the even ones are the first half of
// the tokens and the odd ones the second, so that widening them is two shifts.
// Included inside a translation unit's own namespace.

struct Lanes8 {
  static constexpr int kTokens = 8;
  using Reg = __m128i;
  INLINE static Reg zero() { return _mm_setzero_si128(); }
  INLINE static Reg load(const int16_t* p) { return _mm_loadu_si128((const __m128i*)p); }
  INLINE static void store(int16_t* p, Reg v) { _mm_storeu_si128((__m128i*)p, v); }
  INLINE static Reg add(Reg a, Reg b) { return _mm_add_epi16(a, b); }
  // round(x * c) of 8 tokens.
  INLINE static Reg products(const float* x, float c) {
    const __m128i first = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x), _mm_set1_ps(c)));
    const __m128i second = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4), _mm_set1_ps(c)));
    return _mm_blend_epi16(first, _mm_slli_epi32(second, 16), 0xaa);
  }
  // sums (+)= v * unit * scale
  INLINE static void flush(Reg v, const float* unit, float scale, float* sums, bool clear) {
    const __m128 s = _mm_set1_ps(scale);
    const __m128 first = _mm_cvtepi32_ps(_mm_srai_epi32(_mm_slli_epi32(v, 16), 16)), second = _mm_cvtepi32_ps(_mm_srai_epi32(v, 16));
    const __m128 a = clear ? _mm_setzero_ps() : _mm_loadu_ps(sums), b = clear ? _mm_setzero_ps() : _mm_loadu_ps(sums + 4);
    _mm_storeu_ps(sums, _mm_fmadd_ps(first, _mm_mul_ps(_mm_loadu_ps(unit), s), a));
    _mm_storeu_ps(sums + 4, _mm_fmadd_ps(second, _mm_mul_ps(_mm_loadu_ps(unit + 4), s), b));
  }
};

struct Lanes16 {
  static constexpr int kTokens = 16;
  using Reg = __m256i;
  INLINE static Reg zero() { return _mm256_setzero_si256(); }
  INLINE static Reg load(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  INLINE static void store(int16_t* p, Reg v) { _mm256_storeu_si256((__m256i*)p, v); }
  INLINE static Reg add(Reg a, Reg b) { return _mm256_add_epi16(a, b); }
  INLINE static Reg products(const float* x, float c) {
    const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(c)));
    const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8), _mm256_set1_ps(c)));
    return _mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa);
  }
  INLINE static void flush(Reg v, const float* unit, float scale, float* sums, bool clear) {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256 first = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 16), 16)), second = _mm256_cvtepi32_ps(_mm256_srai_epi32(v, 16));
    const __m256 a = clear ? _mm256_setzero_ps() : _mm256_loadu_ps(sums), b = clear ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + 8);
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(first, _mm256_mul_ps(_mm256_loadu_ps(unit), s), a));
    _mm256_storeu_ps(sums + 8, _mm256_fmadd_ps(second, _mm256_mul_ps(_mm256_loadu_ps(unit + 8), s), b));
  }
};
