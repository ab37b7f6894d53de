// The kernels of matrix tiles, for many tokens: decode a block of weights once, and multiply it with all tokens.
//
// A block is two tiles of rows by one slice of inputs. What vectors of a lane for each row hold, several inputs in a lane's
// four bytes, is what the instructions want of their second operand; the first are the tokens' inputs, 64 bytes of each.
// Two tiles of rows and two of tokens make four products at a time. Math says in what type: MathBf16 or MathInt8.
// Every output is summed in the order of K whatever the threads, the other tokens or the other rows.
//
// Included inside a translation unit's own namespace, after amx_tile.inc.h and tile.inc.h.

static_assert(kTileVectors == 2, "a block of weights is two tiles of rows");
constexpr int kAmxTokens = 16;  // rows of a tile
constexpr int kBlockRows = 2 * kTileRows;

// Inputs of all tokens, slice after slice, [slice][token][bytes of the slice], and then the steps, [slice][token].
template <class Math>
struct AmxSize {
  int64_t slices = 0, bytes = 0;  // of a token's inputs
  explicit AmxSize(const Weights& w) {
    for (typename Math::Slice slice; slice.next(w); ++slices) bytes += slice.bytes();
  }
  // Tokens whose inputs are kept at a time, as in tile.inc.h.
  int64_t tokens() const {
    const int64_t fit = (int64_t(16) << 20) / bytes / kBlockRows * kBlockRows;
    return fit > 512 ? 512 : fit < 64 ? 64 : fit;
  }
};

template <class Math>
int64_t amx_passes(const Weights& w, int64_t m) {
  return divide_up(m, AmxSize<Math>(w).tokens());
}

template <class Math>
void amx_run(const Call& call) {
  const Weights& w = call.w;
  const AmxSize<Math> size(w);
  const Math math(call);
  const int64_t blocks = divide_up(w.tiles, 2), limit = size.tokens();
  for (int64_t m0 = 0; m0 < call.m; m0 += limit) {
    const int64_t tokens = call.m - m0 < limit ? call.m - m0 : limit;
    // Fewer tokens than a tile has rows make smaller tiles; otherwise zeros fill the last one.
    const int rows = int(tokens < kAmxTokens ? tokens : kAmxTokens);
    const int64_t count = divide_up(tokens, rows) * rows;
    char* x = static_cast<char*>(scratch(kInput, size_t(count * (size.bytes + size.slices * int64_t(sizeof(float))))));
    float* steps = reinterpret_cast<float*>(x + count * size.bytes);
    for_each(call.parallel, count, divide_up(count * w.k, 1 << 15), [&](int64_t m) {
      char* to = x;
      float* step = steps + m;
      for (typename Math::Slice slice; slice.next(w); to += count * slice.bytes(), step += count) {
        if (m < tokens) {
          *step = math.convert(to + m * slice.bytes(), (m0 + m) * w.k, slice);
        } else {
          memset(to + m * slice.bytes(), 0, size_t(slice.bytes()));
          *step = 0;
        }
      }
    });
    // As in tile.inc.h: few rows for many threads share the tokens too; several blocks of rows take turns at a slice.
    const int64_t pair = 2 * rows;
    const int64_t wanted = divide_up(4 * call.parallel.threads, blocks), most = divide_up(count, 2 * pair);
    const int64_t parts = call.parallel.threads == 1 ? 1 : wanted < most ? wanted : most;
    const int64_t part_tokens = divide_up(divide_up(count, parts), pair) * pair;
    const int64_t turns = blocks >= 8 * kTurns * call.parallel.threads && count > 2 * pair ? kTurns : 1;
    for_each(call.parallel, divide_up(blocks, turns) * parts, call.parallel.threads, [&](int64_t item) {
      const int64_t begin = item % parts * part_tokens, first_block = item / parts * turns;
      const int64_t last_block = first_block + turns < blocks ? first_block + turns : blocks;
      const int64_t end = begin + part_tokens < count ? begin + part_tokens : count;
      if (begin >= end) return;
      char* weights = static_cast<char*>(scratch(kWorker, size_t(Math::kWeightBytes + turns * part_tokens * kBlockRows * int64_t(sizeof(float)))));
      float* sums = reinterpret_cast<float*>(weights + Math::kWeightBytes);
      tile_configure(rows);
      const char* from = x;
      const float* step = steps;
      bool clear = true;
      for (typename Math::Slice slice; slice.next(w); from += count * slice.bytes(), step += count, clear = false) {
        for (int64_t block = first_block; block < last_block; ++block) {
          for (int v = 0; v < 2; ++v) {
            // An odd last block repeats its tile, whose sums nobody reads.
            Math::decode(w, block * 2 + v < w.tiles ? block * 2 + v : w.tiles - 1, slice, weights, v);
          }
          float* to = sums + (block - first_block) * part_tokens * kBlockRows;
          for (int64_t m = begin; m < end; m += pair, to += pair * kBlockRows) {
            const auto multiply = end - m > rows ? Math::template multiply<2> : Math::template multiply<1>;
            multiply(weights, from + m * slice.bytes(), slice.bytes(), step + m, rows, to, clear);
          }
        }
      }
      tile_release();
      for (int64_t tile = first_block * 2; tile < last_block * 2 && tile < w.tiles; ++tile) {
        const TileRows to = tile_rows(w, tile);
        const float* tile_sums = sums + (tile / 2 - first_block) * part_tokens * kBlockRows + tile % 2 * kTileRows;
        const F16 bias = call.bias ? load_lanes(call.bias, to.first, to.count, call.dtype) : zero();
        for (int64_t m = begin; m < end && m < tokens; ++m) {
          const F16 y = add(load(tile_sums + (m - begin) * kBlockRows), bias);
          store_lanes(call.y, (m0 + m) * w.n + to.first, to.count, call.dtype, y);
        }
      }
    });
  }
}

