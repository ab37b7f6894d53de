// SwiGLU within the kernel that computes its inputs: y = [gate | up], two shards of as many rows, becomes silu(gate) * up. Tiles
// of the two halves are different CTAs' work; whichever of a pair is written second reads both (from L2, where they still are)
// and writes their product: no launch, no pass over memory, and the same roundings as the activation alone. Of this
// lut_mma_bulk.cuh, whose tiles have both halves, takes silu_mul() alone.
#pragma once

#include "launch.h"
#include "ptx.h"

namespace flute::cuda {

struct GateCall {
  void* out;       // [M, half], or null: there is no activation
  uint32_t pairs;  // tiles of a half
  int half;        // rows of a half, a multiple of 8
  int m;
};

// A call's, for tiles of so many strips and tokens; its `out` is null where it has no activation.
inline GateCall gate_of(const Gemm& g, int tile_strips, int tile_tokens) {
  const int half = g.w.n / 2, strips = (half + kStripRows - 1) / kStripRows;
  return {g.gated, uint32_t((strips + tile_strips - 1) / tile_strips) * uint32_t((g.m + tile_tokens - 1) / tile_tokens), half, g.m};
}
inline const char* check_gate(const Gemm& g) {
  if (!g.gated) return nullptr;
  return takes_gate(g.w, g.m) ? nullptr : "silu(gate) * up in the kernel needs two shards of as many rows, a multiple of 8, and not too many tiles";
}

// silu rounded to 16 bits, then the product, as vLLM's silu_and_mul and torch compute them.
template <bool kF16>
FLUTE_DEVICE uint16_t silu_mul(uint16_t gate, uint16_t up) {
  const float x = widen16<kF16>(gate);
  return round16<kF16>(widen16<kF16>(round16<kF16>(x / (1 + exponential(-x)))) * widen16<kF16>(up));
}

template <bool kF16>
FLUTE_DEVICE void silu_mul_octet(const uint16_t* gate, const uint16_t* up, uint16_t* out) {
  const Words4 g = load_l2(gate), u = load_l2(up);
  Words4 product;
  FLUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint16_t low = silu_mul<kF16>(uint16_t(g.w[i]), uint16_t(u.w[i]));
    product.w[i] = low | uint32_t(silu_mul<kF16>(uint16_t(g.w[i] >> 16), uint16_t(u.w[i] >> 16))) << 16;
  }
  store_global(out, product);
}

// Of y, the tile of at most kRows x kTokens from `row` of its halves and `token` on: all kThreads threads of a CTA multiply it.
template <bool kF16, int kRows, int kTokens, int kThreads>
FLUTE_DEVICE void multiply_pair_of_tiles(const GateCall& gate, const void* y, int row, int token, int thread) {
  const int rows = gate.half - row < kRows ? gate.half - row : kRows, octets = rows / 8;
  const int tokens = gate.m - token < kTokens ? gate.m - token : kTokens;
  const uint16_t* const in = static_cast<const uint16_t*>(y) + int64_t(token) * gate.half * 2 + row;
  uint16_t* const out = static_cast<uint16_t*>(gate.out) + int64_t(token) * gate.half + row;
  FLUTE_ROLLED
  for (int i = thread; i < tokens * octets; i += kThreads) {
    const int64_t t = i / octets;
    const int r = i % octets * 8;
    silu_mul_octet<kF16>(in + t * gate.half * 2 + r, in + t * gate.half * 2 + gate.half + r, out + t * gate.half + r);
  }
}

// Whether a tile, which its CTA has written, is the second of its pair; one thread calls it, for all that a barrier has before
// it and another after it. The counters' second half is the pairs', zero again after every call as the first.
FLUTE_DEVICE bool second_of_pair(const GateCall& gate, void* workspace, uint32_t tile) {
  threadfence();
  unsigned* const counter = static_cast<unsigned*>(workspace) + kGateCounters + tile % gate.pairs;
  const bool second = atomic_add(counter, 1) == 1;
  threadfence();
  if (second) *counter = 0;  // for the next call
  return second;
}

// After a tile of y was written, all kThreads threads of a CTA call this. sync() is their barrier, `flag` the shared address
// of a word of theirs.
template <bool kF16, int kRows, int kTokens, int kThreads, class Sync>
FLUTE_DEVICE void finish_pair(const GateCall& gate, const void* y, void* workspace, uint32_t tile, int row, int token, int thread,
                              uint32_t flag, const Sync& sync) {
  sync();
  if (thread == 0) sts32(flag, second_of_pair(gate, workspace, tile));
  sync();
  if (lds32(flag)) multiply_pair_of_tiles<kF16, kRows, kTokens, kThreads>(gate, y, row, token, thread);
}

}  // namespace flute::cuda
