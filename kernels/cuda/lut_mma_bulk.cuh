// K1 where there are bulk copies (Hopper), for at most 8 tokens: the products of lut_mma.cuh, with other loads and other tiles.
//
// Measured on an H100 (132 multiprocessors, 1.85 GHz; an empty kernel in a graph takes 1 us), what costs there besides bytes, of
// which the shape below is made:
//
//   Requests  The copy engine takes one in 36 cycles, whatever its size: 16 warps that fetch their own blocks, three requests
//             each, begin 5000 cycles late. So one thread brings an item for all warps in five requests.
//   Table     Built from single loads of the codebook it took 5000 cycles; by shuffles it waits for memory once (decode.h). One for a
//             multiprocessor, its rows 256 bytes apart: a lookup's address is one byte permutation.
//   Sums      Eight barriers for a strip's warps took 1500 cycles; now all write, one barrier, and one warp a unit adds.
//   Sharing   Fences and counters take 2800 cycles, so what others have to do with, parts of tiles and pairs of a gate, waits
//             until this CTA's own work is done: at most two tiles of a CTA are shared.
//
// An item is 128 rows (two strips) x 512 inputs: each of 16 warps has one block of 64 x 64 weights of it.
#pragma once

#include "lut_mma.cuh"
#include "ptx_sm90.h"

namespace flute::cuda {

constexpr int kBulkWarps = 16, kBulkConsumers = kBulkWarps * 32, kBulkThreads = kBulkConsumers + 128;
// At launch a thread has 65536 / 640 registers, rounded down to a multiple of 8: 96. The sum must stay.
constexpr int kBringerRegisters = 32, kMultiplierRegisters = 112;
static_assert(128 * kBringerRegisters + kBulkConsumers * kMultiplierRegisters <= kBulkThreads * 96, "setmaxnreg would wait forever");
constexpr int kBulkTokens = 8, kBulkRowWarps = 2, kBulkInputWarps = kBulkWarps / kBulkRowWarps;
constexpr int kBulkInputs = kBulkInputWarps * kBlockInputs;
constexpr int kBulkOwners = kBulkRowWarps * 4;  // warps that have a unit of a tile's sums at the end
constexpr int kBulkStages = 8;                  // at most
constexpr int kBulkBarrier = 1;                 // of the consumers

struct BulkTile {
  static constexpr int kTokens = kBulkTokens, kRowWarps = kBulkRowWarps;  // for locate()
};

struct BulkCall {
  TensorMap x;
  Packed w;
  const uint8_t* packed;
  const uint16_t* bias;
  uint16_t* y;
  void* workspace;
  int m;
  int token_tiles;  // 1
  int group_shift;  // as MmaParameters has it
  int item_groups;  // rows of scales of an item and strip, at most
  int stages;
  Work work;
  GateCall gate;
};

// Shared memory: the table; the stages, each x in blocks, codes and scales of both strips; what warps add up through; two
// flags; for each stage a barrier that it is full and one that it is empty.
template <int kBits>
struct BulkShared {
  static constexpr int kTable = table_bytes(kBits, kWideRow), kBlock = int(block_bytes(kBits));
  static constexpr int kXBlock = kBulkTokens * kBlockInputs * 2, kX = kBulkInputWarps * kXBlock;
  static constexpr int kStripCodes = kBulkInputWarps * kBlock, kCodes = kBulkRowWarps * kStripCodes;
  static constexpr int kWarpSums = 4 * kVectorBytes, kSums = kBulkWarps * kWarpSums, kFlags = 16;
  static_assert(kTable % 1024 == 0 && (kX + kCodes) % 1024 == 0, "x is aligned to what the 128-byte swizzle repeats after");

  static FLUTE_HD int stage_bytes(int groups) {
    return (kX + kCodes + kBulkRowWarps * groups * kScaleRowBytes + 1023) / 1024 * 1024;
  }
  static int bytes(int stages, int groups) { return kTable + stages * (stage_bytes(groups) + 16) + kSums + kFlags; }

