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
  int arch;             // compute capability: 80, 89, 90, 100, 120
  int sms;              // multiprocessors
  int shared_bytes;     // that a block may have (opt-in)
  int reserved = 1024;  // of a block's shared memory by the system, before its own
};

// An RMS norm between two layers, at most kNormTokens tokens of it: what the first adds up, and how the second scales its tokens.
// The first writes sum = residual + y, in place of y sum * weight, and for each 16 rows and token the sum of squares of `sum`; the
// second multiplies its products of a token by 1 / sqrt(all squares / K + epsilon), which is the norm of its x. All contiguous, of
// x's type or fp32.
constexpr int kNormTokens = 32;
constexpr FLUTE_HD int norm_parts(int n) { return (n + kStripRows - 1) / kStripRows * (kStripRows / kUnitRows); }
struct AddNorm {
  const void *residual, *weight;  // [M, N], [N]; residual null: none of this
  void* sum;                      // [M, N]
  float* squares;                 // [kNormTokens, norm_parts(N)]
};
struct Normed {
  const float* squares;  // [kNormTokens, norm_parts(K)], or null
  float epsilon;
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
  Normed normed{};  // as these two, only where takes_norms()
  AddNorm add{};    // of one shard
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

// Whether run_mma has the norm before a call and the one after it in its kernel.
bool takes_norms(const Gemm& call);

// Each returns null, or one line that says what failed (CUDA's own words). On sm_90 run_mma and run_wgmma may read weights before
// the kernel before them in the stream has ended, never x: who writes weights by a kernel lets something follow that is none.
const char* run_mma(const Gemm& call);      // any arch from 80, any M; meant for M <= 32 (K1)
const char* run_wgmma(const Gemm& call);    // arch 90 (K2)
// W[first_row .. first_row + rows, K] (K3) to `dense`, 16-byte aligned, in `dtype`: flute.h's Dtype.
const char* run_dequantize(const Packed& w, const uint8_t* packed, int64_t first_row, int64_t rows, int dtype, void* dense, void* stream);
// silu(y[:, :half]) * y[:, half:] of y [m, 2 * half], 16-byte aligned, in `dtype`, to out [m, half].
const char* run_silu_and_mul(const void* y, void* out, int64_t m, int half, int dtype, void* stream);
// The same norm by itself. Of more than kNormTokens tokens the first half does it all: `out` is sum's norm times weight, and
// there are no squares.
const char* run_add_norm(const void* y, const AddNorm& add, float epsilon, void* out, int64_t m, int n, int dtype, void* stream);
// x [m, k] times each token's factor, to out.
const char* run_scale_tokens(const void* x, const Normed& normed, void* out, int64_t m, int k, int dtype, void* stream);
// qweight uint8 [N, K*bits/8], scales 16-bit [N, G], codebooks fp32 [S, 2^bits], all on the device, to packed, and back.
// `table` is the shards' table as the device wants it, in pinned or pageable host memory, S entries.
const char* run_pack(const Packed& w, const Shard* table, const uint8_t* qweight, const uint16_t* scales, const float* codebooks, uint8_t* packed, void* stream);
const char* run_unpack(const Packed& w, const uint8_t* packed, uint8_t* qweight, uint16_t* scales, float* codebooks, void* stream);

}  // namespace flute::cuda
