// y = x W^T by wgmma (sm_90a), for more tokens than mma.sync can serve without being bound by it. W is the left operand, from
// registers, where codes become weights; x is the right one, from shared memory.
//
// A CTA computes tiles of 256 rows (4 strips of one shard) x 64 or 128 tokens. One warp brings blocks of 64 inputs by bulk
// copies through a ring of stages; two warpgroups compute 128 rows each, as two wgmma of 64: a warp has half a strip, unit
// 0 of it in the one and unit 1 in the other. While two steps of 16 inputs are multiplied, the next one's codes are looked up.
//
// Sums stay in the tensor cores' registers over all of K, so that groups' scales cannot be applied to them: weights are
// scaled in 16 bits (each value of the codebook, its scale and their product are rounded, as in a dense layer of x's type
// that was dequantized in it). Scaling in fp32 would take five instructions a pair of weights instead of one (two to widen, two
// products, one to round): at 64 tokens, more issue slots than wgmma leaves.
//
// What a block of 64 inputs takes of a CTA's 256 rows, in cycles of a multiprocessor, with instructions counted in the SASS of
// nvcc 13.0 (bf16, groups of 64 and more). Assumed, not measured: an H200's 989 dense TFLOP/s at 1.83 GHz are 4096
// operations a cycle, so wgmma of 64 x 64 x 16 takes 32; shared memory serves 128 bytes a cycle, to wgmma as well, which
// reads its x anew each time; each of four schedulers issues one instruction a cycle, for two of the eight warps.
//
//            a warp's instructions: all, permutes, lookups, products | issue | shared memory |     wgmma | HBM, 4.8 TB/s
//   4 bits                          170        32   32 LDS       32  |   340 |     716, 1036 | 512, 1024 |           425
//   3 bits                          197        32   32 LDS       32  |   394 |     700, 1020 | 512, 1024 |           322
//   2 bits                          134        16   16 LDS.64    32  |   268 |     652,  972 | 512, 1024 |           219
//
// Shared memory and wgmma are for tiles of 64 and of 128 tokens; HBM for groups of 128. Of the 716, lookups are 256, codes and
// scales 72, x as wgmma reads it 256, the copies into the ring 132. So at 64 tokens shared memory bounds this kernel, at 128
// tokens so do the tensor cores, and 16-bit weights would take 1650 cycles of HBM for the same block. Groups of 16 and 32
// take 60 instructions more.
#pragma once

#include <cstdint>

#include "decode.h"
#include "gate.h"
#include "launch.h"
#include "ptx_sm90.h"
#include "streamk.h"

namespace flute::cuda {

constexpr int kTileStrips = 4, kWarpRows = 32, kSteps = kBlockInputs / kStepInputs;
constexpr int kConsumers = 256, kWgmmaThreads = kConsumers + 128;
// At launch a thread has 65536 / 384 registers, rounded down to a multiple of 8: 168. The sum must stay.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(128 * kProducerRegisters + kConsumers * kConsumerRegisters <= kWgmmaThreads * 168, "setmaxnreg would wait forever");
constexpr int kAhead = 2;  // groups of wgmma under way while the next fragments are looked up
constexpr int kConsumerBarrier = 1;
constexpr int kTileAlign = 1024;  // of what the 128-byte swizzle is applied to
constexpr int kWgmmaStages = 16;  // at most, for the barriers; 6 to 12 fit beside the table

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

// Shared memory from its base: the table, then the stages (x, codes, scales), what consumers write y through, the flag of
// combine(), and for each stage a barrier that it is full and one that it is empty.
template <int kBits, int kTokens>
struct WgmmaShared {
  static constexpr int kTable = table_bytes(kBits, kWideRow);
  static constexpr int kX = kTokens * kBlockInputs * 2, kStripCodes = kBits * kVectorBytes, kCodes = kTileStrips * kStripCodes;
  static constexpr int kWarpOut = 2 * 8 * kWarpRows * 2;  // 8 tokens of a warp's rows, twice
  static constexpr int kOut = kConsumers / 32 * kWarpOut, kFlag = 16, kBarriers = 2 * kWgmmaStages * 8;
  static_assert(kTable % kTileAlign == 0 && kX % kTileAlign == 0, "x tiles are aligned");

  static FLUTE_HD int stage_bytes(int groups) {
    return (kX + kCodes + kTileStrips * groups * kScaleRowBytes + kTileAlign - 1) / kTileAlign * kTileAlign;
  }
  static int bytes(int stages, int groups) { return kTable + stages * stage_bytes(groups) + kOut + kFlag + kBarriers; }

