// Tiles of 8 and 16 tokens for the vector-LUT kernel in NEON, in the tokens' order, and the words that it takes indices
// from: lanes of 32 bits, not vec_neon.inc.h's planes of bytes, because an index and its shift cross bytes.
// Included inside a namespace of its own in a translation unit's, where I16 and its functions hide those planes.

struct I16 {
  uint32x4_t v[4];
};

template <class F>
INLINE I16 each_word(const F& f) {
  return {{f(0), f(1), f(2), f(3)}};
}
#define FLUTE_EACH(...) each_word([&](int i) __attribute__((always_inline)) { return __VA_ARGS__; })

INLINE I16 load_words(const uint32_t* p) { return FLUTE_EACH(vld1q_u32(p + 4 * i)); }
template <int SHIFT>
INLINE I16 shift_right(I16 x) {
  if constexpr (SHIFT == 0) return x;
  else return FLUTE_EACH(vshrq_n_u32(x.v[i], SHIFT));
}
template <int SHIFT>
INLINE I16 shift_left(I16 x) {
  return FLUTE_EACH(vshlq_n_u32(x.v[i], SHIFT));
}
// Bits of `mask` from x, the others from y.
INLINE I16 merge(uint32_t mask, I16 x, I16 y) { return FLUTE_EACH(vbslq_u32(vdupq_n_u32(mask), x.v[i], y.v[i])); }
INLINE I16 and_mask(I16 x, uint32_t mask) { return FLUTE_EACH(vandq_u32(x.v[i], vdupq_n_u32(mask))); }
INLINE I16 or_words(I16 x, I16 y) { return FLUTE_EACH(vorrq_u32(x.v[i], y.v[i])); }
INLINE I16 add_words(I16 x, I16 y) { return FLUTE_EACH(vaddq_u32(x.v[i], y.v[i])); }
// Words of x and y by turns, within each four: of the first two rows, and of the last two.
INLINE I16 interleave_low(I16 x, I16 y) { return FLUTE_EACH(vzip1q_u32(x.v[i], y.v[i])); }
INLINE I16 interleave_high(I16 x, I16 y) { return FLUTE_EACH(vzip2q_u32(x.v[i], y.v[i])); }
INLINE void store_words(void* p, I16 x) {
  for (int i = 0; i < 4; ++i) vst1q_u32(static_cast<uint32_t*>(p) + 4 * i, x.v[i]);
}
#undef FLUTE_EACH

struct Lanes8 {
  static constexpr int kTokens = 8;
  using Reg = int16x8_t;
  INLINE static Reg zero() { return vdupq_n_s16(0); }
  INLINE static Reg load(const int16_t* p) { return vld1q_s16(p); }
  INLINE static void store(int16_t* p, Reg v) { vst1q_s16(p, v); }
  INLINE static Reg add(Reg a, Reg b) { return vaddq_s16(a, b); }
  // round(x * c) of 8 tokens. The low halves of the 32-bit integers are the even 16-bit lanes.
  INLINE static Reg products(const float* x, float c) {
    const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), c)), second = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + 4), c));
    return vuzp1q_s16(vreinterpretq_s16_s32(first), vreinterpretq_s16_s32(second));
  }
  // sums (+)= v * unit * scale
  INLINE static void flush(Reg v, const float* unit, float scale, float* sums, bool clear) {
    const float32x4_t first = vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), second = vcvtq_f32_s32(vmovl_high_s16(v));
    const float32x4_t a = clear ? vdupq_n_f32(0) : vld1q_f32(sums), b = clear ? vdupq_n_f32(0) : vld1q_f32(sums + 4);
    vst1q_f32(sums, vfmaq_f32(a, first, vmulq_n_f32(vld1q_f32(unit), scale)));
    vst1q_f32(sums + 4, vfmaq_f32(b, second, vmulq_n_f32(vld1q_f32(unit + 4), scale)));
  }
};

struct Lanes16 {
  static constexpr int kTokens = 16;
  struct Reg {
    int16x8_t a, b;
  };
  INLINE static Reg zero() { return {Lanes8::zero(), Lanes8::zero()}; }
  INLINE static Reg load(const int16_t* p) {
    const int16x8x2_t v = vld1q_s16_x2(p);
    return {v.val[0], v.val[1]};
  }
  INLINE static void store(int16_t* p, Reg v) {
    Lanes8::store(p, v.a);
    Lanes8::store(p + 8, v.b);
  }
  // Both halves at once: gcc would make one half's additions and then the other's, all addresses kept in memory between.
  INLINE static Reg add(Reg x, Reg y) {
    Reg r{Lanes8::add(x.a, y.a), Lanes8::add(x.b, y.b)};
    asm("" : "+w"(r.a), "+w"(r.b));
    return r;
  }
  INLINE static Reg products(const float* x, float c) { return {Lanes8::products(x, c), Lanes8::products(x + 8, c)}; }
  INLINE static void flush(Reg v, const float* unit, float scale, float* sums, bool clear) {
    Lanes8::flush(v.a, unit, scale, sums, clear);
    Lanes8::flush(v.b, unit + 8, scale, sums + 8, clear);
  }
};
