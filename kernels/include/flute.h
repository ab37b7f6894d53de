// The contract between the native kernels and their callers: what a packed weight looks like, what a kernel
// is, and what the library exports. vllm_flute/layout.py and vllm_flute/counters.py hold the same numbers.
//
// Functions here are `static` on purpose: every instruction set is a translation unit with its own compiler
// flags, and an inline function with external linkage could be kept in its AVX-512 copy and run on a CPU
// that has none.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed layout is little-endian"
#endif

namespace flute {

// ---------------------------------------------------------------------------------------------------------
// Header: int64 [8 + S].
constexpr int64_t kMagic = 0x464C555445;  // "FLUTE"
constexpr int64_t kAbi = 1;
enum HeaderField { kFieldMagic, kFieldAbi, kFieldLayout, kFieldBits, kFieldGroupSize, kFieldK, kFieldScaleDtype,
                   kFieldShards, kHeaderFixed };
enum Layout : int64_t { kRows = 0, kTile16 = 1, kTernary16 = 2, kTrit20 = 3 };
enum ScaleDtype : int64_t { kScaleBf16 = 0, kScaleF16 = 1 };
enum Dtype : int { kF32 = 0, kBf16 = 1, kF16 = 2 };  // of activations, bias and result

// ---------------------------------------------------------------------------------------------------------
// Layout TILE16. The packed tensor is
//
//   codebooks   S x 16 fp32; shorter tables repeat, so that the index bits above a code do not matter
//   tiles       each shard begins a new tile of 16 output rows; missing rows of its last tile are zero
//
// and a tile, whose size is a multiple of 64 bytes, is one sequential stream:
//
//   codes       for every chunk of 32 inputs: `bits` vectors of 16 uint32, lane r belonging to row r
//   scales      G x 16 in the checkpoint's 16-bit type, padded to 64 bytes
//
// K is padded to a multiple of 32 with zero codes, which no kernel multiplies. Within a chunk, code k is in
//
//   4 bits      word k/8 at bit 4*(k%8)
//   2 bits      word k/16 at bit 2*(k%16)
//   3 bits      k < 30: with q = k/5, word q/2 at bit 16*(q%2) + 3*(k%5); codes 30 and 31 are bits 15 and 31
//               of words 0, 1, 2 (lowest first)
//
// Two and four bits are the checkpoint's stream transposed word by word. Three bits are moved so that no code
// crosses a 16-bit half, which lets kernels shift and look up in 32-bit or in 16-bit lanes alike.
//
// TERNARY16 is TILE16 of 2 bits for weights of three values: codes are 0, 1 or 2 (3, whose value is the same, became 2).
//
// TRIT20 has the same weights where a row has one scale, in 1.6 bits. It is TILE16 but for the codes: a chunk is 20
// inputs and one vector of 16 uint32, K is padded to a multiple of 20, and the 16-bit halves of a word hold ten codes
// each: the lower half those of inputs 0, 2 .. 18 of the chunk, the upper half those of 1, 3 .. 19, so that what is at one
// place of both halves is a pair of neighbours. With v the number whose ten base-3 digits they are, the first the most
// significant, a half is ceil(v * 2^16 / 3^10). As a fraction of 2^16 that is at least v / 3^10 and less than (v + 1) / 3^10: its first
// ten base-3 digits are the codes. The upper half of its product with 3^n is the first n of them as a number, and the
// lower half is the fraction that is left.
constexpr int kTileRows = 16;
constexpr int kChunk = 32;
constexpr int kTritChunk = 20;
constexpr int64_t kBookBytes = 16 * sizeof(float);

// One layer's weights, as a valid header explains them.
struct Weights {
  int bits;
  bool ternary;  // three values, and no code 3
  bool trits;    // ternary, in layout TRIT20
  int64_t group_size, k, n, groups;
  ScaleDtype scale_dtype;
  const int64_t* shards;  // rows of each
  int64_t n_shards;
  int64_t chunk_inputs, chunks, tiles, scale_offset, tile_bytes, bytes;  // scale_offset is within a tile
  const uint8_t* packed;
};

// The rows of y that a tile computes, and whose codebook it uses.
struct TileRows {
  int64_t first;
  int count;
  const float* book;
};

// Reads a header of `length` fields; throws std::invalid_argument with one line that says what is wrong.
Weights parse_header(const int64_t* header, int64_t length);
TileRows tile_rows(const Weights& w, int64_t tile);
static inline const uint8_t* tile_data(const Weights& w, int64_t tile) {
  return w.packed + w.n_shards * kBookBytes + tile * w.tile_bytes;
}

// Code k (0..31) of a row in a chunk: the layout in code, for the scalar users of it.
static inline unsigned tile16_code(const uint32_t* chunk, int bits, int row, int k) {
  const uint32_t* word = chunk + row;
  if (bits == 4) return word[k / 8 * 16] >> (k % 8 * 4) & 15;
  if (bits == 2) return word[k / 16 * 16] >> (k % 16 * 2) & 3;
  if (k < 30) return word[k / 10 * 16] >> (k / 5 % 2 * 16 + k % 5 * 3) & 7;
  const int top = k == 30 ? 15 : 31;
  return (word[0] >> top & 1) | (word[16] >> top & 1) << 1 | (word[32] >> top & 1) << 2;
}
// The same for code k (0..19) of a chunk of TRIT20.
static inline unsigned trit20_code(const uint32_t* chunk, int row, int k) {
  uint32_t fraction = chunk[row] >> k % 2 * 16 & 0xffff;
  for (int i = 0; i < k / 2; ++i) fraction = fraction * 3 & 0xffff;
  return fraction * 3 >> 16;
}

// ---------------------------------------------------------------------------------------------------------
// Threads are the caller's: `run` calls body(begin, end, context) over [0, n), each index once.
struct Parallel {
  int threads;
  void (*run)(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

// Calls item(i, context) for i in [0, n) with at most `workers` threads. Threads take items as they come
// free, so a busy core delays nobody; no result may depend on who computed it.
void for_each(const Parallel& parallel, int64_t n, int64_t workers, void (*item)(int64_t i, void* context), void* context);

template <class F>
static void for_each(const Parallel& parallel, int64_t n, int64_t workers, const F& f) {
  for_each(parallel, n, workers, [](int64_t i, void* c) { (*static_cast<const F*>(c))(i); }, const_cast<F*>(&f));
}

// A buffer of this thread, 64-byte aligned, that grows and is kept: no allocation on a warm path. The caller
// of a kernel uses kInput for activations, and every worker (which the caller may be too) kWorker.
enum ScratchUse { kInput, kWorker, kScratchUses };
void* scratch(ScratchUse use, size_t bytes);

// Asks the operating system to back this memory with huge pages when it is first touched. Weights are read once a
// token, faster than a core walks small pages: 29 GB/s a core instead of 17 (Zen 4, in a virtual machine).
constexpr size_t kHugePage = 2 << 20;  // on x86 and, with 4 KB pages, on Arm
void prefer_huge_pages(void* data, size_t bytes);

// ---------------------------------------------------------------------------------------------------------
// y[M, N] = x[M, K] W^T + bias[N] (bias may be null), all of one dtype and contiguous; fp32 sums.
struct Call {
  Weights w;
  const void *x, *bias;
  void* y;
  int64_t m;
  Dtype dtype;
  Parallel parallel;
};

enum Isa { kScalar, kNeon, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx, kIsas };  // each includes those of its CPU before it

// What a kernel multiplies, which sets its error: fp32 sums of exact products; weights rounded to bf16, with fp32 sums;
// with a step for each token and block of inputs, 16-bit sums of rounded products, or exact sums of products of integers
// of 16 or 8 bits.
enum Arithmetic { kFp32, kBf16Weights, kInt16, kInt16Products, kInt8, kArithmetics };

struct Kernel {
  const char* name;
  Isa isa;
  Arithmetic arithmetic;
  int slot;  // row of the counters' page; never reused for another kernel
  const char* (*refuses)(const Weights& w, Dtype dtype);  // what it does not take, or null; every N, K and M is taken
  int64_t (*passes)(const Weights& w, int64_t m);  // how often a call with m tokens streams the packed bytes
  void (*run)(const Call& call);
  bool trits = false;  // whether it takes layout TRIT20 too
};

// One list for each translation unit in cpu/, ended by a kernel without a name.
extern const Kernel kReferenceKernels[], kNeonKernels[], kAvx2Kernels[], kAvx512Kernels[], kAvx512VnniKernels[], kAvx512Bf16Kernels[],
    kAmxKernels[];

// All that are compiled in, in the order of the lists above; the last is null.
const Kernel* const* all_kernels();

// A line of the measured table (vllm_flute/backends/cpu.py): calls with this key take the kernel of this slot. The first
// line that matches and whose kernel can take the call decides; where none does, the analytic default.
struct TableLine {
  int64_t bits;         // 2, 3, 4; 1 for ternary weights
  int64_t dtype;        // Dtype
  int64_t max_tokens;   // M up to here
  int64_t max_weights;  // N * K up to here
  int64_t slot;
};

// The kernel for m tokens: the named one, or with an empty name the dispatcher's choice. Throws
// std::invalid_argument where the name is unknown or the kernel cannot run here or on this dtype.
const Kernel& choose(const Weights& w, int64_t m, Dtype dtype, const std::string& name);
void count(const Kernel& kernel, const Weights& w, int64_t m);

// qweight uint8 [N, K*bits/8], scales 16-bit [N, G], codebooks fp32 [S, 2^bits] to packed, and back.
void pack(const Weights& w, const uint8_t* qweight, const uint16_t* scales, const float* books, uint8_t* packed, const Parallel& parallel);
void unpack(const Weights& w, uint8_t* qweight, uint16_t* scales, float* books, const Parallel& parallel);

// ---------------------------------------------------------------------------------------------------------
// Counters: uint64 page[kSlots][kBuckets][kFields]; bucket i holds calls with M <= kBucketUpper[i].
constexpr int kSlots = 32, kBuckets = 8;
enum CounterField { kCalls, kTokens, kBytes, kFields };
constexpr int64_t kBucketUpper[kBuckets - 1] = {1, 4, 8, 16, 32, 128, 512};
static inline void count_call(uint64_t* page, int slot, int64_t m, int64_t bytes) {
  int bucket = 0;
  while (bucket < kBuckets - 1 && m > kBucketUpper[bucket]) ++bucket;
  uint64_t* row = page + (slot * kBuckets + bucket) * kFields;
  __atomic_fetch_add(row + kCalls, 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(row + kTokens, uint64_t(m), __ATOMIC_RELAXED);
  __atomic_fetch_add(row + kBytes, uint64_t(bytes), __ATOMIC_RELAXED);
}

// ---------------------------------------------------------------------------------------------------------
// Conversions of one value; to 16 bits they round to nearest even.
static inline float bits_to_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t f32_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
static inline float bf16_to_f32(uint16_t h) { return bits_to_f32(uint32_t(h) << 16); }
static inline uint16_t f32_to_bf16(float f) {
  const uint32_t u = f32_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);  // keep NaN a NaN
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) return bits_to_f32(sign | f32_to_bits(float(mantissa) * 0x1p-24f));
  return bits_to_f32(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | mantissa << 13);
}
static inline uint16_t f32_to_f16(float f) {
  uint32_t u = f32_to_bits(f);
  const uint32_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  if (u >= 0x38800000) return uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  const float subnormal = bits_to_f32(u) * 0x1p24f + 0x1p23f;  // the addition rounds to a whole number
  return uint16_t(sign | (f32_to_bits(subnormal) & 0x7ff));
}
static inline float scale_to_f32(uint16_t h, ScaleDtype dtype) { return dtype == kScaleF16 ? f16_to_f32(h) : bf16_to_f32(h); }
static inline float load_value(const void* p, int64_t i, Dtype dtype) {
  if (dtype == kF32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == kBf16 ? bf16_to_f32(h) : f16_to_f32(h);
}
static inline void store_value(void* p, int64_t i, Dtype dtype, float v) {
  if (dtype == kF32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = dtype == kBf16 ? f32_to_bf16(v) : f32_to_f16(v);
}
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flute

#define FLUTE_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: abi, isa (the highest in use), forced (VLLM_FLUTE_ISA), activations (16, or int8 where
// VLLM_FLUTE_ACTIVATIONS lets the dispatcher choose kernels of that arithmetic), error (why a value of these is refused),
// kernels with their isa, arithmetic, slot, whether they are available, and why not.
FLUTE_EXPORT const char* flute_cpu_describe();
// From now on count in this page, which must outlive the library; until then a private one is used.
FLUTE_EXPORT void flute_cpu_set_counters(void* page);
// From now on choose by this table of `lines` TableLines first; it must outlive the library. Null: none.
FLUTE_EXPORT void flute_cpu_set_table(const void* table, int64_t lines);
// The name of the kernel that a call would run; empty where the header or the dtype is not valid.
FLUTE_EXPORT const char* flute_cpu_choose(const int64_t* header, int64_t m, int dtype);
// For each of `count` groups of `size` weights the scale, of either sign, of least squared error with the nearest of `n` levels (at
// most 16, ascending and distinct). importance: how much each weight's error counts, [period, size], of which group g has row
// g % period; null: all alike. NaN for a group with values that are not finite. On the calling thread.
FLUTE_EXPORT void flute_cpu_search_scales(const float* groups, int64_t count, int64_t size, const float* levels, int n,
                                          const float* importance, int64_t period, float* scales);
