// y = x W^T by wgmma (sm_90a), for more tokens than mma.sync can serve without being bound by it. W is the left operand, from
// registers, where codes become weights; x is the right one, from shared memory.
//
// A CTA computes tiles of 256 or 128 rows (4 or 2 strips of one shard) x 16, 32, 64 or 128 tokens. One warp brings blocks of 64
// inputs by bulk copies through a ring of stages. Up to 64 tokens there are four warpgroups of consumers, of a strip each: a
// warp looks up its 16 rows of a whole block while the last block's are multiplied. A tile of two strips has two teams of
// warpgroups, which take turns at blocks and add up at the end. The sums of 128 tokens leave registers for two warpgroups only,
// of two strips each: a warp has units 0 and 1, or 2 and 3, of a strip, and looks up one step of 16 inputs while others are
// multiplied.
//
// Two warpgroups cannot hide how long lookups, products and wgmma take one after another: with them a block of 256 rows x 64
// tokens took 1290 cycles of an H100 (measured), of which its schedulers had nothing to issue in two thirds. And the last CTA of
// a tile that many share reads all their sums alone, about 64 bytes a cycle: with tiles of 256 x 64 that was the larger part of
// the 12 us that a layer took whatever its size (measured). Reckoned, for N = 4096 on 132 multiprocessors, 32 tokens: 8 parts of
// 32 KiB in tiles of 256 rows, 4096 cycles; 4 parts of 16 KiB in tiles of 128, 1024, and 260 for the two teams' sums. Tiles of
// 64 rows would save 600 more, but read 128 KiB of x a CTA instead of 64, at 64 bytes a cycle at best.
//
// Sums stay in the tensor cores' registers over all of K, so that groups' scales cannot be applied to them: weights are
// scaled in 16 bits (each value of the codebook, its scale and their product are rounded, as in a dense layer of x's type
// that was dequantized in it). Scaling in fp32 would take five instructions a pair of weights instead of one (two to widen, two
// products, one to round): at 64 tokens, more issue slots than wgmma leaves.
//
// What a block of 64 inputs takes of 256 rows, in cycles of a multiprocessor, with instructions counted in the SASS of nvcc
// 13.0 (bf16, groups of 64 and more). Assumed, not measured: 989 dense TFLOP/s at 1.83 GHz are 4096 operations a cycle, so
// wgmma of 64 x 64 x 16 takes 32; shared memory serves 128 bytes a cycle, to wgmma as well, which reads its x anew each time;
// each of four schedulers issues one instruction a cycle. HBM is an H100's 2977 GB/s (measured, a copy) at 1.85 GHz.
//
//            a warp's instructions: all, permutes, lookups, products | issue | shared memory: 16, 32, 64 tokens | 128 | HBM
//   4 bits                    112 (189)      16   16 LDS        16   |   448 |                  484, 564, 724   | 1036 | 693
//   3 bits                    128 (216)      16   16 LDS        16   |   512 |                  532, 612, 772   | 1020 | 525
//   2 bits                     96 (155)       8    8 LDS.64     16   |   384 |                  452, 532, 692   |  972 | 357
//
// In parentheses a warp's of tiles of 128 tokens, of which there are half as many, with twice the permutes, lookups and products.
// HBM is for groups of 128; wgmma takes 8 cycles a token, up to 1024. Of the 564, lookups are 256, codes and scales 80, x as
// wgmma reads it 128, the copies into the ring 100; tiles of two strips copy x twice, which is 16, 32 and 64 more, and a warp
// has 6 instructions more. Groups of 16 and 32 take 45 instructions more (67 with 128 tokens).
#pragma once

#include <cstdint>

#include "decode.h"
#include "gate.h"
#include "launch.h"
#include "ptx_sm90.h"
#include "streamk.h"

