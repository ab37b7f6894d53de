// Stream-K (Osama et al., arXiv 2301.03598): the work of all tiles of y, cut along K into slices, is one row of items that
// CTAs share evenly, so that no tile count leaves multiprocessors idle. A tile that several CTAs share is summed from the
// workspace by whichever of them comes last, always in the order of CTAs: y depends on the shape and the grid alone, no CTA
// waits for another, and results take no atomics.
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

// Adds up a tile that this CTA has done its part of. `values` are this thread's of the tile, the same places in every CTA.
// True where this CTA has the sum, in `values`, and is to write the tile. All kThreads threads call it; sync() is their
// barrier and `flag` the shared address of a word of theirs.
template <int kThreads, int kValues, class Sync>
FLUTE_DEVICE bool combine(const Work& w, void* workspace, uint32_t cta, uint32_t tile, int thread, uint32_t flag,
                          float (&values)[kValues], const Sync& sync) {
  static_assert(kValues % 4 == 0, "slots are read 16 bytes at a time");
  const uint32_t first = owner(w, tile * w.slices), last = owner(w, tile * w.slices + w.slices - 1);
  if (first == last) return true;
  uint8_t* const slots = static_cast<uint8_t*>(workspace) + kCounterBytes + thread * sizeof(Words4);
  const auto slot = [&](uint32_t c) { return slots + (size_t(c) * 2 + (c == first)) * (kThreads * kValues * sizeof(float)); };

  uint8_t* const mine = slot(cta);
  FLUTE_UNROLL
  for (int i = 0; i < kValues; i += 4) {
    store_global(mine + i * (kThreads * sizeof(float)),
                 {{as_bits(values[i]), as_bits(values[i + 1]), as_bits(values[i + 2]), as_bits(values[i + 3])}});
  }
  threadfence();
  sync();
  if (thread == 0) {
    unsigned* const counter = static_cast<unsigned*>(workspace) + first;
    const bool complete = atomic_add(counter, 1) == last - first;
    if (complete) *counter = 0;  // for the next call
    sts32(flag, complete);
  }
  sync();
  if (!lds32(flag)) return false;
  threadfence();
  for (uint32_t c = first; c <= last; ++c) {
    const uint8_t* const from = slot(c);
    FLUTE_UNROLL
    for (int i = 0; i < kValues; i += 4) {
      const Words4 four = load_l2(from + i * (kThreads * sizeof(float)));
      FLUTE_UNROLL
      for (int j = 0; j < 4; ++j) values[i + j] = (c == first ? 0 : values[i + j]) + as_f32(four.w[j]);
    }
  }
  return true;
}

}  // namespace flute::cuda
