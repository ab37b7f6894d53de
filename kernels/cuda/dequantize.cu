// W of some rows from MMA64, for cuBLAS: see dequantize.cuh. A block writes one row, its threads neighbouring vectors of it.
// A warp's lookups are in one codebook of 64 bytes, which a load reads at once.
#include <cuda_runtime.h>

#include "dequantize.cuh"
#include "launch.h"

namespace flute::cuda {

namespace {

constexpr int kThreads = 256;

template <Dtype kType>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Packed w, const uint8_t* packed, int64_t first_row, uint8_t* dense) {
  const int64_t row_bytes = int64_t(w.k) * (kType == kF32 ? 4 : 2);
  dequantize_row<kType>(w, packed, first_row + blockIdx.x, threadIdx.x, kThreads, dense + blockIdx.x * row_bytes);
}

}  // namespace

const char* run_dequantize(const Packed& w, const uint8_t* packed, int64_t first_row, int64_t rows, int dtype, void* dense, void* stream) {
  const auto kernel = dtype == kF32 ? dequantize_kernel<kF32> : dtype == kBf16 ? dequantize_kernel<kBf16> : dequantize_kernel<kF16>;
  kernel<<<unsigned(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(w, packed, first_row, static_cast<uint8_t*>(dense));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flute::cuda
