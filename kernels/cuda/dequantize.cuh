// W in 16 or 32 bits from MMA64, eight inputs of a row at a time: a thread's work, which a test does on the CPU too.
#pragma once

#include "flute.h"
#include "layout.h"
#include "repack.cuh"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace flute::cuda {

FLUTE_HD inline float scale_value(uint16_t bits, int f16) {
#ifdef __CUDA_ARCH__
  return f16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t(bits) << 16);
#else
  return f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
#endif
}

template <Dtype kType>
FLUTE_HD inline uint32_t rounded_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  if (kType == kF16) return uint32_t(__half_as_ushort(__float2half_rn(low))) | uint32_t(__half_as_ushort(__float2half_rn(high))) << 16;
  return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(low))) | uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
#else
  if (kType == kF16) return uint32_t(f32_to_f16(low)) | uint32_t(f32_to_f16(high)) << 16;
  return uint32_t(f32_to_bf16(low)) | uint32_t(f32_to_bf16(high)) << 16;
#endif
}

// Codes k and k+1 of row r of a block, k even, the lower input in the lower half of 2*bits bits: they share bytes, see layout.h.
FLUTE_HD inline unsigned pair_at(const uint8_t* block, int bits, int r, int k) {
  const Place low = code_place(bits, r, k);
  if (bits == 4) return block[low.byte];
  const unsigned both = block[low.byte] >> low.shift & 15;
  if (bits == 2) return both;
  const Place high = high_place(r, k);
  const unsigned upper = block[high.byte] >> high.shift & 3;
  return (both & 3) | (both & 12) << 1 | (upper & 1) << 2 | (upper & 2) << 4;
}

// Writes W[row, k .. k+7] to out in kType: codebook times scale in fp32, rounded once. k is a multiple of 8, as group sizes are;
// r is the row in its strip.
template <Dtype kType>
FLUTE_HD inline void dequantize_octet(const Packed& w, const uint8_t* packed, const float* book, int64_t strip, int r, int k,
                                      Vector* out) {
  const uint8_t* block = block_codes(w, packed, strip, k / kBlockInputs);
  const float scale = scale_value(strip_scales(w, packed, strip, k / w.group_size)[scale_place(r)], w.scale_f16);
  union {
    float value[8];
    Vector vector[2];
  } exact;
  for (int j = 0; j < 4; ++j) {
    const unsigned pair = pair_at(block, w.bits, r, k % kBlockInputs + 2 * j);
    exact.value[2 * j] = book[pair & ((1u << w.bits) - 1)] * scale;
    exact.value[2 * j + 1] = book[pair >> w.bits] * scale;
  }
  if constexpr (kType == kF32) {
    out[0] = exact.vector[0];
    out[1] = exact.vector[1];
  } else {
    Vector narrow;
    for (int j = 0; j < 4; ++j) narrow.word[j] = rounded_pair<kType>(exact.value[2 * j], exact.value[2 * j + 1]);
    *out = narrow;
  }
}

// One row of W, of which a thread makes the octets `first`, `first + step` ...
template <Dtype kType>
FLUTE_HD inline void dequantize_row(const Packed& w, const uint8_t* packed, int64_t row, int first, int step, void* out) {
  constexpr int kVectors = kType == kF32 ? 2 : 1;  // 16 bytes each
  const Shard* table = shards(w, packed);
  const Shard& shard = shard_of_row(table, row);
  const int64_t strip = shard.first_strip + (row - shard.first_row) / kStripRows;
  const int r = int((row - shard.first_row) % kStripRows);
  const float* book = books(packed) + (&shard - table) * 16;
  for (int octet = first; octet < w.k / 8; octet += step) {
    dequantize_octet<kType>(w, packed, book, strip, r, octet * 8, static_cast<Vector*>(out) + int64_t(octet) * kVectors);
  }
}

}  // namespace flute::cuda
