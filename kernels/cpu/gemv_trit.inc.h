// C1 for layout TRIT20: gemv.inc.h's way of few tokens, with codes that are digits of fractions (flute.h).
//
// A product of 16-bit halves takes Trits::kDigits codes of both halves out of a word at once. A table lookup with that
// number gives one of their values, so the products are shared among kDigits lookups, and nothing is left of the search
// for a code. A row has one scale: sums are multiplied by it once, at the end. Any number of tokens is taken; a tile, which
// is small, is read again for every few of them.
//
// Included inside a translation unit's own namespace, after gemv.inc.h.

// The 16-bit halves of words times a number: the upper halves of the products, and the lower. The number is hidden from the
// compiler, which would make four shifts and subtractions of a product with 27.
//
// kTritSums: independent sums that fit in registers beside the rest. kTritAhead: there is room for a chunk's numbers too,
// which are then made while the chunk before is multiplied: two products and a lookup in a row are more than the CPU's
// scheduler sees beyond (measured, Zen 4: a sixth of the time).
#ifdef __AVX512BW__
constexpr int kTritSums = 8;
constexpr bool kTritAhead = true;
INLINE __m512i factor(uint16_t by) {
  __m512i m = _mm512_set1_epi16(short(by));
  asm("" : "+v"(m));
  return m;
}
INLINE I16 multiply_high(I16 v, uint16_t by) { return _mm512_mulhi_epu16(v, factor(by)); }
INLINE I16 multiply_low(I16 v, uint16_t by) { return _mm512_mullo_epi16(v, factor(by)); }
#else
constexpr int kTritSums = 4;
constexpr bool kTritAhead = false;
INLINE __m256i factor(uint16_t by) {
  __m256i m = _mm256_set1_epi16(short(by));
  asm("" : "+x"(m));
  return m;
}
INLINE I16 multiply_high(I16 v, uint16_t by) {
  const __m256i m = factor(by);
  return {_mm256_mulhi_epu16(v.a, m), _mm256_mulhi_epu16(v.b, m)};
}
INLINE I16 multiply_low(I16 v, uint16_t by) {
  const __m256i m = factor(by);
  return {_mm256_mullo_epi16(v.a, m), _mm256_mullo_epi16(v.b, m)};
}
#endif

constexpr uint16_t power_of_3(int n) { return n ? uint16_t(3 * power_of_3(n - 1)) : 1; }

// of[j][i], i < 3^DIGITS: digit j, the first the most significant, of the number i.
template <class T, int DIGITS, int SIZE>
struct TritDigits {
  T of[DIGITS][SIZE];
  constexpr TritDigits() : of() {
    for (int i = 0; i < SIZE; ++i) {
      for (int j = DIGITS - 1, rest = i; j >= 0; --j, rest /= 3) of[j][i] = T(rest % 3);
    }
  }
};

// fp32. A permute of 32-bit lanes reads four bits of an index in AVX-512, which is two digits, and three in AVX2.
struct TritsF32 : MathF32 {
#ifdef __AVX512BW__
  static constexpr int kDigits = 2;
#else
  static constexpr int kDigits = 1;
#endif
  struct Table {
    Book<2> digit[kDigits];
  };
  INLINE static Table load_table(const float* codebook) {
    static constexpr TritDigits<uint32_t, kDigits, 16> digits;
    const Book<2> book = load_book<2>(codebook);
    Table table;
    unroll<kDigits>(FLUTE_UNROLLED(j) {
      float values[16];
      store(values, lookup<2, 0>(book, load_words(digits.of[j.value])));
      table.digit[j.value] = load_book<2>(values);
    });
    return table;
  }
  // Of digit J: the value in the lower half, or in the upper.
  template <int J, int HALF>
  INLINE static F16 weight(const Table& table, I16 number) {
    return lookup<2, 16 * HALF>(table.digit[J], number);
  }
};

