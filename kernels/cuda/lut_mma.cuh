// K1: y = x W^T with mma.sync, for few tokens. W is operand A and x operand B ("swap AB"), so that 8 tokens fill an
// instruction that has 16 rows of W. A CTA has eight warps, each with one strip of 64 rows and one block of 64 inputs of
// what a pipeline stage brings; warps that share a strip add up at a tile's end. Items of work are (64 * kRowWarps rows of
// one shard, kTokens tokens, 64 * kInputWarps inputs), shared by Stream-K (streamk.h).
//
// Weights are rounded once, to x's type, in the table: the scales multiply fp32 sums, once a block or, in groups
// of 16 and 32, once a step.
//
// Budget of a warp's block of 64 x 64 weights, counted in the SASS of sm_90a for groups of 64 and more (8 tokens; 16 and 32
// tokens have 16 and 48 more HMMA and FFMA, and 2 and 6 more LDSM). A wavefront is a cycle of shared memory (128 bytes):
//
//                                                        4 bits   3 bits   2 bits
//   wavefronts: lookups (LDS.32 x 64; LDS.64 x 32)           64       64       64
//               codes written by LDGSTS, read by LDS.128     32       24       16
//               x by LDSM, scales by LDS.32                8 + 4    8 + 4    8 + 4
//   LOP3 + SHF + PRMT, two a cycle                          120      114       63
//   HMMA / FFMA / FMUL                                  16/16/8  16/16/8  16/16/8
//   instructions, four a cycle                              277      265      179
//
// Those rates are an H100's (measured, but for the two a cycle of LOP3, SHF and PRMT together). At 3 TB/s a multiprocessor (of
// 132, at 1.85 GHz) gets 12.3 bytes a cycle, a block of 4, 3, 2 bits in 177, 133, 90 cycles. There the kernel executed 590
// instructions a block, not 277: every thread's copies, and what a tile costs besides. Hence lut_mma_bulk.cuh, which Hopper
// takes wherever it can.
#pragma once

#include <cstdio>
#include <type_traits>

#include "decode.h"
#include "gate.h"
#include "launch.h"
#include "ptx.h"
#include "streamk.h"

