// The kernel of 16-bit products, for any number of tokens, in AVX2.
//
// A block of inputs (code_bytes.inc.h) becomes whole multiples of a step, one for each token, and a codebook those of its
// largest magnitude / 16383. Codes are bytes, four inputs of a row to a lane: two byte shuffles look up both halves of
// their 16-bit values, and interleaving those gives two vectors of four rows by four inputs. They are multiplied by the same
// four inputs in every 64 bits and added in pairs, to 32 bits. Nothing rounds until the block ends, where its sums are
// multiplied by the group's scales and the step. Few tokens (kDot16Few) use weights as they come out of the shuffles; for
// more a block of a tile's is decoded once, into the first-level cache.
//
// The step of a token's block of B inputs is the larger of sum |x| / (131072 - B / 2) and max |x| / 32639. So an input has
// 16 bits, the sum of a block's magnitudes is at most 131072 - B / 2 + B / 2, and no sum of products is larger than
// 131072 * 16383 < 2^31. An input is off by at most half a step, a weight by half of 1 / 16383 of its codebook's largest.
//
// Included inside a translation unit's own namespace, after decode.inc.h.

constexpr int64_t kBlock = 128;
#include "code_bytes.inc.h"

constexpr float kBook16 = 16383, kInput16 = 127 * 256 + 127;  // largest values of a codebook and of inputs
constexpr int kDot16Few = FLUTE_TOKENS(4);          // tokens for which weights are multiplied as they are looked up
constexpr int kDot16Tokens = 3;                     // at a time otherwise: 12 sums of 16 rows, and 3 other registers
constexpr int64_t kDot16Inputs = 2 << 20;           // bytes of inputs that share a pass over the weights
constexpr int64_t kDot16BytesPerWorker = 16 << 10;  // packed bytes that are worth another thread, as in gemv.inc.h

// A codebook as the low and the high bytes of 16-bit values, which count for `step` each. Two bits: tables of the lower
// and of the upper code of a nibble.
template <int BITS>
struct Book16 {
  static constexpr int kTables = BITS == 2 ? 2 : 1;
  __m256i low[kTables], high[kTables];
  float step;

  INLINE explicit Book16(const float* book) {
    float largest = 0;
    for (int c = 0; c < 16; ++c) largest = __builtin_fabsf(book[c]) > largest ? __builtin_fabsf(book[c]) : largest;
    step = largest / kBook16;
    alignas(16) uint8_t bytes[kTables][2][16];
    for (int c = 0; c < 16; ++c) {
      for (int t = 0; t < kTables; ++t) {
        const int value = largest > 0 ? int(__builtin_rintf(book[t ? c >> 2 : c] / largest * kBook16)) : 0;
        bytes[t][0][c] = uint8_t(value);
        bytes[t][1][c] = uint8_t(value >> 8);
      }
    }
    for (int t = 0; t < kTables; ++t) {
      low[t] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[t][0]));
      high[t] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)bytes[t][1]));
    }
  }
};

// What indexes a table for vector V of eight rows, whose words are kTileRows apart; a shuffle ignores bits 4 to 6 of a byte.
template <int BITS, int V>
INLINE __m256i indices_of(const uint32_t* codes) {
  const auto word = [codes](int j) __attribute__((always_inline)) { return _mm256_loadu_si256((const __m256i*)(codes + j * kTileRows)); };
  const auto pick = [](uint32_t mask, __m256i v) __attribute__((always_inline)) { return _mm256_and_si256(_mm256_set1_epi32(int(mask)), v); };
  if constexpr (BITS == 4) return pick(0x0f0f0f0f, V % 2 ? _mm256_srli_epi32(word(V / 2), 4) : word(V / 2));
  else if constexpr (BITS == 2) return pick(0x0f0f0f0f, V % 4 < 2 ? word(V / 4) : _mm256_srli_epi32(word(V / 4), 4));
  else {
    // The first two of a half's five codes come to its lower byte by one shift, the last two to the upper by another.
    const auto bytes = [&](__m256i lower, __m256i upper) __attribute__((always_inline)) {
      return pick(0x07070707, _mm256_blendv_epi8(lower, upper, _mm256_set1_epi16(-256)));
    };
    if constexpr (V < 6) {
      const __m256i w = word(V / 2);
      return bytes(V % 2 ? _mm256_srli_epi32(w, 3) : w, _mm256_srli_epi32(w, V % 2 * 3 + 1));
    } else if constexpr (V == 6) {
      return bytes(_mm256_srli_epi32(word(0), 6), _mm256_slli_epi32(word(1), 2));
    } else {
      const __m256i low = pick(0x00070007, _mm256_srli_epi32(word(2), 6)), first = pick(0x01000100, _mm256_srli_epi32(word(0), 7));
      const __m256i second = pick(0x02000200, _mm256_srli_epi32(word(1), 6)), third = pick(0x04000400, _mm256_srli_epi32(word(2), 5));
      return _mm256_or_si256(_mm256_or_si256(low, first), _mm256_or_si256(second, third));
    }
  }
}

