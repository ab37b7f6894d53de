// C2, the vector-LUT kernel (arXiv 2512.06443), for any codebook and group scale.
//
// For kPlan::kWeights inputs at a time, a table holds the sum that every combination of their codes gives, for a tile of
// tokens at once: a row of the table is one 16-bit value a token. A weight row then costs one table row added for each
// combination, whatever its bits and its codebook:
//
//   tables     of one chunk of inputs are alive at a time and are used for a block of weight rows (kBlockRows), which
//              is what keeps them in the first two levels of cache;
//   inputs     are transposed to [K][tokens] once a call, divided by the unit below;
//   sums       are 16-bit within a block of inputs (a group, or 128 of a longer one), then fp32, times unit and scale.
//
// The unit of a token's block is what makes 16 bits enough. With S = sum |x_k| over the block and C the largest
// magnitude of the codebook, unit = S * C / (32766 - B / 2) for a block of B inputs. A table value is a sum of products
// rounded one by one, |round(x_k c / unit)| <= |x_k| C / unit + 1/2, so no partial sum over the block exceeds
// 32766 - B / 2 + B / 2 = 32766: nothing can wrap. The error of a block is at most B / 2 units times the scale.
//
// Included inside a translation unit's own namespace, after decode.inc.h and a file with Lanes of tokens.

// The longest block of 16-bit sums: four chunks, or eight of trits. The error grows with it: 0.1% of a result's standard
// deviation for blocks of 64 inputs, 0.25% for 128 (normal inputs and weights, 4 bits; rounding inputs to bf16: 0.17%).
constexpr int64_t kBlockInputs = 160;
constexpr int64_t kBlockRows = 2048;  // weight rows that share tables: sums of 2048 rows by 32 tokens are 384 KB

// How codes become indices of tables. A chunk of a weight row has kPairs pairs of lookups: one in the low and one in the
// high half of a 32-bit word. input(s, h, j) is the j-th input of the chunk in half h of pair s.
template <int BITS, bool TERNARY, int WEIGHTS>
struct Plan {
  static constexpr int kInputs = kChunk, kVectors = BITS;  // of a chunk
  static constexpr int kWeights = WEIGHTS, kCodes = TERNARY ? 3 : 1 << BITS, kPairs = kChunk / WEIGHTS / 2;
  static constexpr int kEntries = WEIGHTS == 1 ? kCodes : WEIGHTS == 2 ? kCodes * kCodes : kCodes * kCodes * kCodes * kCodes;
  static constexpr int kIndexBits = BITS * WEIGHTS, kPerHalf = 16 / kIndexBits;

  static constexpr int input(int s, int h, int j) {
    if (BITS != 3) return (s / kPerHalf * 2 * kPerHalf + h * kPerHalf + s % kPerHalf) * WEIGHTS + j;
    // A half of a word has five codes: two pairs, and one that pairs with the other half's; then codes 30 and 31.
    if (s < 6) return s / 2 * 10 + h * 5 + s % 2 * 2 + j;
    const int word = (s - 6) * 2 + h;
    return word < 3 ? word * 10 + 4 + 5 * j : 30 + j;
  }

  // A chunk's words; of ternary ones the bits become indices, base 3 within a nibble and then within a byte.
  INLINE static Words<BITS> load(const uint32_t* codes) {
    Words<BITS> w = load_chunk<BITS>(codes);
    if constexpr (TERNARY) {
      unroll<2>(FLUTE_UNROLLED(j) {
        I16& v = w.word[j.value];
        const I16 odd = and_mask(shift_right<2>(v), 0x33333333);
        v = add_words(add_words(and_mask(v, 0x33333333), odd), shift_left<1>(odd));
        if constexpr (WEIGHTS == 4) {
          const I16 high = and_mask(shift_right<4>(v), 0x0f0f0f0f);
          v = add_words(add_words(and_mask(v, 0x0f0f0f0f), high), shift_left<3>(high));
        }
      });
    }
    return w;
  }

  // The indices of pair S for 16 weight rows, times 2^SHIFT.
  template <int S, int SHIFT>
  INLINE static I16 index(const Words<BITS>& w) {
    constexpr int bits = kIndexBits;
    if constexpr (BITS == 3 && S >= 6) return or_words(last<(S - 6) * 2, SHIFT>(w), shift_left<16>(last<(S - 6) * 2 + 1, SHIFT>(w)));
    else if constexpr (BITS == 3) return field<S % 2 * 6, bits, SHIFT>(w.word[S / 2]);
    else return field<S % kPerHalf * bits, bits, SHIFT>(w.word[S / kPerHalf]);
  }

