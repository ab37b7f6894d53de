// The AVX-512 BF16 kernels, for bf16 activations: inputs are multiplied in pairs with fp32 sums. What is bf16 of a
// weight differs: gemv rounds the codebook and multiplies sums by the scales, tile rounds the scaled weight. Either way
// a weight is within the half unit that a dequantized bf16 layer has.
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_avx512.inc.h"
#include "decode.inc.h"
#include "math_f32.inc.h"
#include "pairs_bf16.inc.h"

struct MathBf16 : BookPairs {
  using X = uint16_t;
  using Weight = __m512bh;
  static constexpr int kStep = 2, kDepth = 256;  // as in math_f32.inc.h

  static void arrange(X* to, const void* from, int64_t i, int count, Dtype, int bits) {
    BookPairs::arrange(to, kChunk, static_cast<const X*>(from) + i, count, bits);
  }

  INLINE static void convert(X* to, const void* from, int64_t i, int count, Dtype) {
    memcpy(to, static_cast<const X*>(from) + i, size_t(count) * sizeof(X));
  }
  INLINE static void put(float* to, int, F16 even, F16 odd) { _mm512_storeu_si512(to, round_pairs(even, odd)); }
  INLINE static Weight get(const float* p) { return (__m512bh)_mm512_loadu_si512(p); }

  INLINE static F16 multiply_add(F16 sum, Weight w, const X* x) {
    int32_t pair;
    memcpy(&pair, x, sizeof(pair));
    return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(pair));
  }
};

#include "gemv.inc.h"
#include "gemv_trit.inc.h"

// Layout TRIT20: vpermw reads five index bits, which is three digits, of both halves at a time; the halves are a pair of
// inputs.
struct TritsBf16 : MathBf16 {
  static constexpr int kDigits = 3;
  struct Table {
    __m512i digit[kDigits];
  };
  INLINE static Table load_table(const float* codebook) {
    static constexpr TritDigits<uint16_t, kDigits, 32> digits;
    const __m512i values = MathBf16::load_table<2>(codebook);
    Table table;
    unroll<kDigits>(FLUTE_UNROLLED(j) {
      table.digit[j.value] = _mm512_permutexvar_epi16(_mm512_loadu_si512(digits.of[j.value]), values);
    });
    return table;
  }
  template <int J, int>
  INLINE static Weight weight(const Table& table, I16 number) {
    return (__m512bh)_mm512_permutexvar_epi16(number, table.digit[J]);
  }
};

#include "tile.inc.h"

const char* tile_refuses(const Weights&, Dtype dtype) { return dtype == kBf16 ? nullptr : "activations other than bfloat16"; }
const char* gemv_refuses(const Weights& w, Dtype dtype) {
  return groups_of_chunks(w) ? tile_refuses(w, dtype) : "group sizes that are not a multiple of 32";
}

}  // namespace

const Kernel kAvx512Bf16Kernels[] = {
    {"gemv-avx512bf16", kAvx512Bf16, kBf16Weights, 6, gemv_refuses, gemv_passes, gemv_or_trit_run<MathBf16, TritsBf16>, true},
    {"tile-avx512bf16", kAvx512Bf16, kBf16Weights, 5, tile_refuses, tile_passes<MathBf16>, tile_run<MathBf16>},
    {},
};

}  // namespace flute
