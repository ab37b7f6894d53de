// Between the checkpoint's order (lut-v1) and MMA64, piece by piece: a thread makes one piece of the result, and a test
// makes all of them on the CPU. See layout.h.
#pragma once

#include "layout.h"

namespace flute::cuda {

// A layer as the checkpoint has it: qweight [N, K*bits/8], scales [N, G], codebooks [S, 2^bits].
struct Parts {
  const uint8_t* qweight;
  const uint16_t* scales;
  const float* codebooks;
};
struct PartsOut {
  uint8_t* qweight;
  uint16_t* scales;
  float* codebooks;
};

struct alignas(16) Vector {
  uint32_t word[4];
};

FLUTE_HD inline const Shard& shard_of_strip(const Shard* table, int64_t strip) {
  while (strip >= table->first_strip + table->strips) ++table;
  return *table;
}
FLUTE_HD inline const Shard& shard_of_row(const Shard* table, int64_t row) {
  while (row >= table->first_row + table->rows) ++table;
  return *table;
}

// Codes k and k+1 of a row, k even: at most two bytes hold them.
FLUTE_HD inline unsigned stream_pair(const uint8_t* row, int bits, int64_t k) {
  const int64_t bit = k * bits;
  const int shift = int(bit % 8);
  unsigned bytes = row[bit / 8];
  if (shift + 2 * bits > 8) bytes |= unsigned(row[bit / 8 + 1]) << 8;
  return bytes >> shift & ((1u << 2 * bits) - 1);
}

// The pair that fragment register `reg` (a0 .. a3) of a lane holds, of unit `unit` and step `step` of a block; 0 where the
// shard or K has ended.
FLUTE_HD inline unsigned fragment_pair(const Packed& w, const Parts& in, const Shard& shard, int64_t strip, int64_t block, int lane,
                                       int unit, int step, int reg) {
  const int64_t row = (strip - shard.first_strip) * kStripRows + unit * kUnitRows + lane / 4 + reg % 2 * 8;
  const int64_t k = block * kBlockInputs + step * kStepInputs + lane % 4 * 2 + reg / 2 * 8;
  if (row >= shard.rows || k >= w.k) return 0;
  return stream_pair(in.qweight + (shard.first_row + row) * (int64_t(w.k) / 8 * w.bits), w.bits, k);
}

FLUTE_HD inline Vector pack_codes(const Packed& w, const Parts& in, const Shard* table, int64_t index) {
  const int lane = int(index % 32), vector = int(index / 32 % w.bits);
  const int64_t block = index / 32 / w.bits % w.blocks, strip = index / 32 / w.bits / w.blocks;
  const Shard& shard = shard_of_strip(table, strip);
  const auto pair = [&](int unit, int step, int reg) { return fragment_pair(w, in, shard, strip, block, lane, unit, step, reg); };
  const auto word = [&](int i) {
    uint32_t value = 0;
    for (int reg = 0; reg < 4; ++reg) {
      if (w.bits == 4) {
        value |= pair(vector, i, reg) << 8 * reg;
      } else if (w.bits == 3 && vector == 2) {
        for (int step = 0; step < 4; ++step) {
          const unsigned codes = pair(i, step, reg);
          value |= ((codes >> 2 & 1) | (codes >> 4 & 2)) << (8 * reg + 2 * step);
        }
      } else {
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned codes = pair(2 * vector + i / 2, i % 2 * 2 + odd, reg);
          if (w.bits == 2) value |= codes << (16 * odd + 8 * (reg / 2) + 4 * (reg % 2));
          else value |= ((codes & 3) | (codes >> 1 & 12)) << (8 * reg + 4 * odd);
        }
      }
    }
    return value;
  };
  return {{word(0), word(1), word(2), word(3)}};
}

