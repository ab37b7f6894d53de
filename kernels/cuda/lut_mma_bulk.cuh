// K1 where there are bulk copies (Hopper), for at most 32 tokens: the products of lut_mma.cuh, with other loads and other tiles.
//
// Measured on an H100 (132 multiprocessors, 1.85 GHz; an empty kernel in a graph takes 1 us), what costs there besides bytes, of
// which the shape below is made:
//
//   Requests  The copy engine takes one in 36 cycles, whatever its size: 16 warps that fetch their own blocks, three requests
//             each, begin 5000 cycles late. So one thread brings an item for all warps in five requests, the first before
//             anything else.
//   Table     Built from single loads of the codebook it took 5000 cycles; by shuffles it waits for memory once (decode.h). One
//             for a multiprocessor, its rows 256 bytes apart: a lookup's address is one byte permutation.
//   Sums      Eight barriers for a strip's warps took 1500 cycles; now all write, one barrier, and one warp a unit adds.
//   Sharing   Fences and counters took 2500 cycles. What a CTA has of a tile that others end is sent word by word instead, and a
//             word that has not come is 0, so that none of both is needed: who reads waits for the words themselves. A tile's
//             last CTA adds it up, when its own work is done, and waits for CTAs of lower numbers alone, which a GPU starts
//             first, so that one of them always goes on. Clusters would have the sums nearer, but of four CTAs with a
//             multiprocessor each an H100 ran 30 at a time, not 33, of eight 15 at most (measured).
//   L2        Weights are the first to go (evict_first), so that it keeps activations: 2 to 5 us of a LLaMA-3-8B layer's 80.
//
// A tile is two strips of 64 rows x 8, 16 or 32 tokens, an item a slice of it along K, of which each of 16 warps has one block of
// 64 inputs: of 64 rows, or, for 32 tokens, of 32 rows, whose sums and x are what a thread's registers hold. For SwiGLU the two
// strips are the same rows of gate and up, each with its own table, so that the product needs no other tile.
//
// The kernel is launched early: while the one before it ends, it brings the first weights and builds the table. So a norm between
// two calls would cost more than its own time; AddNorm and Normed of launch.h have it in the calls' own last steps.
#pragma once

#include "lut_mma.cuh"
#include "ptx_sm90.h"

namespace flute::cuda {

constexpr int kBulkWarps = 16, kBulkConsumers = kBulkWarps * 32, kBulkThreads = kBulkConsumers + 128;
// At launch a thread has 65536 / 640 registers, rounded down to a multiple of 8: 96. The sum must stay.
constexpr int kBringerRegisters = 32, kMultiplierRegisters = 112;
static_assert(128 * kBringerRegisters + kBulkConsumers * kMultiplierRegisters <= kBulkThreads * 96,
              "setmaxnreg would wait forever");
constexpr int kBulkStages = 8;   // at most
constexpr int kBulkBarrier = 1;  // of the consumers
constexpr int kBulkStrips = 2;   // of a tile
constexpr int kGateTables = 128;  // from the first strip's table to the second's, which lies between its rows
static_assert(kGateTables >= kCopyBytes && kWideRow >= kGateTables + kCopyBytes, "rows of two tables take turns");

template <int kTokensOf>
struct BulkTile {
  static constexpr int kTokens = kTokensOf, kTokenTiles = kTokens / 8;
  static constexpr int kHalves = kTokens == 32 ? 2 : 1;  // warps that share a strip
  static constexpr int kUnits = 4 / kHalves;             // of a strip that each has
  static constexpr int kRowWarps = kBulkStrips * kHalves, kInputWarps = kBulkWarps / kRowWarps;
  // Warps add up in rounds of some tiles of 8 tokens. At its end warp (row warp, input warp i) owns unit i % kUnits of tile
  // i / kUnits of a round, where there is one: of each round, or of round i / kUnits where a round has one tile.
  static constexpr int kRoundTiles = kTokenTiles == 4 ? 2 : 1, kRounds = kTokenTiles / kRoundTiles;
  static constexpr int kOwners = kTokens == 8 ? kBulkWarps / 2 : kBulkWarps, kOwned = kTokens == 32 ? 2 : 1;
  static constexpr int kWarpSums = kUnits * kRoundTiles * kVectorBytes, kSums = kBulkWarps * kWarpSums;
  static constexpr int kPiece = kOwned * kVectorBytes, kPart = kOwners * kPiece;  // a warp's at the end, and a tile's
  static_assert(kPart <= int(kMailBytes), "a part is a letter");
};

struct BulkCall {
  TensorMap x;
  Packed w;
  const uint8_t* packed;
  const uint16_t* bias;
  uint16_t* y;
  uint16_t* gated;  // or null; else y is not written
  uint8_t* mail;    // of each CTA a part of a tile, zeros until it is sent and once it is read
  int m;
  int group_shift;  // as MmaParameters has it
  int item_groups;  // rows of scales of an item and strip, at most
  int stages;
  Normed normed;
  AddNorm add;
  Work work;
};

// Shared memory: the table; what warps add up through; the sums of a tile that others have begun; for each stage a barrier that it
// is full and one that it is empty; the norm's factors; the stages, each x in blocks, codes and scales of both strips. They are last because their
// size is the call's: all other addresses are constants, and no registers.
template <int kBits, class Tile>
struct BulkShared {
  static constexpr int kTable = table_bytes(kBits, kWideRow), kBlock = int(block_bytes(kBits));
  static constexpr int kXBlock = Tile::kTokens * kBlockInputs * 2, kX = Tile::kInputWarps * kXBlock;
  static constexpr int kStripCodes = Tile::kInputWarps * kBlock;
  static_assert(kTable % 1024 == 0 && kX % 1024 == 0, "x is aligned to what the 128-byte swizzle repeats after");

