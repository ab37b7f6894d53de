// What headers of every packed layout say alike; each library adds what its own layouts need.
#pragma once

#include <stdexcept>

#include "flute.h"

namespace flute {

struct HeaderFields {
  int bits;
  int64_t layout, group_size, k, groups, n;
  ScaleDtype scale_dtype;
  const int64_t* shards;  // rows of each
  int64_t n_shards;
};

[[noreturn]] static inline void refuse_header(const std::string& why) {
  throw std::invalid_argument("packed-weight header: " + why + ": pack the weights again with this version");
}

// Reads a header of `length` fields whose layout is first .. last, which `layouts` names; throws std::invalid_argument with one
// line that says what is wrong.
static inline HeaderFields read_fields(const int64_t* h, int64_t length, int64_t first, int64_t last, const std::string& layouts) {
  // The limits keep products of sizes in 64 bits, and rows and inputs in 32.
  constexpr int64_t kMaxK = int64_t(1) << 28, kMaxN = (int64_t(1) << 31) - 1;
  if (length <= kHeaderFixed || h[kFieldMagic] != kMagic) refuse_header("not one");
  if (h[kFieldAbi] != kAbi) refuse_header("ABI " + std::to_string(h[kFieldAbi]) + ", this library reads ABI " + std::to_string(kAbi));
  if (h[kFieldLayout] < first || h[kFieldLayout] > last) refuse_header("layout " + std::to_string(h[kFieldLayout]) + ", " + layouts);
  if (h[kFieldBits] < 2 || h[kFieldBits] > 4) refuse_header(std::to_string(h[kFieldBits]) + " bits, expected 2, 3 or 4");
  HeaderFields f{};
  f.layout = h[kFieldLayout];
  f.bits = int(h[kFieldBits]);
  f.group_size = h[kFieldGroupSize];
  f.k = h[kFieldK];
  if (f.k < 8 || f.k > kMaxK || f.k % 8) refuse_header("K=" + std::to_string(f.k) + ", expected a multiple of 8");
  if (f.group_size < 8 || f.group_size % 8 || f.k % f.group_size) {
    refuse_header("group size " + std::to_string(f.group_size) + ", expected a multiple of 8 that divides K=" + std::to_string(f.k));
  }
  if (h[kFieldScaleDtype] != kScaleBf16 && h[kFieldScaleDtype] != kScaleF16) refuse_header("unknown dtype of scales");
  f.scale_dtype = ScaleDtype(h[kFieldScaleDtype]);
  f.groups = f.k / f.group_size;
  f.n_shards = h[kFieldShards];
  if (f.n_shards != length - kHeaderFixed) refuse_header("number of shards does not match its length");
  f.shards = h + kHeaderFixed;
  for (int64_t s = 0; s < f.n_shards; ++s) {
    if (f.shards[s] < 1 || f.shards[s] > kMaxN - f.n) refuse_header("shard " + std::to_string(s) + " has " + std::to_string(f.shards[s]) + " rows");
    f.n += f.shards[s];
  }
  return f;
}

}  // namespace flute
