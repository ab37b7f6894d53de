// The kernels for many tokens: decode a block of weights once, scales included, and multiply it with all tokens.
//
// A block is kTileVectors tiles of rows by Math::kDepth inputs, which is half of a first-level cache; a register-blocked
// loop runs it over kTileTokens tokens at a time. Math says in what type (math_f32.inc.h).
// Every output is summed in the order of K whatever the threads, the other tokens or the other rows.
//
// Included inside a translation unit's own namespace, after decode.inc.h.

// Weights of `inputs` inputs from chunk `first` on, for one tile, to out[step][kTileVectors][16].
template <class Math, int BITS>
void decode(const Weights& w, const uint8_t* tile, const float* codebook, int64_t first, int64_t inputs, float* out) {
  constexpr int kDistance = kTileVectors * kTileRows;
  const Book<BITS> book = load_book<BITS>(codebook);
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile) + first * BITS * kTileRows;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  GroupCounter counter(w.group_size / 8, w.groups);
  const int64_t octet = first * 4;
  counter.group = octet / counter.period;
  counter.left = counter.period - octet % counter.period;
  F16 scale = load_scales(scales + counter.group * kTileRows, w.scale_dtype);
  for (int64_t k = 0; k < inputs; k += kChunk, codes += BITS * kTileRows) {
    const Words<BITS> words = load_chunk<BITS>(codes);
    unroll<4>(FLUTE_UNROLLED(octet) {
      unroll<4>(FLUTE_UNROLLED(pair) {
        constexpr int i = decltype(octet)::value * 8 + decltype(pair)::value * 2;
        const F16 even = mul(code_value<BITS, i>(book, words), scale), odd = mul(code_value<BITS, i + 1>(book, words), scale);
        Math::put(out, kDistance, even, odd);
        out += 2 / Math::kStep * kDistance;
      });
      if (counter.ends()) {
        counter.next();
        if (counter.group < w.groups) scale = load_scales(scales + counter.group * kTileRows, w.scale_dtype);
      }
    });
  }
}

// sums[M][kTileVectors][16] (+)= weights x inputs of M tokens, whose rows are Math::kDepth apart.
template <class Math, int M>
void multiply(const float* weights, const typename Math::X* x, int64_t inputs, float* sums, bool clear) {
  constexpr int kVectors = kTileVectors;
  F16 sum[M][kVectors];
  unroll<M>(FLUTE_UNROLLED(m) {
    unroll<kVectors>(FLUTE_UNROLLED(v) {
      sum[m.value][v.value] = clear ? zero() : load(sums + (m.value * kVectors + v.value) * kTileRows);
    });
  });
  for (int64_t k = 0; k < inputs; k += Math::kStep, weights += kVectors * kTileRows, x += Math::kStep) {
    typename Math::Weight weight[kVectors];
    unroll<kVectors>(FLUTE_UNROLLED(v) { weight[v.value] = Math::get(weights + v.value * kTileRows); });
    unroll<M>(FLUTE_UNROLLED(m) {
      unroll<kVectors>(FLUTE_UNROLLED(v) {
        F16& s = sum[m.value][v.value];
        s = Math::multiply_add(s, weight[v.value], x + m.value * Math::kDepth);
      });
    });
  }
  unroll<M>(FLUTE_UNROLLED(m) {
    unroll<kVectors>(FLUTE_UNROLLED(v) { store(sums + (m.value * kVectors + v.value) * kTileRows, sum[m.value][v.value]); });
  });
}

constexpr int kTurns = 4;  // blocks of rows that share one reading of the inputs

template <class Math>
using Multiply = void (*)(const float*, const typename Math::X*, int64_t, float*, bool);

template <class Math, int... M>
Multiply<Math> multiply_for(int m, std::integer_sequence<int, M...>) {
  static constexpr Multiply<Math> table[] = {multiply<Math, M + 1>...};
  return table[m - 1];
}

// Tokens whose converted inputs are kept at a time: up to 512, fewer where they would pass 16 MB.
template <class Math>
int64_t tile_tokens(const Weights& w) {
  const int64_t fit = (int64_t(16) << 20) / (w.chunks * kChunk * int64_t(sizeof(typename Math::X)));
  return fit > 512 ? 512 : fit < 64 ? 64 : fit;
}

template <class Math>
int64_t tile_passes(const Weights& w, int64_t m) {
  return divide_up(m, tile_tokens<Math>(w));
}