  static FLUTE_HD int stage_bytes(int groups) {
    return (kX + kBulkStrips * (kStripCodes + groups * kScaleRowBytes) + 1023) / 1024 * 1024;
  }
  static constexpr int kBarriers = 1024;
  static_assert(2 * 8 * kBulkStages + kNormTokens * 4 <= kBarriers && Tile::kSums % 1024 == 0 && Tile::kPart % 1024 == 0, "stages are aligned");
  static int bytes(int stages, int groups) { return kTable + Tile::kSums + Tile::kPart + kBarriers + stages * stage_bytes(groups); }

  static_assert(kSharedBegin == uint32_t(Device{}.reserved), "as takes_bulk() has it");
  static constexpr uint32_t table = kSharedBegin, sums = table + kTable, kept = sums + Tile::kSums, full = kept + Tile::kPart,
                            empty = full + kBulkStages * 8, factors = empty + kBulkStages * 8,
                            stages = full + kBarriers;
  uint32_t stage_size;
  FLUTE_DEVICE explicit BulkShared(int groups) : stage_size(uint32_t(stage_bytes(groups))) {}
  FLUTE_DEVICE uint32_t x(int stage) const { return stages + stage * stage_size; }
  FLUTE_DEVICE uint32_t codes(int stage, int strip) const { return x(stage) + kX + strip * kStripCodes; }
  FLUTE_DEVICE uint32_t scales(int stage, int strip, int groups) const {
    return x(stage) + kX + kBulkStrips * kStripCodes + strip * groups * kScaleRowBytes;
  }
};

// Where a tile is; for SwiGLU its first strip, gate's, whose other is up's.
FLUTE_DEVICE MmaPlace locate(const BulkCall& p, uint32_t tile) {
  if (p.gated) return {0, int(tile), 2, 0, int(tile) * kStripRows, p.w.named[0].rows - int(tile) * kStripRows};
  return locate_rows<kBulkStrips>(p.w, p.packed, int(tile), 0);
}
// From a tile's strip to its other.
FLUTE_DEVICE int next_strip(const BulkCall& p) { return p.gated ? p.w.named[1].first_strip : 1; }
// One thread's work: brings a CTA's items one after another, at most all stages ahead.
template <int kBits, class Tile>
struct Bringer {
  uint32_t left, tile, slice, parity = 1;  // items left
  int stage = 0, strip, strips;            // few registers: no MmaPlace