namespace flute::cuda {

constexpr int kMmaWarps = 8, kMmaThreads = kMmaWarps * 32;
constexpr int kMaxStages = 8;  // what cp_async_wait can count

template <int kTokensOf>
struct MmaTile {
  static constexpr int kTokens = kTokensOf, kTokenTiles = kTokens / 8;
  // More rows to a CTA mean fewer reads of x, more inputs mean more CTAs for a small layer. x counts from 32 tokens on.
  static constexpr int kRowWarps = kTokens == 32 ? 4 : 2, kInputWarps = kMmaWarps / kRowWarps;
  static constexpr int kUnits = 4 / kInputWarps;  // of its strip that a warp has at the end
  static constexpr int kInputs = kInputWarps * kBlockInputs;
  static constexpr int kCtas = kTokens == 8 ? 2 : 1;  // a multiprocessor: two have 128 registers a thread, too few for 16 tokens
  static constexpr int kXRowBytes = kInputs * 2 + 16;  // 16 more, or ldmatrix's eight rows would be in the same banks
  static constexpr int kXBytes = kTokens * kXRowBytes;
  static constexpr int kScaleRows = kInputs / 16;  // of a stage and strip, at most
  static constexpr int kUnitBytes = kUnitRows * kTokens * int(sizeof(float));
  static constexpr int kValues = kUnits * kTokenTiles * 4;  // of a tile that a thread has at the end
};

// Lookups load shared memory, not the integer pipe, to its limit: rows 128 bytes apart leave room for a second CTA on a
// multiprocessor, which is worth more than the shift that they cost. A table of 3 bits is small enough for both.
constexpr FLUTE_HD int mma_row(int bits) { return bits == 3 ? kWideRow : kRow; }

template <int kBits, class Tile>
constexpr FLUTE_HD int codes_bytes() {
  return Tile::kRowWarps * Tile::kInputWarps * int(block_bytes(kBits));
}

struct MmaParameters {
  Packed w;
  const uint8_t* packed;
  const uint16_t *x, *bias;
  uint16_t* y;
  void* workspace;
  int m;
  int group_shift;  // inputs of a group, as a power of two; 30 where there is one group
  int scale_rows;   // of a stage and strip
  int token_tiles;  // of y
  int slices;       // of a tile
  int stages, stage_bytes;
  GateCall gate;
};

// Where a tile is: `strips` strips of shard `shard` from `strip` on, tokens from `token` on.
struct MmaPlace {
  int shard, strip, strips, token;
  int first_row, rows;  // of y, of this tile
};

template <class Tile>
FLUTE_DEVICE uint32_t count_tiles(const MmaParameters& p) {
  uint32_t row_tiles = 0;
  FLUTE_ROLLED
  for (int s = 0; s < p.w.n_shards; ++s) {
    row_tiles += (shard_of(p.w, p.packed, s).strips + Tile::kRowWarps - 1) / Tile::kRowWarps;
  }
  return row_tiles * p.token_tiles;
}
template <int kStrips>  // of a tile
FLUTE_DEVICE MmaPlace locate_rows(const Packed& w, const uint8_t* packed, int row_tile, int token) {
  FLUTE_ROLLED
  for (int s = 0;; ++s) {
    const Shard h = shard_of(w, packed, s);
    const int tiles = (h.strips + kStrips - 1) / kStrips;
    if (row_tile >= tiles) {
      row_tile -= tiles;
      continue;
    }
    const int strip = row_tile * kStrips, left = h.strips - strip;
    return {s, h.first_strip + strip, left < kStrips ? left : kStrips, token, h.first_row + strip * kStripRows,
            h.rows - strip * kStripRows};
  }
}
template <class Tile>
FLUTE_DEVICE MmaPlace locate(const MmaParameters& p, uint32_t tile) {
  const int token = int(tile % uint32_t(p.token_tiles)) * Tile::kTokens;
  return locate_rows<Tile::kRowWarps>(p.w, p.packed, int(tile / uint32_t(p.token_tiles)), token);
}
template <class Parameters>
FLUTE_DEVICE int group_of(const Parameters& p, int input) {
  const int group = input >> p.group_shift;
  return group < p.w.groups ? group : p.w.groups - 1;
}

// Brings stages, of its tile's slices one after another. Each thread always copies the same places of a stage, so that what
// changes from slice to slice are two offsets. Strips beyond the shard, blocks beyond K and tokens beyond M are left alone;
// inputs beyond K are zeros.
template <int kBits, class Tile>
struct MmaLoader {
  static constexpr int kStripThreads = kMmaThreads / Tile::kRowWarps;  // of codes
  static constexpr int kBlockChunks = int(block_bytes(kBits)) / 16, kStripChunks = Tile::kInputWarps * kBlockChunks;
  static constexpr int kTokenChunks = Tile::kInputs / 8, kTokenStep = kMmaThreads / kTokenChunks;
  static constexpr int kRowChunks = kScaleRowBytes / 16;
  static_assert(kStripChunks % kStripThreads == 0 && Tile::kTokens % kTokenStep == 0, "whole copies a thread");
  static_assert(kStripThreads == Tile::kScaleRows * kRowChunks, "one copy of scales a thread");

  // Where this thread's first copies come from, from the start of `packed` and x, counted in 16 bytes to save registers.
  uint32_t codes, scales, x;
  int tokens;  // of x, from this thread's first on
  int chunk;   // this thread's of its strip's codes and scales; past them where the shard has no such strip

  FLUTE_DEVICE void start(const MmaParameters& p, const MmaPlace& at, int slice, int thread) {
    const int strip = thread / kStripThreads, token = at.token + thread / kTokenChunks;
    chunk = thread % kStripThreads;
    const int block = (at.strip + strip) * p.w.blocks + slice * Tile::kInputWarps;
    codes = uint32_t(p.w.codes_offset / 16) + block * kBlockChunks + chunk;
    scales = uint32_t(p.w.scales_offset / 16) + (at.strip + strip) * p.w.groups * kRowChunks + chunk;
    x = token * (p.w.k / 8) + slice * kTokenChunks + thread % kTokenChunks;
    tokens = p.m - token;
    if (strip >= at.strips) chunk = kStripChunks;
  }

