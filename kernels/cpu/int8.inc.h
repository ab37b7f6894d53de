// Weights and inputs as 8-bit integers, for the kernels that multiply them.
//
// Inputs: a block is a group of weights, or at most kBlock inputs of a longer one. A token's block has one fp32 step,
// its largest magnitude / 127, and its inputs round to the nearest multiple of it. Weights: a shard's codebook rounds to
// multiples of its largest magnitude / 127, so that a ternary {-a, 0, a} is exact; a group's scale stays what it is.
// Hence an input is off by half its block's step and a weight by half its codebook's step times its scale: the bound
// that tests/test_kernels.cpp derives. Within a block sums of products are whole numbers and exact.
//
// Included inside a translation unit's own namespace, after decode.inc.h; AVX-512 F, BW, DQ and VL.

constexpr int64_t kBlock = 256;    // a sum of kBlock products of at most 127 * 127 is below 2^22: exact in fp32 too
#include "code_bytes.inc.h"

// Four codes of each row as bytes. Three-bit codes have five to a 16-bit half: the first two go to its low byte by one
// shift and the last two to its high byte by another; the middle ones of all words, and codes 30 and 31, make two more.
template <int BITS, int V>
INLINE __m512i codes_of(const uint32_t* chunk) {
  const auto word = [chunk](int j) __attribute__((always_inline)) { return load_words(chunk + j * kTileRows); };
  if constexpr (BITS == 4) return _mm512_and_si512(shift_right<V % 2 * 4>(word(V / 2)), _mm512_set1_epi8(15));
  else if constexpr (BITS == 2) return _mm512_and_si512(shift_right<V % 4 * 2>(word(V / 4)), _mm512_set1_epi8(3));
  else {
    I16 low, high;
    if constexpr (V < 6) {
      low = shift_right<V % 2 * 3>(word(V / 2));
      high = shift_right<V % 2 * 3 + 1>(word(V / 2));
    } else if constexpr (V == 6) {
      low = shift_right<6>(word(0));
      high = _mm512_slli_epi32(word(1), 2);
    } else {
      low = shift_right<6>(word(2));
      high = merge(0x01000100, shift_right<7>(word(0)), merge(0x02000200, shift_right<6>(word(1)), shift_right<5>(word(2))));
    }
    return _mm512_and_si512(merge(0x00ff00ff, low, high), _mm512_set1_epi8(7));
  }
}

// A codebook as bytes, with an offset to make them unsigned if it is wanted; a value is step * (byte - offset).
struct Int8Book {
  __m512i bytes;
  float step;
};
INLINE Int8Book int8_book(const float* book, int offset) {
  const __m512 values = _mm512_loadu_ps(book);
  const float largest = _mm512_reduce_max_ps(_mm512_abs_ps(values));
  const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(values, _mm512_set1_ps(largest > 0 ? 127 / largest : 0)));
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(offset)));
  return {_mm512_broadcast_i32x4(bytes), largest / 127};
}
template <int BITS, int V>
INLINE __m512i weight_bytes(const Int8Book& book, const uint32_t* chunk) {
  return _mm512_shuffle_epi8(book.bytes, codes_of<BITS, V>(chunk));
}

// Quantizes a block of inputs of x, whose row begins at `row`: put(i, bytes) takes chunk i of the block, 32 bytes in the
// order of input_of, zero outside of the block. An infinity or a NaN makes the step, and so every result, NaN. A block
// of values below 2^-119, whose reciprocal would overflow, is zero.
struct Quantized {
  float step;
  int32_t sum;  // of the bytes
};
struct Quantizer {
  const void* x;
  Dtype dtype;
  __m256i low, high;  // the bytes of a chunk's lower and upper sixteen inputs that each byte takes; the top bit: none

  Quantizer(const void* x, Dtype dtype, int bits) : x(x), dtype(dtype) {
    alignas(32) uint8_t order[2][kChunk];
    for (int i = 0; i < kChunk; ++i) {
      const int input = input_of(bits, i / 4, i % 4);
      order[0][i] = uint8_t(input < 16 ? input : 0x80);
      order[1][i] = uint8_t(input < 16 ? 0x80 : input - 16);
    }
    low = _mm256_load_si256(reinterpret_cast<const __m256i*>(order[0]));
    high = _mm256_load_si256(reinterpret_cast<const __m256i*>(order[1]));
  }

  INLINE __m512 load(int64_t i, __mmask16 mask) const {
    if (dtype == kF32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + i);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + i);
    if (dtype == kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static uint32_t inside(const Block& block, int64_t chunk) {
    const int64_t from = block.begin - chunk * kChunk, to = block.end - chunk * kChunk;
    return uint32_t((to < kChunk ? uint64_t(1) << to : uint64_t(1) << kChunk) - (from > 0 ? uint64_t(1) << from : 1));
  }

  template <class Put>
  INLINE Quantized operator()(int64_t row, const Block& block, const Put& put) const {
    const int64_t first = block.first_chunk(), chunks = block.chunks();
    __m512i bits = _mm512_setzero_si512();  // of magnitudes: as integers they are in order, and NaNs are the largest
    for (int64_t i = 0; i < chunks; ++i) {
      const uint32_t mask = inside(block, first + i);
      for (int h = 0; h < 2; ++h) {
        const __m512 v = load(row + (first + i) * kChunk + h * 16, __mmask16(mask >> h * 16));
        bits = _mm512_max_epu32(bits, _mm512_castps_si512(_mm512_abs_ps(v)));
      }
    }
    const uint32_t top = _mm512_reduce_max_epu32(bits);
    const float largest = bits_to_f32(top >= 0x7f800000 ? 0x7fc00000 : top);
    const __m512 inverse = _mm512_set1_ps(largest >= 0x1p-119f ? 127 / largest : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < chunks; ++i) {
      const uint32_t mask = inside(block, first + i);
      __m128i bytes[2];
      for (int h = 0; h < 2; ++h) {
        const __m512 v = load(row + (first + i) * kChunk + h * 16, __mmask16(mask >> h * 16));
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
        sum = _mm512_add_epi32(sum, whole);
        bytes[h] = _mm512_cvtepi32_epi8(whole);
      }
      put(i, _mm256_or_si256(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes[0]), low),
                             _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes[1]), high)));
    }
    return {largest / 127, _mm512_reduce_add_epi32(sum)};
  }
};