  FLUTE_DEVICE Bringer(const BulkCall& p, uint32_t cta) {
    const uint32_t begin = first_item(p.work, cta);
    left = first_item(p.work, cta + 1) - begin;
    tile = begin / p.work.slices;
    slice = begin - tile * p.work.slices;
    enter(p);
  }
  FLUTE_DEVICE void enter(const BulkCall& p) {
    const MmaPlace place = locate(p, tile);
    strip = place.strip;
    strips = place.strips;
  }
  // Weights to the next stage, once it is empty, whose barrier then waits for x too.
  FLUTE_DEVICE void bring_weights(const BulkCall& p, const BulkShared<kBits, Tile>& at) {
    if (slice == p.work.slices) {
      slice = 0;
      ++tile;
      enter(p);
    }
    constexpr int kBlocks = Tile::kInputWarps;
    const int block = int(slice) * kBlocks, blocks = p.w.blocks - block < kBlocks ? p.w.blocks - block : kBlocks;
    const int group = group_of(p, block * kBlockInputs), groups = p.w.groups - group;
    const uint32_t scale_bytes = uint32_t(groups < p.item_groups ? groups : p.item_groups) * kScaleRowBytes;
    const uint32_t code_bytes = blocks * at.kBlock;
    const uint32_t full = at.full + stage * 8;
    mbarrier_wait(at.empty + stage * 8, parity);
    mbarrier_arrive_expect(full, at.kX + strips * (code_bytes + scale_bytes));
    FLUTE_ROLLED
    for (int s = 0; s < strips; ++s) {
      const uint32_t of = uint32_t(strip + s * next_strip(p)), codes = of * p.w.blocks + block, scales = of * p.w.groups + group;
      bulk_load_once(at.codes(stage, s), p.packed + p.w.codes_offset + uint64_t(codes) * at.kBlock, code_bytes, full);
      bulk_load_once(at.scales(stage, s, p.item_groups), p.packed + p.w.scales_offset + uint64_t(scales) * kScaleRowBytes,
                     scale_bytes, full);
    }
  }
  FLUTE_DEVICE void bring_x(const BulkCall& p, const BulkShared<kBits, Tile>& at, int to, uint32_t slice_of_x) const {
    tensor_load_blocks<Tile::kInputWarps>(at.x(to), &p.x, int(slice_of_x) * Tile::kInputWarps, 0, at.full + to * 8);
  }
  FLUTE_DEVICE void next(const BulkCall& p) {
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    ++slice;
    --left;
  }
  FLUTE_DEVICE void bring(const BulkCall& p, const BulkShared<kBits, Tile>& at) {
    bring_weights(p, at);
    bring_x(p, at, stage, slice);
    next(p);
  }
  // The first items, of which the stages are empty: their weights, and, when the kernel before this one has ended, x.
  FLUTE_DEVICE uint32_t first_items(const BulkCall& p) const { return left < uint32_t(p.stages) ? left : p.stages; }
  FLUTE_DEVICE void begin(const BulkCall& p, const BulkShared<kBits, Tile>& at) {
    FLUTE_ROLLED
    for (uint32_t i = first_items(p); i; --i) {
      bring_weights(p, at);
      next(p);
    }
  }
  FLUTE_DEVICE void begin_x(const BulkCall& p, const BulkShared<kBits, Tile>& at, uint32_t items, uint32_t first_slice) const {
    FLUTE_ROLLED
    for (uint32_t i = 0, of = first_slice; i < items; ++i, ++of) {
      if (of == p.work.slices) of = 0;
      bring_x(p, at, int(i), of);
    }
  }
};

// Where a consumer warp is, and, of those that own something, its number.
template <class Tile>
struct BulkWarp {
  int row, input, strip, half;
  FLUTE_DEVICE explicit BulkWarp(int warp)
      : row(warp / Tile::kInputWarps), input(warp % Tile::kInputWarps), strip(row / Tile::kHalves), half(row % Tile::kHalves) {}
  FLUTE_DEVICE bool owns() const { return Tile::kOwners == kBulkWarps || input < Tile::kUnits; }
  // The owner of the same rows and tokens of the other strip is kOwners / 2 further on.
  FLUTE_DEVICE int number() const {
    return Tile::kOwners == kBulkWarps ? row * Tile::kInputWarps + input : row * Tile::kUnits + input;
  }
};

// Adds up the warps that have the same rows, always in the same order; own[r] are what the warp owns of round r.
template <class Tile, class Sync>
FLUTE_DEVICE void add_bulk_warps(uint32_t sums, const BulkWarp<Tile>& warp, int lane,
                                 const float (&acc)[Tile::kUnits][Tile::kTokenTiles][4], float (&own)[Tile::kOwned * 4],
                                 const Sync& sync) {
  const uint32_t rows = sums + warp.row * Tile::kInputWarps * Tile::kWarpSums + lane * 16;
  FLUTE_UNROLL
  for (int round = 0; round < Tile::kRounds; ++round) {
    sync();  // what was written before has been read
    FLUTE_UNROLL
    for (int u = 0; u < Tile::kUnits; ++u) {
      FLUTE_UNROLL
      for (int t = 0; t < Tile::kRoundTiles; ++t) {
        const float* const c = acc[u][round * Tile::kRoundTiles + t];
        sts128(rows + warp.input * Tile::kWarpSums + (t * Tile::kUnits + u) * kVectorBytes,
               {{as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])}});
      }
    }
    sync();
    const bool mine = Tile::kRoundTiles > 1 || warp.input / Tile::kUnits == round;
    if (!mine) continue;
    const uint32_t first = rows + (Tile::kRoundTiles > 1 ? warp.input : warp.input % Tile::kUnits) * kVectorBytes;
    float* const sum = own + (Tile::kOwned > 1 ? round * 4 : 0);
    FLUTE_UNROLL
    for (int i = 0; i < Tile::kInputWarps; ++i) {
      const Words4 four = lds128(first + i * Tile::kWarpSums);
      FLUTE_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] = (i ? sum[j] : 0) + as_f32(four.w[j]);
    }
  }
}