  FLUTE_DEVICE void load(const MmaParameters& p, uint32_t stage, int slice, int thread) {
    const int strip = thread / kStripThreads, chunks = (p.w.blocks - slice * Tile::kInputWarps) * kBlockChunks;
    const uint32_t codes_to = stage + (strip * kStripChunks + thread % kStripThreads) * 16;
    const uint8_t* const from = p.packed + uint64_t(codes) * 16;
    FLUTE_UNROLL
    for (int i = 0; i < kStripChunks; i += kStripThreads) {
      if (chunk + i < chunks && chunk < kStripChunks) cp_async16(codes_to + i * 16, from + i * 16, 16);
    }
    stage += codes_bytes<kBits, Tile>();
    const uint32_t x_to = stage + thread / kTokenChunks * Tile::kXRowBytes + thread % kTokenChunks * 16;
    const int input = slice * Tile::kInputs;
    const bool inside = input + thread % kTokenChunks * 8 < p.w.k;
    FLUTE_UNROLL
    for (int i = 0; i < Tile::kTokens / kTokenStep; ++i) {
      // A token that is not there is a column of B, and what it multiplies stays in its column of C.
      if (i * kTokenStep >= tokens) continue;
      const uint32_t chunk_of_x = inside ? x + i * kTokenStep * (p.w.k / 8) : 0;
      cp_async16(x_to + i * kTokenStep * Tile::kXRowBytes, p.x + uint64_t(chunk_of_x) * 8, inside ? 16 : 0);
    }
    stage += Tile::kXBytes;
    const int group = group_of(p, input), groups = group_of(p, input + Tile::kInputs - 1) - group + 1;
    if (chunk < groups * kRowChunks) {
      const uint8_t* const row = p.packed + uint64_t(scales + group * kRowChunks) * 16;
      cp_async16(stage + (strip * p.scale_rows * kRowChunks + chunk) * 16, row, 16);
    }
    codes += kStripChunks;
    x += kTokenChunks;
  }
};

// Adds the products of a block's units, of which a warp has all four or, of half a strip, two, to its sums: acc[u][t] are C's
// registers of unit u and tokens 8t .. 8t + 7. `codes` are what fragment() wants of them, load_x(b) gives B's registers of all
// steps, b[t][s / 2][s % 2 * 2] and the next, scales_of(s) where the lane's scales of step s and the first unit are. With
// kSmallGroups these change within the block.
template <int kBits, int kRowBytes, bool kF16, bool kSmallGroups, int kUnits, int kTokenTiles, class LoadX, class ScalesOf>
FLUTE_DEVICE void multiply_block(uint32_t table, uint32_t copy, float to_weight, int scale_f16, const uint32_t (&codes)[4 * kBits],
                                 const LoadX& load_x, const ScalesOf& scales_of, float (&acc)[kUnits][kTokenTiles][4]) {
  uint32_t b[kTokenTiles][2][4];
  load_x(b);
  FLUTE_UNROLL
  for (int u = 0; u < kUnits; ++u) {
    float sum[kTokenTiles][4] = {};
    FLUTE_UNROLL
    for (int s = 0; s < 4; ++s) {
      uint32_t a[4];
      fragment<kBits, kRowBytes>(table, copy, codes, u, s, a);
      FLUTE_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) mma<kF16>(sum[t], a, b[t][s / 2][s % 2 * 2], b[t][s / 2][s % 2 * 2 + 1]);
      if (!kSmallGroups && s < 3) continue;
      const uint32_t pair = lds32(scales_of(kSmallGroups ? s : 0) + u * 4);
      float scale[2];
      FLUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint16_t h = uint16_t(pair >> 16 * i);
        scale[i] = (scale_f16 ? widen16<true>(h) : widen16<false>(h)) * to_weight;
      }
      FLUTE_UNROLL
      for (int t = 0; t < kTokenTiles; ++t) {
        FLUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc[u][t][i] += scale[i / 2] * sum[t][i];
          sum[t][i] = 0;
        }
      }
    }
  }
}
// A lane's codes of a block, from its 16 bytes of the first vector on: of all its units, or of those of half a strip as unit 0 and 1.
template <int kBits, int kUnits>
FLUTE_DEVICE void load_units(uint32_t lane, int half, uint32_t (&codes)[4 * kBits]) {
  constexpr int kVectors = kBits == 3 ? 2 : kBits, kMine = kUnits == 4 ? kVectors : kVectors / 2;  // whole, or lower bits
  FLUTE_UNROLL
  for (int v = 0; v < kMine; ++v) {
    const Words4 four = lds128(lane + (half * kMine + v) * kVectorBytes);
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) codes[4 * v + i] = four.w[i];
  }
  if constexpr (kBits == 3 && kUnits == 4) {
    const Words4 upper = lds128(lane + 2 * kVectorBytes);
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) codes[8 + i] = upper.w[i];
  } else if constexpr (kBits == 3) {
    const Words2 upper = lds64(lane + 2 * kVectorBytes + half * 8);
    codes[8] = upper.w[0];
    codes[9] = upper.w[1];
  }
}

