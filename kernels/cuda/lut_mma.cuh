// K1: y = x W^T with mma.sync, for few tokens. W is operand A and x operand B ("swap AB"), so that 8 tokens fill an
// instruction that has 16 rows of W. A CTA has eight warps, each with one strip of 64 rows and one block of 64 inputs of
// what a pipeline stage brings; warps that share a strip add up at a tile's end. Items of work are (64 * kRowWarps rows of
// one shard, kTokens tokens, 64 * kInputWarps inputs), shared by Stream-K (streamk.h).
//
// Weights are rounded once, to x's type, in the table: the scales multiply fp32 sums, once a block or, in groups
// of 16 and 32, once a step.
#pragma once

#include <cstdio>

#include "decode.h"
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
  static constexpr int kCtas = kTokens == 32 ? 1 : 2;  // a multiprocessor, as far as registers go
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
  int stages;
};

// Where a tile is: `strips` strips of shard `shard` from `strip` on, tokens from `token` on.
struct MmaPlace {
  int shard, strip, strips, token;
  int first_row, rows;  // of y, of this tile
};

FLUTE_DEVICE Shard shard_at(const MmaParameters& p, int s) {
  return p.w.n_shards == 1 ? Shard{0, p.w.strips, 0, p.w.n} : shards(p.w, p.packed)[s];
}
template <class Tile>
FLUTE_DEVICE uint32_t count_tiles(const MmaParameters& p) {
  uint32_t row_tiles = 0;
  FLUTE_ROLLED
  for (int s = 0; s < p.w.n_shards; ++s) row_tiles += (shard_at(p, s).strips + Tile::kRowWarps - 1) / Tile::kRowWarps;
  return row_tiles * ((p.m + Tile::kTokens - 1) / Tile::kTokens);
}
template <class Tile>
FLUTE_DEVICE MmaPlace locate(const MmaParameters& p, uint32_t tile) {
  const int token_tiles = (p.m + Tile::kTokens - 1) / Tile::kTokens;
  int row_tile = int(tile) / token_tiles;
  const int token = int(tile) % token_tiles * Tile::kTokens;
  FLUTE_ROLLED
  for (int s = 0;; ++s) {
    const Shard h = shard_at(p, s);
    const int tiles = (h.strips + Tile::kRowWarps - 1) / Tile::kRowWarps;
    if (row_tile >= tiles) {
      row_tile -= tiles;
      continue;
    }
    const int strip = row_tile * Tile::kRowWarps, left = h.strips - strip;
    return {s, h.first_strip + strip, left < Tile::kRowWarps ? left : Tile::kRowWarps, token, h.first_row + strip * kStripRows,
            h.rows - strip * kStripRows};
  }
}
FLUTE_DEVICE int group_of(const MmaParameters& p, int input) {
  const int group = input >> p.group_shift;
  return group < p.w.groups ? group : p.w.groups - 1;
}

// Brings stages, of its tile's slices one after another. Each thread always copies the same places of a stage, so that what
// changes from slice to slice are three pointers. Strips beyond the shard, blocks beyond K and tokens beyond M are left alone;
// inputs beyond K are zeros.
template <int kBits, class Tile>
struct MmaLoader {
  static constexpr int kStripThreads = kMmaThreads / Tile::kRowWarps;  // of codes
  static constexpr int kBlockChunks = int(block_bytes(kBits)) / 16, kStripChunks = Tile::kInputWarps * kBlockChunks;
  static constexpr int kTokenChunks = Tile::kInputs / 8, kTokenStep = kMmaThreads / kTokenChunks;
  static constexpr int kRowChunks = kScaleRowBytes / 16;
  static_assert(kStripChunks % kStripThreads == 0 && Tile::kTokens % kTokenStep == 0, "whole copies a thread");
  static_assert(kStripThreads == Tile::kScaleRows * kRowChunks, "one copy of scales a thread");

  const uint8_t* codes;
  const uint16_t* x;
  const uint8_t* scales;
  int tokens;        // of x, from this thread's first on
  int chunks, left;  // of codes and of inputs, from this thread's first on: what is not past the end
  int scale_chunk;   // this thread's of its strip's scales
  int input;         // the slice's first