// Rows 0, 1, 4, 5 and 2, 3, 6, 7 of eight, four inputs each.
struct Pair16 {
  __m256i first, second;
};
template <int BITS, int V>
INLINE Pair16 weights16(const Book16<BITS>& book, const uint32_t* codes) {
  constexpr int t = BITS == 2 ? V % 2 : 0;
  const __m256i at = indices_of<BITS, V>(codes);
  const __m256i low = _mm256_shuffle_epi8(book.low[t], at), high = _mm256_shuffle_epi8(book.high[t], at);
  return {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}

// sum += products, in place. Left to itself gcc first adds up the products of several steps, keeps the sums in memory, or copies
// each of them once a step.
INLINE void add16(__m256i& sum, __m256i products) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products)); }
INLINE void add32(__m256i& sum, __m256i products) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products)); }

// Inputs of M tokens are one stream of 64-bit values, M of each kind: for every block its heads, then for each of its chunks
// eight times four inputs.
struct Head16 {
  float step, sum;  // the sum of the inputs in steps, for dot16_even
  Head16(float step, float sum) : step(step), sum(sum) {}
  INLINE explicit Head16(uint64_t value) { memcpy(this, &value, sizeof(Head16)); }
};
struct Dot16Size {
  int64_t values = 0;  // of the stream, for each token
  explicit Dot16Size(const Weights& w) {
    for (Block block; block.next(w);) values += 1 + block.chunks() * kChunkVectors;
  }
  int64_t tokens() const {
    const int64_t fit = kDot16Inputs / (values * 8) / 12 * 12;
    return fit > 12 ? fit : 12;
  }
};

// Calls f(group, chunks) for every block. Blocks are whole chunks (dot16_refuses).
template <class F>
INLINE void each_block(const Weights& w, const F& f) {
  const int64_t group_chunks = w.groups == 1 ? w.chunks : w.group_size / kChunk, most = kBlock / kChunk;
  for (int64_t group = 0; group < w.groups; ++group) {
    for (int64_t left = group_chunks; left > 0; left -= most) f(group, left < most ? left : most);
  }
}

// Which bytes of each eight inputs of a chunk a pair of its vectors takes; the top bit: none.
struct Order16 {
  uint8_t bytes[kChunkVectors / 2][kChunk / 8][16];
};
template <int BITS>
constexpr Order16 order16() {
  Order16 order{};
  for (int pair = 0; pair < kChunkVectors / 2; ++pair) {
    for (int eight = 0; eight < kChunk / 8; ++eight) {
      for (int i = 0; i < 16; ++i) {
        const int input = input_of(BITS, pair * 2 + i / 8, i / 2 % 4);
        order.bytes[pair][eight][i] = uint8_t(input / 8 == eight ? input % 8 * 2 + i % 2 : 0x80);
      }
    }
  }
  return order;
}
constexpr Order16 kOrders16[] = {order16<2>(), order16<3>(), order16<4>()};

