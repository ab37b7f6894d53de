// The kernel of byte dot products, for any number of tokens: int8 weights and inputs (int8.inc.h).
//
// Rows are lanes, a lane four inputs. Each vector of weights comes out of its codes in registers, by a shift, a mask and a
// byte shuffle, and serves up to kMaxTokens tokens, which is enough to hide that: measured, more tokens for a vector, with
// their totals in memory, are slower. So a tile is read front to back for every few tokens, whose inputs are in the
// second-level cache, and there is no second path for many tokens.
// The instruction multiplies unsigned by signed bytes: weights are 128 too large, and sums begin at -128 times the sum
// of the inputs. |sum| <= 256 * 255 * 127 + 128 * 256 * 127 < 2^24 at any time: far from an int32's end.
//
// Included inside a translation unit's own namespace, after int8.inc.h.

constexpr int64_t kDot8Inputs = 512 << 10;         // bytes of quantized inputs that share a pass over the weights: half an L2
constexpr int64_t kDot8BytesPerWorker = 16 << 10;  // packed bytes that are worth another thread, as in gemv.inc.h

// Inputs of M tokens are one stream of four-byte values, M of each kind: for every block the start of the sums, the steps
// (fp32) and then, for each of its chunks, eight times four inputs.
struct Dot8Size {
  int64_t words = 0;  // of the stream, for each token
  explicit Dot8Size(const Weights& w) {
    for (Block block; block.next(w);) words += 2 + block.chunks() * kChunkVectors;
  }
  int64_t tokens() const {
    const int64_t fit = kDot8Inputs / (words * 4) / kMaxTokens * kMaxTokens;
    return fit > kMaxTokens ? fit : kMaxTokens;
  }
};

void dot8_quantize(const Quantizer& quantize, const Weights& w, int64_t row, int32_t* to, int width) {
  for (Block block; block.next(w);) {
    int32_t* inputs = to + 2 * width;
    const Quantized q = quantize(row, block, [&](int64_t i, __m256i bytes) __attribute__((always_inline)) {
      alignas(32) int32_t four[kChunkVectors];
      _mm256_store_si256(reinterpret_cast<__m256i*>(four), bytes);
      for (int v = 0; v < kChunkVectors; ++v) inputs[(i * kChunkVectors + v) * width] = four[v];
    });
    to[0] = int32_t(-128u * uint32_t(q.sum));  // the sum of a block that has an infinity is any number
    memcpy(to + width, &q.step, 4);
    to = inputs + block.chunks() * kChunkVectors * width;
  }
}

// sums[M][16] of one tile.
template <int BITS, int M>
void dot8_tile(const Weights& w, const uint8_t* tile, const float* codebook, const int32_t* x, float* sums) {
  constexpr int kChains = M == 1 ? 4 : M < 4 ? 2 : 1;  // at least four independent sums
  const Int8Book book = int8_book(codebook, 128);
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.scale_offset);
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile);
  F16 total[M];
  unroll<M>(FLUTE_UNROLLED(m) { total[m.value] = zero(); });
  for (Block block; block.next(w);) {
    I16 sum[M][kChains];
    unroll<M>(FLUTE_UNROLLED(m) {
      sum[m.value][0] = _mm512_set1_epi32(x[m.value]);
      unroll<kChains - 1>(FLUTE_UNROLLED(c) { sum[m.value][c.value + 1] = _mm512_setzero_si512(); });
    });
    const int32_t* steps = x + M;
    x += 2 * M;
    const uint32_t* chunk = codes + block.first_chunk() * BITS * kTileRows;
    for (int64_t left = block.chunks(); left; --left, chunk += BITS * kTileRows, x += kChunkVectors * M) {
      unroll<BITS>(FLUTE_UNROLLED(j) { _mm_prefetch((const char*)(chunk + j.value * kTileRows) + 2048, _MM_HINT_T0); });
      unroll<kChunkVectors>(FLUTE_UNROLLED(v) {
        const __m512i weight = weight_bytes<BITS, v.value>(book, chunk);
        unroll<M>(FLUTE_UNROLLED(m) {
          I16& s = sum[m.value][v.value % kChains];
          s = _mm512_dpbusd_epi32(s, weight, _mm512_set1_epi32(x[v.value * M + m.value]));
        });
      });
    }
    const F16 scale = mul(load_scales(scales + block.group * kTileRows, w.scale_dtype), set1(book.step));
    unroll<M>(FLUTE_UNROLLED(m) {
      I16* s = sum[m.value];
      if constexpr (kChains == 4) s[0] = _mm512_add_epi32(_mm512_add_epi32(s[0], s[1]), _mm512_add_epi32(s[2], s[3]));
      if constexpr (kChains == 2) s[0] = _mm512_add_epi32(s[0], s[1]);
      float step;
      memcpy(&step, steps + m.value, 4);
      total[m.value] = fma(_mm512_cvtepi32_ps(s[0]), mul(scale, set1(step)), total[m.value]);
    });
  }
  unroll<M>(FLUTE_UNROLLED(m) { store(sums + m.value * kTileRows, total[m.value]); });
}

