// Packing, unpacking and dequantizing for the GPU, done on the CPU by the functions that the device runs, the last by simt.h's
// emulator: packed codes and scales are where layout.h says, the way back is exact, and each weight is its codebook's value times
// its scale, rounded once.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../cuda/launch.h"
#include "../cuda/repack.cuh"
#include "flute.h"
#include "simt.h"

using namespace flute;
using namespace flute::cuda;

static int checks = 0;

#define CHECK(ok, ...)                                     \
  do {                                                     \
    ++checks;                                              \
    if (!(ok)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #ok); \
      std::printf(__VA_ARGS__);                            \
      std::printf("\n");                                   \
      std::exit(1);                                        \
    }                                                      \
  } while (0)

// What a checkpoint has, with the codes also as numbers.
struct Layer {
  Packed w;
  std::vector<Shard> table;
  std::vector<uint8_t> codes, qweight;
  std::vector<uint16_t> scales;
  std::vector<float> codebooks;
};

static Layer random_layer(int bits, bool f16, int group, int k, const std::vector<int64_t>& rows, unsigned seed) {
  std::mt19937 random(seed);
  Layer layer;
  layer.w = describe(bits, f16, group, k, rows.data(), int64_t(rows.size()));
  const Packed& w = layer.w;
  Shard next{};
  for (int64_t n : rows) {
    next.rows = int32_t(n);
    next.strips = int32_t(divide_up(n, kStripRows));
    layer.table.push_back(next);
    next.first_row += next.rows;
    next.first_strip += next.strips;
  }
  layer.codes.resize(size_t(w.n) * w.k);
  layer.qweight.resize(size_t(w.n) * w.k * bits / 8);
  for (int64_t i = 0; i < int64_t(layer.codes.size()); ++i) {
    layer.codes[i] = random() % (1u << bits);
    for (int b = 0; b < bits; ++b) layer.qweight[(i * bits + b) / 8] |= (layer.codes[i] >> b & 1) << (i * bits + b) % 8;
  }
  layer.scales.resize(size_t(w.n) * w.groups);
  for (uint16_t& s : layer.scales) {
    const float value = 0.01f + float(random() % 1000) * 1e-4f;
    s = f16 ? f32_to_f16(value) : f32_to_bf16(value);
  }
  layer.codebooks.resize(rows.size() << bits);
  for (float& v : layer.codebooks) v = float(int(random() % 20001) - 10000) * 1e-3f;
  return layer;
}

// W[first .. first + rows] by K3 in a type; what it leaves alone stays NaN, and so must what lies around.
static void check_dense(const Layer& layer, const std::vector<uint8_t>& packed, Dtype type, int64_t first, int64_t rows) {
  const Packed& w = layer.w;
  const int64_t size = type == kF32 ? 4 : 2, row_vectors = w.k * size / int64_t(sizeof(Vector));
  const int64_t around = kStripRows * row_vectors;
  std::vector<Vector> dense(size_t(around + rows * row_vectors + around));
  memset(dense.data(), 0xff, dense.size() * sizeof(Vector));
  simt::config.seed = uint64_t(++checks);
  const char* error = run_dequantize(w, packed.data(), first, rows, type, dense.data() + around, nullptr);
  CHECK(!error, "%s", error);
  for (int64_t i = 0; i < around; ++i) {
    for (const Vector& v : {dense[i], dense[dense.size() - 1 - i]}) {
      CHECK((v.word[0] & v.word[1] & v.word[2] & v.word[3]) == ~0u, "written around rows %d to %d", int(first), int(first + rows));
    }
  }
  for (size_t s = 0; s < layer.table.size(); ++s) {
    const int64_t begin = layer.table[s].first_row, end = begin + layer.table[s].rows;
    for (int64_t row = std::max(first, begin); row < std::min(first + rows, end); ++row) {
      for (int64_t k = 0; k < w.k; ++k) {
        const float scale = scale_to_f32(layer.scales[row * w.groups + k / w.group_size], w.scale_f16 ? kScaleF16 : kScaleBf16);
        const float exact = layer.codebooks[(s << w.bits) + layer.codes[row * w.k + k]] * scale;
        unsigned char expected[4];
        store_value(expected, 0, type, exact);
        const auto* actual = reinterpret_cast<const unsigned char*>(&dense[around]) + ((row - first) * w.k + k) * size;
        CHECK(!memcmp(expected, actual, size), "bits %d, type %d, rows %d to %d, row %d, k %d", w.bits, type, int(first),
              int(first + rows), int(row), int(k));
      }
    }
  }
}