  uint32_t table, stage, stage_size, out, flag, full, empty;
  FLUTE_DEVICE WgmmaShared(int stages, int groups)
      : table(shared_base()), stage(table + kTable), stage_size(uint32_t(stage_bytes(groups))), out(stage + stages * stage_size),
        flag(out + kOut), full(flag + kFlag), empty(full + kWgmmaStages * 8) {}
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

FLUTE_DEVICE Shard shard_at(const WgmmaCall& call, int s) {
  return call.w.n_shards == 1 ? Shard{0, call.w.strips, 0, call.w.n} : shards(call.w, call.packed)[s];
}
FLUTE_HD inline uint32_t shard_tiles(const Shard& s) { return uint32_t(s.strips + kTileStrips - 1) / kTileStrips; }

// Calls part(p) for what this CTA has to do, in order. Tiles of the same rows follow each other, so that L2 has their weights.
template <int kTokens, class F>
FLUTE_DEVICE void for_parts(const WgmmaCall& call, const F& part) {
  const uint32_t token_tiles = uint32_t(call.m + kTokens - 1) / kTokens;
  uint32_t row_tiles = 0;
  for (int s = 0; s < call.w.n_shards; ++s) row_tiles += shard_tiles(shard_at(call, s));
  const uint32_t tiles = row_tiles * token_tiles, blocks = uint32_t(call.w.blocks);
  // Where it leaves less than a tenth of the CTAs idle, tiles are cut into equal parts, each one CTA's: no CTA then has two
  // partial tiles to write, and fewer are read again.
  uint32_t ctas = uint32_t(cta_count());
  const uint32_t parts = ctas / tiles;
  if (parts > 0 && blocks % parts == 0 && 10 * tiles * parts >= 9 * ctas) ctas = tiles * parts;
  const Work work = share_work(tiles, blocks, ctas);
  if (uint32_t(cta_id()) >= work.ctas) return;
  const uint32_t last = first_item(work, cta_id() + 1);
  for (uint32_t item = first_item(work, cta_id()); item < last;) {
    Part p;
    p.tile = item / work.slices;
    p.begin = item % work.slices;
    p.end = p.begin + (last - item) < work.slices ? p.begin + (last - item) : work.slices;
    item += p.end - p.begin;
    p.token = int(p.tile % token_tiles) * kTokens;
    uint32_t row_tile = p.tile / token_tiles;
    p.shard = shard_at(call, 0);
    p.shard_index = 0;
    while (row_tile >= shard_tiles(p.shard)) {
      row_tile -= shard_tiles(p.shard);
      p.shard = shard_at(call, ++p.shard_index);
    }
    p.strip = int(row_tile) * kTileStrips;  // of the shard
    p.strips = p.shard.strips - p.strip < kTileStrips ? p.shard.strips - p.strip : kTileStrips;
    part(work, p);
  }
}

template <int kBits, int kTokens>
FLUTE_DEVICE void produce(const WgmmaCall& call, const WgmmaShared<kBits, kTokens>& at) {
  using At = WgmmaShared<kBits, kTokens>;
  const int groups = block_groups(call.w);
  const uint32_t codes_of_strip = uint32_t(call.w.blocks) * At::kStripCodes;
  const uint32_t scales_of_strip = uint32_t(call.w.groups) * kScaleRowBytes;
  Ring ring(call.stages);
  for_parts<kTokens>(call, [&](const Work&, const Part& p) {
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

// What a lane decodes of a block: its codes of the two units that are this half of a strip, as unit 0 and 1 of fragment().
template <int kBits>
FLUTE_DEVICE void load_codes(uint32_t codes, int half, int lane, uint32_t (&words)[4 * kBits]) {
  constexpr int kVectors = kBits == 4 ? 2 : 1;  // of four or lower two bits
  FLUTE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Words4 four = lds128(codes + (half * kVectors + v) * kVectorBytes + lane * 16);
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) words[4 * v + i] = four.w[i];
  }
  if constexpr (kBits == 3) {
    const Words2 upper = lds64(codes + 2 * kVectorBytes + lane * 16 + half * 8);
    words[8] = upper.w[0];
    words[9] = upper.w[1];
  }
}

// The scales of a lane's four rows, each twice: {unit 0: row, row + 8}, {unit 1: row, row + 8}.
template <bool kF16>
FLUTE_DEVICE void load_scales(uint32_t row, int half, int lane, bool stored_f16, float to_weight, uint32_t (&scales)[4]) {
  const Words2 stored = lds64(row + lane / 4 * 16 + half * 8);
  FLUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
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

// Writes a warp's 32 rows x kTokens tokens: by way of shared memory, since a lane has single values of eight rows.
template <bool kF16, int kTokens>
FLUTE_DEVICE void write_tile(const WgmmaCall& call, const Part& p, int strip, int half, int lane, uint32_t out,
                             const float (&sums)[kTokens]) {
  const int row = (p.strip + strip) * kStripRows + half * kWarpRows;  // of the shard
  float bias[4] = {};
  FLUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int r = row + i * 8 + lane / 4;
    if (call.bias && r < p.shard.rows) bias[i] = widen16<kF16>(static_cast<const uint16_t*>(call.bias)[p.shard.first_row + r]);
  }
  // Eight tokens x 64 bytes; the four pieces of 16 change places from one pair of tokens to the next, so that neither
  // the matrices nor the lanes that read them meet in a bank.
  const auto place = [&](int buffer, int token, int piece) {
    return out + buffer * (8 * kWarpRows * 2) + token * (kWarpRows * 2) + ((piece ^ (token / 2 % 4)) * 16);
  };
  const int rows = p.shard.rows - (row + lane % 4 * 8);  // from the eight that the lane writes
  FLUTE_UNROLL
  for (int j = 0; j < kTokens / 8; ++j) {
    uint32_t pairs[4];
    FLUTE_UNROLL
    for (int i = 0; i < 4; ++i) {  // unit i / 2, eight rows i % 2
      const float* two = sums + i / 2 * (kTokens / 2) + 4 * j + i % 2 * 2;
      pairs[i] = round_pair<kF16>(two[0] + bias[i], two[1] + bias[i]);
    }
    stmatrix4_transposed(place(j % 2, lane % 8, lane / 8), pairs);
    syncwarp();
    const Words4 eight = lds128(place(j % 2, lane / 4, lane % 4));
    const int token = p.token + 8 * j + lane / 4;
    if (token >= call.m || rows <= 0) continue;
    uint16_t* const y = static_cast<uint16_t*>(call.y) + int64_t(token) * call.w.n + p.shard.first_row + row + lane % 4 * 8;
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

template <int kBits, bool kF16, int kTokens, bool kFine>
FLUTE_DEVICE void consume(const WgmmaCall& call, const WgmmaShared<kBits, kTokens>& at) {
  const int thread = thread_id(), warp = thread / 32, lane = lane_id(), strip = warp / 2, half = warp % 2;
  const int groups = block_groups(call.w);
  const uint32_t copy = lane_copy<kBits>(lane);
  const auto sync = [] { barrier(kConsumerBarrier, kConsumers); };
  Ring ring(call.stages);
  int shard_of_table = -1;
  float to_weight = 0;
  float sums[2][kTokens / 2];
  uint32_t a[kSteps][2][4];  // wgmma reads them kAhead steps behind
  static_assert(kAhead < kSteps, "a fragment's registers are written again after kSteps steps");

  for_parts<kTokens>(call, [&](const Work& work, const Part& p) {
    if (p.shard_index != shard_of_table) {
      shard_of_table = p.shard_index;
      const float* const book = books(call.packed) + 16 * p.shard_index;
      const Normal normal = normalise(book, 0);
      to_weight = normal.to_weight;
      sync();  // nobody looks up any more
      build_table<kBits, kWideRow, kF16>(at.table, book, normal.to_table, thread, kConsumers);
      sync();
    }
    FLUTE_UNROLL
    for (int i = 0; i < kTokens / 2; ++i) sums[0][i] = sums[1][i] = 0;
    int behind = -1;  // the stage that wgmma may still read
    for (int block = int(p.begin); block < int(p.end); ++block, ring.next()) {
      uint32_t words[4 * kBits], scales[4];
      mbarrier_wait(at.full + ring.stage * 8, ring.parity);
      load_codes<kBits>(at.codes(ring.stage, strip), half, lane, words);
      const uint64_t x = describe_x(at.x(ring.stage));
      FLUTE_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        if (s == 0 || kFine) {
          int group = 0;  // of the block's; steps beyond K take the last one's scales
          if constexpr (kFine) {
            const int last = call.w.groups - 1 - block * groups;
            group = s * groups / kSteps < last ? s * groups / kSteps : last;
          }
          const uint32_t row = at.scales(ring.stage, strip, groups) + group * kScaleRowBytes;
          load_scales<kF16>(row, half, lane, call.w.scale_f16, to_weight, scales);
        }
        FLUTE_UNROLL
        for (int u = 0; u < 2; ++u) {
          fragment<kBits, kWideRow>(at.table, copy, words, u, s, a[s][u]);
          FLUTE_UNROLL
          for (int i = 0; i < 4; ++i) a[s][u][i] = multiply_pair<kF16>(a[s][u][i], scales[2 * u + i % 2]);
        }
        wgmma_fence();
        FLUTE_UNROLL
        for (int u = 0; u < 2; ++u) wgmma<kF16>(sums[u], a[s][u], x + s * kStepDescriptor);
        wgmma_commit();
        wgmma_wait<kAhead>();
        if (s == kAhead - 1 && behind >= 0 && lane == 0) mbarrier_arrive(at.empty + behind * 8);
      }
      behind = ring.stage;
    }
    wgmma_wait<0>();
    wgmma_results(sums[0]);
    wgmma_results(sums[1]);
    if (lane == 0) mbarrier_arrive(at.empty + behind * 8);
    float(&values)[kTokens] = reinterpret_cast<float(&)[kTokens]>(sums);
    if (combine<kConsumers>(work, call.workspace, uint32_t(cta_id()), p.tile, thread, at.flag, values, sync)) {
      write_tile<kF16>(call, p, strip, half, lane, at.out + warp * WgmmaShared<kBits, kTokens>::kWarpOut, values);
      if (call.gate.out) {
        finish_pair<kF16, kTileStrips * kStripRows, kTokens, kConsumers>(call.gate, call.y, call.workspace, p.tile,
                                                                         p.strip * kStripRows, p.token, thread, at.flag, sync);
      }
    }
  });
}

// kFine: a block has more than one group.
template <int kBits, bool kF16, int kTokens, bool kFine>
FLUTE_KERNEL(kWgmmaThreads, 1)
lut_wgmma(FLUTE_PARAMETER WgmmaCall call) {
  const WgmmaShared<kBits, kTokens> at(call.stages, block_groups(call.w));
  if (thread_id() == 0) {
    prefetch_map(&call.x);
    for (int i = 0; i < call.stages; ++i) {
      mbarrier_init(at.full + i * 8, 1);
      mbarrier_init(at.empty + i * 8, kConsumers / 32);
    }
    fence_mbarrier_init();
  }
  barrier();
  if (thread_id() >= kConsumers) {
    give_registers<kProducerRegisters>();
    if (thread_id() == kConsumers) produce<kBits, kTokens>(call, at);
  } else {
    take_registers<kConsumerRegisters>();
    consume<kBits, kF16, kTokens, kFine>(call, at);
  }
}

template <int kBits, bool kF16, int kTokens>
const char* run_wgmma_tile(const Gemm& g) {
  using At = WgmmaShared<kBits, kTokens>;
  WgmmaCall call{{}, g.w, g.packed, g.bias, g.y, g.workspace, g.m, 0, gate_of(g, kTileStrips, kTokens)};
  const int groups = block_groups(g.w);
  call.stages = (g.device.shared_bytes - At::bytes(0, groups)) / At::stage_bytes(groups);
  call.stages = call.stages < kWgmmaStages ? call.stages : kWgmmaStages;
  if (call.stages < 2) return "lut_wgmma: the device has too little shared memory for two stages";
  if (const char* error = encode_map(&call.x, g.x, g.m, g.w.k, kTokens, kF16)) return error;
  const auto kernel = groups > 1 ? lut_wgmma<kBits, kF16, kTokens, true> : lut_wgmma<kBits, kF16, kTokens, false>;
  return launch(kernel, g.device.sms, kWgmmaThreads, At::bytes(call.stages, groups), g.stream, call);
}

template <int kBits>
const char* run_wgmma_bits(const Gemm& g) {
  if (g.m <= 64) return g.f16 ? run_wgmma_tile<kBits, true, 64>(g) : run_wgmma_tile<kBits, false, 64>(g);
  return g.f16 ? run_wgmma_tile<kBits, true, 128>(g) : run_wgmma_tile<kBits, false, 128>(g);
}

}  // namespace flute::cuda
