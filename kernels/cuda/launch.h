// The contract between the GPU kernels' host launchers and their callers (torch's operators, tests, benchmarks): no
// torch, no CUDA header. Every launcher is asynchronous, allocates nothing, never waits for the device and reads nothing
// from it, so that a CUDA graph can capture it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"

namespace flute::cuda {

// What a launcher has to know of the device; the caller reads it once.
struct Device {
  int arch;          // compute capability: 80, 89, 90, 100, 120
  int sms;           // multiprocessors
  int shared_bytes;  // that a block may have (opt-in)
};

// y[M, N] = x[M, K] W^T + bias[N]; x, y and bias of one 16-bit type, contiguous, x and packed 16-byte aligned.
struct Gemm {
  Packed w;
  const uint8_t* packed;
  const void* x;
  const void* bias;  // or null
  void* y;
  void* gated;      // silu(y[:, :N/2]) * y[:, N/2:], [M, N/2], where it is not null: y may be written, or not
  int m;
  int f16;          // x, y and bias are fp16; else bf16
  void* workspace;  // workspace_bytes(device); the first cleared_bytes(device) are zero before the first call, and after every
  Device device;
  void* stream;     // cudaStream_t
};

// A stream's calls share one workspace, of a size that depends on the device alone: mail of lut_mma_bulk.cuh, kMailBytes for each
// multiprocessor of sm_90; counters; partial sums.
constexpr size_t kMailBytes = 16 * 1024, kCounterBytes = 64 * 1024;
inline size_t mail_bytes(const Device& device) { return device.arch == 90 ? size_t(device.sms) * kMailBytes : 0; }
inline size_t cleared_bytes(const Device& device) { return mail_bytes(device) + kCounterBytes; }
inline void* counters_of(const Gemm& call) { return static_cast<uint8_t*>(call.workspace) + mail_bytes(call.device); }
size_t workspace_bytes(const Device& device);
// The first half of the counters is Stream-K's (streamk.h), the second that of pairs of tiles of `gated` (gate.h).
constexpr uint32_t kGateCounters = kCounterBytes / sizeof(unsigned) / 2;

// Whether run_mma and run_wgmma can make `gated` of m tokens, for two shards of as many rows: their tiles have 128 rows only
// where one tile has all tokens or at least 128 of them, else 256 rows of at least 32 tokens.
inline bool takes_gate(const Packed& w, int64_t m) {
  return w.n_shards == 2 && w.n % 16 == 0 && (w.n / 2 / 128 + 1) * ((m + 31) / 32) <= int64_t(kGateCounters);
}

// Each returns null, or one line that says what failed (CUDA's own words).
const char* run_mma(const Gemm& call);      // any arch from 80, any M; meant for M <= 32 (K1)
const char* run_wgmma(const Gemm& call);    // arch 90 (K2)
// W[first_row .. first_row + rows, K] (K3) to `dense`, 16-byte aligned, in `dtype`: flute.h's Dtype.
const char* run_dequantize(const Packed& w, const uint8_t* packed, int64_t first_row, int64_t rows, int dtype, void* dense, void* stream);
// silu(y[:, :half]) * y[:, half:] of y [m, 2 * half], 16-byte aligned, in `dtype`, to out [m, half].
const char* run_silu_and_mul(const void* y, void* out, int64_t m, int half, int dtype, void* stream);
// qweight uint8 [N, K*bits/8], scales 16-bit [N, G], codebooks fp32 [S, 2^bits], all on the device, to packed, and back.
// `table` is the shards' table as the device wants it, in pinned or pageable host memory, S entries.
const char* run_pack(const Packed& w, const Shard* table, const uint8_t* qweight, const uint16_t* scales, const float* codebooks, uint8_t* packed, void* stream);
const char* run_unpack(const Packed& w, const uint8_t* packed, uint8_t* qweight, uint16_t* scales, float* codebooks, void* stream);

}  // namespace flute::cuda
