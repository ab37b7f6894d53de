// The instructions that the kernels name themselves, each with its emulated definition: with FLUTE_EMULATE_SIMT the same
// kernel source compiles for a CPU and runs in tests/simt/simt.h. The names are the PTX manual's.
//
// Shared memory is addressed by 32-bit numbers, as PTX does, so that a table lookup costs no 64-bit arithmetic.
#pragma once

#include <cstdint>

#ifdef FLUTE_EMULATE_SIMT
#include <cmath>

#include "flute.h"
#include "simt.h"
#define FLUTE_DEVICE inline
#define FLUTE_KERNEL(threads, ctas) void
#define FLUTE_UNROLL
#define FLUTE_ROLLED
#define FLUTE_PARAMETER const
#else
#include <cuda_runtime.h>
#define FLUTE_DEVICE __device__ __forceinline__
#define FLUTE_KERNEL(threads, ctas) __global__ void __launch_bounds__(threads, ctas)
#define FLUTE_UNROLL _Pragma("unroll")
#define FLUTE_ROLLED _Pragma("unroll 1")
#define FLUTE_PARAMETER const __grid_constant__
#endif

namespace flute::cuda {

struct alignas(8) Words2 {
  uint32_t w[2];
};
struct alignas(16) Words4 {
  uint32_t w[4];
};

#ifdef FLUTE_EMULATE_SIMT

FLUTE_DEVICE int thread_id() { return simt::thread(); }
FLUTE_DEVICE int fresh_thread_id() { return simt::thread(); }
FLUTE_DEVICE uint32_t kept_register(uint32_t v) { return v; }
FLUTE_DEVICE int cta_id() { return simt::cta(); }
FLUTE_DEVICE int cta_count() { return simt::ctas(); }
FLUTE_DEVICE uint32_t shared_base() { return simt::kSharedBase; }

template <class T>
FLUTE_DEVICE T shared_load(uint32_t address) {
  T value;
  memcpy(&value, simt::shared(address, sizeof value), sizeof value);
  return value;
}
template <class T>
FLUTE_DEVICE void shared_store(uint32_t address, const T& value) {
  memcpy(simt::shared(address, sizeof value), &value, sizeof value);
}
FLUTE_DEVICE uint32_t lds32(uint32_t address) { return shared_load<uint32_t>(address); }
FLUTE_DEVICE Words2 lds64(uint32_t address) { return shared_load<Words2>(address); }
FLUTE_DEVICE Words4 lds128(uint32_t address) { return shared_load<Words4>(address); }
FLUTE_DEVICE void sts32(uint32_t address, uint32_t value) { shared_store(address, value); }
FLUTE_DEVICE void sts128(uint32_t address, const Words4& value) { shared_store(address, value); }

FLUTE_DEVICE void cp_async16(uint32_t to, const void* from, int bytes) { simt::cp_async(to, from, bytes); }
FLUTE_DEVICE void cp_async_commit() { simt::cp_async_commit(); }
FLUTE_DEVICE void cp_async_wait(int pending) { simt::cp_async_wait(pending); }

FLUTE_DEVICE void syncwarp() { simt::sync_warp(); }
FLUTE_DEVICE void barrier() { simt::barrier(0, simt::threads()); }
FLUTE_DEVICE void barrier(int id, int threads) { simt::barrier(id, threads); }
FLUTE_DEVICE void threadfence() {}
FLUTE_DEVICE unsigned atomic_add(unsigned* p, unsigned v) {
  const unsigned old = *p;
  *p += v;
  return old;
}

// `value` of lane `from`.
FLUTE_DEVICE uint32_t from_lane(uint32_t value, int from) {
  struct Lane {
    uint32_t value, other;
    int from;
  } lane{value, 0, from};
  simt::meet(simt::thread() / 32, 32, simt::thread() % 32, &lane, [](void** all) {
    for (int l = 0; l < 32; ++l) {
      Lane& to = *static_cast<Lane*>(all[l]);
      to.other = static_cast<Lane*>(all[to.from])->value;
    }
  });
  return lane.other;
}

FLUTE_DEVICE void ldmatrix4(uint32_t address, uint32_t (&r)[4]) { simt::ldmatrix4(address, r); }
template <bool kF16>
FLUTE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  simt::mma_m16n8k16(d, a, b, kF16);
}

FLUTE_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return simt::prmt(a, b, selector); }
FLUTE_DEVICE float as_f32(uint32_t bits) { return bits_to_f32(bits); }
FLUTE_DEVICE uint32_t as_bits(float f) { return f32_to_bits(f); }
template <bool kF16>
FLUTE_DEVICE uint16_t round16(float f) {
  return kF16 ? f32_to_f16(f) : f32_to_bf16(f);
}
template <bool kF16>
FLUTE_DEVICE uint32_t round_pair(float low, float high) {
  return uint32_t(round16<kF16>(low)) | uint32_t(round16<kF16>(high)) << 16;
}
template <bool kF16>
FLUTE_DEVICE float widen16(uint16_t h) {
  return kF16 ? f16_to_f32(h) : bf16_to_f32(h);
}
FLUTE_DEVICE float exponential(float f) { return std::exp(f); }
FLUTE_DEVICE Words4 load_l2(const void* p) {
  Words4 value;
  memcpy(&value, p, sizeof value);
  return value;
}
FLUTE_DEVICE void store_global(void* p, const Words4& value) { memcpy(p, &value, sizeof value); }