  uint32_t table, stages, stage_size, sums, flags, full, empty;
  FLUTE_DEVICE BulkShared(int n, int groups)
      : table(shared_base()), stages(table + kTable), stage_size(uint32_t(stage_bytes(groups))), sums(stages + n * stage_size),
        flags(sums + kSums), full(flags + kFlags), empty(full + n * 8) {}
  FLUTE_DEVICE uint32_t x(int stage) const { return stages + stage * stage_size; }
  FLUTE_DEVICE uint32_t codes(int stage, int strip) const { return x(stage) + kX + strip * kStripCodes; }
  FLUTE_DEVICE uint32_t scales(int stage, int strip, int groups) const { return x(stage) + kX + kCodes + strip * groups * kScaleRowBytes; }
};

// One thread's work: brings items, at most all stages ahead.
template <int kBits>
FLUTE_DEVICE void bring_items(const BulkCall& p, const BulkShared<kBits>& at, uint32_t begin, uint32_t end) {
  const uint32_t slices = p.work.slices;
  uint32_t tile = begin / slices, slice = begin - tile * slices, parity = 1;
  MmaPlace place = locate<BulkTile>(p, tile);
  int stage = 0;
  FLUTE_ROLLED
  for (uint32_t item = begin; item < end; ++item) {
    const int block = int(slice) * kBulkInputWarps, blocks = p.w.blocks - block < kBulkInputWarps ? p.w.blocks - block : kBulkInputWarps;
    const int group = group_of(p, block * kBlockInputs), left = p.w.groups - group;
    const uint32_t scale_bytes = uint32_t(left < p.item_groups ? left : p.item_groups) * kScaleRowBytes, code_bytes = blocks * at.kBlock;
    const uint32_t full = at.full + stage * 8;
    mbarrier_wait(at.empty + stage * 8, parity);
    mbarrier_arrive_expect(full, at.kX + place.strips * (code_bytes + scale_bytes));
    FLUTE_ROLLED
    for (int s = 0; s < place.strips; ++s) {
      bulk_load(at.codes(stage, s), block_codes(p.w, p.packed, place.strip + s, block), code_bytes, full);
      bulk_load(at.scales(stage, s, p.item_groups), strip_scales(p.w, p.packed, place.strip + s, group), scale_bytes, full);
    }
    tensor_load_blocks<kBulkInputWarps>(at.x(stage), &p.x, block, 0, full);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    if (++slice == slices && item + 1 < end) {
      slice = 0;
      place = locate<BulkTile>(p, ++tile);
    }
  }
}

// Adds up the warps of a strip, always in the same order: unit u is input warp u's in the end.
template <class Sync>
FLUTE_DEVICE void add_bulk_warps(uint32_t sums, int warp, int lane, const float (&acc)[4][1][4], float (&own)[4], const Sync& sync) {
  constexpr int kWarpBytes = 4 * kVectorBytes;
  const int input_warp = warp % kBulkInputWarps;
  sync();  // what was written before has been read
  FLUTE_UNROLL
  for (int u = 0; u < 4; ++u) {
    const float* const c = acc[u][0];
    sts128(sums + warp * kWarpBytes + u * kVectorBytes + lane * 16, {{as_bits(c[0]), as_bits(c[1]), as_bits(c[2]), as_bits(c[3])}});
  }
  sync();
  if (input_warp >= 4) return;
  const uint32_t first = sums + (warp - input_warp) * kWarpBytes + input_warp * kVectorBytes + lane * 16;
  FLUTE_UNROLL
  for (int i = 0; i < kBulkInputWarps; ++i) {
    const Words4 four = lds128(first + i * kWarpBytes);
    FLUTE_UNROLL
    for (int j = 0; j < 4; ++j) own[j] = (i ? own[j] : 0) + as_f32(four.w[j]);
  }
}

// Of a tile, the owners' unit: warp `owner` of kBulkOwners.
template <bool kF16>
FLUTE_DEVICE void write_bulk_unit(const BulkCall& p, const MmaPlace& at, int owner, int lane, const float (&own)[4]) {
  FLUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = owner / 4 * kStripRows + owner % 4 * kUnitRows + lane / 4 + i * 8;
    if (row >= at.rows) continue;
    const float bias = p.bias ? widen16<kF16>(p.bias[at.first_row + row]) : 0;
    FLUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int token = lane % 4 * 2 + j;
      if (token < p.m) p.y[int64_t(token) * p.w.n + at.first_row + row] = round16<kF16>(own[2 * i + j] + bias);
    }
  }
}

