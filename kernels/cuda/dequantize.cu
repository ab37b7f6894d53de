// K3's launcher.
#include "dequantize.cuh"

namespace flute::cuda {

namespace {

template <int kBits>
const char* launch_bits(const DequantizeParameters& p, int grid, int dtype, void* stream) {
  const auto narrow = dtype == kBf16 ? dequantize<kBits, kBf16> : dequantize<kBits, kF16>;
  return launch(dtype == kF32 ? dequantize<kBits, kF32> : narrow, grid, kDequantizeThreads, kValuesBytes, stream, p);
}

}  // namespace

const char* run_dequantize(const Packed& w, const uint8_t* packed, int64_t first_row, int64_t rows, int dtype, void* dense,
                           void* stream) {
  const unsigned strip_ctas = unsigned(w.blocks + kDequantizeWarps - 1) / kDequantizeWarps;
  const int row_bytes = w.k * (dtype == kF32 ? 4 : 2);
  const DequantizeParameters p{w, packed, int(first_row), int(rows), static_cast<uint8_t*>(dense), row_bytes, strip_ctas};
  // At most: where the shards' rows end is on the device. Each shard may end, and the first begin, within a strip.
  const int64_t strips = (rows + kStripRows - 1) / kStripRows + w.n_shards;
  const int grid = int((strips < w.strips ? strips : w.strips) * strip_ctas);
  if (w.bits == 2) return launch_bits<2>(p, grid, dtype, stream);
  return w.bits == 3 ? launch_bits<3>(p, grid, dtype, stream) : launch_bits<4>(p, grid, dtype, stream);
}

}  // namespace flute::cuda
