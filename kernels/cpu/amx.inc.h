// The kernels of matrix tiles, for two tokens and more: decode a block of weights once, and multiply it with all tokens.
//
// A block is two tiles of rows by one slice of inputs. What vectors of a lane for each row hold, several inputs in a lane's
// four bytes, is what the instructions want of their second operand; the first are the tokens' inputs, 64 bytes of each.
// Two tiles of rows and two of tokens make four products at a time. Math says of what: MathBf16, MathBf16Sums or MathInt8.
// Every output is summed in the order of K whatever the threads, the other tokens or the other rows.
//
// Included inside a translation unit's own namespace, after amx_tile.inc.h and tile.inc.h.

static_assert(kTileVectors == 2, "a block of weights is two tiles of rows");
constexpr int kAmxTokens = 16;  // rows of a tile
constexpr int kBlockRows = 2 * kTileRows;

// Inputs of all tokens, slice after slice, as tiles: [slice][tile of tokens][64 bytes of inputs][token of the tile][64], and then
// the steps, [slice][token]. A tile is 1 KB in a row: out of the second-level cache it is loaded faster than rows far apart.
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
        char* row = to + m / rows * rows * slice.bytes() + m % rows * 64;
        if (m < tokens) {
          *step = math.convert(row, rows * 64, (m0 + m) * w.k, slice);
        } else {
          for (int64_t i = 0; i < slice.bytes(); i += 64) memset(row + i * rows, 0, 64);
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
            const auto multiply = end - m > rows ? &Math::template multiply<2> : &Math::template multiply<1>;
            (math.*multiply)(weights, from + m * slice.bytes(), slice.bytes(), step + m, rows, to, clear);
          }
        }
      }
      tile_release();
      // A token's rows of weights together: whole cache lines of y, whose rows may share the sets of the caches.
      const int64_t first = first_block * 2, last = last_block * 2 < w.tiles ? last_block * 2 : w.tiles;
      for (int64_t m = begin; m < end && m < tokens; ++m) {
        for (int64_t tile = first; tile < last; ++tile) {
          const TileRows to = tile_rows(w, tile);
          const float* sum = sums + ((tile - first) / 2 * part_tokens + m - begin) * kBlockRows + tile % 2 * kTileRows;
          const F16 bias = call.bias ? load_lanes(call.bias, to.first, to.count, call.dtype) : zero();
          store_lanes(call.y, (m0 + m) * w.n + to.first, to.count, call.dtype, add(load(sum), bias));
        }
      }
    });
  }
}

// Four products, or two for one tile of tokens, of `bytes` bytes of each token's inputs, 64 a step; the second tile of tokens is
// x_next after the first. `next` is the distance of weights' steps, `between` that of the two tiles' weights, `row` that of their
// rows.
template <int TOKENS, class Product>
INLINE void multiply_steps(const char* weights, int64_t next, int64_t between, int64_t row, const char* x, int64_t x_next, int64_t bytes, int rows, const Product& product) {
  for (int64_t i = 0; i < bytes; i += 64, weights += next, x += 64 * rows) {
    tile_load<6>(weights, row);
    tile_load<7>(weights + between, row);
    tile_load<4>(x, 64);
    if constexpr (TOKENS == 2) tile_load<5>(x + x_next, 64);
    product();
  }
}

