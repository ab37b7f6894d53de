// What the kernels share: decoding a chunk of codes, the counting of groups, and the way of values in and out.
//
// Included inside a translation unit's own namespace, after a vec_*.inc.h.

// The indices of an unrolled loop as types, so that shifts are immediates.
template <int I>
struct Const {
  static constexpr int value = I;
};
template <class F, int... I>
INLINE void unroll(const F& f, std::integer_sequence<int, I...>) {
  (f(Const<I>{}), ...);
}
template <int COUNT, class F>
INLINE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, COUNT>{});
}
#define FLUTE_UNROLLED(i) [&](auto i) __attribute__((always_inline))

#include "chunk.inc.h"

// Bytes ahead of codes that are read front to back: far for the second-level cache, which waits for memory, and near for the
// first. Measured on Zen 4: one of them alone reads 2-bit weights at 83% of what both do.
constexpr int kPrefetchFar = 16384, kPrefetch = 1024;
INLINE void prefetch_codes(const void* codes) {
  __builtin_prefetch(static_cast<const char*>(codes) + kPrefetchFar, 0, 2);
  __builtin_prefetch(static_cast<const char*>(codes) + kPrefetch);
}

// The value that code K of a chunk has in the codebook.
template <int BITS, int K>
INLINE F16 code_value(const Book<BITS>& book, const Words<BITS>& w) {
  if constexpr (BITS == 4) return lookup<4, K % 8 * 4>(book, w.word[K / 8]);
  else if constexpr (BITS == 2) return lookup<2, K % 16 * 2>(book, w.word[K / 16]);
  else if constexpr (K < 30) return lookup<3, K / 5 % 2 * 16 + K % 5 * 3>(book, w.word[K / 10]);
  else return lookup<3, (K - 30) * 16>(book, w.word[3]);
}

INLINE F16 load_scales(const uint16_t* p, ScaleDtype dtype) { return dtype == kScaleF16 ? from_f16(p) : from_bf16(p); }

// `count` values at p[i..] as fp32, zero beyond.
F16 load_lanes(const void* p, int64_t i, int count, Dtype dtype) {
  const size_t size = dtype == kF32 ? 4 : 2;
  const void* from = static_cast<const char*>(p) + i * size;
  float tail[16] = {};
  if (count < 16) from = memcpy(tail, from, count * size);
  if (dtype == kF32) return load(static_cast<const float*>(from));
  return dtype == kBf16 ? from_bf16(static_cast<const uint16_t*>(from)) : from_f16(static_cast<const uint16_t*>(from));
}

void store_lanes(void* p, int64_t i, int count, Dtype dtype, F16 v) {
  const size_t size = dtype == kF32 ? 4 : 2;
  void* to = static_cast<char*>(p) + i * size;
  float tail[16];
  void* out = count < 16 ? tail : to;
  if (dtype == kF32) store(static_cast<float*>(out), v);
  else if (dtype == kBf16) to_bf16(static_cast<uint16_t*>(out), v);
  else to_f16(static_cast<uint16_t*>(out), v);
  if (count < 16) memcpy(to, tail, count * size);
}

// Groups end where chunks do.
bool groups_of_chunks(const Weights& w) { return w.group_size % kChunk == 0 || w.groups == 1; }

// Where a group ends: every `period` steps, and never after the last one, so that padding belongs to none.
struct GroupCounter {
  int64_t period, groups, left, group = 0;
  INLINE GroupCounter(int64_t period, int64_t groups) : period(period), groups(groups), left(period) {}
  INLINE bool ends() { return --left == 0; }
  INLINE void next() { left = ++group < groups ? period : INT64_MAX; }
};
