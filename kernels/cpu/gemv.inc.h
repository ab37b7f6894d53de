// C1, the kernel for few tokens.
//
// Rows are lanes. Every code costs one shift and one table permute in registers, and its weight one multiply-add for
// each token with a broadcast input. Sums run over one group of inputs and are then multiplied by the group's scales,
// so a weight is never formed. A tile is read once, front to back. Math says in what type (math_f32.inc.h).
//
// Included inside a translation unit's own namespace, after a Math.

constexpr int kPrefetchGroups = 16;            // groups ahead of the scales, a stream too slow for the hardware to follow
constexpr int64_t kGemvTokens = 64;            // tokens that share one stream of the weights
constexpr int64_t kBytesPerWorker = 16 << 10;  // packed bytes that are worth another thread

// sums[M][16] of one tile for M tokens; x are arranged inputs with rows of `stride`, zero up to a multiple of 32.
// BY_CHUNK: groups_of_chunks. Otherwise groups end at any multiple of 8 inputs, which takes a Math of single inputs.
template <class Math, int BITS, int M, bool BY_CHUNK>
void gemv_tile(const Weights& w, const uint8_t* tile, const float* codebook, const typename Math::X* x, int64_t stride, float* sums) {
  constexpr int kChains = M == 1 ? 4 : M < 4 ? 2 : 1;  // at least four independent sums
  constexpr int kSteps = 8 / Math::kStep;              // of 8 inputs
  const auto table = Math::template load_table<BITS>(codebook);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  F16 part[M][kChains], total[M];
  unroll<M>(FLUTE_UNROLLED(m) {
    total[m.value] = zero();
    unroll<kChains>(FLUTE_UNROLLED(c) { part[m.value][c.value] = zero(); });
  });
  // A single group takes the whole of a padded K.
  GroupCounter counter(!BY_CHUNK ? w.group_size / 8 : w.groups == 1 ? w.chunks : w.group_size / kChunk, w.groups);
  // The first ones of the next tile, which is the same thread's as a rule.
  for (int i = 0; i < kPrefetchGroups; i += 2) __builtin_prefetch((const char*)(scales + i * kTileRows) + w.tile_bytes);
  const auto end_of_group = [&]() __attribute__((always_inline)) {
    __builtin_prefetch(scales + (counter.group + kPrefetchGroups) * kTileRows);
    const F16 scale = load_scales(scales + counter.group * kTileRows, w.scale_dtype);
    unroll<M>(FLUTE_UNROLLED(m) {
      F16* p = part[m.value];
      if constexpr (kChains == 4) p[0] = add(add(p[0], p[1]), add(p[2], p[3]));
      if constexpr (kChains == 2) p[0] = add(p[0], p[1]);
      total[m.value] = fma(p[0], scale, total[m.value]);
      unroll<kChains>(FLUTE_UNROLLED(c) { p[c.value] = zero(); });
    });
    counter.next();
  };
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  for (int64_t chunk = 0; chunk < w.chunks; ++chunk, codes += BITS * kTileRows, x += kChunk) {
    unroll<BITS>(FLUTE_UNROLLED(j) { prefetch_codes(codes + j.value * kTileRows); });
    const Words<BITS> words = load_chunk<BITS>(codes);
    unroll<4>(FLUTE_UNROLLED(octet) {
      unroll<kSteps>(FLUTE_UNROLLED(i) {
        constexpr int step = decltype(octet)::value * kSteps + decltype(i)::value;
        const auto weight = Math::template weight<BITS, step>(table, words);
        unroll<M>(FLUTE_UNROLLED(m) {
          F16& p = part[m.value][step % kChains];
          p = Math::multiply_add(p, weight, x + m.value * stride + step * Math::kStep);
        });
      });
      if constexpr (!BY_CHUNK) {
        if (counter.ends()) end_of_group();
      }
    });
    if constexpr (BY_CHUNK) {
      if (counter.ends()) end_of_group();
    }
  }
  unroll<M>(FLUTE_UNROLLED(m) { store(sums + m.value * kTileRows, total[m.value]); });
}

template <class Math>
using GemvTile = void (*)(const Weights&, const uint8_t*, const float*, const typename Math::X*, int64_t, float*);

template <class Math, int BITS, int... M>
GemvTile<Math> gemv_for(const Weights& w, int m, std::integer_sequence<int, M...>) {
  static constexpr GemvTile<Math> by_chunk[] = {gemv_tile<Math, BITS, M + 1, true>...};
  if constexpr (Math::kStep == 1) {
    static constexpr GemvTile<Math> by_octet[] = {gemv_tile<Math, BITS, M + 1, false>...};
    if (!groups_of_chunks(w)) return by_octet[m - 1];
  }
  return by_chunk[m - 1];
}

template <class Math>
GemvTile<Math> gemv_for(const Weights& w, int m) {
  constexpr std::make_integer_sequence<int, kMaxTokens> counts;
  return w.bits == 2 ? gemv_for<Math, 2>(w, m, counts) : w.bits == 3 ? gemv_for<Math, 3>(w, m, counts) : gemv_for<Math, 4>(w, m, counts);
}

int64_t gemv_passes(const Weights&, int64_t m) { return divide_up(m, kGemvTokens); }

// Every tile of y for tokens [m0, m0 + tokens): sum_tile(rows, tile, m, count, sums) is for `count` tokens from m0 + m on.
template <class F>
void gemv_tiles(const Call& call, int64_t m0, int64_t tokens, const F& sum_tile) {
  const Weights& w = call.w;
  const int64_t workers = divide_up(w.bytes * divide_up(tokens, 4), kBytesPerWorker);
  for_each(call.parallel, w.tiles, workers, [&](int64_t tile) {
    const TileRows rows = tile_rows(w, tile);
    const F16 bias = call.bias ? load_lanes(call.bias, rows.first, rows.count, call.dtype) : zero();
    for (int64_t m = 0; m < tokens; m += kMaxTokens) {
      const int now = int(tokens - m < kMaxTokens ? tokens - m : kMaxTokens);
      float sums[kMaxTokens * kTileRows];
      sum_tile(rows, tile, m, now, sums);
      for (int i = 0; i < now; ++i) {
        const F16 y = add(load(sums + i * kTileRows), bias);
        store_lanes(call.y, (m0 + m + i) * w.n + rows.first, rows.count, call.dtype, y);
      }
    }
  });
}

template <class Math>
void gemv_run(const Call& call) {
  using X = typename Math::X;
  const Weights& w = call.w;
  // A cache line between rows: rows a power of two apart would share the sets of the first-level cache.
  const int64_t stride = w.chunks * kChunk + 64 / int64_t(sizeof(X));
  for (int64_t m0 = 0; m0 < call.m; m0 += kGemvTokens) {
    const int64_t tokens = call.m - m0 < kGemvTokens ? call.m - m0 : kGemvTokens;
    X* x = static_cast<X*>(scratch(kInput, size_t(tokens * stride) * sizeof(X)));
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t k = 0; k < w.k; k += kChunk) {
        const int64_t count = w.k - k < kChunk ? w.k - k : kChunk;
        Math::arrange(x + m * stride + k, call.x, (m0 + m) * w.k + k, int(count), call.dtype, w.bits);
      }
    }
    gemv_tiles(call, m0, tokens, [&](const TileRows& rows, int64_t tile, int64_t m, int now, float* sums) {
      gemv_for<Math>(w, now)(w, tile_data(w, tile), rows.book, x + m * stride, stride, sums);
    });
  }
}
