// Packed layout MMA64 (layout 4 in a header): what the GPU kernels read. Torch-free and CUDA-free: host compilers, device
// code and the emulated tests share it.
//
// A shard is one of the matrices that a layer fuses, with its own codebook. Its output rows are cut into strips of 64;
// missing rows of a shard's last strip have zero scales. Inputs are cut into blocks of 64, the last padded with code 0,
// which meets only zero activations. The packed tensor is
//
//   books    S x 16 fp32; shorter tables repeat
//   shards   S x {first strip, strips, first row, rows} int32
//            (up to here padded to 128 bytes)
//   scales   strips x groups x 64 values in the checkpoint's 16-bit type, in the order of scale_place()
//   codes    strips x blocks x `bits` x 512 bytes
//
// The codes of a block lie in the order in which tensor cores want them: A of mma.m16n8k16 (PTX manual, "Matrix fragments
// for mma.m16n8k16") has in lane l the registers a0 .. a3, each a pair of neighbouring inputs, and A of a warp of
// wgmma.m64nNk16 has the same. A block is 4 units of 16 rows and 4 steps of 16 inputs, and each unit and step is one such
// fragment. A block's codes are `bits` vectors (4 bits: 4; 3 and 2 bits: 3 and 2) of 32 lanes x 16 bytes, so that
// what a lane loads, 16 bytes at a time, are its own fragments:
//
//   4 bits   vector u is unit u: word s (of 4) is step s, byte i is register a_i, low nibble the lower input
//   2 bits   vector v is units 2v and 2v+1: word 2*(u%2) + s/2, byte 2*(s%2) + i/2 holds a_i and its neighbour a_(i^1), which is
//            eight rows apart, the even one in the low nibble: a byte looks up four codes
//   3 bits   the codes' lower two bits, then their upper bit. Lower: vector v is units 2v and 2v+1: word 2*(u%2) + s/2, byte i,
//            nibble s%2. Upper: vector 2, word u, byte i, bits 2s and 2s+1. With a step's nibbles and its upper bits
//            moved to bits 4 and 5, the four bytes of a word are the four registers' pairs
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FLUTE_HD __host__ __device__
#else
#define FLUTE_HD
#endif