// What a thread owns of a tile, to and from shared memory.
template <class Tile>
FLUTE_DEVICE void store_piece(uint32_t piece, int lane, const float (&sums)[Tile::kOwned * 4]) {
  FLUTE_UNROLL
  for (int i = 0; i < Tile::kOwned; ++i) {
    const float* const c = sums + i * 4;
    sts128(piece + i * kVectorBytes + lane * 16, {{as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])}});
  }
}
template <class Tile>
FLUTE_DEVICE void load_piece(uint32_t piece, int lane, float (&sums)[Tile::kOwned * 4]) {
  FLUTE_UNROLL
  for (int i = 0; i < Tile::kOwned; ++i) {
    const Words4 four = lds128(piece + i * kVectorBytes + lane * 16);
    FLUTE_UNROLL
    for (int j = 0; j < 4; ++j) sums[4 * i + j] = as_f32(four.w[j]);
  }
}

// A sum as it is sent: never 0, which +0 would be.
FLUTE_DEVICE uint32_t sent_word(float sum) { return as_bits(sum) ? as_bits(sum) : 0x80000000; }
FLUTE_DEVICE bool has_come(const Words4& four) { return four.w[0] && four.w[1] && four.w[2] && four.w[3]; }

template <class Tile>
FLUTE_DEVICE uint8_t* letter(const BulkCall& p, uint32_t cta, int owner, int lane) {
  return p.mail + size_t(cta) * Tile::kPart + owner * Tile::kPiece + lane * sizeof(Words4);
}
template <class Tile>
FLUTE_DEVICE void send_piece(uint8_t* to, const float (&sums)[Tile::kOwned * 4]) {
  FLUTE_UNROLL
  for (int i = 0; i < Tile::kOwned; ++i) {
    const float* const c = sums + i * 4;
    store_relaxed(to + i * kVectorBytes, {{sent_word(c[0]), sent_word(c[1]), sent_word(c[2]), sent_word(c[3])}});
  }
}
// sums[] += what the CTAs from `first` to before `last` have sent, always in the same order; the mail is zeros again.
template <class Tile>
FLUTE_DEVICE void receive_pieces(const BulkCall& p, uint32_t first, uint32_t last, int owner, int lane, float (&sums)[Tile::kOwned * 4]) {
  constexpr int kAtOnce = 4 / Tile::kOwned;  // CTAs: reading L2 takes long
  FLUTE_ROLLED
  for (uint32_t cta = first; cta < last; cta += kAtOnce) {
    Words4 read[kAtOnce][Tile::kOwned] = {};
    spin([&] {
      bool all = true;
      FLUTE_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        FLUTE_UNROLL
        for (int i = 0; i < Tile::kOwned; ++i) {
          if (cta + n >= last) continue;
          if (!has_come(read[n][i])) read[n][i] = load_relaxed(letter<Tile>(p, cta + n, owner, lane) + i * kVectorBytes);
        }
      }
      FLUTE_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        FLUTE_UNROLL
        for (int i = 0; i < Tile::kOwned; ++i) all &= cta + n >= last || has_come(read[n][i]);
      }
      return all;
    });
    FLUTE_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      if (cta + n >= last) continue;
      FLUTE_UNROLL
      for (int i = 0; i < Tile::kOwned; ++i) {
        store_global(letter<Tile>(p, cta + n, owner, lane) + i * kVectorBytes, {});
        FLUTE_UNROLL
        for (int j = 0; j < 4; ++j) sums[4 * i + j] += as_f32(read[n][i].w[j]);
      }
    }
  }
}