template <class Math>
void tile_run(const Call& call) {
  using X = typename Math::X;
  constexpr int kDepth = Math::kDepth, kRowSums = kTileVectors * kTileRows;
  const Weights& w = call.w;
  const int64_t depths = divide_up(w.k, kDepth), blocks = divide_up(w.tiles, kTileVectors), limit = tile_tokens<Math>(w);
  for (int64_t m0 = 0; m0 < call.m; m0 += limit) {
    const int64_t tokens = call.m - m0 < limit ? call.m - m0 : limit;
    // Inputs in blocks of kDepth: x[depth][token][kDepth].
    X* x = static_cast<X*>(scratch(kInput, size_t(depths * tokens * kDepth) * sizeof(X)));
    for_each(call.parallel, tokens, divide_up(tokens * w.k, 1 << 15), [&](int64_t m) {
      for (int64_t k = 0; k < w.k; k += 16) {
        const int64_t count = w.k - k < 16 ? w.k - k : 16;
        Math::convert(x + (k / kDepth * tokens + m) * kDepth + k % kDepth, call.x, (m0 + m) * w.k + k, int(count), call.dtype);
      }
    });
    // Few rows for many threads: share the tokens too, at the price of decoding again.
    const int64_t wanted = divide_up(4 * call.parallel.threads, blocks), most = divide_up(tokens, 4 * kTileTokens);
    const int64_t parts = call.parallel.threads == 1 ? 1 : wanted < most ? wanted : most;
    const int64_t part_tokens = divide_up(divide_up(tokens, parts), kTileTokens) * kTileTokens;
    // Several blocks of rows take turns at the same inputs, which stay in the second-level cache.
    const int64_t turns = blocks >= 8 * kTurns * call.parallel.threads && tokens > 4 * kTileTokens ? kTurns : 1;
    for_each(call.parallel, divide_up(blocks, turns) * parts, call.parallel.threads, [&](int64_t item) {
      const int64_t begin = item % parts * part_tokens, first_block = item / parts * turns;
      const int64_t last_block = first_block + turns < blocks ? first_block + turns : blocks;
      const int64_t end = begin + part_tokens < tokens ? begin + part_tokens : tokens;
      if (begin >= end) return;
      float* weights = static_cast<float*>(scratch(kWorker, size_t(kDepth / Math::kStep + turns * part_tokens) * kRowSums * sizeof(float)));
      float* sums = weights + kDepth / Math::kStep * kRowSums;
      for (int64_t d = 0; d < depths; ++d) {
        const int64_t inputs = w.k - d * kDepth < kDepth ? w.k - d * kDepth : kDepth;
        for (int64_t block = first_block; block < last_block; ++block) {
          for (int v = 0; v < kTileVectors; ++v) {
            // An odd last block repeats its tile, whose sums nobody reads.
            const int64_t tile = block * kTileVectors + v < w.tiles ? block * kTileVectors + v : w.tiles - 1;
            const auto decode_bits = w.bits == 2 ? decode<Math, 2> : w.bits == 3 ? decode<Math, 3> : decode<Math, 4>;
            decode_bits(w, tile_data(w, tile), tile_rows(w, tile).book, d * kDepth / kChunk, inputs, weights + v * kTileRows);
          }
          float* block_sums = sums + (block - first_block) * part_tokens * kRowSums;
          for (int64_t m = begin; m < end; m += kTileTokens) {
            const int now = int(end - m < kTileTokens ? end - m : kTileTokens);
            const auto run = multiply_for<Math>(now, std::make_integer_sequence<int, kTileTokens>{});
            run(weights, x + (d * tokens + m) * kDepth, inputs, block_sums + (m - begin) * kRowSums, d == 0);
          }
        }
      }
      for (int64_t tile = first_block * kTileVectors; tile < last_block * kTileVectors && tile < w.tiles; ++tile) {
        const TileRows rows = tile_rows(w, tile);
        const float* tile_sums = sums + (tile / kTileVectors - first_block) * part_tokens * kRowSums + tile % kTileVectors * kTileRows;
        const F16 bias = call.bias ? load_lanes(call.bias, rows.first, rows.count, call.dtype) : zero();
        for (int64_t m = begin; m < end; ++m) {
          const F16 y = add(load(tile_sums + (m - begin) * kRowSums), bias);
          store_lanes(call.y, (m0 + m) * w.n + rows.first, rows.count, call.dtype, y);
        }
      }
    });
  }
}