// The sums of two tiles of weights, side by side in rows of kBlockRows, of one or two tiles of tokens.
constexpr int64_t kSumsRow = kBlockRows * int64_t(sizeof(float));
INLINE void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
template <int TOKENS, class T>
INLINE void load_sums(const T* sums, int rows) {
  tile_load<0>(sums, kSumsRow);
  tile_load<1>(sums + kTileRows, kSumsRow);
  if constexpr (TOKENS == 2) tile_load<2>(sums + rows * kBlockRows, kSumsRow);
  if constexpr (TOKENS == 2) tile_load<3>(sums + rows * kBlockRows + kTileRows, kSumsRow);
}
template <int TOKENS, class T>
INLINE void store_sums(T* sums, int rows) {
  tile_store<0>(sums, kSumsRow);
  tile_store<1>(sums + kTileRows, kSumsRow);
  if constexpr (TOKENS == 2) tile_store<2>(sums + rows * kBlockRows, kSumsRow);
  if constexpr (TOKENS == 2) tile_store<3>(sums + rows * kBlockRows + kTileRows, kSumsRow);
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

  float convert(char* to, int64_t next, int64_t row, const Slice& slice) const {
    const uint16_t* from = x + row + slice.begin;
    for (int64_t left = slice.inputs; left > 0; left -= kChunk, from += kChunk, to += next) {
      _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(left < kChunk ? (1u << left) - 1 : ~0u, from));  // the padded weights have values
    }
    return 1;
  }
  INLINE static void put(float* to, int, F16 even, F16 odd) { _mm512_storeu_si512(to, round_pairs(even, odd)); }
  static void decode(const Weights& w, int64_t tile, const Slice& slice, char* weights, int v) {
    const auto run = w.bits == 2 ? flute::decode<MathBf16, 2> : w.bits == 3 ? flute::decode<MathBf16, 3> : flute::decode<MathBf16, 4>;
    run(w, tile_data(w, tile), tile_rows(w, tile).book, slice.begin / kChunk, slice.inputs, reinterpret_cast<float*>(weights) + v * kTileRows);
  }
  // Rows of both tiles' weights alternate.
  template <int TOKENS>
  INLINE static void multiply_slice(const char* weights, const char* x, int64_t x_next, int64_t bytes, int rows) {
    multiply_steps<TOKENS>(weights, kAmxTokens * kSumsRow, kSumsRow / 2, kSumsRow, x, x_next, bytes, rows, []() __attribute__((always_inline)) {
      tile_dpbf16<0, 4, 6>();
      tile_dpbf16<1, 4, 7>();
      if constexpr (TOKENS == 2) tile_dpbf16<2, 5, 6>();
      if constexpr (TOKENS == 2) tile_dpbf16<3, 5, 7>();
    });
  }
  template <int TOKENS>
  void multiply(const char* weights, const char* x, int64_t bytes, const float*, int rows, float* sums, bool clear) const {
    if (clear) zero_sums();
    else load_sums<TOKENS>(sums, rows);
    multiply_slice<TOKENS>(weights, x, bytes * rows, bytes, rows);
    store_sums<TOKENS>(sums, rows);
  }
};

// bf16, fewer tokens: weights are the codebook's values, which take a third of the instructions to decode, and the sums of
// a group, or of a slice that is less, are multiplied by its scales, which costs the more the more tokens there are.
struct MathBf16Sums : MathBf16 {
  static constexpr int64_t kWeightBytes = MathBf16::kWeightBytes + kDepth / kChunk * kSumsRow;  // and scales
  int bits;
  int64_t group_chunks;
  explicit MathBf16Sums(const Call& call) : MathBf16(call), bits(call.w.bits), group_chunks(chunks_of_group(call.w)) {}

  // Groups are whole slices, or slices whole groups.
  static bool takes(const Weights& w) {
    return w.groups == 1 || w.group_size % kDepth == 0 || (w.group_size % kChunk == 0 && kDepth % w.group_size == 0);
  }
  // Of those in a slice.
  static int64_t chunks_of_group(const Weights& w) {
    return w.groups == 1 || w.group_size > kDepth ? kDepth / kChunk : w.group_size / kChunk;
  }

