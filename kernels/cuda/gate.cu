// SwiGLU by itself, where no kernel's end can take it: after cuBLAS, and where halves are not of whole tiles' rows.
#include <cuda_runtime.h>

#include "flute.h"
#include "gate.h"

namespace flute::cuda {

namespace {

constexpr int kThreads = 256;

// Eight outputs a thread; y and out are 16-byte aligned and half is a multiple of 8.
template <bool kF16>
__global__ void __launch_bounds__(kThreads) silu_and_mul_octets(const uint16_t* y, uint16_t* out, int64_t m, int half) {
  const int64_t octets = half / 8, i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m * octets) return;
  const uint16_t* const gate = y + i / octets * half * 2 + i % octets * 8;
  silu_mul_octet<kF16>(gate, gate + half, out + i * 8);
}

// One output a thread, of any half and dtype.
template <class T, class Product>
__device__ void silu_and_mul_one(const T* y, T* out, int64_t m, int half, const Product& product) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m * half) return;
  const T* const gate = y + i / half * half * 2 + i % half;
  out[i] = product(gate[0], gate[half]);
}
template <bool kF16>
__global__ void __launch_bounds__(kThreads) silu_and_mul_16(const uint16_t* y, uint16_t* out, int64_t m, int half) {
  silu_and_mul_one(y, out, m, half, [](uint16_t gate, uint16_t up) { return silu_mul<kF16>(gate, up); });
}
__global__ void __launch_bounds__(kThreads) silu_and_mul_32(const float* y, float* out, int64_t m, int half) {
  silu_and_mul_one(y, out, m, half, [](float gate, float up) { return gate / (1 + expf(-gate)) * up; });
}

}  // namespace

const char* run_silu_and_mul(const void* y, void* out, int64_t m, int half, int dtype, void* stream) {
  const bool octets = dtype != kF32 && half % 8 == 0;
  const unsigned blocks = unsigned((m * half / (octets ? 8 : 1) + kThreads - 1) / kThreads);
  if (dtype == kF32) {
    silu_and_mul_32<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const float*>(y), static_cast<float*>(out), m, half);
  } else {
    const bool f16 = dtype == kF16;
    const auto kernel = octets ? (f16 ? silu_and_mul_octets<true> : silu_and_mul_octets<false>) : (f16 ? silu_and_mul_16<true> : silu_and_mul_16<false>);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint16_t*>(y), static_cast<uint16_t*>(out), m, half);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace flute::cuda