// Adds up the warps of a strip, always in the same order, through shared memory at `buffer`, which others may still read
// when this begins. `own` are a warp's units of the sum: input warp i has units i * kUnits and following.
template <class Tile>
FLUTE_DEVICE void add_input_warps(uint32_t buffer, int thread, const float (&acc)[4][Tile::kTokenTiles][4],
                                  float (&own)[Tile::kValues]) {
  constexpr int kOf = Tile::kInputWarps;
  const int warp = thread / 32, input_warp = warp % kOf, row_warp = warp / kOf;
  const auto place = [&](int from, int t) { return buffer + from * Tile::kUnitBytes + t * kVectorBytes + thread % 32 * 16; };
  FLUTE_UNROLL
  for (int j = 0; j < Tile::kUnits; ++j) {
    float* const sum = own + j * Tile::kTokenTiles * 4;
    FLUTE_UNROLL
    for (int d = 0; d < kOf; ++d) {
      const int unit = (input_warp + d) % kOf * Tile::kUnits + j, from = row_warp * kOf + (input_warp + kOf - d) % kOf;
      if (d) barrier();
      FLUTE_UNROLL
      for (int u = 0; u < 4; ++u) {
        if (u != unit) continue;  // a loop, because registers have no index
        FLUTE_UNROLL
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
          const float* const c = acc[u][t];
          if (d) sts128(place(warp, t), {{as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])}});
          FLUTE_UNROLL
          for (int i = 0; i < 4 && d == 0; ++i) sum[4 * t + i] = c[i];
        }
      }
      if (d == 0) continue;
      barrier();
      FLUTE_UNROLL
      for (int t = 0; t < Tile::kTokenTiles; ++t) {
        const Words4 four = lds128(place(from, t));
        FLUTE_UNROLL
        for (int i = 0; i < 4; ++i) sum[4 * t + i] += as_f32(four.w[i]);
      }
    }
  }
}

template <bool kF16, class Tile>
FLUTE_DEVICE void write_tile(const MmaParameters& p, const MmaPlace& at, int thread, const float (&own)[Tile::kValues]) {
  const int lane = thread % 32, warp = thread / 32;
  const int first = warp / Tile::kInputWarps * kStripRows + warp % Tile::kInputWarps * Tile::kUnits * kUnitRows + lane / 4;
  FLUTE_UNROLL
  for (int j = 0; j < Tile::kUnits * 2; ++j) {
    const int row = first + j * 8;
    if (row >= at.rows) continue;
    const float bias = p.bias ? widen16<kF16>(p.bias[at.first_row + row]) : 0;
    FLUTE_UNROLL
    for (int i = 0; i < Tile::kTokenTiles * 2; ++i) {
      const int token = at.token + i / 2 * 8 + lane % 4 * 2 + i % 2;
      const float value = own[(j / 2 * Tile::kTokenTiles + i / 2) * 4 + j % 2 * 2 + i % 2];
      if (token < p.m) p.y[int64_t(token) * p.w.n + at.first_row + row] = round16<kF16>(value + bias);
    }
  }
}