// Each token's factor of the norm before this call, while the first x is on its way.
template <int kBits, class Tile>
FLUTE_DEVICE void make_factors(const BulkCall& p, const BulkShared<kBits, Tile>& at) {
  constexpr int kThreads = kBulkConsumers / kNormTokens, kAtOnce = 4;  // of a token; 16 bytes each: K = 4096
  const int parts = norm_parts(p.w.k), token = fresh_thread_id() / kThreads, thread = fresh_thread_id() % kThreads;
  const float* const squares = p.normed.squares + token * parts;
  float sum = 0;
  FLUTE_ROLLED
  for (int first = thread * 4; first < parts && token < p.m; first += kAtOnce * kThreads * 4) {
    Words4 read[kAtOnce] = {};
    FLUTE_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kThreads * 4 < parts) read[i] = load_l2(squares + first + i * kThreads * 4);
    }
    FLUTE_UNROLL
    for (int i = 0; i < kAtOnce * 4; ++i) sum += as_f32(read[i / 4].w[i % 4]);
  }
  FLUTE_UNROLL
  for (int bit = 1; bit < kThreads; bit *= 2) sum += as_f32(other_lane(as_bits(sum), bit));
  if (thread == 0) sts32(at.factors + token * 4, as_bits(1 / sqrtf(sum / float(p.w.k) + p.normed.epsilon)));
}

// A tile's end: warps leave their sums in shared memory, token by token, and each thread writes eight rows of a token; for SwiGLU
// of gate and up. What it reads from memory for that is asked for when it is made, before anything waits.
template <bool kF16, int kBits, class Tile>
struct TileEnd {
  static constexpr int kPitch = (kBulkStrips * kStripRows + 4) * 4;  // of a token: lanes of a store have banks of their own
  static_assert(Tile::kTokens * kPitch <= Tile::kSums && kBulkConsumers >= Tile::kTokens * kBulkStrips * kStripRows / 8, "it fits");
  MmaPlace at;
  int token, octet, row, left;  // row of y; rows from there on
  bool whole;                   // eight rows that can be written at once
  Words4 residual{}, weight{};

  FLUTE_DEVICE TileEnd(const BulkCall& p, uint32_t tile) : at(locate(p, tile)) {
    const int shift = p.gated ? 3 : 4;  // of a token's octets
    static_assert(kBulkStrips * kStripRows / 8 == 16);
    token = fresh_thread_id() >> shift;
    octet = fresh_thread_id() & ((1 << shift) - 1);
    row = at.first_row + octet * 8;
    left = token < p.m ? at.rows - octet * 8 : 0;
    whole = left >= 8 && (p.w.n | row) % 8 == 0 && (!p.gated || p.w.n % 16 == 0);
    if (!p.add.residual || left <= 0) return;  // then all are whole: takes_norms()
    residual = load_l2(static_cast<const uint16_t*>(p.add.residual) + int64_t(token) * p.w.n + row);
    weight = load_l2(static_cast<const uint16_t*>(p.add.weight) + row);
  }

  FLUTE_DEVICE void leave(uint32_t out, const BulkWarp<Tile>& warp, int lane, const float (&own)[Tile::kOwned * 4]) const {
    const int unit = warp.half * Tile::kUnits + warp.input % Tile::kUnits;
    const uint32_t first = out + (warp.input / Tile::kUnits * 8 + lane % 4 * 2) * kPitch +
                           (warp.strip * kStripRows + unit * kUnitRows + lane / 4) * 4;
    FLUTE_UNROLL
    for (int i = 0; i < Tile::kOwned * 4; ++i) {
      sts32(first + (i / 4 * Tile::kRoundTiles * 8 + i % 2) * kPitch + i / 2 % 2 * 8 * 4, as_bits(own[i]));
    }
  }