INLINE float sum_of(F16 v) {
  const __m256 eight = _mm256_add_ps(v.a, v.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest_of(F16 v) {
  const __m256 eight = _mm256_max_ps(v.a, v.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)), two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// One token's inputs to its places in a stream of `width` tokens. `halved`: as dot16_even takes them. An infinity or a NaN
// makes the step, and so every result, NaN; a block of values too small to divide by is zero.
void dot16_quantize(const Call& call, int64_t row, bool halved, uint64_t* to, int width) {
  const Weights& w = call.w;
  const Order16& order = kOrders16[w.bits - 2];
  const __m128i ones = _mm_set1_epi16(1), low = _mm_set1_epi16(0xff), halves = _mm_set_epi64x(0x0f0d0b090e0c0a08, 0x0705030106040200);
  alignas(32) float rows[kBlock];
  for (Block block; block.next(w);) {
    const int64_t inputs = block.chunks() * kChunk;
    F16 sum = zero(), top = zero();
    for (int64_t i = 0; i < inputs; i += 16) {
      const int64_t left = block.end - block.begin - i;
      const F16 v = left > 0 ? load_lanes(call.x, row + block.begin + i, left < 16 ? int(left) : 16, call.dtype) : zero(), size = absolute(v);
      sum = add(sum, size);
      top = {_mm256_max_ps(top.a, size.a), _mm256_max_ps(top.b, size.b)};
      store(rows + i, v);
    }
    float step = sum_of(sum) / (131072 - float(inputs / 2));
    const float least = largest_of(top) / kInput16;
    if (least > step) step = least;
    const F16 inverse = set1(step > 0x1p-100f ? 1 / step : 0);
    uint64_t* head = to;
    to += width;
    __m128i whole_sum = _mm_setzero_si128();
    for (int64_t i = 0; i < inputs; i += kChunk) {
      __m128i whole[4];
      for (int h = 0; h < 2; ++h) {
        const F16 v = mul(load(rows + i + h * 16), inverse);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)), 0xd8);
        whole[h * 2] = _mm256_castsi256_si128(packed);
        whole[h * 2 + 1] = _mm256_extracti128_si256(packed, 1);
      }
      for (int pair = 0; pair < kChunkVectors / 2; ++pair, to += 2 * width) {
        __m128i four = _mm_setzero_si128();
        for (int e = 0; e < 4; ++e) four = _mm_or_si128(four, _mm_shuffle_epi8(whole[e], _mm_loadu_si128((const __m128i*)order.bytes[pair][e])));
        if (halved) {
          whole_sum = _mm_add_epi32(whole_sum, _mm_madd_epi16(four, ones));
          const __m128i high = _mm_add_epi16(four, _mm_set1_epi16(128));
          four = _mm_shuffle_epi8(_mm_or_si128(_mm_and_si128(low, four), _mm_andnot_si128(low, high)), halves);
        }
        _mm_storel_epi64((__m128i*)to, four);
        _mm_storel_epi64((__m128i*)(to + width), _mm_unpackhi_epi64(four, four));
      }
    }
    whole_sum = _mm_hadd_epi32(whole_sum, whole_sum);
    const Head16 both(step, float(_mm_cvtsi128_si32(whole_sum) + _mm_extract_epi32(whole_sum, 1)));
    memcpy(head, &both, sizeof(both));
  }
}

// sums[M][16] of one tile.
template <int BITS, int M>
void dot16_tile(const Weights& w, const uint8_t* tile, const float* codebook, const uint64_t* x, float* sums) {
  constexpr int kAtOnce = M <= 2 ? 2 : 1;  // halves of the tile's rows, whose sums are in registers
  const Book16<BITS> book(codebook);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  __m256 total[2][M][2];
  unroll<2 * M>(FLUTE_UNROLLED(i) { total[i.value / M][i.value % M][0] = total[i.value / M][i.value % M][1] = _mm256_setzero_ps(); });
  each_block(w, [&](int64_t group, int64_t chunks) __attribute__((always_inline)) {
    const F16 scale = mul(load_scales(scales + group * kTileRows, w.scale_dtype), set1(book.step));
    const uint64_t* heads = x;
    x += M;
    unroll<2 / kAtOnce>(FLUTE_UNROLLED(part) {
      const uint32_t* chunk = codes;
      const uint64_t* in = x;
      __m256i sum[kAtOnce][M][2];
      unroll<kAtOnce * M>(FLUTE_UNROLLED(i) { sum[i.value / M][i.value % M][0] = sum[i.value / M][i.value % M][1] = _mm256_setzero_si256(); });
      for (int64_t left = chunks; left; --left, chunk += BITS * kTileRows, in += kChunkVectors * M) {
        if constexpr (part.value == 0) unroll<BITS>(FLUTE_UNROLLED(j) { prefetch_codes(chunk + j.value * kTileRows); });
        unroll<kChunkVectors>(FLUTE_UNROLLED(v) {
          unroll<kAtOnce>(FLUTE_UNROLLED(h) {
            const Pair16 weight = weights16<BITS, v.value>(book, chunk + (part.value + h.value) * 8);
            unroll<M>(FLUTE_UNROLLED(m) {
              const __m256i four = _mm256_set1_epi64x(int64_t(in[v.value * M + m.value]));
              add32(sum[h.value][m.value][0], _mm256_madd_epi16(weight.first, four));
              add32(sum[h.value][m.value][1], _mm256_madd_epi16(weight.second, four));
            });
          });
        });
      }
      unroll<kAtOnce>(FLUTE_UNROLLED(h) {
        constexpr int half = part.value + h.value;
        const __m256 s = half ? scale.b : scale.a, low = _mm256_unpacklo_ps(s, s), high = _mm256_unpackhi_ps(s, s);
        unroll<M>(FLUTE_UNROLLED(m) {
          const __m256 step = _mm256_set1_ps(Head16(heads[m.value]).step);
          __m256* t = total[half][m.value];
          t[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[h.value][m.value][0]), _mm256_mul_ps(low, step), t[0]);
          t[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[h.value][m.value][1]), _mm256_mul_ps(high, step), t[1]);
        });
      });
    });
    codes += chunks * BITS * kTileRows;
    x += chunks * kChunkVectors * M;
  });
  unroll<M>(FLUTE_UNROLLED(m) {
    const auto &lower = total[0][m.value], &upper = total[1][m.value];
    store(sums + m.value * kTileRows, F16{_mm256_hadd_ps(lower[0], lower[1]), _mm256_hadd_ps(upper[0], upper[1])});
  });
}

