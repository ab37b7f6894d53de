// Sixteen lanes in NEON (ARMv8-A's base), as four registers of four rows.
// Included inside a translation unit's own namespace.

constexpr int kMaxTokens = FLUTE_TOKENS(4);                     // of gemv: 16 of the 32 registers are sums, 4 the codebook, 4 words
constexpr int kTileVectors = 1, kTileTokens = FLUTE_TOKENS(6);  // of the tile kernels: 24 sums, 4 weights, 1 input in 32 registers

struct F16 {
  float32x4_t a, b, c, d;
};
// Words as planes of bytes: the lowest byte of all sixteen rows, and so on. A load takes them apart, and from then on
// one instruction has all rows' codes where a 32-bit lane would need four.
struct I16 {
  uint8x16_t plane[4];
};

INLINE F16 set1(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
INLINE F16 zero() { return set1(0); }
INLINE F16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
INLINE void store(float* p, F16 v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
  vst1q_f32(p + 8, v.c);
  vst1q_f32(p + 12, v.d);
}
INLINE F16 add(F16 x, F16 y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)}; }
INLINE F16 mul(F16 x, F16 y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)}; }
INLINE F16 absolute(F16 v) { return {vabsq_f32(v.a), vabsq_f32(v.b), vabsq_f32(v.c), vabsq_f32(v.d)}; }
INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}

INLINE float32x4_t from_bf16_4(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE F16 from_bf16(const uint16_t* p) { return {from_bf16_4(p), from_bf16_4(p + 4), from_bf16_4(p + 8), from_bf16_4(p + 12)}; }
INLINE float32x4_t from_f16_4(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE F16 from_f16(const uint16_t* p) { return {from_f16_4(p), from_f16_4(p + 4), from_f16_4(p + 8), from_f16_4(p + 12)}; }
INLINE void to_bf16_4(uint16_t* p, float32x4_t v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), nan = vorrq_u32(u, vdupq_n_u32(0x400000));
  vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, nan), 16));
}
INLINE void to_bf16(uint16_t* p, F16 v) {
  to_bf16_4(p, v.a);
  to_bf16_4(p + 4, v.b);
  to_bf16_4(p + 8, v.c);
  to_bf16_4(p + 12, v.d);
}
INLINE void to_f16_4(uint16_t* p, float32x4_t v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
INLINE void to_f16(uint16_t* p, F16 v) {
  to_f16_4(p, v.a);
  to_f16_4(p + 4, v.b);
  to_f16_4(p + 8, v.c);
  to_f16_4(p + 12, v.d);
}

INLINE I16 load_words(const uint32_t* p) {
  const uint8x16x4_t v = vld4q_u8(reinterpret_cast<const uint8_t*>(p));
  return {{v.val[0], v.val[1], v.val[2], v.val[3]}};
}
// Byte INDEX of the words shifted right.
template <int SHIFT, int INDEX>
INLINE uint8x16_t shifted_plane(I16 v) {
  constexpr int kPlane = INDEX + SHIFT / 8, kBits = SHIFT % 8;
  if constexpr (kPlane > 3) return vdupq_n_u8(0);
  else if constexpr (kBits == 0) return v.plane[kPlane];
  else if constexpr (kPlane == 3) return vshrq_n_u8(v.plane[3], kBits);
  else return vsliq_n_u8(vshrq_n_u8(v.plane[kPlane], kBits), v.plane[kPlane + 1], 8 - kBits);
}
template <int SHIFT>
INLINE I16 shift_right(I16 v) {
  return {{shifted_plane<SHIFT, 0>(v), shifted_plane<SHIFT, 1>(v), shifted_plane<SHIFT, 2>(v), shifted_plane<SHIFT, 3>(v)}};
}
// Bits of `mask` from x, the others from y.
INLINE I16 merge(uint32_t mask, I16 x, I16 y) {
  I16 r;
  for (int i = 0; i < 4; ++i) r.plane[i] = vbslq_u8(vdupq_n_u8(uint8_t(mask >> 8 * i)), x.plane[i], y.plane[i]);
  return r;
}

// The codebook's bytes in planes, as the codes are: a lookup is one tbl of one register for each.
template <int BITS>
struct Book {
  uint8x16_t plane[4];
};
template <int BITS>
INLINE Book<BITS> load_book(const float* p) {
  const uint8x16x4_t v = vld4q_u8(reinterpret_cast<const uint8_t*>(p));
  return {{v.val[0], v.val[1], v.val[2], v.val[3]}};
}
// The value of the code at bit SHIFT of every row. The index is four bits (the codebook repeats), and the planes of
// the values are interleaved to numbers: 13 instructions for sixteen values, 14 or 15 where a shift or two come before.
template <int BITS, int SHIFT>
INLINE F16 lookup(const Book<BITS>& book, I16 words) {
  constexpr int kBit = SHIFT % 8;
  uint8x16_t index;
  if constexpr (kBit + BITS > 8) index = shifted_plane<SHIFT, 0>(words);
  else if constexpr (kBit > 0) index = vshrq_n_u8(words.plane[SHIFT / 8], kBit);
  else index = words.plane[SHIFT / 8];
  if constexpr (kBit < 4 || kBit + BITS > 8) index = vandq_u8(index, vdupq_n_u8(15));
  const uint8x16_t p0 = vqtbl1q_u8(book.plane[0], index), p1 = vqtbl1q_u8(book.plane[1], index);
  const uint8x16_t p2 = vqtbl1q_u8(book.plane[2], index), p3 = vqtbl1q_u8(book.plane[3], index);
  const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(p0, p1)), low8 = vreinterpretq_u16_u8(vzip2q_u8(p0, p1));
  const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(p2, p3)), high8 = vreinterpretq_u16_u8(vzip2q_u8(p2, p3));
  return {vreinterpretq_f32_u16(vzip1q_u16(low0, high0)), vreinterpretq_f32_u16(vzip2q_u16(low0, high0)),
          vreinterpretq_f32_u16(vzip1q_u16(low8, high8)), vreinterpretq_f32_u16(vzip2q_u16(low8, high8))};
}
