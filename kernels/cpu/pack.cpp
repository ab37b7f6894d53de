// The packed layouts: what a header means, and the way between the checkpoint's order and tiles.
#include <algorithm>
#include <string>

#include "header.h"

namespace flute {

namespace {

// 32 codes of a row as three words, between the stream's order and the tile's (see flute.h). Five codes are
// 15 bits in both, so the stream is cut in six such pieces and the last two codes.
void stream_to_tile3(const uint32_t in[3], uint32_t out[3]) {
  const uint64_t low = in[0] | uint64_t(in[1]) << 32, high = in[1] >> 13 | uint64_t(in[2]) << 19;  // from bit 45
  const uint32_t last = in[2] >> 26;
  for (int j = 0; j < 3; ++j) {
    uint32_t half[2];
    for (int h = 0; h < 2; ++h) {
      const int q = 2 * j + h;
      half[h] = uint32_t(q < 3 ? low >> 15 * q : high >> 15 * (q - 3)) & 0x7fff;
      half[h] |= (last >> (3 * h + j) & 1) << 15;
    }
    out[j] = half[0] | half[1] << 16;
  }
}

void tile3_to_stream(const uint32_t in[3], uint32_t out[3]) {
  uint64_t low = 0, high = 0;  // bits 0-44 and 45-95
  for (int q = 0; q < 6; ++q) {
    const uint32_t half = in[q / 2] >> 16 * (q % 2);
    (q < 3 ? low : high) |= uint64_t(half & 0x7fff) << 15 * (q % 3);
    high |= uint64_t(half >> 15 & 1) << (45 + 3 * (q % 2) + q / 2);
  }
  out[0] = uint32_t(low);
  out[1] = uint32_t(low >> 32 | high << 13);
  out[2] = uint32_t(high >> 19);
}

// Two digits of each half of a word from four codes, at 0 and 16: the codes' even ones and their odd ones. Code 3 is 2.
struct TritTable {
  uint32_t of[256];
  constexpr TritTable() : of() {
    for (int byte = 0; byte < 256; ++byte) {
      uint32_t digit[4] = {};
      for (int i = 0; i < 4; ++i) digit[i] = (byte >> 2 * i & 3) == 3 ? 2 : byte >> 2 * i & 3;
      of[byte] = digit[0] * 3 + digit[2] + ((digit[1] * 3 + digit[3]) << 16);
    }
  }
};
constexpr TritTable kTrits;
constexpr int kTritBytes = kTritChunk / 4;

uint32_t stream_to_trits(const uint8_t in[kTritBytes]) {
  uint32_t v = 0;
  for (int i = 0; i < kTritBytes; ++i) v = v * 9 + kTrits.of[in[i]];  // both numbers at a time: 3^10 < 2^16
  const auto fraction = [](uint64_t number) { return uint32_t((number << 16) + 59048) / 59049; };
  return fraction(v & 0xffff) | fraction(v >> 16) << 16;
}

void trits_to_stream(uint32_t in, uint8_t out[kTritBytes]) {
  uint64_t v = (in & 0xffff) | uint64_t(in >> 16) << 32, codes = 0;
  for (int i = 0; i < kTritChunk / 2; ++i) {
    v *= 3;
    codes |= ((v >> 16 & 3) | (v >> 46 & 12)) << 4 * i;
    v &= 0xffff0000ffff;
  }
  memcpy(out, &codes, kTritBytes);
}

}  // namespace

Weights parse_header(const int64_t* header, int64_t length) {
  const HeaderFields f = read_fields(header, length, kTile16, kTrit20, "the CPU kernels read layouts 1 (tile16), 2 (ternary16) and 3 (trit20)");
  Weights w{};
  w.bits = f.bits;
  w.trits = f.layout == kTrit20;
  w.ternary = w.trits || f.layout == kTernary16;
  if (w.ternary && w.bits != 2) refuse_header("a layout of ternary weights with " + std::to_string(w.bits) + " bits, expected 2");
  w.group_size = f.group_size;
  w.k = f.k;
  w.n = f.n;
  w.groups = f.groups;
  if (w.trits && w.groups != 1) refuse_header("layout trit20 with " + std::to_string(w.groups) + " scales a row, expected 1");
  w.scale_dtype = f.scale_dtype;
  w.shards = f.shards;
  w.n_shards = f.n_shards;
  for (int64_t s = 0; s < w.n_shards; ++s) w.tiles += divide_up(w.shards[s], kTileRows);
  w.chunk_inputs = w.trits ? kTritChunk : kChunk;
  w.chunks = divide_up(w.k, w.chunk_inputs);
  w.scale_offset = w.chunks * (w.trits ? 1 : w.bits) * 64;
  w.tile_bytes = w.scale_offset + divide_up(w.groups * kTileRows * 2, 64) * 64;
  w.bytes = w.n_shards * kBookBytes + w.tiles * w.tile_bytes;
  return w;
}

TileRows tile_rows(const Weights& w, int64_t tile) {
  int64_t first = 0, shard = 0;
  for (;; ++shard) {
    const int64_t rows = w.shards[shard], tiles = divide_up(rows, kTileRows);
    if (tile < tiles) {
      const int64_t count = std::min<int64_t>(kTileRows, rows - tile * kTileRows);
      return {first + tile * kTileRows, int(count), reinterpret_cast<const float*>(w.packed + shard * kBookBytes)};
    }
    tile -= tiles;
    first += rows;
  }
}

void pack(const Weights& weights, const uint8_t* qweight, const uint16_t* scales, const float* books, uint8_t* packed, const Parallel& parallel) {
  Weights w = weights;
  w.packed = packed;
  const int size = 1 << w.bits;
  float* out_books = reinterpret_cast<float*>(packed);
  for (int64_t i = 0; i < w.n_shards * 16; ++i) out_books[i] = books[i / 16 * size + i % size];
  const int64_t row_bytes = w.k * w.bits / 8, chunk_bytes = w.chunk_inputs * w.bits / 8;
  for_each(parallel, w.tiles, parallel.threads, [&](int64_t tile) {
    const TileRows rows = tile_rows(w, tile);
    uint8_t* out = packed + (tile_data(w, tile) - packed);
    uint32_t* words = reinterpret_cast<uint32_t*>(out);
    if (w.trits) {
      for (int r = 0; r < kTileRows; ++r) {
        const uint8_t* source = qweight + (rows.first + r) * row_bytes;
        for (int64_t c = 0; c < w.chunks; ++c, source += chunk_bytes) {
          const int64_t bytes = r < rows.count ? std::min(chunk_bytes, row_bytes - c * chunk_bytes) : 0;
          uint8_t last[kTritBytes] = {};
          if (bytes && bytes < chunk_bytes) memcpy(last, source, size_t(bytes));
          words[c * kTileRows + r] = stream_to_trits(bytes == chunk_bytes ? source : last);
        }
      }
    }
    for (int64_t c = 0; c < w.chunks && !w.trits; ++c, words += w.bits * kTileRows) {
      const int64_t bytes = std::min(chunk_bytes, row_bytes - c * chunk_bytes);
      for (int r = 0; r < kTileRows; ++r) {
        uint32_t in[4] = {}, moved[3];
        const uint32_t* from = in;
        const uint8_t* source = qweight + (rows.first + r) * row_bytes + c * chunk_bytes;
        if (r < rows.count) {
          if (bytes == 16) memcpy(in, source, 16);
          else memcpy(in, source, size_t(bytes));
        }
        if (w.bits == 3) stream_to_tile3(in, moved), from = moved;
        if (w.ternary) {
          for (int j = 0; j < 2; ++j) in[j] &= ~(in[j] >> 1 & 0x55555555);  // code 3 to 2
        }
        for (int j = 0; j < w.bits; ++j) words[j * kTileRows + r] = from[j];
      }
    }
    uint16_t* out_scales = reinterpret_cast<uint16_t*>(out + w.scale_offset);
    memset(out_scales, 0, size_t(w.tile_bytes - w.scale_offset));
    for (int r = 0; r < rows.count; ++r) {
      for (int64_t g = 0; g < w.groups; ++g) out_scales[g * kTileRows + r] = scales[(rows.first + r) * w.groups + g];
    }
  });
}

void unpack(const Weights& w, uint8_t* qweight, uint16_t* scales, float* books, const Parallel& parallel) {
  const int size = 1 << w.bits;
  const float* in_books = reinterpret_cast<const float*>(w.packed);
  for (int64_t i = 0; i < w.n_shards * size; ++i) books[i] = in_books[i / size * 16 + i % size];
  const int64_t row_bytes = w.k * w.bits / 8, chunk_bytes = w.chunk_inputs * w.bits / 8;
  for_each(parallel, w.tiles, parallel.threads, [&](int64_t tile) {
    const TileRows rows = tile_rows(w, tile);
    const uint8_t* data = tile_data(w, tile);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(data);
    for (int64_t c = 0; c < w.chunks; ++c, words += (w.trits ? 1 : w.bits) * kTileRows) {
      const int64_t bytes = std::min(chunk_bytes, row_bytes - c * chunk_bytes);
      for (int r = 0; r < rows.count; ++r) {
        uint32_t in[4], moved[3];
        const uint32_t* from = in;
        if (w.trits) {
          uint8_t codes[kTritBytes];
          trits_to_stream(words[r], codes);
          memcpy(qweight + (rows.first + r) * row_bytes + c * chunk_bytes, codes, size_t(bytes));
          continue;
        }
        for (int j = 0; j < w.bits; ++j) in[j] = words[j * kTileRows + r];
        if (w.bits == 3) tile3_to_stream(in, moved), from = moved;
        memcpy(qweight + (rows.first + r) * row_bytes + c * chunk_bytes, from, size_t(bytes));
      }
    }
    const uint16_t* in_scales = reinterpret_cast<const uint16_t*>(data + w.scale_offset);
    for (int r = 0; r < rows.count; ++r) {
      for (int64_t g = 0; g < w.groups; ++g) scales[(rows.first + r) * w.groups + g] = in_scales[g * kTileRows + r];
    }
  });
}

}  // namespace flute