// The same for two bits and a codebook of evenly spaced values: products of codes, which are bytes, and of inputs halved into
// signed bytes, half as much work as to look up 16-bit values. A value is spacing * (code + from) + rest, where for a
// table with a zero, and for one that is symmetric about it, nothing is left.
template <int M>
void dot16_even(const Weights& w, const uint8_t* tile, const float* codebook, const uint64_t* x, float* sums) {
  constexpr int kAtOnce = M <= 2 ? 2 : 1, kBits = 2;
  static_assert(kBlock / 4 * 2 * 3 * 128 <= 32767, "16-bit sums of two products at a time, each at most 3 * 128");
  const float spacing = codebook[1] - codebook[0], from = spacing != 0 ? __builtin_rintf(codebook[0] / spacing * 2) / 2 : 0;
  const float rest = codebook[0] - from * spacing;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  F16 total[M];
  unroll<M>(FLUTE_UNROLLED(m) { total[m.value] = zero(); });
  each_block(w, [&](int64_t group, int64_t chunks) __attribute__((always_inline)) {
    const F16 scale = load_scales(scales + group * kTileRows, w.scale_dtype);
    const uint64_t* heads = x;
    x += M;
    unroll<2 / kAtOnce>(FLUTE_UNROLLED(part) {
      const uint32_t* chunk = codes;
      const int32_t* in = reinterpret_cast<const int32_t*>(x);
      __m256i low[kAtOnce][M], high[kAtOnce][M];
      unroll<kAtOnce * M>(FLUTE_UNROLLED(i) { low[i.value / M][i.value % M] = high[i.value / M][i.value % M] = _mm256_setzero_si256(); });
      for (int64_t left = chunks; left; --left, chunk += kBits * kTileRows, in += kChunkVectors * M * 2) {
        if constexpr (part.value == 0) unroll<kBits>(FLUTE_UNROLLED(j) { prefetch_codes(chunk + j.value * kTileRows); });
        unroll<kChunkVectors>(FLUTE_UNROLLED(v) {
          unroll<kAtOnce>(FLUTE_UNROLLED(h) {
            const __m256i word = _mm256_loadu_si256((const __m256i*)(chunk + v.value / 4 * kTileRows + (part.value + h.value) * 8));
            const __m256i code = _mm256_and_si256(_mm256_set1_epi8(3), v.value % 4 ? _mm256_srli_epi32(word, v.value % 4 * 2) : word);
            unroll<M>(FLUTE_UNROLLED(m) {
              const int32_t* four = in + (v.value * M + m.value) * 2;
              add16(low[h.value][m.value], _mm256_maddubs_epi16(code, _mm256_set1_epi32(four[0])));
              add16(high[h.value][m.value], _mm256_maddubs_epi16(code, _mm256_set1_epi32(four[1])));
            });
          });
        });
      }
      unroll<kAtOnce>(FLUTE_UNROLLED(h) {
        constexpr int half = part.value + h.value;
        unroll<M>(FLUTE_UNROLLED(m) {
          const Head16 head(heads[m.value]);
          const __m256i lower = _mm256_madd_epi16(low[h.value][m.value], _mm256_set1_epi16(1));
          const __m256i upper = _mm256_madd_epi16(high[h.value][m.value], _mm256_set1_epi16(256));
          // Exact where the table is about zero: whole numbers and halves below 2^22.
          const __m256 whole = _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(lower, upper)), _mm256_set1_ps(from * head.sum));
          const __m256 products = _mm256_fmadd_ps(whole, _mm256_set1_ps(spacing * head.step), _mm256_set1_ps(rest * head.sum * head.step));
          __m256& t = half ? total[m.value].b : total[m.value].a;
          t = _mm256_fmadd_ps(products, half ? scale.b : scale.a, t);
        });
      });
    });
    codes += chunks * kBits * kTileRows;
    x += chunks * kChunkVectors * M;
  });
  unroll<M>(FLUTE_UNROLLED(m) { store(sums + m.value * kTileRows, total[m.value]); });
}

