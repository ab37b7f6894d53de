// Codes of layout MMA64 to fragments of A, through a table of pairs in shared memory with one copy a bank: no lookup
// waits for another (a table with x copies takes 3.2, 2.9, 2.0 and 1.0 passes a lookup for 1, 8, 16 and 32, by simulation).
// The method is FLUTE's (arXiv 2407.10960, "vectorized lookup tables" and their duplication); the layout is this project's.
//
//   4 bits   256 entries of one pair, at the byte that layout.h stores
//   3 bits   64 entries of one pair, at lower bits | upper bits << 4
//   2 bits   256 entries of two pairs: 8 bytes, which a warp reads in two passes of 16 lanes, so that 16 copies are one a bank
//
// A row of the table is an entry's copies: 128 bytes. Where rows lie 256 bytes apart, one byte permutation makes a lookup's
// address (byte 1 the index, byte 0 the lane's copy); where they lie 128 apart, it takes a shift and a bitwise operation, and
// half the memory. What lies between wide rows stays unused: pieces of 128 bytes suit no buffer of the kernels.
#pragma once

#include "layout.h"
#include "ptx.h"

namespace flute::cuda {

constexpr int kCopyBytes = 128;            // 32 banks of 4 bytes
constexpr int kWideRow = 256, kRow = 128;  // distances of rows

constexpr FLUTE_HD int table_entries(int bits) { return bits == 3 ? 64 : 256; }
constexpr FLUTE_HD int entry_bytes(int bits) { return bits == 2 ? 8 : 4; }
constexpr FLUTE_HD int table_bytes(int bits, int row) { return table_entries(bits) * row; }

// Powers of two between a codebook and its 16-bit table, so that rounding neither overflows nor meets subnormals: the
// largest value becomes 2^top .. 2^(top+1). Exponents are held to where both powers are normal fp32 numbers.
struct Normal {
  float to_table, to_weight;
};
// All lanes of a warp call it; each has one value of the codebook, so that memory is waited for once.
FLUTE_DEVICE Normal normalise(const float* book, int top) {
  uint32_t largest = as_bits(book[lane_id() % 16]) & 0x7fffffff;
  FLUTE_UNROLL
  for (int bit = 1; bit < 16; bit *= 2) {
    const uint32_t other = other_lane(largest, bit);
    largest = other > largest ? other : largest;
  }
  int e = int(largest >> 23) - 127;
  if (largest == 0) e = top;
  e = e < -100 ? -100 : e > 127 ? 127 : e;
  return {as_f32(uint32_t(127 + top - e) << 23), as_f32(uint32_t(127 - top + e) << 23)};
}

// Fills the table at shared address `table` from a shard's 16 values; all threads of `threads`, whole warps, take part, and a
// barrier of the caller's must follow.
template <int kBits, int kRowBytes, bool kF16>
FLUTE_DEVICE void build_table(uint32_t table, const float* book, float to_table, int thread, int threads) {
  constexpr int kChunks = kCopyBytes / 16, kMask = (1 << kBits) - 1;
  const uint32_t rounded = round16<kF16>(book[lane_id() % 16] * to_table);
  const auto pair = [&](int low, int high) { return from_lane(rounded, low) | from_lane(rounded, high) << 16; };
  FLUTE_ROLLED
  for (int i = thread; i < table_entries(kBits) * kChunks; i += threads) {
    const int entry = i / kChunks;
    uint32_t even, odd;
    if constexpr (kBits == 4) {
      even = odd = pair(entry & kMask, entry >> 4);
    } else if constexpr (kBits == 3) {
      even = odd = pair((entry & 3) | (entry >> 4 & 1) << 2, (entry >> 2 & 3) | (entry >> 5) << 2);
    } else {
      even = pair(entry & kMask, entry >> 2 & kMask);
      odd = pair(entry >> 4 & kMask, entry >> 6);
    }
    sts128(table + entry * kRowBytes + i % kChunks * 16, {{even, odd, even, odd}});
  }
}

// A lane's offset in a row: the copy that it reads.
template <int kBits>
FLUTE_DEVICE uint32_t lane_copy(int lane) {
  return uint32_t(lane * entry_bytes(kBits) % kCopyBytes);
}

// The shared address of what byte i of `word` stands for.
template <int kRowBytes>
FLUTE_DEVICE uint32_t lookup_address(uint32_t table, uint32_t copy, uint32_t word, int i) {
  if constexpr (kRowBytes == kWideRow) {
    return table + prmt(word, copy, 0x5504 | i << 4);  // bytes 1 to 3 of `copy` are zero
  } else {
    return table + (((i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7f80) | copy);
  }
}

// Registers a0 .. a3 of unit u and step s from a lane's codes of a block: word w of vector v is codes[4 * v + w]. Only
// the vectors that hold unit u are read. u and s are constants once loops are unrolled.
template <int kBits, int kRowBytes>
FLUTE_DEVICE void fragment(uint32_t table, uint32_t copy, const uint32_t (&codes)[4 * kBits], int u, int s, uint32_t (&a)[4]) {
  if constexpr (kBits == 2) {
    const uint32_t word = codes[u * 2 + s / 2];
    FLUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const Words2 two = lds64(lookup_address<kRowBytes>(table, copy, word, s % 2 * 2 + j));
      a[2 * j] = two.w[0];
      a[2 * j + 1] = two.w[1];
    }
  } else {
    uint32_t word;
    if constexpr (kBits == 4) {
      word = codes[u * 4 + s];
    } else {
      const uint32_t low = codes[u * 2 + s / 2] >> s % 2 * 4, upper = codes[8 + u];
      const uint32_t high = s < 2 ? upper << (4 - 2 * s) : upper >> (2 * s - 4);
      word = ((low & 0x0f0f0f0f) | (high & 0xf0f0f0f0)) & 0x3f3f3f3f;
    }
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) a[i] = lds32(lookup_address<kRowBytes>(table, copy, word, i));
  }
}

}  // namespace flute::cuda