static void check_layer(const Layer& layer) {
  const Packed& w = layer.w;
  const size_t table_at = w.n_shards * 16 * sizeof(float);
  std::vector<uint8_t> packed(w.bytes, 0xcd);
  memcpy(&packed[table_at], layer.table.data(), layer.table.size() * sizeof(Shard));
  CHECK(w.bytes % int64_t(sizeof(Vector)) == 0, "%d bytes", int(w.bytes));
  const Parts parts{layer.qweight.data(), layer.scales.data(), layer.codebooks.data()};
  for (int64_t i = w.bytes / int64_t(sizeof(Vector)); i-- > 0;) pack_vector(w, parts, packed.data(), i);

  CHECK(!memcmp(&packed[table_at], layer.table.data(), layer.table.size() * sizeof(Shard)), "the shards' table was overwritten");
  for (size_t i = table_at + layer.table.size() * sizeof(Shard); i < size_t(w.scales_offset); ++i) {
    CHECK(packed[i] == 0, "byte %d before the scales", int(i));
  }
  for (size_t s = 0; s < layer.table.size(); ++s) {
    const Shard& shard = layer.table[s];
    for (int i = 0; i < 16; ++i) {
      CHECK(books(packed.data())[s * 16 + i] == layer.codebooks[(s << w.bits) + i % (1 << w.bits)], "shard %d, value %d", int(s), i);
    }
    for (int strip = shard.first_strip; strip < shard.first_strip + shard.strips; ++strip) {
      for (int r = 0; r < kStripRows; ++r) {
        const int64_t in_shard = int64_t(strip - shard.first_strip) * kStripRows + r, row = shard.first_row + in_shard;
        const bool there = in_shard < shard.rows;
        for (int64_t g = 0; g < w.groups; ++g) {
          const uint16_t expected = there ? layer.scales[row * w.groups + g] : 0;
          CHECK(strip_scales(w, packed.data(), strip, g)[scale_place(r)] == expected, "strip %d, row %d, group %d", strip, r, int(g));
        }
        for (int64_t k = 0; k < int64_t(w.blocks) * kBlockInputs; ++k) {
          const unsigned expected = there && k < w.k ? layer.codes[row * w.k + k] : 0;
          const uint8_t* block = block_codes(w, packed.data(), strip, k / kBlockInputs);
          CHECK(code_at(block, w.bits, r, int(k % kBlockInputs)) == expected, "bits %d, strip %d, row %d, k %d", w.bits, strip, r, int(k));
        }
      }
    }
  }

  std::vector<uint8_t> qweight(layer.qweight.size(), 0xcd);
  std::vector<uint16_t> scales(layer.scales.size(), 0xcdcd);
  std::vector<float> codebooks(layer.codebooks.size(), -1e30f);
  for (int64_t i = unpack_pieces(w); i-- > 0;) unpack_piece(w, packed.data(), {qweight.data(), scales.data(), codebooks.data()}, i);
  CHECK(qweight == layer.qweight, "bits %d", w.bits);
  CHECK(scales == layer.scales, "bits %d", w.bits);
  CHECK(codebooks == layer.codebooks, "bits %d", w.bits);

  const int64_t n = w.n, strip = std::min<int64_t>(n, kStripRows);
  const int64_t ranges[][2] = {{0, n}, {0, 1}, {n / 3, n - n / 3}, {n - 1, 1}, {n / 2, (n + 3) / 4}, {n / 128 * 64, strip}};
  for (const Dtype type : {kBf16, kF16, kF32}) {
    for (const auto& [first, rows] : ranges) check_dense(layer, packed, type, first, rows);
  }
}

// code_place() and high_place() give every code of a block its own bits, and leave none over.
static void check_places(int bits) {
  std::vector<int> owners(block_bytes(bits) * 8);
  for (int r = 0; r < kStripRows; ++r) {
    for (int k = 0; k < kBlockInputs; ++k) {
      const Place low = code_place(bits, r, k);
      for (int b = 0; b < (bits == 4 ? 4 : 2); ++b) ++owners[low.byte * 8 + low.shift + b];
      if (bits == 3) ++owners[high_place(r, k).byte * 8 + high_place(r, k).shift];
    }
  }
  for (size_t bit = 0; bit < owners.size(); ++bit) CHECK(owners[bit] == 1, "bits %d: bit %d has %d owners", bits, int(bit), owners[bit]);
}

int main() {
  struct Shape {
    int k, group;
    std::vector<int64_t> rows;
  };
  const Shape shapes[] = {
      {64, 64, {64}},      {8, 8, {8}},          {72, 72, {8}},       {320, 64, {72}},       {576, 64, {200}},
      {1040, 16, {16}},    {256, 256, {136}},    {384, 128, {64, 8}}, {192, 32, {40, 8, 24}}, {200, 40, {128, 72}},
      {128, 64, {1, 63, 65}}, {264, 24, {72, 130}}, {1096, 8, {64}},  {64, 64, {8, 70, 8, 16, 130, 3}},
  };
  unsigned seed = 0;
  for (int bits = 2; bits <= 4; ++bits) {
    check_places(bits);
    for (const Shape& shape : shapes) {
      for (const bool f16 : {false, true}) check_layer(random_layer(bits, f16, shape.group, shape.k, shape.rows, ++seed));
    }
  }
  std::printf("all passed (%d checks)\n", checks);
}