// Whether all shards have two bits and codebooks of evenly spaced values.
bool dot16_is_even(const Weights& w) {
  if (w.bits != 2) return false;
  for (int64_t shard = 0; shard < w.n_shards; ++shard) {
    const float* book = reinterpret_cast<const float*>(w.packed + shard * kBookBytes);
    const float spacing = book[1] - book[0];
    if (book[2] - book[1] != spacing || !(w.ternary || book[3] - book[2] == spacing)) return false;
  }
  return true;
}

// Weights of one block of a tile: [chunk][vector][Pair16 of rows 0 to 7, of rows 8 to 15].
template <int BITS>
void dot16_decode(const Book16<BITS>& book, const uint32_t* codes, int64_t chunks, __m256i* out) {
  for (; chunks; --chunks, codes += BITS * kTileRows) {
    unroll<BITS>(FLUTE_UNROLLED(j) { prefetch_codes(codes + j.value * kTileRows); });
    unroll<kChunkVectors>(FLUTE_UNROLLED(v) {
      unroll<2>(FLUTE_UNROLLED(h) {
        const Pair16 weight = weights16<BITS, v.value>(book, codes + h.value * 8);
        _mm256_store_si256(out++, weight.first);
        _mm256_store_si256(out++, weight.second);
      });
    });
  }
}

// totals[M][4] (+)= one block's weights x inputs, times scales, as the four vectors of weights have their rows, and steps.
template <int M>
void dot16_multiply(const __m256i* weights, int64_t vectors, const uint64_t* x, const __m256* scales, __m256* totals, bool clear) {
  __m256i sum[M][4];
  unroll<4 * M>(FLUTE_UNROLLED(i) { sum[i.value / 4][i.value % 4] = _mm256_setzero_si256(); });
  const uint64_t* heads = x;
  x += M;
  for (; vectors; --vectors, weights += 4, x += M) {
    unroll<M>(FLUTE_UNROLLED(m) {
      const __m256i four = _mm256_set1_epi64x(int64_t(x[m.value]));
      unroll<4>(FLUTE_UNROLLED(i) { add32(sum[m.value][i.value], _mm256_madd_epi16(four, _mm256_load_si256(weights + i.value))); });
    });
  }
  unroll<M>(FLUTE_UNROLLED(m) {
    const __m256 step = _mm256_set1_ps(Head16(heads[m.value]).step);
    unroll<4>(FLUTE_UNROLLED(i) {
      __m256& total = totals[m.value * 4 + i.value];
      total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[m.value][i.value]), _mm256_mul_ps(scales[i.value], step), clear ? _mm256_setzero_ps() : total);
    });
  });
}

// totals[tokens][4] of one tile. Inputs are in streams of kDot16Tokens tokens, the last of what is left.
template <int BITS>
void dot16_blocks(const Weights& w, const uint8_t* tile, const float* codebook, const uint64_t* x, int64_t values, int64_t tokens, __m256* totals) {
  const Book16<BITS> book(codebook);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  int64_t at = 0;  // values of a token before the block
  __m256i weights[kBlock / kChunk * kChunkVectors * 4];
  each_block(w, [&](int64_t group, int64_t chunks) __attribute__((always_inline)) {
    const F16 s = mul(load_scales(scales + group * kTileRows, w.scale_dtype), set1(book.step));
    const __m256 scale[] = {_mm256_unpacklo_ps(s.a, s.a), _mm256_unpackhi_ps(s.a, s.a), _mm256_unpacklo_ps(s.b, s.b), _mm256_unpackhi_ps(s.b, s.b)};
    dot16_decode<BITS>(book, codes, chunks, weights);
    codes += chunks * BITS * kTileRows;
    for (int64_t m = 0; m < tokens; m += kDot16Tokens) {
      const int64_t width = tokens - m < kDot16Tokens ? tokens - m : kDot16Tokens;
      const auto run = width == 1 ? dot16_multiply<1> : width == 2 ? dot16_multiply<2> : dot16_multiply<3>;
      run(weights, chunks * kChunkVectors, x + m * values + at * width, scale, totals + m * 4, at == 0);
    }
    at += 1 + chunks * kChunkVectors;
  });
}