// kFine: a block has more than one group.
template <int kBits, bool kF16, bool kFine>
FLUTE_DEVICE void consume_items(const BulkCall& p, const BulkShared<kBits>& at, uint32_t cta, uint32_t begin, uint32_t end) {
  const auto sync = [] { barrier(kBulkBarrier, kBulkConsumers); };
  const int warp = thread_id() / 32, lane = lane_id(), row_warp = warp / kBulkInputWarps, input_warp = warp % kBulkInputWarps;
  const uint32_t slices = p.work.slices, first_tile = begin / slices, last_tile = (end - 1) / slices;
  const int owner = row_warp * 4 + input_warp;  // where input_warp < 4
  constexpr size_t kPartBytes = kBulkOwners * 32 * sizeof(Words4);

  int table_shard = -1, stage = 0;
  uint32_t parity = 0, item = begin;
  float to_weight = 0;
  FLUTE_ROLLED
  for (uint32_t tile = first_tile; tile <= last_tile; ++tile) {
    const MmaPlace place = locate<BulkTile>(p, tile);
    if (place.shard != table_shard) {  // nobody reads the table now: warps met when they added up the tile before
      table_shard = place.shard;
      const float* const book = books(p.packed) + table_shard * 16;
      const Normal normal = normalise(book, kF16 ? 14 : 0);  // see lut_mma.cuh
      build_table<kBits, kWideRow, kF16>(at.table, book, normal.to_table, fresh_thread_id(), kBulkConsumers);
      to_weight = normal.to_weight;
      sync();
    }
    float acc[4][1][4] = {};
    const uint32_t tile_begin = tile * slices, tile_end = tile_begin + slices < end ? tile_begin + slices : end;
    FLUTE_ROLLED
    for (; item < tile_end; ++item) {
      const int block = int(item - tile_begin) * kBulkInputWarps + input_warp;
      mbarrier_wait(at.full + stage * 8, parity);
      if (row_warp < place.strips && block < p.w.blocks) {
        const auto read_x = [&](uint32_t(&b)[1][2][4]) {
          const uint32_t row = at.x(stage) + input_warp * at.kXBlock + lane % 8 * (kBlockInputs * 2);
          ldmatrix4(row + (lane / 8 ^ lane % 8) * 16, b[0][0]);  // pieces of 16 bytes are swizzled by the row
          ldmatrix4(row + ((lane / 8 + 4) ^ lane % 8) * 16, b[0][1]);
        };
        const int first_group = group_of(p, (block - input_warp) * kBlockInputs);
        const uint32_t scales = at.scales(stage, row_warp, p.item_groups) + lane / 4 * 16;
        const auto scales_of = [&](int s) {
          return scales + (group_of(p, block * kBlockInputs + (kFine ? s * kStepInputs : 0)) - first_group) * kScaleRowBytes;
        };
        multiply_block<kBits, kWideRow, kF16, kFine>(at.table, to_weight, p.w.scale_f16, at.codes(stage, row_warp) + input_warp * at.kBlock,
                                                     read_x, scales_of, acc);
      }
      syncwarp();  // every lane has read the stage
      if (lane == 0) mbarrier_arrive(at.empty + stage * 8);
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    float own[4];
    add_bulk_warps(at.sums, warp, lane, acc, own, sync);
    if (input_warp >= 4) continue;
    if (tile_begin >= begin && tile_begin + slices <= end) {
      write_bulk_unit<kF16>(p, place, owner, lane, own);
    } else {
      store_part<kBulkOwners * 32>(slot_of(p.workspace, Sharers(p.work, tile), cta, kPartBytes), owner * 32 + lane, own);
    }
  }

  // Tiles that others have a part of: this CTA's first and its last.
  const int thread = fresh_thread_id();
  const auto is_shared = [&](uint32_t tile) { return tile * slices < begin || (tile + 1) * slices > end; };
  sync();
  if (thread < 2) {
    const uint32_t tile = thread ? last_tile : first_tile;
    const bool asks = is_shared(tile) && (thread == 0 || last_tile != first_tile);
    sts32(at.flags + thread * 4, asks && last_to_come(p.workspace, Sharers(p.work, tile)));
  }
  sync();
  FLUTE_ROLLED
  for (int i = 0; i < 2; ++i) {
    if (!lds32(at.flags + i * 4) || input_warp >= 4) continue;
    const uint32_t tile = i ? last_tile : first_tile;
    float own[4] = {};
    add_parts<kBulkOwners * 32>(p.workspace, Sharers(p.work, tile), owner * 32 + lane, own);
    write_bulk_unit<kF16>(p, locate<BulkTile>(p, tile), owner, lane, own);
  }
  if (!p.gate.out) return;

  // Every tile that this CTA has written is one of a pair: a thread a tile asks for it.
  sync();
  FLUTE_ROLLED
  for (uint32_t base = first_tile; base <= last_tile; base += kBulkConsumers) {
    const uint32_t mine = base + uint32_t(thread);
    bool second = false;
    if (mine <= last_tile) {
      const uint32_t flag = at.flags + (mine == last_tile && last_tile != first_tile) * 4;
      second = (!is_shared(mine) || lds32(flag)) && second_of_pair(p.gate, p.workspace, mine);
    }
    sts32(at.sums + thread * 4, second);
    sync();
    FLUTE_ROLLED
    for (uint32_t tile = base; tile <= last_tile && tile < base + kBulkConsumers; ++tile) {
      if (!lds32(at.sums + (tile - base) * 4)) continue;
      const MmaPlace place = locate<BulkTile>(p, tile);
      multiply_pair_of_tiles<kF16, kBulkRowWarps * kStripRows, kBulkTokens, kBulkConsumers>(
          p.gate, p.y, place.first_row - place.shard * p.gate.half, 0, thread);
    }
    sync();
  }
}

template <int kBits, bool kF16, bool kFine>
FLUTE_KERNEL(kBulkThreads, 1) lut_mma_bulk(FLUTE_PARAMETER BulkCall p) {
  const uint32_t cta = uint32_t(cta_id());
  const uint32_t begin = first_item(p.work, cta), end = first_item(p.work, cta + 1);
  const BulkShared<kBits> at(p.stages, p.item_groups);
  if (thread_id() == kBulkConsumers) {
    prefetch_map(&p.x);
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(at.full + i * 8, 1);
      mbarrier_init(at.empty + i * 8, kBulkWarps);
    }
    fence_mbarrier_init();
  }
  barrier();
  if (thread_id() >= kBulkConsumers) {
    give_registers<kBringerRegisters>();
    if (thread_id() == kBulkConsumers) bring_items<kBits>(p, at, begin, end);
  } else {
    take_registers<kMultiplierRegisters>();
    consume_items<kBits, kF16, kFine>(p, at, cta, begin, end);
  }
}