// sums[M][16] of one tile for M tokens; x are inputs with rows of `stride`, zero up to a multiple of 20.
template <class Trits, int M>
void trit_tile(const Weights& w, const uint8_t* tile, const float* codebook, const typename Trits::X* x, int64_t stride, float* sums) {
  // Independent sums for each token; few tokens need several to fill the time that one addition takes.
  constexpr int kChains = 4 * M <= kTritSums ? 4 : 2 * M <= kTritSums ? 2 : 1;
  constexpr int kDigits = Trits::kDigits, kHalf = kTritChunk / 2, kNumbers = (kHalf + kDigits - 1) / kDigits, kHalves = 2 / Trits::kStep;
  const auto table = Trits::load_table(codebook);
  F16 part[M][kChains];
  unroll<M>(FLUTE_UNROLLED(m) {
    unroll<kChains>(FLUTE_UNROLLED(c) { part[m.value][c.value] = zero(); });
  });
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  // The last number may have digits beyond the tenth; those before them are right, and nobody reads the others.
  I16 next[kNumbers];
  const auto make = [&](const uint32_t* at) __attribute__((always_inline)) {
    const I16 fraction = load_words(at);
    unroll<kNumbers>(FLUTE_UNROLLED(n) {
      constexpr int before = decltype(n)::value * kDigits;
      if constexpr (before == 0) next[0] = multiply_high(fraction, power_of_3(kDigits));
      else next[n.value] = multiply_high(multiply_low(fraction, power_of_3(before)), power_of_3(kDigits));
    });
  };
  if (kTritAhead) make(codes);
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk, codes += kTileRows, x += kTritChunk) {
    prefetch_codes(codes);
    I16 numbers[kNumbers];
    if (!kTritAhead) make(codes);
    unroll<kNumbers>(FLUTE_UNROLLED(n) { numbers[n.value] = next[n.value]; });
    if (kTritAhead) make(codes + kTileRows);  // after the last chunk of the scales, which nobody reads
    unroll<kNumbers>(FLUTE_UNROLLED(n) {
      const I16 number = numbers[n.value];
      unroll<kDigits>(FLUTE_UNROLLED(j) {
        constexpr int code = decltype(n)::value * kDigits + decltype(j)::value;
        if constexpr (code < kHalf) {
          unroll<kHalves>(FLUTE_UNROLLED(half) {
            constexpr int input = 2 * code + decltype(half)::value, step = input / Trits::kStep;
            const auto weight = Trits::template weight<decltype(j)::value, decltype(half)::value>(table, number);
            unroll<M>(FLUTE_UNROLLED(m) {
              F16& p = part[m.value][step % kChains];
              p = Trits::multiply_add(p, weight, x + m.value * stride + input);
            });
          });
        }
      });
    });
  }
  const F16 scale = load_scales(reinterpret_cast<const uint16_t*>(tile + w.scale_offset), w.scale_dtype);
  unroll<M>(FLUTE_UNROLLED(m) {
    F16* p = part[m.value];
    unroll<kChains - 1>(FLUTE_UNROLLED(c) { p[0] = add(p[0], p[c.value + 1]); });
    store(sums + m.value * kTileRows, mul(p[0], scale));
  });
}

template <class Trits>
using TritTile = void (*)(const Weights&, const uint8_t*, const float*, const typename Trits::X*, int64_t, float*);

template <class Trits, int... M>
TritTile<Trits> trit_for(int m, std::integer_sequence<int, M...>) {
  static constexpr TritTile<Trits> table[] = {trit_tile<Trits, M + 1>...};
  return table[m - 1];
}

// gemv_run for either layout.
template <class Math, class Trits>
void gemv_or_trit_run(const Call& call) {
  using X = typename Trits::X;
  const Weights& w = call.w;
  if (!w.trits) return gemv_run<Math>(call);
  // A cache line between rows, as in gemv_run; conversions write up to 15 inputs too many into it.
  const int64_t inputs = w.chunks * kTritChunk, stride = inputs + 64 / int64_t(sizeof(X));
  for (int64_t m0 = 0; m0 < call.m; m0 += kGemvTokens) {
    const int64_t tokens = call.m - m0 < kGemvTokens ? call.m - m0 : kGemvTokens;
    X* x = static_cast<X*>(scratch(kInput, size_t(tokens * stride) * sizeof(X)));
    for (int64_t m = 0; m < tokens; ++m) {
      X* row = x + m * stride;
      for (int64_t k = 0; k < w.k; k += 16) {
        Trits::convert(row + k, call.x, (m0 + m) * w.k + k, int(w.k - k < 16 ? w.k - k : 16), call.dtype);
      }
      memset(row + w.k, 0, size_t(inputs - w.k) * sizeof(X));
    }
    gemv_tiles(call, m0, tokens, [&](const TileRows& rows, int64_t tile, int64_t m, int now, float* sums) {
      const auto run = trit_for<Trits>(now, std::make_integer_sequence<int, kMaxTokens>{});
      run(w, tile_data(w, tile), rows.book, x + m * stride, stride, sums);
    });
  }
}