  FLUTE_DEVICE static uint16_t value(const BulkCall& p, float sum, float factor, int row) {
    return round16<kF16>(sum * factor + (p.bias ? widen16<kF16>(p.bias[row]) : 0));
  }
  FLUTE_DEVICE void write(const BulkCall& p, const BulkShared<kBits, Tile>& shared) const {
    const uint32_t sums = shared.sums + token * kPitch + octet * 32, up = sums + kStripRows * 4;
    const int half = p.w.n / 2;
    const float factor = p.normed.squares && left > 0 ? as_f32(lds32(shared.factors + token * 4)) : 1;
    uint16_t* const to = p.gated ? p.gated + int64_t(token) * half + row : p.y + int64_t(token) * p.w.n + row;
    float squares = 0;
    if (whole) {
      Words4 result, total{};
      FLUTE_UNROLL
      for (int four = 0; four < 2; ++four) {
        const Words4 of_y = lds128(sums + four * 16), of_up = p.gated ? lds128(up + four * 16) : Words4{};
        FLUTE_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          uint16_t y[2], sum[2] = {};
          FLUTE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int n = pair * 2 + i, r = row + four * 4 + n;
            y[i] = value(p, as_f32(of_y.w[n]), factor, r);
            if (p.gated) {
              y[i] = silu_mul<kF16>(y[i], value(p, as_f32(of_up.w[n]), factor, half + r));
            } else if (p.add.residual) {
              const int word = four * 2 + pair, shift = 16 * i;
              const float added = widen16<kF16>(y[i]) + widen16<kF16>(uint16_t(residual.w[word] >> shift));
              sum[i] = round16<kF16>(added);
              y[i] = round16<kF16>(added * widen16<kF16>(uint16_t(weight.w[word] >> shift)));
              squares += added * added;
            }
          }
          result.w[four * 2 + pair] = y[0] | uint32_t(y[1]) << 16;
          total.w[four * 2 + pair] = sum[0] | uint32_t(sum[1]) << 16;
        }
      }
      store_global(to, result);
      if (p.add.residual) store_global(static_cast<uint16_t*>(p.add.sum) + int64_t(token) * p.w.n + row, total);
    } else {  // the end of a shard that is none of eight rows, or what follows one
      FLUTE_ROLLED
      for (int i = 0; i < 8 && i < left; ++i) {
        const uint16_t y = value(p, as_f32(lds32(sums + i * 4)), factor, row + i);
        to[i] = p.gated ? silu_mul<kF16>(y, value(p, as_f32(lds32(up + i * 4)), factor, half + row + i)) : y;
      }
    }
    if (!p.add.residual) return;
    squares += as_f32(other_lane(as_bits(squares), 1));  // the other eight rows of sixteen
    if (octet % 2 || token >= p.m || octet / (kStripRows / 8) >= at.strips) return;
    p.add.squares[token * norm_parts(p.w.n) + at.strip * (kStripRows / kUnitRows) + octet / 2] = squares;
  }
};

