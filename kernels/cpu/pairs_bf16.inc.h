// Weights as pairs of bf16 inputs, in lanes of a row each: what products of pairs take, of vectors and of matrix tiles.
//
// Included inside a translation unit's own namespace, after decode.inc.h; AVX-512 F, BW, DQ, VL and BF16.

constexpr int kPairs = kChunk / 2;  // of a chunk

// The codebook's values, rounded, without scales: the vectors of pairs of a chunk, and its inputs in their order.
//
// vpermw reads five index bits: the codebook is there twice. No code crosses a 16-bit half of a word, so one shift and one
// permute give two codes of each row, one from each half; `arrange` pairs inputs in the same way.
struct BookPairs {
  template <int BITS>
  using Table = __m512i;
  template <int BITS>
  INLINE static Table<BITS> load_table(const float* book) {
    const F16 values = load(book);
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }
  template <int BITS, int I>
  INLINE static __m512bh weight(const Table<BITS>& table, const Words<BITS>& words) {
    constexpr int kPerHalf = 16 / BITS;
    I16 codes = words.word[I / kPerHalf];  // for 3 bits the last pair is alone in word 3
    if constexpr (I % kPerHalf != 0) codes = _mm512_srli_epi16(codes, I % kPerHalf * BITS);
    return (__m512bh)_mm512_permutexvar_epi16(codes, table);
  }
  // Chunks of inputs, `next` apart, zero beyond `count`.
  static void arrange(uint16_t* to, int64_t next, const uint16_t* from, int64_t count, int bits) {
    const int per_half = 16 / bits;
    uint16_t order[kChunk];
    for (int step = 0; step < kPairs; ++step) {
      const int low = step / per_half * 2 * per_half + step % per_half;
      order[2 * step] = uint16_t(low);
      order[2 * step + 1] = uint16_t(bits == 3 && step == 15 ? 31 : low + per_half);
    }
    const __m512i in_order = _mm512_loadu_si512(order);
    for (; count > 0; count -= kChunk, from += kChunk, to += next) {
      const __mmask32 mask = count < kChunk ? (1u << count) - 1 : ~0u;
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(in_order, _mm512_maskz_loadu_epi16(mask, from)));
    }
  }
};

// Two vectors of weights that were scaled in fp32, rounded: 16 pairs.
INLINE __m512i round_pairs(F16 even, F16 odd) {
  // The conversion leaves 16 even weights, then 16 odd ones.
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}