  float convert(char* to, int64_t next, int64_t row, const Slice& slice) const {
    BookPairs::arrange(reinterpret_cast<uint16_t*>(to), next / 2, x + row + slice.begin, slice.inputs, bits);
    return 1;
  }
  template <int BITS>
  static void decode_chunks(const float* book, const uint32_t* chunk, int64_t chunks, char* to) {
    const auto table = BookPairs::load_table<BITS>(book);
    for (; chunks; --chunks, chunk += BITS * kTileRows) {
      unroll<BITS>(FLUTE_UNROLLED(j) { prefetch_codes(chunk + j.value * kTileRows); });
      const Words<BITS> words = load_chunk<BITS>(chunk);
      unroll<kPairs>(FLUTE_UNROLLED(i) {
        _mm512_storeu_si512(to, (__m512i)BookPairs::weight<BITS, i.value>(table, words));
        to += kSumsRow;
      });
    }
  }
  static void decode(const Weights& w, int64_t tile, const Slice& slice, char* weights, int v) {
    const uint8_t* data = tile_data(w, tile);
    const int64_t first = slice.begin / kChunk, chunks = slice.bytes() / 64, group_chunks = chunks_of_group(w);
    const auto run = w.bits == 2 ? decode_chunks<2> : w.bits == 3 ? decode_chunks<3> : decode_chunks<4>;
    run(tile_rows(w, tile).book, reinterpret_cast<const uint32_t*>(data) + first * w.bits * kTileRows, chunks, weights + v * 64);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(data + w.scale_offset);
    char* to = weights + MathBf16::kWeightBytes + v * 64;
    for (int64_t chunk = 0; chunk < chunks; chunk += group_chunks, to += kSumsRow) {
      const int64_t group = w.groups == 1 ? 0 : (first + chunk) * kChunk / w.group_size;
      store(reinterpret_cast<float*>(to), load_scales(scales + group * kTileRows, w.scale_dtype));
    }
  }
  template <int TOKENS>
  void multiply(const char* weights, const char* x, int64_t bytes, const float*, int rows, float* sums, bool clear) const {
    const float* scales = reinterpret_cast<const float*>(weights + MathBf16::kWeightBytes);
    for (int64_t at = 0; at < bytes; at += group_chunks * 64, scales += kBlockRows, clear = false) {
      const int64_t now = bytes - at < group_chunks * 64 ? bytes - at : group_chunks * 64;
      zero_sums();
      multiply_slice<TOKENS>(weights + at / 64 * kAmxTokens * kSumsRow, x + at * rows, bytes * rows, now, rows);
      alignas(64) float part[2 * kAmxTokens][2][kTileRows];
      store_sums<TOKENS>(part[0][0], rows);
      const F16 scale[2] = {load(scales), load(scales + kTileRows)};
      for (int m = 0; m < TOKENS * rows; ++m) {
        for (int v = 0; v < 2; ++v) {
          float* to = sums + m * kBlockRows + v * kTileRows;
          store(to, fma(load(part[m][v]), scale[v], clear ? zero() : load(to)));
        }
      }
    }
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

  float convert(char* to, int64_t next, int64_t row, const Slice& slice) const {
    memset(to + (slice.bytes() / 64 - 1) * next + kChunk, 0, kChunk);
    return quantize(row, slice, [&](int64_t i, __m256i bytes) __attribute__((always_inline)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2 * next + i % 2 * kChunk), bytes);
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
  void multiply(const char* weights, const char* x, int64_t bytes, const float* steps, int rows, float* sums, bool clear) const {
    zero_sums();
    multiply_steps<TOKENS>(weights, 16 * 64, kTileBytes, 64, x, bytes * rows, bytes, rows, []() __attribute__((always_inline)) {
      tile_dpbssd<0, 4, 6>();
      tile_dpbssd<1, 4, 7>();
      if constexpr (TOKENS == 2) tile_dpbssd<2, 5, 6>();
      if constexpr (TOKENS == 2) tile_dpbssd<3, 5, 7>();
    });
    alignas(64) int32_t whole[2 * kAmxTokens][2][kTileRows];
    store_sums<TOKENS>(whole[0][0], rows);
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