 private:
  // `COUNT` bits of each half from bit AT on, times 2^SHIFT.
  template <int AT, int COUNT, int SHIFT>
  INLINE static I16 field(I16 v) {
    constexpr uint32_t mask = ((1u << COUNT) - 1) << SHIFT;
    if constexpr (AT >= SHIFT) return and_mask(shift_right<AT - SHIFT>(v), mask | mask << 16);
    else return and_mask(shift_left<SHIFT - AT>(v), mask | mask << 16);
  }
  // The odd codes of the two halves of word W; of word 3 codes 30 and 31. Index in the low half, the high half is zero.
  template <int W, int SHIFT>
  INLINE static I16 last(const Words<BITS>& w) {
    constexpr int low = W < 3 ? 12 : 0, high = W < 3 ? 28 : 16;
    return or_words(and_mask(move<low - SHIFT>(w.word[W]), 7 << SHIFT), and_mask(move<high - SHIFT - 3>(w.word[W]), 56 << SHIFT));
  }
  template <int RIGHT>
  INLINE static I16 move(I16 v) {
    if constexpr (RIGHT >= 0) return shift_right<RIGHT>(v);
    else return shift_left<-RIGHT>(v);
  }
};

#ifdef __AVX2__  // the products of gemv_trit.inc.h
// TRIT20: five codes are the upper half of a product with 3^5, the other five that of what the first has left.
struct TritPlan {
  static constexpr int kInputs = kTritChunk, kVectors = 1, kWeights = 5, kCodes = 3, kPairs = 2, kEntries = 243;
  static constexpr int input(int s, int h, int j) { return 10 * s + 2 * (4 - j) + h; }
  struct Indices {
    I16 pair[2];
  };
  INLINE static Indices load(const uint32_t* codes) {
    const I16 fraction = load_words(codes);
    return {{multiply_high(fraction, kEntries), multiply_high(multiply_low(fraction, kEntries), kEntries)}};
  }
  template <int S, int SHIFT>
  INLINE static I16 index(const Indices& indices) {
    return shift_left<SHIFT>(indices.pair[S]);
  }
};
#endif

// Where 16-bit sums end: groups of up to that are blocks, longer ones are cut.
struct Blocks {
  int64_t group_chunks, chunks, per_group, inputs, count;  // chunks and inputs are those of the longest block
  explicit Blocks(const Weights& w) {
    group_chunks = w.groups == 1 ? w.chunks : w.group_size / w.chunk_inputs;
    chunks = w.trits ? 8 : 4;
    per_group = divide_up(group_chunks, chunks);
    inputs = (per_group > 1 ? chunks : group_chunks) * w.chunk_inputs;
    count = per_group * w.groups;
  }
  float limit() const { return float(32766 - inputs / 2); }
  int64_t block(int64_t chunk) const { return chunk / group_chunks * per_group + chunk % group_chunks / chunks; }
  bool begins(int64_t chunk) const { return chunk % group_chunks % chunks == 0; }
};

// Inputs of `count` tokens from row m0 on, for Lanes of tokens: x[chunks][inputs][tokens] divided by the units without the
// codebook's magnitude, units[block][tokens]. Tokens beyond `count` are zero.
template <class Lanes>
void vlut_inputs(const Call& call, const Blocks& blocks, int64_t m0, int64_t count, int64_t block, float* x, float* units) {
  constexpr int T = Lanes::kTokens;
  const int64_t before = block % blocks.per_group * blocks.chunks, rest = blocks.group_chunks - before;
  const int64_t first = (block / blocks.per_group * blocks.group_chunks + before) * call.w.chunk_inputs;
  const int64_t inputs = (rest < blocks.chunks ? rest : blocks.chunks) * call.w.chunk_inputs;
  float rows[T][kBlockInputs], inverse[T];
  for (int t = 0; t < T; ++t) {
    F16 sum = zero();
    for (int64_t i = 0; i < inputs; i += 16) {
      const int64_t k = first + i, left = call.w.k - k;
      const F16 v = t < count && left > 0 ? load_lanes(call.x, (m0 + t) * call.w.k + k, left < 16 ? int(left) : 16, call.dtype) : zero();
      sum = add(sum, absolute(v));
      store(&rows[t][i], v);
    }
    float lanes[16], total = 0;
    store(lanes, sum);
    for (int i = 0; i < 16; ++i) total += lanes[i];
    units[block * T + t] = total / blocks.limit();
    // What is too small to divide by counts as zero; NaN and infinity reach the result through the unit.
    inverse[t] = total > 0x1p-100f ? blocks.limit() / total : 0;
  }
  for (int64_t i = 0; i < inputs; ++i) {
    for (int t = 0; t < T; ++t) x[(first + i) * T + t] = rows[t][i] * inverse[t];
  }
}

