// K3: W in 16 or 32 bits from MMA64, for cuBLAS: each weight is its codebook's value times its scale in fp32, rounded once. Any
// rows, any K and group sizes that are multiples of 8.
//
// A warp takes a block of 64 x 64. What its lanes load are fragments; what they store are octets, eight neighbouring inputs of
// a row, of which a warp's 16-byte stores fill whole lines: lane l has inputs 8 * (l % 8) .. + 7 of the rows 2 * (l / 8) and the
// next, of each eight. Codes, not weights, change lanes, by three exchanges with the lane that differs in one bit: of bytes and
// of halves among the four lanes that share a row, then of words between two rows.
//
// Values lie in shared memory so that a lookup is one wavefront (a cycle of shared memory, 128 bytes) for 32 weights,
// whatever the codes are:
//
//   4 bits   16 values
//   3 bits   32 words of which 12 are read, in as many banks: the lower two bits of a code choose among four, and its upper
//            bit is bit 4 of the word's number in even places and bit 3 in odd ones, where it is cheapest to bring
//   2 bits   16 pairs of values, 8 bytes, which a warp reads in two passes of 16 lanes
//
// Budget of a block in 16 bits, counted in the SASS of sm_90a for a layer of one shard (154 of the instructions are what comes
// before the table's barrier):
//
//                                            4 bits   3 bits   2 bits
//   wavefronts: lookups (LDS.32; LDS.64)        128      128      128
//               SHFL                             40       40       20
//               loads (LDG.128), at least        24       20       16
//               stores (STG.128)                 64       64       64
//   LOP3 + SHF + PRMT + SEL, two a cycle        282      310      154
//   F2FP / FMUL                              64/128   64/128   64/128
//   instructions, four a cycle                  922      957      704
//
// An H100's multiprocessor (132 of them at 1.85 GHz) has 12.3 bytes a cycle of 3 TB/s, a block in 800 to 900 cycles. Shared
// memory takes 256, 252, 228 of them and instructions 231, 240, 176: memory is the limit, and the blocks of the 32 warps that a
// multiprocessor holds hide its latency without loads ahead of time. Measured: 28672 x 4096 of 4 bits in 103 us, 2.9 TB/s.
#pragma once

#include "flute.h"
#include "launch.h"
#include "ptx.h"

namespace flute::cuda {

constexpr int kDequantizeWarps = 8, kDequantizeThreads = kDequantizeWarps * 32;
constexpr int kValuesBytes = 32 * int(sizeof(float));

struct DequantizeParameters {
  Packed w;
  const uint8_t* packed;
  int first_row, rows;  // that are asked for
  uint8_t* dense;
  int row_bytes;
  unsigned strip_ctas;  // of a strip, each with a block a warp
};

// Word `i` of the values' table, from a shard's 16.
template <int kBits>
FLUTE_DEVICE float table_value(const float* book, unsigned i) {
  if constexpr (kBits == 4) return book[i % 16];
  if constexpr (kBits == 3) return book[i % 4 + (i < 4 ? 0 : 4)];
  return book[i % 2 ? i / 8 : i / 2 % 4];
}

// Step s of unit u: in byte i the pair of register a_i, of three bits as lower bits | upper bits << 4, with anything above.
template <int kBits>
FLUTE_DEVICE uint32_t step_pairs(const uint32_t (&codes)[4 * kBits], int u, int s) {
  if constexpr (kBits == 4) return codes[u * 4 + s];
  const uint32_t low = codes[u * 2 + s / 2] >> s % 2 * 4, upper = codes[8 + u];
  const uint32_t high = s < 2 ? upper << (4 - 2 * s) : upper >> (2 * s - 4);
  return (low & 0x0f0f0f0f) | (high & 0xf0f0f0f0);
}

// Of the four lanes of a row: byte j of lane i becomes byte i of lane j.
struct Transpose {
  uint32_t bytes, halves;  // prmt's selectors
  FLUTE_DEVICE explicit Transpose(unsigned lane) : bytes(lane & 1 ? 0x3715 : 0x6240), halves(lane & 2 ? 0x3276 : 0x5410) {}
  FLUTE_DEVICE uint32_t operator()(uint32_t word) const {
    word = prmt(word, other_lane(word, 1), bytes);
    return prmt(word, other_lane(word, 2), halves);
  }
};

// The octets of unit u: byte j of pairs[e][b] holds inputs 2j and 2j + 1 of row 8 b + e, from the lane's first row on.
// Of two bits, both b have their codes in one word, a nibble each.
template <int kBits>
FLUTE_DEVICE void octets(const uint32_t (&codes)[4 * kBits], const Transpose& transpose, unsigned lane, int u,
                         uint32_t (&pairs)[2][2]) {
  uint32_t words[2][2];  // h: which half of the block's inputs; b as above; byte j goes to lane j of the row's four
  FLUTE_UNROLL
  for (int h = 0; h < 2; ++h) {
    if constexpr (kBits == 2) {
      words[h][0] = codes[u * 2 + h];
    } else {
      const uint32_t even = step_pairs<kBits>(codes, u, 2 * h), odd = step_pairs<kBits>(codes, u, 2 * h + 1);
      words[h][0] = prmt(even, odd, 0x6420);
      words[h][1] = prmt(even, odd, 0x7531);
    }
  }
  const bool upper = lane & 4;
  FLUTE_UNROLL
  for (int b = 0; b < 2; ++b) {
    if (kBits == 2 && b == 1) {
      pairs[0][1] = pairs[0][0];
      pairs[1][1] = pairs[1][0];
      break;
    }
    const uint32_t left = transpose(words[0][b]), right = transpose(words[1][b]);
    const uint32_t other = other_lane(upper ? left : right, 4);
    pairs[0][b] = upper ? other : left;
    pairs[1][b] = upper ? right : other;
  }
}

// The eight values that an octet's word stands for. `table` is the shared address of the values, a multiple of 256.
template <int kBits>
FLUTE_DEVICE void look_up(uint32_t table, uint32_t word, int b, float (&value)[8]) {
  const auto address = [&](uint32_t offsets, int j) { return prmt(offsets, table, 0x7650 | j); };
  if constexpr (kBits == 2) {
    const uint32_t offsets = (b == 0 ? word << 3 : word >> 1) & 0x78787878;
    FLUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Words2 two = lds64(address(offsets, j));
      value[2 * j] = as_f32(two.w[0]);
      value[2 * j + 1] = as_f32(two.w[1]);
    }
  } else {
    const uint32_t even = kBits == 4 ? word << 2 & 0x3c3c3c3c : word << 2 & 0x4c4c4c4c;
    const uint32_t odd = kBits == 4 ? word >> 2 & 0x3c3c3c3c : word & 0x2c2c2c2c;
    FLUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      value[2 * j] = as_f32(lds32(address(even, j)));
      value[2 * j + 1] = as_f32(lds32(address(odd, j)));
    }
  }
}

