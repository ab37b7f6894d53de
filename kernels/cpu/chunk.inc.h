// A chunk of codes as words of sixteen rows.
//
// Included by decode.inc.h, and again where words are of another kind (neon.cpp).

// A chunk's words; for 3 bits also a fourth one with codes 30 and 31 at bits 0 and 16.
template <int BITS>
struct Words {
  I16 word[4];
};
template <int BITS>
INLINE Words<BITS> load_chunk(const uint32_t* p) {
  Words<BITS> w;
  unroll<BITS>(FLUTE_UNROLLED(j) { w.word[j.value] = load_words(p + j.value * kTileRows); });
  if constexpr (BITS == 3) {
    const I16 two = merge(0x00020002, shift_right<14>(w.word[1]), shift_right<15>(w.word[0]));
    w.word[3] = merge(0x00040004, shift_right<13>(w.word[2]), two);
  }
  return w;
}