// The tables of one chunk: 2 kPairs of kEntries rows, from its inputs of all tokens and the codebook over its magnitude.
template <class P, class Lanes>
void vlut_tables(const float* x, const float* book, int16_t* tables) {
  constexpr int T = Lanes::kTokens, C = P::kCodes, W = P::kWeights;
  using Reg = typename Lanes::Reg;
  unroll<2 * P::kPairs>(FLUTE_UNROLLED(p) {
    int16_t* to = tables + p.value * P::kEntries * T;
    Reg product[W][C];
    unroll<W>(FLUTE_UNROLLED(j) {
      const float* input = x + P::input(p.value / 2, p.value % 2, j.value) * T;
      unroll<C>(FLUTE_UNROLLED(c) { product[j.value][c.value] = Lanes::products(input, book[c.value]); });
    });
    if constexpr (W == 1) {
      for (int c = 0; c < C; ++c) Lanes::store(to + c * T, product[0][c]);
    } else {
      for (int high = 0; high < P::kEntries / (C * C); ++high) {
        for (int b = 0; b < C; ++b) {
          Reg rest = product[1][b];
          if constexpr (W >= 4) rest = Lanes::add(rest, Lanes::add(product[2][high % C], product[3][high / C % C]));
          if constexpr (W == 5) rest = Lanes::add(rest, product[4][high / (C * C)]);
          for (int a = 0; a < C; ++a, to += T) Lanes::store(to, Lanes::add(product[0][a], rest));
        }
      }
    }
  });
}

// Bytes of the tables of one chunk, and how many chunks have theirs at once.
template <class P, class Lanes>
constexpr int64_t vlut_table_bytes() {
  return int64_t(2 * P::kPairs * P::kEntries) * Lanes::kTokens * int64_t(sizeof(int16_t));
}
template <class P, class Lanes>
constexpr int64_t vlut_slice() {
  // Measured. Wide rows suffer less from the second level of cache; tables of five codes are in it anyway, and their chunks
  // have too few lookups for a load and a store of the sums each.
  const int64_t limit = P::kWeights == 5 ? Lanes::kTokens * 8000 : Lanes::kTokens == 32 ? 96 << 10 : 48 << 10;
  int64_t chunks = 1;
  while (2 * chunks * vlut_table_bytes<P, Lanes>() <= limit && 2 * chunks * P::kInputs <= kBlockInputs) chunks *= 2;
  return chunks;
}

// Adds a slice of CHUNKS chunks of one tile of 16 weight rows: sums16[16][T] within a block, then sums[16][T].
template <class P, class Lanes, int CHUNKS>
void vlut_tile(const uint32_t* codes, const int16_t* tables, const float* unit, const float* scales, bool begins, bool ends, bool clear,
               int16_t* sums16, float* sums) {
  constexpr int T = Lanes::kTokens, kShift = T == 32 ? 6 : T == 16 ? 5 : 4;
  static_assert(T * sizeof(int16_t) == 1 << kShift && P::kEntries << kShift <= 1 << 16, "offsets are 16 bits, in bytes");
  // Loads are what limits the loop below, so four offsets share one: two pairs of a row beside each other. Interleaving
  // leaves, of every four rows, the first two in one vector and the others in the next.
  constexpr int kQuads = P::kPairs / 2;
  alignas(64) uint64_t offsets[CHUNKS][kQuads][2][kTileRows / 2];
  unroll<CHUNKS>(FLUTE_UNROLLED(i) {
    const auto words = P::load(codes + i.value * P::kVectors * kTileRows);
    unroll<kQuads>(FLUTE_UNROLLED(q) {
      const I16 even = P::template index<2 * q.value, kShift>(words), odd = P::template index<2 * q.value + 1, kShift>(words);
      store_words(offsets[i.value][q.value][0], interleave_low(even, odd));
      store_words(offsets[i.value][q.value][1], interleave_high(even, odd));
    });
  });
  const char* table = reinterpret_cast<const char*>(tables);
  for (int r = 0; r < kTileRows; ++r) {
    typename Lanes::Reg sum = begins ? Lanes::zero() : Lanes::load(sums16 + r * T), other = Lanes::zero();
    const uint64_t* row = &offsets[0][0][r % 4 / 2][r / 4 * 2 + r % 2];
    unroll<CHUNKS>(FLUTE_UNROLLED(i) {
      unroll<kQuads>(FLUTE_UNROLLED(q) {
        constexpr int quad = i.value * kQuads + q.value;
        const char* at = table + (quad * 4 * P::kEntries << kShift);
        const uint64_t four = row[quad * kTileRows];
        const auto value = [&](int j, uint16_t offset) __attribute__((always_inline)) {
          return Lanes::load(reinterpret_cast<const int16_t*>(at + (j * P::kEntries << kShift) + offset));
        };
        sum = Lanes::add(sum, value(0, uint16_t(four)));
        other = Lanes::add(other, value(1, uint16_t(four >> 16)));
        sum = Lanes::add(sum, value(2, uint16_t(four >> 32)));
        other = Lanes::add(other, value(3, uint16_t(four >> 48)));
      });
    });
    sum = Lanes::add(sum, other);
    if (ends) Lanes::flush(sum, unit, scales[r], sums + r * T, clear);
    else Lanes::store(sums16 + r * T, sum);
  }
}