template <Dtype kType>
constexpr int kOctetVectors = kType == kF32 ? 2 : 1;  // of 16 bytes
template <Dtype kType>
FLUTE_DEVICE void round_octet(const float (&value)[8], Words4 (&octet)[kOctetVectors<kType>]) {
  FLUTE_UNROLL
  for (int i = 0; i < 4 * kOctetVectors<kType>; ++i) {
    uint32_t& word = octet[i / 4].w[i % 4];
    if constexpr (kType == kF32) word = as_bits(value[i]);
    else word = round_pair<kType == kF16>(value[2 * i], value[2 * i + 1]);
  }
}

template <int kBits, Dtype kType>
FLUTE_KERNEL(kDequantizeThreads, 4) dequantize(FLUTE_PARAMETER DequantizeParameters p) {
  const Packed& w = p.w;
  const unsigned thread = thread_id(), cta = cta_id(), lane = thread % 32;
  const int block = int(cta % p.strip_ctas * kDequantizeWarps + thread / 32);
  int s = 0;
  Shard shard = shard_of(w, p.packed, s);
  FLUTE_ROLLED
  while (p.first_row >= shard.first_row + shard.rows) shard = shard_of(w, p.packed, ++s);
  const int strip = shard.first_strip + (p.first_row - shard.first_row) / kStripRows + int(cta / p.strip_ctas);
  if (strip >= w.strips) return;
  FLUTE_ROLLED
  while (strip >= shard.first_strip + shard.strips) shard = shard_of(w, p.packed, ++s);

  // Loads first: what the table takes then passes while they are under way.
  const int row = int(lane / 8 * 2), k = block * kBlockInputs + int(lane % 8 * 8);  // of the lane's octets, the first row of a strip
  uint32_t codes[4 * kBits];
  Words4 scales[2]{};
  if (block < w.blocks) {
    FLUTE_UNROLL
    for (int v = 0; v < kBits; ++v) {
      const Words4 vector = load_l2(block_codes(w, p.packed, strip, block) + v * kVectorBytes + lane * 16);
      FLUTE_UNROLL
      for (int i = 0; i < 4; ++i) codes[4 * v + i] = vector.w[i];
    }
    if (k < w.k) {
      const uint16_t* const group = strip_scales(w, p.packed, strip, unsigned(k) / unsigned(w.group_size));
      FLUTE_UNROLL
      for (int e = 0; e < 2; ++e) scales[e] = load_l2(group + scale_place(row + e));
    }
  }
  const uint32_t table = shared_base();
  if (thread < 32) sts32(table + 4 * lane, as_bits(table_value<kBits>(books(p.packed) + s * 16, lane)));
  barrier();
  if (block >= w.blocks) return;

  // Of the rows that are asked for: where the lane's first is, below zero before them, and where they or the shard end.
  const int first = shard.first_row + (strip - shard.first_strip) * kStripRows - p.first_row + row;
  const int left = shard.first_row + shard.rows - p.first_row;
  const unsigned end = k >= w.k ? 0 : left < p.rows ? left : p.rows;
  constexpr int kVectors = kOctetVectors<kType>;
  uint8_t* to = p.dense + int64_t(first) * p.row_bytes + k / 8 * 16 * kVectors;
  const Transpose transpose(lane);
  FLUTE_UNROLL
  for (int u = 0; u < 4; ++u) {
    uint32_t pairs[2][2];
    octets<kBits>(codes, transpose, lane, u, pairs);
    FLUTE_UNROLL
    for (int b = 0; b < 2; ++b) {
      FLUTE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int r = kUnitRows * u + 8 * b + e;
        const uint16_t half = uint16_t(scales[e].w[u] >> 16 * b);
        const float scale = w.scale_f16 ? widen16<true>(half) : widen16<false>(half);
        float value[8];
        look_up<kBits>(table, pairs[e][b], b, value);
        FLUTE_UNROLL
        for (int j = 0; j < 8; ++j) value[j] *= scale;
        Words4 octet[kVectors];
        round_octet<kType>(value, octet);
        if (unsigned(first + r) < end) {
          FLUTE_UNROLL
          for (int i = 0; i < kVectors; ++i) store_global(to + 16 * i, octet[i]);
        }
        to += (e == 0 ? 1 : 7) * int64_t(p.row_bytes);
      }
    }
  }
}

}  // namespace flute::cuda