template <int kBits, bool kF16, class Tile>
FLUTE_KERNEL(kMmaThreads, Tile::kCtas) lut_mma(FLUTE_PARAMETER MmaParameters p) {
  const int thread = thread_id(), warp = thread / 32;
  const uint32_t cta = uint32_t(cta_id());
  const Work work = share_work(count_tiles<Tile>(p), p.slices, uint32_t(cta_count()));
  if (cta >= work.ctas) return;
  const uint32_t begin = first_item(work, cta), end = first_item(work, cta + 1);

  const uint32_t table = shared_base(), flag = table + table_bytes(kBits, mma_row(kBits)), first_stage = flag + 16;

  // The loader runs ahead of the sums by all stages but one, across tiles.
  MmaLoader<kBits, Tile> loader;
  const uint32_t slices = p.slices;
  uint32_t load_tile = begin / slices;
  loader.start(p, locate<Tile>(p, load_tile), int(begin - load_tile * slices), thread);
  const auto load = [&](uint32_t item, uint32_t stage) {
    if (item < end) {
      if (item == (load_tile + 1) * slices) {
        loader.start(p, locate<Tile>(p, ++load_tile), 0, fresh_thread_id());
      }
      loader.load(p, stage, int(item - load_tile * slices), thread);
    }
    cp_async_commit();  // an empty group too, so that waiting can count
  };
  const uint32_t ahead = p.stages - 1, last_stage = first_stage + ahead * p.stage_bytes;
  for (uint32_t i = 0; i < ahead; ++i) load(begin + i, first_stage + i * p.stage_bytes);

  const int row_warp = warp / Tile::kInputWarps, input_warp = warp % Tile::kInputWarps;
  int table_shard = -1;
  uint32_t stage = last_stage;  // of the item before
  float to_weight = 0;
  for (uint32_t item = begin, tile = begin / slices; item < end; ++tile) {
    MmaPlace at = locate<Tile>(p, tile);
    const bool active = row_warp < at.strips;
    if (at.shard != table_shard) {  // nobody reads the table now: there was a barrier after the last block
      table_shard = at.shard;
      const float* const book = books(p.packed) + table_shard * 16;
      const Normal normal = normalise(book, kF16 ? 14 : 0);  // fp16 reaches up to 2^15.99; bf16 has fp32's range
      build_table<kBits, mma_row(kBits), kF16>(table, book, normal.to_table, fresh_thread_id(), kMmaThreads);
      to_weight = normal.to_weight;
    }
    float acc[4][Tile::kTokenTiles][4] = {};
    for (; item < end && item < (tile + 1) * slices; ++item) {
      cp_async_wait(int(ahead) - 1);
      barrier();  // the item is there for everyone, and nobody reads the stage that is loaded next
      load(item + ahead, stage);
      stage = stage == last_stage ? first_stage : stage + p.stage_bytes;
      const int slice = int(item - tile * slices);
      if (!active || slice * Tile::kInputWarps + input_warp >= p.w.blocks) continue;
      const uint32_t x = stage + codes_bytes<kBits, Tile>();
      const auto load_x = [&](uint32_t(&b)[Tile::kTokenTiles][2][4]) {
        const int lane = lane_id();
        const uint32_t first = x + lane % 8 * Tile::kXRowBytes + input_warp * (kBlockInputs * 2) + lane / 8 * 16;
        FLUTE_UNROLL
        for (int t = 0; t < Tile::kTokenTiles; ++t) {
          ldmatrix4(first + t * 8 * Tile::kXRowBytes, b[t][0]);
          ldmatrix4(first + t * 8 * Tile::kXRowBytes + 64, b[t][1]);
        }
      };
      const uint32_t scales = x + Tile::kXBytes + row_warp * p.scale_rows * kScaleRowBytes + lane_id() / 4 * 16;
      const int first_group = group_of(p, slice * Tile::kInputs);
      const auto scales_of = [&](int s) {
        const int input = (slice * Tile::kInputWarps + input_warp) * kBlockInputs + s * kStepInputs;
        return scales + (group_of(p, input) - first_group) * kScaleRowBytes;
      };
      const auto multiply = [&](auto small_groups) {
        uint32_t codes[4 * kBits];
        load_units<kBits, 4>(stage + (row_warp * Tile::kInputWarps + input_warp) * int(block_bytes(kBits)) + lane_id() * 16, 0, codes);
        multiply_block<kBits, mma_row(kBits), kF16, small_groups.value, 4>(table, lane_copy<kBits>(lane_id()), to_weight,
                                                                           p.w.scale_f16, codes, load_x, scales_of, acc);
      };
      if (p.group_shift < 6) multiply(std::true_type{});  // 64 inputs, a block
      else multiply(std::false_type{});
    }
    static_assert(codes_bytes<kBits, Tile>() + Tile::kXBytes >= kMmaWarps * Tile::kUnitBytes, "sums pass through the last stage");
    float own[Tile::kValues];
    const int writer = fresh_thread_id();
    add_input_warps<Tile>(stage, writer, acc, own);
    // What is computed again here would cost registers to keep.
    const Work same = share_work(count_tiles<Tile>(p), p.slices, uint32_t(cta_count()));
    if (combine<kMmaThreads>(same, p.workspace, uint32_t(cta_id()), tile, writer, flag, own, [] { barrier(); })) {
      at = locate<Tile>(p, tile);
      write_tile<kF16, Tile>(p, at, writer, own);
      if (!p.gate.out) continue;
      finish_pair<kF16, Tile::kRowWarps * kStripRows, Tile::kTokens, kMmaThreads>(
          p.gate, p.y, p.workspace, tile, at.first_row - at.shard * p.gate.half, at.token, writer, flag, [] { barrier(); });
    }
  }
}