namespace flute::cuda {

constexpr int64_t kMma64 = 4;  // the layout's number in headers
constexpr int kStripRows = 64, kBlockInputs = 64, kUnitRows = 16, kStepInputs = 16;
constexpr int kVectorBytes = 32 * 16;  // 16 bytes a lane
constexpr int kScaleRowBytes = kStripRows * 2;

constexpr FLUTE_HD int64_t block_bytes(int bits) { return int64_t(bits) * kVectorBytes; }

struct Shard {
  int32_t first_strip, strips, first_row, rows;
};
// Shards that a kernel's parameters name: who has to read the packed tensor's table waits for memory before the first load.
constexpr int kNamedShards = 4;

// A layer's weights, as a valid header explains them. Plain data: a kernel parameter.
struct Packed {
  int bits;
  int scale_f16;  // scales are fp16; else bf16
  int group_size, groups;
  int n, k;
  int n_shards, strips, blocks;  // strips of all shards; blocks of one strip
  int strip_pairs;               // of all shards, one strip where a shard's last has no other
  int64_t scales_offset, codes_offset, bytes;
  Shard named[kNamedShards];  // the first of them
};

// Fills everything but the packed tensor's table from what a header says. Rows of each shard are positive.
inline Packed describe(int bits, int scale_f16, int64_t group_size, int64_t k, const int64_t* rows, int64_t n_shards) {
  Packed p{};
  p.bits = bits;
  p.scale_f16 = scale_f16;
  p.group_size = int(group_size);
  p.groups = int(k / group_size);
  p.k = int(k);
  p.n_shards = int(n_shards);
  p.blocks = int((k + kBlockInputs - 1) / kBlockInputs);
  for (int64_t s = 0; s < n_shards; ++s) {
    const int strips = int((rows[s] + kStripRows - 1) / kStripRows);
    if (s < kNamedShards) p.named[s] = {p.strips, strips, p.n, int32_t(rows[s])};
    p.n += int(rows[s]);
    p.strips += strips;
    p.strip_pairs += (strips + 1) / 2;
  }
  p.scales_offset = (n_shards * int64_t(16 * sizeof(float) + sizeof(Shard)) + 127) / 128 * 128;
  p.codes_offset = p.scales_offset + int64_t(p.strips) * p.groups * kScaleRowBytes;
  p.bytes = p.codes_offset + int64_t(p.strips) * p.blocks * block_bytes(bits);
  return p;
}

FLUTE_HD inline const float* books(const uint8_t* packed) { return reinterpret_cast<const float*>(packed); }
FLUTE_HD inline const Shard* shards(const Packed& p, const uint8_t* packed) {
  return reinterpret_cast<const Shard*>(packed + p.n_shards * int64_t(16 * sizeof(float)));
}
FLUTE_HD inline Shard shard_of(const Packed& p, const uint8_t* packed, int s) {
  return s < kNamedShards ? p.named[s] : shards(p, packed)[s];
}
FLUTE_HD inline const uint8_t* block_codes(const Packed& p, const uint8_t* packed, int64_t strip, int64_t block) {
  return packed + p.codes_offset + (strip * p.blocks + block) * block_bytes(p.bits);
}
FLUTE_HD inline const uint16_t* strip_scales(const Packed& p, const uint8_t* packed, int64_t strip, int64_t group) {
  return reinterpret_cast<const uint16_t*>(packed + p.scales_offset + (strip * p.groups + group) * kScaleRowBytes);
}

// Where the scale of row r (0..63) of a strip is among its group's 64: a lane, whose rows are r%8 and r%8 + 8 of each
// unit, has its eight scales in 16 bytes: {unit 0: g, g + 8}, {unit 1: g, g + 8}, ...
constexpr FLUTE_HD int scale_place(int r) { return r % 8 * 8 + r / 16 * 2 + r / 8 % 2; }

// Where in a block the code of row r and input k (both 0..63) is: bytes and bits from the block's start. Three bits
// have two places: `low` of 2 bits, `high` of 1.
struct Place {
  int byte, shift;
};
constexpr FLUTE_HD int fragment_lane(int r, int k) { return r % 8 * 4 + k % 8 / 2; }
constexpr FLUTE_HD int fragment_register(int r, int k) { return r / 8 % 2 + k / 8 % 2 * 2; }  // a0 .. a3
constexpr FLUTE_HD Place code_place(int bits, int r, int k) {
  const int u = r / kUnitRows, s = k / kStepInputs, i = fragment_register(r, k), e = k % 2, lane = fragment_lane(r, k);
  if (bits == 4) return {u * kVectorBytes + lane * 16 + s * 4 + i, 4 * e};
  const int word = u / 2 * kVectorBytes + lane * 16 + (u % 2 * 2 + s / 2) * 4;
  if (bits == 2) return {word + s % 2 * 2 + i / 2, i % 2 * 4 + 2 * e};
  return {word + i, s % 2 * 4 + 2 * e};  // the lower two of three bits
}
constexpr FLUTE_HD Place high_place(int r, int k) {
  return {2 * kVectorBytes + fragment_lane(r, k) * 16 + r / kUnitRows * 4 + fragment_register(r, k), k / kStepInputs * 2 + k % 2};
}
constexpr FLUTE_HD unsigned code_at(const uint8_t* block, int bits, int r, int k) {
  const Place low = code_place(bits, r, k);
  const unsigned code = block[low.byte] >> low.shift & (bits == 4 ? 15 : 3);
  if (bits != 3) return code;
  const Place high = high_place(r, k);
  return code | (block[high.byte] >> high.shift & 1u) << 2;
}

}  // namespace flute::cuda