// kFine: a block has more than one group.
template <int kBits, bool kF16, bool kFine, class Tile>
FLUTE_DEVICE void consume_items(const BulkCall& p, const BulkShared<kBits, Tile>& at) {
  constexpr int kTokenTiles = Tile::kTokenTiles;
  const auto sync = [] { barrier(kBulkBarrier, kBulkConsumers); };

  // What can be computed again is not kept: registers are few.
  const auto first_of = [&](int later) { return first_item(p.work, uint32_t(cta_id()) + later); };
  uint32_t tile = first_of(0) / p.work.slices, left = first_of(1) - first_of(0);  // items
  int slice = int(first_of(0) - tile * p.work.slices), stage = 0;
  uint32_t parity = 0;
  float to_weight = 0;
  if (p.normed.squares) {
    wait_for_earlier();
    make_factors(p, at);
  }
  // One turn a tile, and a last one for a tile that others have begun and this CTA has ended: there is one place where tiles are
  // written, since code that a CTA runs once waits for instructions.
  FLUTE_ROLLED
  for (;; ++tile, slice = 0) {
    float own[Tile::kOwned * 4];
    if (left) {
      // Read anew for each tile: addresses that follow from it would take registers all the time.
      const int lane = fresh_lane();
      const BulkWarp<Tile> warp(fresh_warp());
      const uint32_t copy = lane_copy<kBits>(lane) + (p.gated ? warp.strip * kGateTables : 0);
      const int shard = locate(p, tile).shard;
      // Nobody reads the table now: warps met when they added up the tile before.
      if (tile == first_of(0) / p.work.slices || shard != locate(p, tile - 1).shard) {
        FLUTE_ROLLED
        for (int s = 0; s < (p.gated ? 2 : 1); ++s) {
          const float* const book = books(p.packed) + (shard + s) * 16;
          const Normal normal = normalise(book, kF16 ? 14 : 0);  // see lut_mma.cuh
          build_table<kBits, kWideRow, kF16>(at.table + s * kGateTables, book, normal.to_table, fresh_thread_id(), kBulkConsumers);
          if (!p.gated || s == warp.strip) to_weight = normal.to_weight;
        }
        sync();
      }
      // In a stage, the lane's codes, its row of x (swizzled by the row: 16-byte piece i of it is at i ^ lane % 8), its scales. An
      // item begins with a group, or is within one.
      const auto in_stage = [&](uint32_t offset) { return kept_register(at.x(0) + offset); };
      const uint32_t codes_at = in_stage(at.codes(0, warp.strip) - at.x(0) + warp.input * at.kBlock + lane * 16);
      const uint32_t x_at = in_stage(warp.input * at.kXBlock + ((lane % 8 * (kBlockInputs * 2 + 16)) ^ (lane / 8 * 16)));
      const uint32_t scales_at = in_stage(at.scales(0, warp.strip, p.item_groups) - at.x(0) + lane / 4 * 16 + warp.half * Tile::kUnits * 4);
      // Where the tile has one strip, the other's warps add up what the stage happens to hold, which nobody writes.
      float acc[Tile::kUnits][kTokenTiles][4] = {};
      FLUTE_ROLLED
      for (; left && slice < int(p.work.slices); ++slice, --left) {
        const uint32_t offset = stage * at.stage_size;
        mbarrier_wait(at.full + stage * 8, parity);
        if (slice * Tile::kInputWarps + warp.input < p.w.blocks) {
          uint32_t codes[4 * kBits];
          load_units<kBits, Tile::kUnits>(codes_at + offset, warp.half, codes);
          const auto read_x = [&](uint32_t(&b)[kTokenTiles][2][4]) {
            FLUTE_UNROLL
            for (int t = 0; t < kTokenTiles; ++t) {
              ldmatrix4(x_at + offset + t * 8 * (kBlockInputs * 2), b[t][0]);
              ldmatrix4(((x_at + offset) ^ 64) + t * 8 * (kBlockInputs * 2), b[t][1]);
            }
          };
          const auto scales_of = [&](int s) {
            const int group = (warp.input * kBlockInputs + (kFine ? s * kStepInputs : 0)) >> p.group_shift;
            return scales_at + offset + group * kScaleRowBytes;
          };
          multiply_block<kBits, kWideRow, kF16, kFine>(at.table, copy, to_weight, p.w.scale_f16, codes, read_x, scales_of, acc);
        }
        syncwarp();  // every lane has read the stage
        if (lane == 0) mbarrier_arrive(at.empty + stage * 8);
        if (++stage == p.stages) {
          stage = 0;
          parity ^= 1;
        }
      }
      const int to = fresh_lane();
      const BulkWarp<Tile> owner(fresh_warp());
      add_bulk_warps<Tile>(at.sums, owner, to, acc, own, sync);
      const uint32_t begin = tile * p.work.slices;
      if (begin + p.work.slices > first_of(1)) {  // the next CTA goes on
        if (owner.owns()) send_piece<Tile>(letter<Tile>(p, uint32_t(cta_id()), owner.number(), to), own);
        continue;
      }
      if (begin < first_of(0)) {  // others have begun it
        if (owner.owns()) store_piece<Tile>(at.kept + owner.number() * Tile::kPiece, to, own);
        continue;
      }
    } else {
      tile = first_of(0) / p.work.slices;
      const uint32_t begin = tile * p.work.slices;
      if (stage < 0 || begin == first_of(0) || begin + p.work.slices > first_of(1)) return;
      stage = -1;
    }
    const TileEnd<kF16, kBits, Tile> end(p, tile);
    const int lane = fresh_lane();
    const BulkWarp<Tile> warp(fresh_warp());
    sync();  // what was kept is there, and everyone has read what warps add up through
    if (stage < 0 && warp.owns()) {
      load_piece<Tile>(at.kept + warp.number() * Tile::kPiece, lane, own);
      const uint32_t first = owner(p.work, tile * p.work.slices);
      receive_pieces<Tile>(p, first, uint32_t(cta_id()), warp.number(), lane, own);
    }
    if (warp.owns()) end.leave(at.sums, warp, lane, own);
    sync();
    end.write(p, at);
  }
}