// Weight rows of tiles [begin, end), which share a codebook, for one tile of tokens. work: sums and tables.
template <class P, class Lanes>
void vlut_rows(const Call& call, const Blocks& blocks, int64_t begin, int64_t end, const float* x, const float* units, int64_t m0, int64_t count, float* work) {
  constexpr int T = Lanes::kTokens;
  const Weights& w = call.w;
  float* sums = work;
  int16_t* sums16 = reinterpret_cast<int16_t*>(sums + (end - begin) * kTileRows * T);
  int16_t* tables = sums16 + (end - begin) * kTileRows * T;
  const float* codebook = tile_rows(w, begin).book;
  float magnitude = 0, book[16];
  for (int c = 0; c < P::kCodes; ++c) magnitude = __builtin_fabsf(codebook[c]) > magnitude ? __builtin_fabsf(codebook[c]) : magnitude;
  for (int c = 0; c < P::kCodes; ++c) book[c] = magnitude > 0 ? codebook[c] / magnitude : 0;
  for (int64_t chunk = 0, chunks; chunk < w.chunks; chunk += chunks) {
    const bool begins = blocks.begins(chunk);
    for (chunks = 1; chunks < vlut_slice<P, Lanes>() && chunk + chunks < w.chunks && !blocks.begins(chunk + chunks); ++chunks) continue;
    if (chunks < vlut_slice<P, Lanes>()) chunks = 1;
    for (int64_t i = 0; i < chunks; ++i) {
      vlut_tables<P, Lanes>(x + (chunk + i) * P::kInputs * T, book, tables + i * 2 * P::kPairs * P::kEntries * T);
    }
    const bool ends = blocks.begins(chunk + chunks) || chunk + chunks == w.chunks;
    const auto run = chunks == 1 ? vlut_tile<P, Lanes, 1> : vlut_tile<P, Lanes, vlut_slice<P, Lanes>()>;
    const int64_t group = chunk / blocks.group_chunks, block = blocks.block(chunk);
    for (int64_t tile = begin; tile < end; ++tile) {
      const uint32_t* codes = reinterpret_cast<const uint32_t*>(tile_data(w, tile)) + chunk * P::kVectors * kTileRows;
      // The next slice of this tile is wanted after all the other tiles.
      for (int64_t j = 0; j < chunks * P::kVectors; ++j) __builtin_prefetch(codes + (chunks * P::kVectors + j) * kTileRows, 0, 2);
      alignas(64) float scales[kTileRows];
      if (ends) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(tile_data(w, tile) + w.scale_offset) + group * kTileRows;
        store(scales, mul(load_scales(from, w.scale_dtype), set1(magnitude)));
      }
      const int64_t row = (tile - begin) * kTileRows;
      run(codes, tables, units + block * T, scales, begins, ends, block == 0, sums16 + row * T, sums + row * T);
    }
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    const TileRows rows = tile_rows(w, tile);
    const F16 bias = call.bias ? load_lanes(call.bias, rows.first, rows.count, call.dtype) : zero();
    const float* from = sums + (tile - begin) * kTileRows * T;
    for (int64_t t = 0; t < count; ++t) {
      alignas(64) float y[kTileRows];
      for (int r = 0; r < kTileRows; ++r) y[r] = from[r * T + t];
      store_lanes(call.y, (m0 + t) * w.n + rows.first, rows.count, call.dtype, add(load(y), bias));
    }
  }
}

