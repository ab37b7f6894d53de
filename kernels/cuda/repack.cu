// Weights of one layer from the checkpoint's order to MMA64 and back, on the device: see repack.cuh.
#include <cuda_runtime.h>

#include "launch.h"
#include "repack.cuh"

namespace flute::cuda {

namespace {

constexpr int kThreads = 256;

// Neighbouring threads make neighbouring vectors. The warps of a block of threads read neighbouring bytes of the same rows, so
// that device memory sees a layer's bytes once each way: 70 GB for LLaMA-3-70B in 4 bits.
__global__ void __launch_bounds__(kThreads) pack_kernel(Packed w, Parts in, uint8_t* packed) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < w.bytes / int64_t(sizeof(Vector))) pack_vector(w, in, packed, index);
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(Packed w, const uint8_t* packed, PartsOut out) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < unpack_pieces(w)) unpack_piece(w, packed, out, index);
}

unsigned blocks_for(int64_t items) { return unsigned((items + kThreads - 1) / kThreads); }

const char* failure(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* run_pack(const Packed& w, const Shard* table, const uint8_t* qweight, const uint16_t* scales, const float* codebooks,
                     uint8_t* packed, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  uint8_t* there = packed + w.n_shards * int64_t(16 * sizeof(float));
  const auto copy_table = [&] { return failure(cudaMemcpyAsync(there, table, w.n_shards * sizeof(Shard), cudaMemcpyHostToDevice, on)); };
  if (const char* why = copy_table()) return why;
  pack_kernel<<<blocks_for(w.bytes / int64_t(sizeof(Vector))), kThreads, 0, on>>>(w, {qweight, scales, codebooks}, packed);
  if (const char* why = failure(cudaGetLastError())) return why;
  return copy_table();  // again: a kernel that is launched early waits for what is none (launch.h)
}

const char* run_unpack(const Packed& w, const uint8_t* packed, uint8_t* qweight, uint16_t* scales, float* codebooks, void* stream) {
  const PartsOut out{qweight, scales, codebooks};
  unpack_kernel<<<blocks_for(unpack_pieces(w)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(w, packed, out);
  return failure(cudaGetLastError());
}

}  // namespace flute::cuda