template <int kBits, bool kF16, bool kFine, class Tile>
FLUTE_KERNEL(kBulkThreads, 1) lut_mma_bulk(FLUTE_PARAMETER BulkCall p) {
  const BulkShared<kBits, Tile> at(p.item_groups);
  let_next_begin();
  check_shared_begin();
  if (thread_id() >= kBulkConsumers) {
    Bringer<kBits, Tile> bringer(p, uint32_t(cta_id()));
    const bool brings = thread_id() == kBulkConsumers;
    const uint32_t first_items = bringer.first_items(p), first_slice = bringer.slice;
    if (brings) {
      prefetch_map(&p.x);
      for (int i = 0; i < p.stages; ++i) {
        mbarrier_init(at.full + i * 8, 1);
        mbarrier_init(at.empty + i * 8, kBulkWarps);
      }
      fence_mbarrier_init();
      bringer.begin(p, at);
    }
    syncwarp();
    barrier();
    give_registers<kBringerRegisters>();
    if (!brings) return;
    wait_for_earlier();
    bringer.begin_x(p, at, first_items, first_slice);
    FLUTE_ROLLED
    while (bringer.left) bringer.bring(p, at);
  } else {
    barrier();
    take_registers<kMultiplierRegisters>();
    consume_items<kBits, kF16, kFine, Tile>(p, at);
  }
}

template <int kBits, bool kF16, class Tile>
const char* launch_mma_bulk(const Gemm& g, int group_shift) {
  using Shared = BulkShared<kBits, Tile>;
  const int groups = g.w.groups > 1 ? Tile::kInputWarps * kBlockInputs >> group_shift : 1;
  const uint32_t slices = uint32_t(g.w.blocks + Tile::kInputWarps - 1) / Tile::kInputWarps;
  const uint32_t tiles = uint32_t(g.gated ? g.w.named[0].strips : g.w.strip_pairs);
  if (int64_t(tiles) * slices > INT32_MAX) return "lut_mma: more weights than 32-bit work items can count";
  BulkCall call{{}, g.w, g.packed, static_cast<const uint16_t*>(g.bias), static_cast<uint16_t*>(g.y), static_cast<uint16_t*>(g.gated),
                static_cast<uint8_t*>(g.workspace), g.m, group_shift, groups, 0,
                g.normed, g.add, share_work_evenly(tiles, slices, uint32_t(g.device.sms))};
  while (call.stages < kBulkStages && Shared::bytes(call.stages + 1, groups) <= g.device.shared_bytes) ++call.stages;
  if (call.stages < 2) return "lut_mma: the device has too little shared memory for two stages";
  if (const char* error = encode_blocks_map(&call.x, g.x, g.m, g.w.k, Tile::kTokens, Tile::kInputWarps, kF16)) return error;
  const bool fine = g.w.groups > 1 && group_shift < 6;
  const auto kernel = fine ? lut_mma_bulk<kBits, kF16, true, Tile> : lut_mma_bulk<kBits, kF16, false, Tile>;
  return launch_early(kernel, int(call.work.ctas), kBulkThreads, Shared::bytes(call.stages, groups), g.stream, call, true);
}

template <int kBits, bool kF16>
const char* choose_bulk_tile(const Gemm& g, int group_shift) {
  if (g.m <= 8) return launch_mma_bulk<kBits, kF16, BulkTile<8>>(g, group_shift);
  if (g.m <= 16) return launch_mma_bulk<kBits, kF16, BulkTile<16>>(g, group_shift);
  return launch_mma_bulk<kBits, kF16, BulkTile<32>>(g, group_shift);
}

// lut_mma_bulk_2.cu, _3, _4: for sm_90a alone, as lut_wgmma's.
template <int kBits>
const char* run_mma_bulk_bits(const Gemm& g, int group_shift) {
  return g.f16 ? choose_bulk_tile<kBits, true>(g, group_shift) : choose_bulk_tile<kBits, false>(g, group_shift);
}

}  // namespace flute::cuda