template <int kBits, bool kF16>
const char* launch_mma_bulk(const Gemm& g, int group_shift) {
  using Shared = BulkShared<kBits>;
  const int groups = g.w.groups > 1 ? kBulkInputs >> group_shift : 1;
  const uint32_t slices = uint32_t(g.w.blocks + kBulkInputWarps - 1) / kBulkInputWarps, tiles = uint32_t(g.w.strip_pairs);
  if (int64_t(tiles) * slices > INT32_MAX) return "lut_mma: more weights than 32-bit work items can count";
  // Where it leaves less than a tenth of the CTAs idle, tiles are cut into equal parts, each one CTA's, as in lut_wgmma.cuh.
  uint32_t ctas = uint32_t(g.device.sms);
  const uint32_t parts = ctas / tiles;
  if (parts > 0 && slices % parts == 0 && 10 * tiles * parts >= 9 * ctas) ctas = tiles * parts;
  BulkCall call{{}, g.w, g.packed, static_cast<const uint16_t*>(g.bias), static_cast<uint16_t*>(g.y), g.workspace, g.m, 1, group_shift,
                groups, 0, share_work(tiles, slices, ctas), gate_of(g, kBulkRowWarps, kBulkTokens)};
  while (call.stages < kBulkStages && Shared::bytes(call.stages + 1, groups) <= g.device.shared_bytes) ++call.stages;
  if (call.stages < 2) return "lut_mma: the device has too little shared memory for two stages";
  if (const char* error = encode_blocks_map(&call.x, g.x, g.m, g.w.k, kBulkTokens, kBulkInputWarps, kF16)) return error;
  const auto kernel = g.w.groups > 1 && group_shift < 6 ? lut_mma_bulk<kBits, kF16, true> : lut_mma_bulk<kBits, kF16, false>;
  return launch(kernel, int(call.work.ctas), kBulkThreads, Shared::bytes(call.stages, groups), g.stream, call);
}

// lut_mma_bulk_2.cu, _3, _4: for sm_90a alone, as lut_wgmma's.
template <int kBits>
const char* run_mma_bulk_bits(const Gemm& g, int group_shift) {
  return g.f16 ? launch_mma_bulk<kBits, true>(g, group_shift) : launch_mma_bulk<kBits, false>(g, group_shift);
}

}  // namespace flute::cuda