// Four products, or two for one tile of tokens, over 64 bytes of inputs a step: `next` is the distance of weights' steps,
// `between` that of the two tiles' weights, `row` that of their rows.
template <int TOKENS, class Product>
INLINE void multiply_steps(const char* weights, int64_t next, int64_t between, int64_t row, const char* x, int64_t bytes, int rows, const Product& product) {
  for (int64_t i = 0; i < bytes; i += 64, weights += next) {
    tile_load<6>(weights, row);
    tile_load<7>(weights + between, row);
    tile_load<4>(x + i, bytes);
    if constexpr (TOKENS == 2) tile_load<5>(x + rows * bytes + i, bytes);
    product();
  }
}

// bf16: a slice is 256 inputs, and a weight is the codebook's value times the group's scale, rounded once.
struct MathBf16 {
  static constexpr int kStep = 2;        // what decode<> of tile.inc.h asks of a Math
  static constexpr int64_t kDepth = 256;  // inputs; a block's weights are 16 KB, 32 tokens' inputs as much
  static constexpr int64_t kWeightBytes = kDepth * kBlockRows * 2;
  struct Slice {
    int64_t begin = -kDepth, inputs = 0;
    INLINE bool next(const Weights& w) {
      begin += kDepth;
      inputs = w.k - begin < kDepth ? w.k - begin : kDepth;
      return inputs > 0;
    }
    INLINE int64_t bytes() const { return divide_up(inputs, kChunk) * 64; }
  };
  const uint16_t* x;
  explicit MathBf16(const Call& call) : x(static_cast<const uint16_t*>(call.x)) {}

  float convert(char* to, int64_t row, const Slice& slice) const {
    memcpy(to, x + row + slice.begin, size_t(slice.inputs * 2));
    memset(to + slice.inputs * 2, 0, size_t(slice.bytes() - slice.inputs * 2));  // the padded weights have values
    return 1;
  }
  INLINE static void put(float* to, int, F16 even, F16 odd) {
    // As in avx512bf16.cpp: the conversion leaves 16 even weights, then 16 odd ones; the product wants pairs.
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }
  static void decode(const Weights& w, int64_t tile, const Slice& slice, char* weights, int v) {
    const auto run = w.bits == 2 ? flute::decode<MathBf16, 2> : w.bits == 3 ? flute::decode<MathBf16, 3> : flute::decode<MathBf16, 4>;
    run(w, tile_data(w, tile), tile_rows(w, tile).book, slice.begin / kChunk, slice.inputs, reinterpret_cast<float*>(weights) + v * kTileRows);
  }
  template <int TOKENS>
  static void multiply(const char* weights, const char* x, int64_t bytes, const float*, int rows, float* sums, bool clear) {
    constexpr int64_t kRow = kBlockRows * sizeof(float);
    const int64_t second = rows * kBlockRows;
    if (clear) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    } else {
      tile_load<0>(sums, kRow);
      tile_load<1>(sums + kTileRows, kRow);
      if constexpr (TOKENS == 2) tile_load<2>(sums + second, kRow);
      if constexpr (TOKENS == 2) tile_load<3>(sums + second + kTileRows, kRow);
    }
    // Rows of both tiles' weights alternate.
    multiply_steps<TOKENS>(weights, kAmxTokens * kRow, kRow / 2, kRow, x, bytes, rows, []() __attribute__((always_inline)) {
      tile_dpbf16<0, 4, 6>();
      tile_dpbf16<1, 4, 7>();
      if constexpr (TOKENS == 2) tile_dpbf16<2, 5, 6>();
      if constexpr (TOKENS == 2) tile_dpbf16<3, 5, 7>();
    });
    tile_store<0>(sums, kRow);
    tile_store<1>(sums + kTileRows, kRow);
    if constexpr (TOKENS == 2) tile_store<2>(sums + second, kRow);
    if constexpr (TOKENS == 2) tile_store<3>(sums + second + kTileRows, kRow);
  }
};