// Tables of more weights a lookup cost more to make and less to use: which pays is a matter of rows.
template <class Lanes, class Few, class Many>
void vlut_choose(const Call& call, const Blocks& blocks, int64_t begin, int64_t end, const float* x, const float* units, int64_t m0, int64_t count) {
  const bool many = (end - begin) * kTileRows >= 4 * Many::kEntries;
  const size_t sums = size_t(end - begin) * kTileRows * Lanes::kTokens * (sizeof(float) + sizeof(int16_t));
  float* work = static_cast<float*>(scratch(kWorker, sums + size_t(many ? vlut_slice<Many, Lanes>() * vlut_table_bytes<Many, Lanes>() : vlut_slice<Few, Lanes>() * vlut_table_bytes<Few, Lanes>())));
  const auto rows = many ? vlut_rows<Many, Lanes> : vlut_rows<Few, Lanes>;
  rows(call, blocks, begin, end, x, units, m0, count, work);
}

// Tokens [m0, m0 + tokens) in tiles of Lanes::kTokens.
template <class Lanes>
void vlut_tokens(const Call& call, int64_t m0, int64_t tokens) {
  constexpr int T = Lanes::kTokens;
  const Weights& w = call.w;
  const Blocks blocks(w);
  const int64_t tiles = divide_up(tokens, T), inputs = w.chunks * w.chunk_inputs * T, per_tile = inputs + blocks.count * T;
  float* prepared = static_cast<float*>(scratch(kInput, size_t(tiles * per_tile) * sizeof(float)));
  for_each(call.parallel, tiles * blocks.count, divide_up(tokens * w.k, 1 << 14), [&](int64_t i) {
    const int64_t tile = i / blocks.count, at = m0 + tile * T, count = m0 + tokens - at < T ? m0 + tokens - at : T;
    float* x = prepared + tile * per_tile;
    vlut_inputs<Lanes>(call, blocks, at, count, i % blocks.count, x, x + inputs);
  });
  const int64_t cut = divide_up(w.tiles, kBlockRows / kTileRows), wanted = divide_up(call.parallel.threads, tiles);
  const int64_t parts = cut > wanted ? cut : wanted, part = divide_up(w.tiles, parts);
  for_each(call.parallel, divide_up(w.tiles, part) * tiles, call.parallel.threads, [&](int64_t i) {
    const int64_t tile = i % tiles, at = m0 + tile * T, count = m0 + tokens - at < T ? m0 + tokens - at : T;
    const float* x = prepared + tile * per_tile;
    const int64_t last = (i / tiles + 1) * part < w.tiles ? (i / tiles + 1) * part : w.tiles;
    for (int64_t begin = i / tiles * part, end; begin < last; begin = end) {
      const float* book = tile_rows(w, begin).book;
      for (end = begin + 1; end < last && memcmp(tile_rows(w, end).book, book, kBookBytes) == 0;) ++end;
      auto run = w.ternary           ? vlut_choose<Lanes, Plan<2, true, 2>, Plan<2, true, 4>>
                       : w.bits == 2 ? vlut_choose<Lanes, Plan<2, false, 2>, Plan<2, false, 4>>
                       : w.bits == 3 ? vlut_choose<Lanes, Plan<3, false, 2>, Plan<3, false, 2>>
                                     : vlut_choose<Lanes, Plan<4, false, 1>, Plan<4, false, 2>>;
#ifdef __AVX2__
      if (w.trits) run = vlut_choose<Lanes, TritPlan, TritPlan>;
#endif
      run(call, blocks, begin, end, x, x + inputs, at, count);
    }
  });
}

// Tokens whose inputs are prepared at a time: up to 512, fewer where they would pass 16 MB.
int64_t vlut_limit(const Weights& w) {
  const int64_t fit = (int64_t(16) << 20) / (w.chunks * w.chunk_inputs * int64_t(sizeof(float))) / kMaxLanes * kMaxLanes;
  return fit > 512 ? 512 : fit < kMaxLanes ? kMaxLanes : fit;
}

int64_t vlut_passes(const Weights& w, int64_t m) { return divide_up(m, kMaxLanes) * (w.n > 0); }

void vlut_run(const Call& call) {
  const int64_t limit = vlut_limit(call.w);
  for (int64_t m0 = 0; m0 < call.m; m0 += limit) {
    const int64_t tokens = call.m - m0 < limit ? call.m - m0 : limit, rest = tokens % kMaxLanes, whole = rest * 2 > kMaxLanes ? tokens : tokens - rest;
    if (whole) vlut_tokens<LanesMax>(call, m0, whole);
    if (whole == tokens) continue;
    if (kMaxLanes > 16 && rest > 8) vlut_tokens<Lanes16>(call, m0 + whole, rest);
    else vlut_tokens<Lanes8>(call, m0 + whole, rest);
  }
}

const char* vlut_refuses(const Weights& w, Dtype) {
  return groups_of_chunks(w) ? nullptr : "group sizes that are not a multiple of 32";
}