  FLUTE_DEVICE void start(const MmaParameters& p, const MmaPlace& at, int slice, int thread) {
    const int strip = thread / kStripThreads, chunk = thread % kStripThreads, block = slice * Tile::kInputWarps;
    const bool here = strip < at.strips;
    codes = block_codes(p.w, p.packed, at.strip + strip, block) + chunk * 16;
    chunks = here ? (p.w.blocks - block) * kBlockChunks - chunk : 0;
    input = slice * Tile::kInputs;
    const int token = at.token + thread / kTokenChunks, mine = input + thread % kTokenChunks * 8;
    x = p.x + int64_t(token) * p.w.k + mine;
    tokens = p.m - token;
    left = p.w.k - mine;
    scales = reinterpret_cast<const uint8_t*>(strip_scales(p.w, p.packed, at.strip + strip, 0)) + chunk * 16;
    scale_chunk = here ? chunk : kStripThreads;
  }

  FLUTE_DEVICE void load(const MmaParameters& p, uint32_t stage, int thread) {
    const int strip = thread / kStripThreads, chunk = thread % kStripThreads;
    const uint32_t codes_to = stage + (strip * kStripChunks + chunk) * 16;
    FLUTE_UNROLL
    for (int i = 0; i < kStripChunks; i += kStripThreads) {
      if (i < chunks) cp_async16(codes_to + i * 16, codes + i * 16, 16);
    }
    stage += codes_bytes<kBits, Tile>();
    const uint32_t x_to = stage + thread / kTokenChunks * Tile::kXRowBytes + thread % kTokenChunks * 16;
    const int step = kTokenStep * p.w.k;  // elements
    FLUTE_UNROLL
    for (int i = 0; i < Tile::kTokens / kTokenStep; ++i) {
      // A token that is not there is a column of B, and what it multiplies stays in its column of C.
      if (i * kTokenStep < tokens) cp_async16(x_to + i * kTokenStep * Tile::kXRowBytes, left > 0 ? x + i * step : p.x, left > 0 ? 16 : 0);
    }
    stage += Tile::kXBytes;
    const int group = group_of(p, input), groups = group_of(p, input + Tile::kInputs - 1) - group + 1;
    if (scale_chunk < groups * kRowChunks) {
      cp_async16(stage + (strip * p.scale_rows * kRowChunks + chunk) * 16, scales + int64_t(group) * kScaleRowBytes, 16);
    }
    codes += kStripChunks * 16;
    chunks -= kStripChunks;
    x += Tile::kInputs;
    left -= Tile::kInputs;
    input += Tile::kInputs;
  }
};

// Adds the products of one block to a warp's sums. acc[u][t] are C's registers of unit u and tokens 8t .. 8t + 7. With
// kSmallGroups scales change within the block.
template <int kBits, bool kF16, class Tile, bool kSmallGroups>
FLUTE_DEVICE void multiply_block(const MmaParameters& p, uint32_t table, float to_weight, uint32_t stage, int row_warp, int input_warp,
                                 int slice, float (&acc)[4][Tile::kTokenTiles][4]) {
  const int lane = lane_id();
  const uint32_t copy = lane_copy<kBits>(lane);
  uint32_t codes[4 * kBits];
  const uint32_t block = stage + (row_warp * Tile::kInputWarps + input_warp) * int(block_bytes(kBits)) + lane * 16;
  FLUTE_UNROLL
  for (int v = 0; v < kBits; ++v) {
    const Words4 four = lds128(block + v * kVectorBytes);
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) codes[4 * v + i] = four.w[i];
  }

  stage += codes_bytes<kBits, Tile>();
  uint32_t b[Tile::kTokenTiles][2][4];  // [t][s / 2]: B's registers of step s and of the next
  const uint32_t x = stage + lane % 8 * Tile::kXRowBytes + input_warp * (kBlockInputs * 2) + lane / 8 * 16;
  FLUTE_UNROLL
  for (int t = 0; t < Tile::kTokenTiles; ++t) {
    ldmatrix4(x + t * 8 * Tile::kXRowBytes, b[t][0]);
    ldmatrix4(x + t * 8 * Tile::kXRowBytes + 64, b[t][1]);
  }

  const int input = (slice * Tile::kInputWarps + input_warp) * kBlockInputs, first_group = group_of(p, slice * Tile::kInputs);
  const uint32_t scales = stage + Tile::kXBytes + row_warp * p.scale_rows * kScaleRowBytes + lane / 4 * 16;
  FLUTE_UNROLL
  for (int u = 0; u < 4; ++u) {
    float sum[Tile::kTokenTiles][4] = {};
    FLUTE_UNROLL
    for (int s = 0; s < 4; ++s) {
      uint32_t a[4];
      fragment<kBits, mma_row(kBits)>(table, copy, codes, u, s, a);
      FLUTE_UNROLL
      for (int t = 0; t < Tile::kTokenTiles; ++t) mma<kF16>(sum[t], a, b[t][s / 2][s % 2 * 2], b[t][s / 2][s % 2 * 2 + 1]);
      if (!kSmallGroups && s < 3) continue;
      const uint32_t pair = lds32(scales + (group_of(p, input + (kSmallGroups ? s * kStepInputs : 0)) - first_group) * kScaleRowBytes + u * 4);
      float scale[2];
      FLUTE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint16_t h = uint16_t(pair >> 16 * i);
        scale[i] = (p.w.scale_f16 ? widen16<true>(h) : widen16<false>(h)) * to_weight;
      }
      FLUTE_UNROLL
      for (int t = 0; t < Tile::kTokenTiles; ++t) {
        FLUTE_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc[u][t][i] += scale[i / 2] * sum[t][i];
          sum[t][i] = 0;
        }
      }
    }
  }
}