// int8: a slice is a block of int8.inc.h, whose sums are exact and then scaled. An odd chunk is filled up with zero inputs,
// under which any weights may lie.
struct MathInt8 {
  static constexpr int64_t kSteps = kBlock / 64 + 1;  // a block may begin and end within chunks
  static constexpr int64_t kTileBytes = kSteps * 16 * 64;
  static constexpr int64_t kWeightBytes = 2 * kTileBytes + 2 * 64;  // and 2 x 16 scales
  struct Slice : Block {
    INLINE int64_t bytes() const { return divide_up(chunks(), 2) * 64; }
  };
  Quantizer quantize;
  explicit MathInt8(const Call& call) : quantize(call.x, call.dtype, call.w.bits) {}

  float convert(char* to, int64_t row, const Slice& slice) const {
    memset(to + slice.bytes() - kChunk, 0, kChunk);
    return quantize(row, slice, [&](int64_t i, __m256i bytes) __attribute__((always_inline)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kChunk), bytes);
    }).step;
  }
  template <int BITS>
  static void decode_chunks(const Int8Book& book, const uint32_t* chunk, int64_t chunks, char* to) {
    for (; chunks; --chunks, chunk += BITS * kTileRows) {
      unroll<kChunkVectors>(FLUTE_UNROLLED(v) {
        _mm512_storeu_si512(to, weight_bytes<BITS, v.value>(book, chunk));
        to += 64;
      });
    }
  }
  static void decode(const Weights& w, int64_t tile, const Slice& slice, char* weights, int v) {
    const uint8_t* data = tile_data(w, tile);
    const Int8Book book = int8_book(tile_rows(w, tile).book, 0);
    const auto run = w.bits == 2 ? decode_chunks<2> : w.bits == 3 ? decode_chunks<3> : decode_chunks<4>;
    run(book, reinterpret_cast<const uint32_t*>(data) + slice.first_chunk() * w.bits * kTileRows, slice.chunks(), weights + v * kTileBytes);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(data + w.scale_offset) + slice.group * kTileRows;
    store(reinterpret_cast<float*>(weights + 2 * kTileBytes) + v * kTileRows, mul(load_scales(scales, w.scale_dtype), set1(book.step)));
  }
  template <int TOKENS>
  static void multiply(const char* weights, const char* x, int64_t bytes, const float* steps, int rows, float* sums, bool clear) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    multiply_steps<TOKENS>(weights, 16 * 64, kTileBytes, 64, x, bytes, rows, []() __attribute__((always_inline)) {
      tile_dpbssd<0, 4, 6>();
      tile_dpbssd<1, 4, 7>();
      if constexpr (TOKENS == 2) tile_dpbssd<2, 5, 6>();
      if constexpr (TOKENS == 2) tile_dpbssd<3, 5, 7>();
    });
    alignas(64) int32_t whole[2 * kAmxTokens][2][kTileRows];
    tile_store<0>(whole, sizeof(whole[0]));
    tile_store<1>(whole[0][1], sizeof(whole[0]));
    if constexpr (TOKENS == 2) tile_store<2>(whole[rows], sizeof(whole[0]));
    if constexpr (TOKENS == 2) tile_store<3>(whole[rows][1], sizeof(whole[0]));
    const float* scales = reinterpret_cast<const float*>(weights + 2 * kTileBytes);
    for (int v = 0; v < 2; ++v) {
      const F16 scale = load(scales + v * kTileRows);
      for (int m = 0; m < TOKENS * rows; ++m) {
        float* to = sums + m * kBlockRows + v * kTileRows;
        const F16 sum = _mm512_cvtepi32_ps(_mm512_load_si512(whole[m][v]));
        store(to, fma(sum, mul(scale, set1(steps[m])), clear ? zero() : load(to)));
      }
    }
  }
};