template <int kBits, bool kF16, class Tile>
const char* launch_mma(const Gemm& call, int group_shift) {
  MmaParameters p{call.w, call.packed, static_cast<const uint16_t*>(call.x), static_cast<const uint16_t*>(call.bias),
                  static_cast<uint16_t*>(call.y), counters_of(call), call.m, group_shift, 0, 0, 0, 0, 0,
                  gate_of(call, Tile::kRowWarps, Tile::kTokens)};
  p.scale_rows = Tile::kInputs >> group_shift > 1 ? Tile::kInputs >> group_shift : 1;
  p.token_tiles = (call.m + Tile::kTokens - 1) / Tile::kTokens;
  p.slices = (call.w.blocks + Tile::kInputWarps - 1) / Tile::kInputWarps;
  p.stage_bytes = codes_bytes<kBits, Tile>() + Tile::kXBytes + Tile::kRowWarps * p.scale_rows * kScaleRowBytes;
  const int fixed = table_bytes(kBits, mma_row(kBits)) + 16;
  constexpr int kReserved = 1024, kGoodStages = 3;  // the driver's own shared memory for each CTA; see kMaxStages
  int ctas = Tile::kCtas, shared = (call.device.shared_bytes + kReserved) / ctas - kReserved;
  if (shared < fixed + kGoodStages * p.stage_bytes) {
    ctas = 1;
    shared = call.device.shared_bytes;
  }
  p.stages = (shared - fixed) / p.stage_bytes < kMaxStages ? (shared - fixed) / p.stage_bytes : kMaxStages;
  if (shared < fixed || p.stages < 2) return "lut_mma: the device has too little shared memory for two stages";
  // A shard's last tile may have a single strip; how many do is on the device.
  const int64_t row_tiles = call.w.n_shards == 1 ? (call.w.strips + Tile::kRowWarps - 1) / Tile::kRowWarps : call.w.strips;
  const int64_t items = row_tiles * p.token_tiles * p.slices;
  if (items > INT32_MAX) return "lut_mma: more tokens than 32-bit work items can count";
  const int64_t most = int64_t(ctas) * call.device.sms;
  if (most > int64_t(kGateCounters)) return "lut_mma: more multiprocessors than the workspace has counters";
  const int grid = int(items < most ? items : most), bytes = fixed + p.stages * p.stage_bytes;
  return launch(lut_mma<kBits, kF16, Tile>, grid, kMmaThreads, bytes, call.stream, p);
}

template <int kBits, bool kF16>
const char* choose_tile(const Gemm& call, int group_shift) {
  if (call.m <= 8) return launch_mma<kBits, kF16, MmaTile<8>>(call, group_shift);
  if (call.m <= 16) return launch_mma<kBits, kF16, MmaTile<16>>(call, group_shift);
  return launch_mma<kBits, kF16, MmaTile<32>>(call, group_shift);
}

// One translation unit each, for compile time: lut_mma_2.cu, _3, _4.
template <int kBits>
const char* run_mma_bits(const Gemm& call, int group_shift) {
  return call.f16 ? choose_tile<kBits, true>(call, group_shift) : choose_tile<kBits, false>(call, group_shift);
}
extern template const char* run_mma_bits<2>(const Gemm&, int);
extern template const char* run_mma_bits<3>(const Gemm&, int);
extern template const char* run_mma_bits<4>(const Gemm&, int);

}  // namespace flute::cuda