namespace flute::cuda {

constexpr int kSteps = kBlockInputs / kStepInputs, kStripUnits = kStripRows / kUnitRows;
constexpr int kConsumerBarrier = 1;
constexpr int kTileAlign = 1024;  // of what the 128-byte swizzle is applied to
constexpr int kWgmmaStages = 16;  // at most, for the barriers

// How a CTA's tile of kStrips strips of one shard and kTokens tokens is divided. A warpgroup has kUnits strips: each of its
// warps has as many units of 16 rows, and each unit is one wgmma a step.
template <int kTokensOf, int kStripsOf>
struct WgmmaTile {
  static constexpr int kTokens = kTokensOf, kStrips = kStripsOf, kRows = kStrips * kStripRows;
  static constexpr bool kFew = kTokens <= 64;
  static constexpr int kUnits = kFew ? 1 : 2, kWarpgroups = kFew ? 4 : 2;
  // Warpgroups beyond what the strips take are further teams: they compute the same rows from every other block of inputs, and
  // at a part's end each team has the sums of its share of the tokens.
  static constexpr int kTeamThreads = kStrips / kUnits * 128, kConsumers = kWarpgroups * 128, kTeams = kConsumers / kTeamThreads;
  static constexpr int kOctets = kTokens / 8 / kTeams, kValues = kUnits * kOctets * 4;  // a thread's at the end
  static_assert(kTeams <= 2, "two sums add up alike in both orders");
  // Steps whose codes are looked up together, and groups of wgmma that may be under way when weights go to the registers of
  // the next.
  static constexpr int kChain = kFew ? kSteps : 1, kGroups = kSteps / kChain, kAhead = kFew ? 0 : 2;
  static_assert(kAhead < kGroups, "a fragment's registers are written again after kGroups groups");
  // The stage that a team's last block came from is empty once its next one is looked up, which must be there by then. Between
  // two barriers of all consumers a stage is one team's: another would not know which of two earlier phases a parity means.
  static constexpr int kLeastStages = 2 * kTeams;
  // At launch a thread has 65536 / kThreads registers, rounded down to a multiple of 8: 96 or 168. The sum must stay.
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kProducerRegisters = kFew ? 32 : 40, kConsumerRegisters = kFew ? 112 : 232;
  static_assert(128 * kProducerRegisters + kConsumers * kConsumerRegisters <= kThreads * (65536 / kThreads / 8 * 8),
                "setmaxnreg would wait forever");
};

struct WgmmaCall {
  TensorMap x;
  Packed w;
  const uint8_t* packed;
  const void* bias;
  void* y;
  void* workspace;
  int m, stages;
  GateCall gate;
};

// A block's groups: 1, 2 or 4, or 1 where a group is some blocks or all of K.
FLUTE_HD inline int block_groups(const Packed& w) {
  return w.groups > 1 && w.group_size < kBlockInputs ? kBlockInputs / w.group_size : 1;
}

// Shared memory from its base: the table, then the stages (x, codes, scales), what consumers write y through and exchange sums
// through, the flag of combine(), and for each stage a barrier that it is full and one that it is empty.
template <int kBits, class Tile>
struct WgmmaShared {
  static constexpr int kTable = table_bytes(kBits, kWideRow);
  static constexpr int kX = Tile::kTokens * kBlockInputs * 2;
  static constexpr int kStripCodes = kBits * kVectorBytes, kCodes = Tile::kStrips * kStripCodes;
  static constexpr int kWarpOut = 2 * 32 * 16;  // 16 bytes a lane, twice
  static constexpr int kOut = Tile::kConsumers / 32 * kWarpOut, kFlag = 16, kBarriers = 2 * kWgmmaStages * 8;
  static constexpr int kExchange = Tile::kTeams > 1 ? Tile::kConsumers * Tile::kValues * int(sizeof(float)) : 0;
  static_assert(kTable % kTileAlign == 0 && kX % kTileAlign == 0, "x tiles are aligned");