using Dot8Tile = void (*)(const Weights&, const uint8_t*, const float*, const int32_t*, float*);
template <int BITS, int... M>
Dot8Tile dot8_for(int tokens, std::integer_sequence<int, M...>) {
  static constexpr Dot8Tile table[] = {dot8_tile<BITS, M + 1>...};
  return table[tokens - 1];
}
Dot8Tile dot8_for(const Weights& w, int tokens) {
  constexpr std::make_integer_sequence<int, kMaxTokens> counts;
  return w.bits == 2 ? dot8_for<2>(tokens, counts) : w.bits == 3 ? dot8_for<3>(tokens, counts) : dot8_for<4>(tokens, counts);
}

int64_t dot8_passes(const Weights& w, int64_t m) { return divide_up(m, Dot8Size(w).tokens()); }

void dot8_run(const Call& call) {
  const Weights& w = call.w;
  const Dot8Size size(w);
  const Quantizer quantize(call.x, call.dtype, w.bits);
  const int64_t limit = size.tokens();
  for (int64_t m0 = 0; m0 < call.m; m0 += limit) {
    const int64_t tokens = call.m - m0 < limit ? call.m - m0 : limit;
    // In blocks of about the same size: 8 and 8 tokens take less than 12 and 4.
    const int64_t width = divide_up(tokens, divide_up(tokens, kMaxTokens)), blocks = divide_up(tokens, width);
    const auto width_of = [&](int64_t block) { return int(block < blocks - 1 ? width : tokens - block * width); };
    int32_t* x = static_cast<int32_t*>(scratch(kInput, size_t(tokens * size.words) * 4));
    for_each(call.parallel, tokens, divide_up(tokens * w.k, 1 << 15), [&](int64_t m) {
      const int64_t block = m / width;
      int32_t* to = x + block * width * size.words + m % width;
      dot8_quantize(quantize, w, (m0 + m) * w.k, to, width_of(block));
    });
    const int64_t workers = divide_up(w.bytes * divide_up(tokens, 4), kDot8BytesPerWorker);
    // Few rows for many threads: share the tokens too.
    const int64_t wanted = divide_up(4 * call.parallel.threads, w.tiles), parts = wanted < blocks ? wanted : blocks;
    for_each(call.parallel, w.tiles * parts, workers, [&](int64_t item) {
      const int64_t tile = item / parts, part = item % parts;
      const TileRows rows = tile_rows(w, tile);
      const F16 bias = call.bias ? load_lanes(call.bias, rows.first, rows.count, call.dtype) : zero();
      for (int64_t block = part * blocks / parts; block < (part + 1) * blocks / parts; ++block) {
        const int64_t first = block * width;
        const int now = width_of(block);
        float sums[kMaxTokens * kTileRows];
        dot8_for(w, now)(w, tile_data(w, tile), rows.book, x + first * size.words, sums);
        for (int i = 0; i < now; ++i) {
          const F16 y = add(load(sums + i * kTileRows), bias);
          store_lanes(call.y, (m0 + first + i) * w.n + rows.first, rows.count, call.dtype, y);
        }
      }
    });
  }
}
