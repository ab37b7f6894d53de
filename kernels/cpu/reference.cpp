// C0, the oracle in C++: one code, one lookup, one multiplication at a time, summed in double. It runs on any
// CPU and is what remains where no vector kernel does.
#include <algorithm>

#include "flute.h"

namespace flute {

namespace {

constexpr int kTokens = 16;  // tokens that share one reading of a tile

void run(const Call& call) {
  const Weights& w = call.w;
  for_each(call.parallel, w.tiles, w.tiles, [&](int64_t tile) {
    const TileRows rows = tile_rows(w, tile);
    const uint8_t* data = tile_data(w, tile);
    const uint32_t* codes = reinterpret_cast<const uint32_t*>(data);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(data + w.scale_offset);
    for (int64_t m0 = 0; m0 < call.m; m0 += kTokens) {
      const int tokens = int(std::min<int64_t>(kTokens, call.m - m0));
      double sum[kTokens][kTileRows] = {};
      for (int64_t k = 0; k < w.k; ++k) {
        const uint32_t* chunk = codes + k / w.chunk_inputs * (w.trits ? 1 : w.bits) * kTileRows;
        const int at = int(k % w.chunk_inputs);
        float weight[kTileRows];
        for (int r = 0; r < kTileRows; ++r) {
          const float scale = scale_to_f32(scales[k / w.group_size * kTileRows + r], w.scale_dtype);
          weight[r] = rows.book[w.trits ? trit20_code(chunk, r, at) : tile16_code(chunk, w.bits, r, at)] * scale;
        }
        for (int m = 0; m < tokens; ++m) {
          const double x = load_value(call.x, (m0 + m) * w.k + k, call.dtype);
          for (int r = 0; r < kTileRows; ++r) sum[m][r] += x * weight[r];
        }
      }
      for (int m = 0; m < tokens; ++m) {
        for (int r = 0; r < rows.count; ++r) {
          const int64_t n = rows.first + r;
          if (call.bias) sum[m][r] += load_value(call.bias, n, call.dtype);
          store_value(call.y, (m0 + m) * w.n + n, call.dtype, float(sum[m][r]));
        }
      }
    }
  });
}

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }
int64_t once(const Weights&, int64_t) { return 1; }

}  // namespace

const Kernel kReferenceKernels[] = {{"reference", kScalar, kFp32, 0, refuses_nothing, once, run, true}, {}};

}  // namespace flute