  static FLUTE_HD int stage_bytes(int groups) {
    return (kX + kCodes + Tile::kStrips * groups * kScaleRowBytes + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
  static int bytes(int stages, int groups) {
    return kTable + stages * stage_bytes(groups) + kOut + kExchange + kFlag + kBarriers;
  }

  uint32_t table, stage, stage_size, out, exchange, flag, full, empty;
  FLUTE_DEVICE WgmmaShared(int stages, int groups)
      : table(shared_base()), stage(table + kTable), stage_size(uint32_t(stage_bytes(groups))), out(stage + stages * stage_size),
        exchange(out + kOut), flag(exchange + kExchange), full(flag + kFlag), empty(full + kWgmmaStages * 8) {}
  FLUTE_DEVICE uint32_t x(int i) const { return stage + i * stage_size; }
  FLUTE_DEVICE uint32_t codes(int i, int strip) const { return x(i) + kX + strip * kStripCodes; }
  FLUTE_DEVICE uint32_t scales(int i, int strip, int groups) const {
    return x(i) + kX + kCodes + strip * groups * kScaleRowBytes;
  }
};

// Position in the ring of stages.
struct Ring {
  int stages, stage = 0;
  uint32_t parity = 0;
  FLUTE_DEVICE explicit Ring(int n) : stages(n) {}
  FLUTE_DEVICE void next() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// A run of blocks of one tile, this CTA's part of it.
struct Part {
  uint32_t tile, begin, end;  // blocks
  int shard_index, strip, strips, token;
  Shard shard;
};

template <class Tile>
FLUTE_HD inline uint32_t shard_tiles(const Shard& s) {
  return uint32_t(s.strips + Tile::kStrips - 1) / Tile::kStrips;
}

// Calls part(p) for what this CTA has to do, in order. Tiles of the same rows follow each other, so that L2 has their weights.
template <class Tile, class F>
FLUTE_DEVICE void for_parts(const WgmmaCall& call, const F& part) {
  const uint32_t token_tiles = uint32_t(call.m + Tile::kTokens - 1) / Tile::kTokens;
  uint32_t row_tiles = 0;
  for (int s = 0; s < call.w.n_shards; ++s) row_tiles += shard_tiles<Tile>(shard_of(call.w, call.packed, s));
  const uint32_t tiles = row_tiles * token_tiles, blocks = uint32_t(call.w.blocks);
  const Work work = share_work_evenly(tiles, blocks, uint32_t(cta_count()));
  if (uint32_t(cta_id()) >= work.ctas) return;
  const uint32_t last = first_item(work, cta_id() + 1);
  for (uint32_t item = first_item(work, cta_id()); item < last;) {
    Part p;
    p.tile = item / work.slices;
    p.begin = item % work.slices;
    p.end = p.begin + (last - item) < work.slices ? p.begin + (last - item) : work.slices;
    item += p.end - p.begin;
    p.token = int(p.tile % token_tiles) * Tile::kTokens;
    uint32_t row_tile = p.tile / token_tiles;
    p.shard = shard_of(call.w, call.packed, 0);
    p.shard_index = 0;
    while (row_tile >= shard_tiles<Tile>(p.shard)) {
      row_tile -= shard_tiles<Tile>(p.shard);
      p.shard = shard_of(call.w, call.packed, ++p.shard_index);
    }
    p.strip = int(row_tile) * Tile::kStrips;  // of the shard
    p.strips = p.shard.strips - p.strip < Tile::kStrips ? p.shard.strips - p.strip : Tile::kStrips;
    part(work, p);
  }
}

template <int kBits, class Tile>
FLUTE_DEVICE void produce(const WgmmaCall& call, const WgmmaShared<kBits, Tile>& at) {
  using At = WgmmaShared<kBits, Tile>;
  const int groups = block_groups(call.w);
  const uint32_t codes_of_strip = uint32_t(call.w.blocks) * At::kStripCodes;
  const uint32_t scales_of_strip = uint32_t(call.w.groups) * kScaleRowBytes;
  Ring ring(call.stages);
  wait_for_earlier();
  for_parts<Tile>(call, [&](const Work&, const Part& p) {
    const int64_t strip = p.shard.first_strip + p.strip;
    const uint8_t* codes = block_codes(call.w, call.packed, strip, p.begin);
    const uint8_t* const scales = reinterpret_cast<const uint8_t*>(strip_scales(call.w, call.packed, strip, 0));
    for (int block = int(p.begin); block < int(p.end); ++block, codes += At::kStripCodes, ring.next()) {
      const uint32_t full = at.full + ring.stage * 8;
      const int group = call.w.groups == 1 ? 0 : block * kBlockInputs / call.w.group_size, left = call.w.groups - group;
      const uint32_t scale_bytes = uint32_t(left < groups ? left : groups) * kScaleRowBytes;
      mbarrier_wait(at.empty + ring.stage * 8, ring.parity ^ 1);
      mbarrier_arrive_expect(full, At::kX + uint32_t(p.strips) * (At::kStripCodes + scale_bytes));
      tensor_load(at.x(ring.stage), &call.x, block * kBlockInputs, p.token, full);
      const uint8_t *strip_codes = codes, *strip_scales = scales + group * kScaleRowBytes;
      for (int i = 0; i < p.strips; ++i, strip_codes += codes_of_strip, strip_scales += scales_of_strip) {
        bulk_load(at.codes(ring.stage, i), strip_codes, At::kStripCodes, full);
        bulk_load(at.scales(ring.stage, i, groups), strip_scales, scale_bytes, full);
      }
    }
  });
}

// What a lane decodes of a block: its codes of kUnits units from `unit` on, as unit 0 (and 1) of fragment().
template <int kBits, int kUnits>
FLUTE_DEVICE void load_codes(uint32_t codes, int unit, int lane, uint32_t (&words)[4 * kBits]) {
  const uint32_t mine = codes + lane * 16;
  const auto take = [&](int to, const auto& from) {
    FLUTE_UNROLL
    for (int i = 0; i < int(sizeof from.w / 4); ++i) words[to + i] = from.w[i];
  };
  if constexpr (kBits == 4) {  // a vector a unit
    FLUTE_UNROLL
    for (int u = 0; u < kUnits; ++u) take(4 * u, lds128(mine + (unit + u) * kVectorBytes));
  } else {  // of the lower two bits a vector is two units
    const uint32_t lower = mine + unit / 2 * kVectorBytes, upper = mine + 2 * kVectorBytes + unit * 4;
    if constexpr (kUnits == 2) take(0, lds128(lower));
    else take(0, lds64(lower + unit % 2 * 8));
    if constexpr (kBits == 3 && kUnits == 2) take(8, lds64(upper));
    if constexpr (kBits == 3 && kUnits == 1) words[8] = lds32(upper);
  }
}

// The scales of a lane's rows, each twice: {unit 0: row, row + 8}, {unit 1: row, row + 8}.
template <bool kF16, int kUnits>
FLUTE_DEVICE void load_scales(uint32_t row, int unit, int lane, bool stored_f16, float to_weight,
                              uint32_t (&scales)[2 * kUnits]) {
  const uint32_t from = row + lane / 4 * 16 + unit * 4;
  Words2 stored;
  if constexpr (kUnits == 2) stored = lds64(from);
  else stored.w[0] = lds32(from);
  FLUTE_UNROLL
  for (int i = 0; i < 2 * kUnits; ++i) {
    const uint16_t h = uint16_t(stored.w[i / 2] >> i % 2 * 16);
    const float scale = (stored_f16 ? widen16<true>(h) : widen16<false>(h)) * to_weight;
    scales[i] = round_pair<kF16>(scale, scale);
  }
}

// Descriptor of a K-major tile with rows of 128 bytes, swizzled by 128 (PTX manual, "Matrix descriptor"): address, an unused
// stride, stride of eight rows, all in 16 bytes, and the swizzle's code. A step of 16 inputs is 2 further on.
FLUTE_DEVICE uint64_t describe_x(uint32_t x) {
  return uint64_t(x >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(8 * 128 >> 4) << 32 | uint64_t(1) << 62;
}
constexpr int kStepDescriptor = kStepInputs * 2 >> 4;

// What a thread has of the tile once its CTA's part is computed: all sums of one team, or both teams' of its share of the
// tokens. All consumers call it.
template <class Tile, class Sync>
FLUTE_DEVICE void share_sums(uint32_t exchange, int team, int thread, const float (&sums)[Tile::kUnits][Tile::kTokens / 2],
                             float (&values)[Tile::kValues], const Sync& sync) {
  constexpr int kValues = Tile::kValues, kOfUnit = kValues / Tile::kUnits;
  // Value i of a team's tokens.
  const auto sum = [&](int of, int i) { return sums[i / kOfUnit][of * kOfUnit + i % kOfUnit]; };
  FLUTE_UNROLL
  for (int i = 0; i < kValues; ++i) values[i] = Tile::kTeams == 2 && team ? sum(1, i) : sum(0, i);
  if constexpr (Tile::kTeams == 2) {
    const auto place = [&](int of, int i) {
      return exchange + uint32_t((of * kValues + i) * Tile::kTeamThreads + thread % Tile::kTeamThreads * 4) * 4;
    };
    sync();  // everyone has read the last part's
    FLUTE_UNROLL
    for (int i = 0; i < kValues; i += 4) {
      Words4 other;
      FLUTE_UNROLL
      for (int j = 0; j < 4; ++j) other.w[j] = as_bits(team ? sum(0, i + j) : sum(1, i + j));
      sts128(place(team, i), other);
    }
    sync();
    FLUTE_UNROLL
    for (int i = 0; i < kValues; i += 4) {
      const Words4 other = lds128(place(1 - team, i));
      FLUTE_UNROLL
      for (int j = 0; j < 4; ++j) values[i + j] += as_f32(other.w[j]);
    }
  }
}

// Writes a warp's rows, from `row` of the shard, of kOctets x 8 tokens: by way of shared memory, since a lane has single values
// of its rows. Four matrices of 8 rows x 8 tokens go at a time, of two units and eight tokens or of one unit and sixteen.
template <bool kF16, class Tile>
FLUTE_DEVICE void write_tile(const WgmmaCall& call, const Shard& shard, int row, int first_token, int lane, uint32_t out,
                             const float (&values)[Tile::kValues]) {
  constexpr int kUnits = Tile::kUnits, kOctets = Tile::kOctets, kPieces = 2 * kUnits, kPasses = (kOctets * kUnits + 1) / 2;
  float bias[kPieces] = {};
  FLUTE_UNROLL
  for (int i = 0; i < kPieces; ++i) {
    const int r = row + i * 8 + lane / 4;
    if (call.bias && r < shard.rows) bias[i] = widen16<kF16>(static_cast<const uint16_t*>(call.bias)[shard.first_row + r]);
  }
  // A token has kPieces pieces of 16 bytes, which change places every 128 bytes, so that neither the matrices nor the lanes
  // that read them meet in a bank.
  const auto place = [&](int buffer, int token, int piece) {
    return out + buffer * (32 * 16) + token * (kPieces * 16) + ((piece ^ (token * kPieces / 8 % kPieces)) * 16);
  };
  const int token_of_lane = lane / kPieces, piece = lane % kPieces;
  const int rows = shard.rows - (row + piece * 8);  // from the eight that the lane writes
  FLUTE_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t pairs[4];
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) {  // eight rows i % 2
      const int unit = kUnits == 2 ? i / 2 : 0, octet = kUnits == 2 ? pass : kOctets == 1 ? 0 : 2 * pass + i / 2;
      const float* two = values + (unit * kOctets + octet) * 4 + i % 2 * 2;
      pairs[i] = round_pair<kF16>(two[0] + bias[i % kPieces], two[1] + bias[i % kPieces]);
    }
    const int column = kUnits == 2 ? lane % 8 : lane / 16 * 8 + lane % 8;  // the token of the matrix's column lane % 8
    stmatrix4_transposed(place(pass % 2, column, lane / 8 % kPieces), pairs);
    syncwarp();
    const Words4 eight = lds128(place(pass % 2, token_of_lane, piece));
    const int token = first_token + pass * (16 / kUnits) + token_of_lane;
    if (token >= call.m || rows <= 0 || token_of_lane >= 8 * kOctets) continue;
    uint16_t* const y = static_cast<uint16_t*>(call.y) + int64_t(token) * call.w.n + shard.first_row + row + piece * 8;
    if (rows >= 8 && reinterpret_cast<uintptr_t>(y) % 16 == 0) {
      store_global(y, eight);
    } else {  // a shard that ends or begins between multiples of eight rows
      FLUTE_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i < rows) y[i] = uint16_t(eight.w[i / 2] >> i % 2 * 16);
      }
    }
  }
  syncwarp();
}

template <int kBits, bool kF16, class Tile, bool kFine>
FLUTE_DEVICE void consume(const WgmmaCall& call, const WgmmaShared<kBits, Tile>& at) {
  constexpr int kUnits = Tile::kUnits, kChain = Tile::kChain;
  const int thread = thread_id(), warp = thread / 32, lane = lane_id(), team = thread / Tile::kTeamThreads;
  const int first_unit = warp % (Tile::kTeamThreads / 32) * kUnits;  // of the tile
  const int strip = first_unit / kStripUnits, unit = first_unit % kStripUnits;
  const int groups = block_groups(call.w);
  const uint32_t copy = lane_copy<kBits>(lane);
  const auto sync = [] { barrier(kConsumerBarrier, Tile::kConsumers); };
  Ring ring(call.stages);
  int shard_of_table = -1;
  float to_weight = 0;
  float sums[kUnits][Tile::kTokens / 2];
  uint32_t a[Tile::kGroups][kChain][kUnits][4];  // wgmma reads them kAhead groups behind

  for_parts<Tile>(call, [&](const Work& work, const Part& p) {
    if (p.shard_index != shard_of_table) {
      shard_of_table = p.shard_index;
      const float* const book = books(call.packed) + 16 * p.shard_index;
      const Normal normal = normalise(book, 0);
      to_weight = normal.to_weight;
      sync();  // nobody looks up any more
      build_table<kBits, kWideRow, kF16>(at.table, book, normal.to_table, thread, Tile::kConsumers);
      sync();
    }
    FLUTE_UNROLL
    for (int i = 0; i < kUnits * Tile::kTokens / 2; ++i) sums[i / (Tile::kTokens / 2)][i % (Tile::kTokens / 2)] = 0;
    int behind = -1;  // the stage that wgmma may still read
    for (int block = int(p.begin); block < int(p.end); ++block, ring.next()) {
      if (Tile::kTeams > 1 && (block - int(p.begin)) % Tile::kTeams != team) continue;
      uint32_t words[4 * kBits], scales[kChain][2 * kUnits];
      mbarrier_wait(at.full + ring.stage * 8, ring.parity);
      load_codes<kBits, kUnits>(at.codes(ring.stage, strip), unit, lane, words);
      const uint64_t x = describe_x(at.x(ring.stage));
      FLUTE_UNROLL
      for (int g = 0; g < Tile::kGroups; ++g) {
        uint32_t looked_up[kChain][kUnits][4];
        FLUTE_UNROLL
        for (int c = 0; c < kChain; ++c) {
          const int s = g * kChain + c;
          if (s == 0 || kFine) {
            int group = 0;  // of the block's; steps beyond K take the last one's scales
            if constexpr (kFine) {
              const int last = call.w.groups - 1 - block * groups;
              group = s * groups / kSteps < last ? s * groups / kSteps : last;
            }
            const uint32_t row = at.scales(ring.stage, strip, groups) + group * kScaleRowBytes;
            load_scales<kF16, kUnits>(row, unit, lane, call.w.scale_f16, to_weight, scales[kFine ? c : 0]);
          }
          FLUTE_UNROLL
          for (int u = 0; u < kUnits; ++u) fragment<kBits, kWideRow>(at.table, copy, words, u, s, looked_up[c][u]);
        }
        wgmma_wait<Tile::kAhead>();
        if (g == Tile::kAhead && behind >= 0 && lane == 0) mbarrier_arrive(at.empty + behind * 8);
        FLUTE_UNROLL
        for (int i = 0; i < kChain * kUnits * 4; ++i) {
          const int c = i / (4 * kUnits), u = i / 4 % kUnits;
          a[g][c][u][i % 4] = multiply_pair<kF16>(looked_up[c][u][i % 4], scales[kFine ? c : 0][2 * u + i % 2]);
        }
        wgmma_fence();
        FLUTE_UNROLL
        for (int i = 0; i < kChain * kUnits; ++i) {
          const int c = i / kUnits, u = i % kUnits;
          wgmma<kF16>(sums[u], a[g][c][u], x + (g * kChain + c) * kStepDescriptor);
        }
        wgmma_commit();
      }
      behind = ring.stage;
    }
    wgmma_wait<0>();
    FLUTE_UNROLL
    for (int u = 0; u < kUnits; ++u) wgmma_results(sums[u]);
    if (behind >= 0 && lane == 0) mbarrier_arrive(at.empty + behind * 8);
    float values[Tile::kValues];
    share_sums<Tile>(at.exchange, team, thread, sums, values, sync);
    if (combine<Tile::kConsumers>(work, call.workspace, uint32_t(cta_id()), p.tile, thread, at.flag, values, sync)) {
      const int row = p.strip * kStripRows + first_unit * kUnitRows, token = p.token + team * Tile::kOctets * 8;
      write_tile<kF16, Tile>(call, p.shard, row, token, lane, at.out + warp * WgmmaShared<kBits, Tile>::kWarpOut, values);
      if (call.gate.out) {
        finish_pair<kF16, Tile::kRows, Tile::kTokens, Tile::kConsumers>(call.gate, call.y, call.workspace, p.tile,
                                                                        p.strip * kStripRows, p.token, thread, at.flag, sync);
      }
    }
  });
}

// kFine: a block has more than one group.
template <int kBits, bool kF16, class Tile, bool kFine>
FLUTE_KERNEL(Tile::kThreads, 1)
lut_wgmma(FLUTE_PARAMETER WgmmaCall call) {
  const WgmmaShared<kBits, Tile> at(call.stages, block_groups(call.w));
  let_next_begin();
  if (thread_id() == 0) {
    prefetch_map(&call.x);
    for (int i = 0; i < call.stages; ++i) {
      mbarrier_init(at.full + i * 8, 1);
      mbarrier_init(at.empty + i * 8, Tile::kTeamThreads / 32);
    }
    fence_mbarrier_init();
  }
  barrier();
  if (thread_id() >= Tile::kConsumers) {
    give_registers<Tile::kProducerRegisters>();
    if (thread_id() == Tile::kConsumers) produce<kBits, Tile>(call, at);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    consume<kBits, kF16, Tile, kFine>(call, at);
  }
}

// What of the device's shared memory is left for stages, in turn for the teams; less than kLeastStages where it is too little.
template <int kBits, class Tile>
int count_stages(const Gemm& g) {
  using At = WgmmaShared<kBits, Tile>;
  const int groups = block_groups(g.w), left = g.device.shared_bytes - At::bytes(0, groups), fit = left < 0 ? 0 : left / At::stage_bytes(groups);
  return (fit < kWgmmaStages ? fit : kWgmmaStages) / Tile::kTeams * Tile::kTeams;
}

template <int kBits, bool kF16, class Tile>
const char* run_wgmma_tile(const Gemm& g) {
  using At = WgmmaShared<kBits, Tile>;
  WgmmaCall call{{}, g.w, g.packed, g.bias, g.y, counters_of(g), g.m, 0, gate_of(g, Tile::kStrips, Tile::kTokens)};
  const int groups = block_groups(g.w);
  call.stages = count_stages<kBits, Tile>(g);
  if (call.stages < Tile::kLeastStages) return "lut_wgmma: the device has too little shared memory for its stages";
  if (const char* error = encode_map(&call.x, g.x, g.m, g.w.k, Tile::kTokens, kF16)) return error;
  const auto kernel = groups > 1 ? lut_wgmma<kBits, kF16, Tile, true> : lut_wgmma<kBits, kF16, Tile, false>;
  return launch_early(kernel, g.device.sms, Tile::kThreads, At::bytes(call.stages, groups), g.stream, call);
}

// Tiles of two strips where ones of four are too few: twice as many have half as many parts each, of half the bytes, which the
// last CTA of a tile reads again; but x is read once more for every 128 rows.
template <int kBits, bool kF16>
const char* run_wgmma_type(const Gemm& g) {
  const int token_tiles = g.m > 64 ? (g.m + 127) / 128 : 1;
  const bool narrow = int64_t(g.w.strips / 4) * token_tiles * 2 < g.device.sms;
  const auto run = [&](auto wide_tile, auto narrow_tile) {
    using Narrow = decltype(narrow_tile);
    const bool fits = count_stages<kBits, Narrow>(g) >= Narrow::kLeastStages;
    return narrow && fits ? run_wgmma_tile<kBits, kF16, Narrow>(g) : run_wgmma_tile<kBits, kF16, decltype(wide_tile)>(g);
  };
  if (g.m > 64) return run(WgmmaTile<128, 4>{}, WgmmaTile<128, 2>{});
  if (g.m > 32) return run(WgmmaTile<64, 4>{}, WgmmaTile<64, 2>{});
  if (g.m > 16) return run(WgmmaTile<32, 4>{}, WgmmaTile<32, 2>{});
  return run(WgmmaTile<16, 4>{}, WgmmaTile<16, 2>{});
}

template <int kBits>
const char* run_wgmma_bits(const Gemm& g) {
  return g.f16 ? run_wgmma_type<kBits, true>(g) : run_wgmma_type<kBits, false>(g);
}

}  // namespace flute::cuda
