// Stream-K (Osama et al., arXiv 2301.03598): the work of all tiles of y, cut along K into slices, is one row of items that
// CTAs share evenly, so that no tile count leaves multiprocessors idle. A tile that several CTAs share is summed from the
// workspace by whichever of them comes last, always in the order of CTAs: y depends on the shape and the grid alone, no CTA
// waits for another, and results take no atomics. lut_mma_bulk.cuh shares items alike, and has another way to add up.
//
// A CTA has at most two shared tiles, its first and its last, hence two slots of the workspace; and it is the first of a
// tile's CTAs for at most one shared tile, whose counter is its own.
#pragma once

#include "launch.h"
#include "ptx.h"

namespace flute::cuda {

struct Work {
  uint32_t slices;       // items of a tile
  uint32_t ctas;         // that take part, at most one an item
  uint32_t share, rest;  // items of a CTA; the first `rest` have one more
};

FLUTE_HD inline Work share_work(uint32_t tiles, uint32_t slices, uint32_t ctas) {
  const uint32_t items = tiles * slices;
  ctas = ctas < items ? ctas : items;
  return {slices, ctas, items / ctas, items % ctas};
}
// The same where tiles may be cut into equal parts, each one CTA's, and less than a tenth of the CTAs is idle for it: no CTA then
// has two partial tiles to write, and fewer are read again.
FLUTE_HD inline Work share_work_evenly(uint32_t tiles, uint32_t slices, uint32_t ctas) {
  const uint32_t parts = ctas / tiles;
  const bool even = parts > 0 && slices % parts == 0 && 10 * tiles * parts >= 9 * ctas;
  return share_work(tiles, slices, even ? tiles * parts : ctas);
}
// The items of CTA c are first_item(c) .. first_item(c + 1).
FLUTE_HD inline uint32_t first_item(const Work& w, uint32_t c) { return c * w.share + (c < w.rest ? c : w.rest); }
FLUTE_HD inline uint32_t owner(const Work& w, uint32_t item) {
  const uint32_t longer = w.rest * (w.share + 1);
  return item < longer ? item / (w.share + 1) : w.rest + (item - longer) / w.share;
}

// fp32 bytes of the workspace for each multiprocessor: two slots of a tile for each CTA that runs there. The largest are
// one CTA of 256 rows x 32 tokens (lut_mma.cuh; two of 128 x 8 take less), and one of 256 x 128 (lut_wgmma.cuh, Hopper only).
constexpr size_t kMmaSlotBytes = 2 * 256 * 32 * sizeof(float);
constexpr size_t kWgmmaSlotBytes = 2 * 256 * 128 * sizeof(float);

// The CTAs that share a tile.
struct Sharers {
  uint32_t first, last;
  FLUTE_DEVICE Sharers(const Work& w, uint32_t tile) : first(owner(w, tile * w.slices)), last(owner(w, tile * w.slices + w.slices - 1)) {}
};
// Where CTA c has its part of a tile, of `bytes`.
FLUTE_DEVICE uint8_t* slot_of(void* workspace, const Sharers& s, uint32_t c, size_t bytes) {
  return static_cast<uint8_t*>(workspace) + kCounterBytes + (size_t(c) * 2 + (c == s.first)) * bytes;
}

// One thread's kValues of kThreads' go to a slot.
template <int kThreads, int kValues>
FLUTE_DEVICE void store_part(uint8_t* slot, int thread, const float (&values)[kValues]) {
  static_assert(kValues % 4 == 0, "slots are written and read 16 bytes at a time");
  FLUTE_UNROLL
  for (int i = 0; i < kValues; i += 4) {
    store_global(slot + thread * sizeof(Words4) + i * (kThreads * sizeof(float)),
                 {{as_bits(values[i]), as_bits(values[i + 1]), as_bits(values[i + 2]), as_bits(values[i + 3])}});
  }
}
// Whether all CTAs of a tile have stored their parts; one thread calls it, for all that a barrier has before it and another after
// it: fences of every thread would only wait longer.
FLUTE_DEVICE bool last_to_come(void* workspace, const Sharers& s) {
  threadfence();
  unsigned* const counter = static_cast<unsigned*>(workspace) + s.first;
  const bool complete = atomic_add(counter, 1) == s.last - s.first;
  threadfence();
  if (complete) *counter = 0;  // for the next call
  return complete;
}
// The sum of all parts, in the order of CTAs.
template <int kThreads, int kValues>
FLUTE_DEVICE void add_parts(void* workspace, const Sharers& s, int thread, float (&values)[kValues]) {
  constexpr size_t kBytes = kThreads * kValues * sizeof(float);
  constexpr int kAtOnce = kValues <= 8 ? 4 : kValues <= 16 ? 2 : 1;  // slots: reading L2 takes long, and registers are few
  uint8_t* const mine = static_cast<uint8_t*>(workspace) + thread * sizeof(Words4);
  FLUTE_ROLLED
  for (uint32_t c = s.first; c <= s.last; c += kAtOnce) {
    FLUTE_UNROLL
    for (int i = 0; i < kValues; i += 4) {
      Words4 read[kAtOnce];
      FLUTE_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        if (c + n <= s.last) read[n] = load_l2(slot_of(mine, s, c + n, kBytes) + i * (kThreads * sizeof(float)));
      }
      FLUTE_UNROLL
      for (int n = 0; n < kAtOnce; ++n) {
        FLUTE_UNROLL
        for (int j = 0; j < 4 && c + n <= s.last; ++j) values[i + j] = (c + n == s.first ? 0 : values[i + j]) + as_f32(read[n].w[j]);
      }
    }
  }
}

// Adds up a tile that this CTA has done its part of. `values` are this thread's of the tile, the same places in every CTA.
// True where this CTA has the sum, in `values`, and is to write the tile. All kThreads threads call it; sync() is their
// barrier and `flag` the shared address of a word of theirs.
template <int kThreads, int kValues, class Sync>
FLUTE_DEVICE bool combine(const Work& w, void* workspace, uint32_t cta, uint32_t tile, int thread, uint32_t flag,
                          float (&values)[kValues], const Sync& sync) {
  const Sharers sharers(w, tile);
  if (sharers.first == sharers.last) return true;
  store_part<kThreads>(slot_of(workspace, sharers, cta, kThreads * kValues * sizeof(float)), thread, values);
  sync();
  if (thread == 0) sts32(flag, last_to_come(workspace, sharers));
  sync();
  if (!lds32(flag)) return false;
  add_parts<kThreads>(workspace, sharers, thread, values);
  return true;
}

}  // namespace flute::cuda