FLUTE_DEVICE Words4 load_relaxed(const void* p) { return load_l2(p); }
FLUTE_DEVICE void store_relaxed(void* p, const Words4& value) { store_global(p, value); }
// Calls ready() until it says true.
template <class Ready>
FLUTE_DEVICE void spin(const Ready& ready) {
  simt::wait(ready);
}

// Null, or one line that says what failed. in_order: CTAs wait for others of lower numbers.
template <class P>
const char* launch(void (*kernel)(P), int grid, int threads, int shared_bytes, void*, const P& parameters, bool in_order = false) {
  return simt::launch(grid, threads, shared_bytes, [&] { kernel(parameters); }, in_order);
}

#else

FLUTE_DEVICE int thread_id() { return int(threadIdx.x); }
// For rare code in a loop: what follows from it is computed there, not kept in registers through the loop.
FLUTE_DEVICE int fresh_thread_id() {
  int v;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
  return v;
}
// A value that is not to be computed again where it is used.
FLUTE_DEVICE uint32_t kept_register(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
FLUTE_DEVICE int cta_id() { return int(blockIdx.x); }
FLUTE_DEVICE int cta_count() { return int(gridDim.x); }
extern __shared__ __align__(1024) uint8_t dynamic_shared[];
FLUTE_DEVICE uint32_t shared_base() { return uint32_t(__cvta_generic_to_shared(dynamic_shared)); }

// Volatile, and with memory clobbered where it is written: the compiler must not move these across barriers.
FLUTE_DEVICE uint32_t lds32(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
FLUTE_DEVICE Words2 lds64(uint32_t address) {
  Words2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "r"(address));
  return v;
}
FLUTE_DEVICE Words4 lds128(uint32_t address) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address));
  return v;
}
FLUTE_DEVICE void sts32(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
FLUTE_DEVICE void sts128(uint32_t address, const Words4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// 16 bytes of shared memory, of which the first `bytes` (0 or 16) come from global memory, past L1, and the others are zero.
FLUTE_DEVICE void cp_async16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}
FLUTE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FLUTE_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Waits until at most `pending` of this thread's latest groups are under way. The instruction takes a constant.
FLUTE_DEVICE void cp_async_wait(int pending) {
  switch (pending) {
    case 0: return cp_async_wait_group<0>();
    case 1: return cp_async_wait_group<1>();
    case 2: return cp_async_wait_group<2>();
    case 3: return cp_async_wait_group<3>();
    case 4: return cp_async_wait_group<4>();
    case 5: return cp_async_wait_group<5>();
    default: return cp_async_wait_group<6>();
  }
}

FLUTE_DEVICE void syncwarp() { __syncwarp(); }
FLUTE_DEVICE void barrier() { __syncthreads(); }
FLUTE_DEVICE void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
FLUTE_DEVICE void threadfence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FLUTE_DEVICE unsigned atomic_add(unsigned* p, unsigned v) { return atomicAdd(p, v); }

// `value` of lane `from`.
FLUTE_DEVICE uint32_t from_lane(uint32_t value, int from) { return __shfl_sync(0xffffffff, value, from); }

FLUTE_DEVICE void ldmatrix4(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// d[16, 8] += a[16, 16] b[16, 8], a and b fp16 or bf16, d fp32.
template <bool kF16>
FLUTE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

FLUTE_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
FLUTE_DEVICE float as_f32(uint32_t bits) { return __uint_as_float(bits); }
FLUTE_DEVICE uint32_t as_bits(float f) { return __float_as_uint(f); }
template <bool kF16>
FLUTE_DEVICE uint16_t round16(float f) {
  uint16_t h;
  if constexpr (kF16) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// Two values in 16 bits, the first in the lower half.
template <bool kF16>
FLUTE_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t d;
  if constexpr (kF16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <bool kF16>
FLUTE_DEVICE float widen16(uint16_t h) {
  if constexpr (!kF16) return __uint_as_float(uint32_t(h) << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
FLUTE_DEVICE float exponential(float f) { return expf(f); }
// From L2: L1 does not see what other multiprocessors write.
FLUTE_DEVICE Words4 load_l2(const void* p) {
  const uint4 v = __ldcg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
FLUTE_DEVICE void store_global(void* p, const Words4& v) {
  *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

// 16 bytes that another CTA reads or has written, without any order: each word is the old one or the new.
FLUTE_DEVICE Words4 load_relaxed(const void* p) {
  Words4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
FLUTE_DEVICE void store_relaxed(void* p, const Words4& v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]), "r"(v.w[1]),
               "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}
// Calls ready() until it says true.
template <class Ready>
FLUTE_DEVICE void spin(const Ready& ready) {
  while (!ready()) {
  }
}

// Null, or one line that says what failed. in_order: CTAs wait for others of lower numbers, which a GPU starts first.
template <class P>
const char* launch(void (*kernel)(P), int grid, int threads, int shared_bytes, void* stream, const P& parameters, bool = false) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

#endif

FLUTE_DEVICE int lane_id() { return thread_id() % 32; }
// Unsigned: who divides a number that could be negative takes three instructions more.
FLUTE_DEVICE int fresh_lane() { return int(unsigned(fresh_thread_id()) % 32); }
FLUTE_DEVICE int fresh_warp() { return int(unsigned(fresh_thread_id()) / 32); }
// `value` of the lane whose number is this one's but for one bit, which is 1, 2, 4 ...
FLUTE_DEVICE uint32_t other_lane(uint32_t value, int bit) { return from_lane(value, lane_id() ^ bit); }

}  // namespace flute::cuda