// Adds up the warps of a strip, always in the same order, through shared memory at `buffer`, which others may still read
// when this begins. `own` are a warp's units of the sum: input warp i has units i * kUnits and following.
template <class Tile>
FLUTE_DEVICE void add_input_warps(uint32_t buffer, int warp, const float (&acc)[4][Tile::kTokenTiles][4], float (&own)[Tile::kValues]) {
  constexpr int kOf = Tile::kInputWarps;
  const int input_warp = warp % kOf, row_warp = warp / kOf;
  const auto place = [&](int from, int t) { return buffer + from * Tile::kUnitBytes + t * kVectorBytes + lane_id() * 16; };
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
FLUTE_DEVICE void write_tile(const MmaParameters& p, const MmaPlace& at, int warp, const float (&own)[Tile::kValues]) {
  const int lane = lane_id(), first = warp / Tile::kInputWarps * kStripRows + warp % Tile::kInputWarps * Tile::kUnits * kUnitRows + lane / 4;
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
  const Work work = share_work(count_tiles<Tile>(p), (p.w.blocks + Tile::kInputWarps - 1) / Tile::kInputWarps, uint32_t(cta_count()));
  if (cta >= work.ctas) return;
  const uint32_t begin = first_item(work, cta), end = first_item(work, cta + 1);

  const uint32_t table = shared_base(), flag = table + table_bytes(kBits, mma_row(kBits)), first_stage = flag + 16;
  const uint32_t stage_bytes = codes_bytes<kBits, Tile>() + Tile::kXBytes + Tile::kRowWarps * p.scale_rows * kScaleRowBytes;

  // The loader runs ahead of the sums by all stages but one, across tiles.
  MmaLoader<kBits, Tile> loader;
  uint32_t to_load = begin, load_tile = begin / work.slices, load_slice = begin % work.slices, load_to = first_stage;
  const uint32_t stages_end = first_stage + p.stages * stage_bytes;
  loader.start(p, locate<Tile>(p, load_tile), int(load_slice), thread);
  const auto load = [&] {
    if (to_load < end) {
      if (load_slice == work.slices) {
        load_slice = 0;
        loader.start(p, locate<Tile>(p, ++load_tile), 0, thread);
      }
      loader.load(p, load_to, thread);
      ++load_slice;
      ++to_load;
      load_to = load_to + stage_bytes == stages_end ? first_stage : load_to + stage_bytes;
    }
    cp_async_commit();  // an empty group too, so that waiting can count
  };
  for (int i = 0; i + 1 < p.stages; ++i) load();

  const int row_warp = warp / Tile::kInputWarps, input_warp = warp % Tile::kInputWarps;
  int table_shard = -1;
  uint32_t stage = first_stage;
  float to_weight = 0;
  for (uint32_t item = begin, tile = begin / work.slices; item < end; ++tile) {
    MmaPlace at = locate<Tile>(p, tile);
    const bool active = row_warp < at.strips;
    if (at.shard != table_shard) {  // nobody reads the table now: there was a barrier after the last block
      table_shard = at.shard;
      const float* const book = books(p.packed) + table_shard * 16;
      const Normal normal = normalise(book, kF16 ? 14 : 0);  // fp16 reaches up to 2^15.99; bf16 has fp32's range
      build_table<kBits, mma_row(kBits), kF16>(table, book, normal.to_table, thread, kMmaThreads);
      to_weight = normal.to_weight;
    }
    float acc[4][Tile::kTokenTiles][4] = {};
    const uint32_t tile_end = (tile + 1) * work.slices < end ? (tile + 1) * work.slices : end;
    uint32_t used = stage;
    for (uint32_t slice = item - tile * work.slices; item < tile_end; ++item, ++slice) {
      cp_async_wait(p.stages - 2);
      barrier();  // the item is there for everyone, and nobody reads the stage that is loaded next
      load();
      used = stage;
      stage = stage + stage_bytes == stages_end ? first_stage : stage + stage_bytes;
      if (!active || int(slice) * Tile::kInputWarps + input_warp >= p.w.blocks) continue;
      if (p.group_shift < 6) {  // 64 inputs, a block
        multiply_block<kBits, kF16, Tile, true>(p, table, to_weight, used, row_warp, input_warp, int(slice), acc);
      } else {
        multiply_block<kBits, kF16, Tile, false>(p, table, to_weight, used, row_warp, input_warp, int(slice), acc);
      }
    }
    static_assert(codes_bytes<kBits, Tile>() + Tile::kXBytes >= kMmaWarps * Tile::kUnitBytes, "sums pass through the last stage");
    float own[Tile::kValues];
    add_input_warps<Tile>(used, warp, acc, own);
    if (combine<kMmaThreads>(work, p.workspace, cta, tile, thread, flag, own, [] { barrier(); })) {
      at = locate<Tile>(p, tile);  // again: it would cost registers to keep
      write_tile<kF16, Tile>(p, at, warp, own);
    }
  }
}

template <int kBits, bool kF16, class Tile>
const char* launch_mma(const Gemm& call, int group_shift) {
  MmaParameters p{call.w,
                  call.packed,
                  static_cast<const uint16_t*>(call.x),
                  static_cast<const uint16_t*>(call.bias),
                  static_cast<uint16_t*>(call.y),
                  call.workspace,
                  call.m,
                  group_shift,
                  Tile::kInputs >> group_shift > 1 ? Tile::kInputs >> group_shift : 1,
                  0};
  const int stage = codes_bytes<kBits, Tile>() + Tile::kXBytes + Tile::kRowWarps * p.scale_rows * kScaleRowBytes;
  const int fixed = table_bytes(kBits, mma_row(kBits)) + 16;
  constexpr int kReserved = 1024, kGoodStages = 3;  // the driver's own shared memory for each CTA; see kMaxStages
  int ctas = Tile::kCtas, shared = (call.device.shared_bytes + kReserved) / ctas - kReserved;
  if (shared < fixed + kGoodStages * stage) {
    ctas = 1;
    shared = call.device.shared_bytes;
  }
  p.stages = (shared - fixed) / stage < kMaxStages ? (shared - fixed) / stage : kMaxStages;
  if (shared < fixed || p.stages < 2) return "lut_mma: the device has too little shared memory for two stages";
  const int64_t row_tiles = call.w.n_shards == 1 ? (call.w.strips + Tile::kRowWarps - 1) / Tile::kRowWarps : call.w.strips;  // or fewer
  const int64_t items = row_tiles * ((call.m + Tile::kTokens - 1) / Tile::kTokens) * ((call.w.blocks + Tile::kInputWarps - 1) / Tile::kInputWarps);
  if (items > INT32_MAX) return "lut_mma: more tokens than 32-bit work items can count";
  const int64_t most = int64_t(ctas) * call.device.sms;
  if (most > int64_t(kCounterBytes / sizeof(unsigned))) return "lut_mma: more multiprocessors than the workspace has counters";
  return launch(lut_mma<kBits, kF16, Tile>, int(items < most ? items : most), kMmaThreads, fixed + p.stages * stage, call.stream, p);
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