using Dot16Tile = void (*)(const Weights&, const uint8_t*, const float*, const uint64_t*, float*);
template <int BITS, int... M>
Dot16Tile dot16_for(int tokens, std::integer_sequence<int, M...>) {
  static constexpr Dot16Tile table[] = {dot16_tile<BITS, M + 1>...};
  return table[tokens - 1];
}
template <int... M>
Dot16Tile dot16_even_for(int tokens, std::integer_sequence<int, M...>) {
  static constexpr Dot16Tile table[] = {dot16_even<M + 1>...};
  return table[tokens - 1];
}
Dot16Tile dot16_for(const Weights& w, bool even, int tokens) {
  constexpr std::make_integer_sequence<int, kDot16Few> counts;
  if (even) return dot16_even_for(tokens, counts);
  return w.bits == 2 ? dot16_for<2>(tokens, counts) : w.bits == 3 ? dot16_for<3>(tokens, counts) : dot16_for<4>(tokens, counts);
}

int64_t dot16_passes(const Weights& w, int64_t m) { return divide_up(m, Dot16Size(w).tokens()); }

void dot16_run(const Call& call) {
  const Weights& w = call.w;
  const Dot16Size size(w);
  const int64_t limit = size.tokens();
  for (int64_t m0 = 0; m0 < call.m; m0 += limit) {
    const int64_t tokens = call.m - m0 < limit ? call.m - m0 : limit;
    const bool even = tokens <= kDot16Few && dot16_is_even(w);
    const int64_t width = tokens <= kDot16Few ? tokens : kDot16Tokens, blocks = divide_up(tokens, width);
    const auto width_of = [&](int64_t block) { return int(block < blocks - 1 ? width : tokens - block * width); };
    uint64_t* x = static_cast<uint64_t*>(scratch(kInput, size_t(tokens * size.values) * 8));
    for_each(call.parallel, tokens, divide_up(tokens * w.k, 1 << 15), [&](int64_t m) {
      const int64_t block = m / width;
      dot16_quantize(call, (m0 + m) * w.k, even, x + block * width * size.values + m % width, width_of(block));
    });
    const int64_t workers = divide_up(w.bytes * divide_up(tokens, 4), kDot16BytesPerWorker);
    const int64_t wanted = divide_up(4 * call.parallel.threads, w.tiles), most = divide_up(blocks, 4), parts = wanted < most ? wanted : most;
    for_each(call.parallel, w.tiles * parts, workers, [&](int64_t item) {
      const int64_t tile = item / parts, part = item % parts;
      const TileRows rows = tile_rows(w, tile);
      const F16 bias = call.bias ? load_lanes(call.bias, rows.first, rows.count, call.dtype) : zero();
      const auto put = [&](int64_t m, F16 y) {
        store_lanes(call.y, (m0 + m) * w.n + rows.first, rows.count, call.dtype, add(y, bias));
      };
      if (tokens <= kDot16Few) {
        float sums[kDot16Few * kTileRows];
        dot16_for(w, even, int(tokens))(w, tile_data(w, tile), rows.book, x, sums);
        for (int i = 0; i < tokens; ++i) put(i, load(sums + i * kTileRows));
        return;
      }
      const int64_t first = part * blocks / parts * width, last = (part + 1) * blocks / parts * width, now = (last < tokens ? last : tokens) - first;
      __m256* totals = static_cast<__m256*>(scratch(kWorker, size_t(now * 4) * sizeof(__m256)));
      const auto run = w.bits == 2 ? dot16_blocks<2> : w.bits == 3 ? dot16_blocks<3> : dot16_blocks<4>;
      run(w, tile_data(w, tile), rows.book, x + first * size.values, size.values, now, totals);
      for (int64_t i = 0; i < now; ++i) {
        const __m256* t = totals + i * 4;
        put(first + i, {_mm256_hadd_ps(t[0], t[1]), _mm256_hadd_ps(t[2], t[3])});
      }
    });
  }
}

const char* dot16_refuses(const Weights& w, Dtype) {
  return groups_of_chunks(w) ? nullptr : "group sizes that are not a multiple of 32";
}