FLUTE_HD inline Vector pack_scales(const Packed& w, const Parts& in, const Shard* table, int64_t index) {
  const int place = int(index % 8);  // r % 8 of the eight rows whose scales lie together, see scale_place()
  const int64_t group = index / 8 % w.groups, strip = index / 8 / w.groups;
  const Shard& shard = shard_of_strip(table, strip);
  Vector out{};
  for (int j = 0; j < 8; ++j) {
    const int64_t row = (strip - shard.first_strip) * kStripRows + j / 2 * kUnitRows + j % 2 * 8 + place;
    const uint32_t scale = row < shard.rows ? in.scales[(shard.first_row + row) * w.groups + group] : 0;
    out.word[j / 2] |= scale << 16 * (j % 2);
  }
  return out;
}

FLUTE_HD inline Vector pack_books(const Packed& w, const Parts& in, int64_t index) {
  union {
    float value[4];
    Vector vector;
  } out;
  const int size = 1 << w.bits;
  for (int j = 0; j < 4; ++j) out.value[j] = in.codebooks[index / 4 * size + (index % 4 * 4 + j) % size];
  return out.vector;
}

// Vector `index` of the packed tensor, of bytes / 16. The shards' table has been copied there before: it is left alone.
FLUTE_HD inline void pack_vector(const Packed& w, const Parts& in, uint8_t* packed, int64_t index) {
  constexpr int64_t kBookVectors = 16 * sizeof(float) / sizeof(Vector);
  const Shard* table = shards(w, packed);
  const int64_t books_end = w.n_shards * kBookVectors, table_end = books_end + w.n_shards;
  const int64_t scales = w.scales_offset / int64_t(sizeof(Vector)), codes = w.codes_offset / int64_t(sizeof(Vector));
  if (index >= books_end && index < table_end) return;
  Vector& out = reinterpret_cast<Vector*>(packed)[index];
  if (index < books_end) out = pack_books(w, in, index);
  else if (index < scales) out = Vector{};
  else if (index < codes) out = pack_scales(w, in, table, index - scales);
  else out = pack_codes(w, in, table, index - codes);
}

// The way back, in pieces of eight codes, one scale or one value of a codebook.
constexpr int kPieceInputs = 8;
FLUTE_HD inline int64_t unpack_pieces(const Packed& w) {
  return int64_t(w.n) * (w.k / kPieceInputs + w.groups) + (int64_t(w.n_shards) << w.bits);
}
FLUTE_HD inline void unpack_piece(const Packed& w, const uint8_t* packed, const PartsOut& out, int64_t index) {
  const Shard* table = shards(w, packed);
  const int64_t row_pieces = w.k / kPieceInputs, code_pieces = w.n * row_pieces, scale_pieces = int64_t(w.n) * w.groups;
  if (index < code_pieces) {
    const int64_t row = index / row_pieces, k = index % row_pieces * kPieceInputs;
    const Shard& shard = shard_of_row(table, row);
    const int64_t strip = shard.first_strip + (row - shard.first_row) / kStripRows;
    const uint8_t* block = block_codes(w, packed, strip, k / kBlockInputs);
    uint32_t codes = 0;
    for (int j = 0; j < kPieceInputs; ++j) {
      codes |= code_at(block, w.bits, int((row - shard.first_row) % kStripRows), int((k + j) % kBlockInputs)) << w.bits * j;
    }
    for (int j = 0; j < w.bits; ++j) out.qweight[index * w.bits + j] = uint8_t(codes >> 8 * j);
    return;
  }
  index -= code_pieces;
  if (index < scale_pieces) {
    const int64_t row = index / w.groups, group = index % w.groups;
    const Shard& shard = shard_of_row(table, row);
    const int64_t strip = shard.first_strip + (row - shard.first_row) / kStripRows;
    out.scales[index] = strip_scales(w, packed, strip, group)[scale_place(int((row - shard.first_row) % kStripRows))];
    return;
  }
  index -= scale_pieces;
  out.codebooks[index] = books(packed)[(index >> w.bits) * 16 + (index & ((1 << w.bits) - 1))];
}

}  // namespace flute::cuda
