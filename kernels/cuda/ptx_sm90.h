// Hopper's own instructions (sm_90a), the only inline PTX of the wgmma kernel beside ptx.h: barriers in shared memory that
// count bytes, bulk copies, matrix multiplication by a warpgroup (four warps, the first a multiple of four) that runs on its
// own. Sections in quotes are of the PTX manual. As in ptx.h, each has its emulated definition.
#pragma once

#include "ptx.h"

#ifdef FLUTE_EMULATE_SIMT
#include "sm90.h"
#else
#include <cuda.h>
#endif

namespace flute::cuda {

#ifdef FLUTE_EMULATE_SIMT

using TensorMap = simt::TensorMap;

inline const char* encode_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool) {
  *map = {static_cast<const uint8_t*>(data), uint64_t(columns), uint64_t(rows), uint64_t(columns) * 2, 64, uint32_t(box_rows)};
  return nullptr;
}

FLUTE_DEVICE void mbarrier_init(uint32_t bar, uint32_t count) { simt::mbarrier_init(bar, count); }
FLUTE_DEVICE void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
FLUTE_DEVICE void mbarrier_arrive(uint32_t bar) { simt::mbarrier_arrive(bar); }
FLUTE_DEVICE void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) { simt::mbarrier_arrive_expect(bar, bytes); }
FLUTE_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) { simt::mbarrier_wait(bar, parity); }

FLUTE_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  simt::bulk_load(to, from, bytes, bar);
}
FLUTE_DEVICE void bulk_load_once(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) { bulk_load(to, from, bytes, bar); }
FLUTE_DEVICE void tensor_load(uint32_t to, const TensorMap* map, int column, int row, uint32_t bar) {
  simt::load_box(to, map, column, row, bar);
}
FLUTE_DEVICE void prefetch_map(const TensorMap*) {}

inline const char* encode_blocks_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, int, bool f16) {
  return encode_map(map, data, rows, columns, box_rows, f16);
}
template <int kBlocks>
FLUTE_DEVICE void tensor_load_blocks(uint32_t to, const TensorMap* map, int block, int row, uint32_t bar) {
  for (int i = 0; i < kBlocks; ++i) simt::load_box(to + i * map->box_rows * 128, map, (block + i) * 64, row, bar);
}

// Where a CTA's dynamic shared memory begins, as a constant.
constexpr uint32_t kSharedBegin = simt::kSharedBase;
FLUTE_DEVICE void check_shared_begin() {}

// A kernel has what kernels before it wrote when it begins.
FLUTE_DEVICE void let_next_begin() {}
FLUTE_DEVICE void wait_for_earlier() {}
template <class P>
const char* launch_early(void (*kernel)(P), int grid, int threads, int shared_bytes, void* stream, const P& parameters, bool in_order = false) {
  return launch(kernel, grid, threads, shared_bytes, stream, parameters, in_order);
}

template <int kRegisters>
FLUTE_DEVICE void take_registers() {
  simt::take_registers(kRegisters);
}
template <int kRegisters>
FLUTE_DEVICE void give_registers() {
  simt::give_registers(kRegisters);
}

FLUTE_DEVICE void wgmma_fence() { simt::wgmma_fence(); }
FLUTE_DEVICE void wgmma_commit() { simt::wgmma_commit(); }
template <int kPending>
FLUTE_DEVICE void wgmma_wait() {
  simt::wgmma_wait(kPending);
}
template <int kSums>
FLUTE_DEVICE void wgmma_results(float (&)[kSums]) {}
template <bool kF16, int kSums>
FLUTE_DEVICE void wgmma(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  simt::wgmma(d, a, b, 2 * kSums, kF16);
}

FLUTE_DEVICE void stmatrix4_transposed(uint32_t address, const uint32_t (&r)[4]) { simt::stmatrix4_transposed(address, r); }
template <bool kF16>
FLUTE_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int e = 0; e < 32; e += 16) {
    d |= uint32_t(round16<kF16>(widen16<kF16>(uint16_t(a >> e)) * widen16<kF16>(uint16_t(b >> e)))) << e;
  }
  return d;
}

#else

using TensorMap = CUtensorMap;

// The driver's function is fetched when first needed, so that the library loads where there is no driver.
inline const char* encode(CUtensorMap* map, const void* data, bool f16, uint32_t rank, const cuuint64_t* size, const cuuint64_t* strides,
                          const cuuint32_t* box) {
  static const auto function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) f = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  if (!function) return "the driver has no cuTensorMapEncodeTiled: it must be of CUDA 12.0 or later";
  const cuuint32_t step[3] = {1, 1, 1};
  const CUtensorMapDataType type = f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = function(map, type, rank, const_cast<void*>(data), size, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses x: its address must be a multiple of 16, K of 8";
}
// The map of a row-major matrix of 16-bit values, 16-byte aligned, for boxes of box_rows x 64 values (128 bytes, the width of
// the swizzle).
inline const char* encode_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, bool f16) {
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, row_bytes[1] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)};
  return encode(map, data, f16, 2, size, row_bytes, box);
}
// The same for boxes of several blocks of 64 columns, one behind the other; columns are a multiple of 64.
inline const char* encode_blocks_map(TensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows, int box_blocks, bool f16) {
  const cuuint64_t size[3] = {64, cuuint64_t(rows), cuuint64_t(columns) / 64}, strides[2] = {cuuint64_t(columns) * 2, 128};
  const cuuint32_t box[3] = {64, cuuint32_t(box_rows), cuuint32_t(box_blocks)};
  return encode(map, data, f16, 3, size, strides, box);
}

// ---------------------------------------------------------------------------------------------------------
// mbarrier: a phase ends when `count` threads have arrived and every expected byte has come.
FLUTE_DEVICE void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Initialised barriers become visible to the copy engine; the other threads of the CTA need a __syncthreads() besides.
FLUTE_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FLUTE_DEVICE void mbarrier_arrive(uint32_t bar) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(bar) : "memory");
}
// Arrives, and has the phase wait for this many bytes of bulk copies.
FLUTE_DEVICE void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(bar), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended: with 1, a new barrier's wait returns at once.
FLUTE_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @done bra end;\n bra again;\n"
      "end:\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// ---------------------------------------------------------------------------------------------------------
// Bulk copies to shared memory ("cp.async.bulk", "cp.async.bulk.tensor"), which arrive at a barrier by their bytes.
// A run of bytes: addresses and size are multiples of 16.
FLUTE_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar)
               : "memory");
}
// The same of what nobody reads again: L2 gives up its place first, and keeps what other kernels have left there.
FLUTE_DEVICE void bulk_load_once(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
  asm volatile(
      "{\n .reg .b64 policy;\n createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(bar)
      : "memory");
}
// The box of a matrix whose first element is at this column and row: zeros where it is outside, and all of its bytes count.
FLUTE_DEVICE void tensor_load(uint32_t to, const TensorMap* map, int column, int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(map),
      "r"(column), "r"(row), "r"(bar)
      : "memory");
}
template <int kBlocks>  // of the map's boxes
FLUTE_DEVICE void tensor_load_blocks(uint32_t to, const TensorMap* map, int block, int row, uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(map),
      "r"(0), "r"(row), "r"(block), "r"(bar)
      : "memory");
}
FLUTE_DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Where a CTA's dynamic shared memory begins if it has no other, which is not known when a kernel is compiled: behind what the
// system has reserved (cudaDevAttrReservedSharedMemoryPerBlock). As a constant it is part of instructions' addresses.
constexpr uint32_t kSharedBegin = 1024;
FLUTE_DEVICE void check_shared_begin() {
  if (shared_base() != kSharedBegin) asm volatile("trap;");
}

// ---------------------------------------------------------------------------------------------------------
// Programmatic dependent launch ("griddepcontrol"): CTAs of a kernel that was launched early take the multiprocessors that the
// kernel before it in the stream leaves, once all CTAs of that have called let_next_begin(). Only after wait_for_earlier() has
// it ended, and all that it wrote, and all before it, can be read, and what it read be written.
FLUTE_DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
FLUTE_DEVICE void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
template <class P>
const char* launch_early(void (*kernel)(P), int grid, int threads, int shared_bytes, void* stream, const P& parameters, bool = false) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &early;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, kernel, parameters);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---------------------------------------------------------------------------------------------------------
// The register budget moves from warpgroup to warpgroup: multiples of 8; all warps of a warpgroup execute it.
template <int kRegisters>
FLUTE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLUTE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---------------------------------------------------------------------------------------------------------
// wgmma. Registers that an instruction reads or adds to belong to it until a wait has covered its group.
FLUTE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FLUTE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>  // groups that may still run
FLUTE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// What reads sums must not be moved before the wait, which names no registers.
template <int kSums>
FLUTE_DEVICE void wgmma_results(float (&d)[kSums]) {
  FLUTE_UNROLL
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FLUTE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLUTE_D8(i) FLUTE_D4(i), FLUTE_D4(i + 4)
#define FLUTE_WGMMA16(type)                                                                                           \
  asm volatile(                                                                                                       \
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"                                       \
      : FLUTE_D8(0)                                                                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FLUTE_WGMMA32(type)                                                                                           \
  asm volatile(                                                                                                       \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "                                     \
      "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"                                                                        \
      : FLUTE_D8(0), FLUTE_D8(8)                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FLUTE_WGMMA64(type)                                                                                           \
  asm volatile(                                                                                                       \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                     \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                                       \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                            \
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                                                        \
      : FLUTE_D8(0), FLUTE_D8(8), FLUTE_D8(16), FLUTE_D8(24)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define FLUTE_WGMMA128(type)                                                                                          \
  asm volatile(                                                                                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                    \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                                       \
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"                              \
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                              \
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                            \
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"                                                                        \
      : FLUTE_D8(0), FLUTE_D8(8), FLUTE_D8(16), FLUTE_D8(24), FLUTE_D8(32), FLUTE_D8(40), FLUTE_D8(48), FLUTE_D8(56)  \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d += a b of m64 n(2 kSums) k16 ("Register Fragments for wgmma.mma_async.m64nNk16"): `a` is this thread's part of 64 rows, of
// which its warp has 16, `b` the descriptor of tokens x 16 inputs in shared memory, d the part of 64 rows x tokens:
// d[4j + 2h + e] is the warp's row lane/4 + 8h and token 8j + lane%4*2 + e.
template <bool kF16, int kSums>
FLUTE_DEVICE void wgmma(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kSums == 8 || kSums == 16 || kSums == 32 || kSums == 64, "16, 32, 64 or 128 tokens");
  if constexpr (kSums == 8 && kF16) FLUTE_WGMMA16("f16");
  if constexpr (kSums == 8 && !kF16) FLUTE_WGMMA16("bf16");
  if constexpr (kSums == 16 && kF16) FLUTE_WGMMA32("f16");
  if constexpr (kSums == 16 && !kF16) FLUTE_WGMMA32("bf16");
  if constexpr (kSums == 32 && kF16) FLUTE_WGMMA64("f16");
  if constexpr (kSums == 32 && !kF16) FLUTE_WGMMA64("bf16");
  if constexpr (kSums == 64 && kF16) FLUTE_WGMMA128("f16");
  if constexpr (kSums == 64 && !kF16) FLUTE_WGMMA128("bf16");
}
#undef FLUTE_D4
#undef FLUTE_D8
#undef FLUTE_WGMMA16
#undef FLUTE_WGMMA32
#undef FLUTE_WGMMA64
#undef FLUTE_WGMMA128

// ---------------------------------------------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit values to shared memory, transposed: lane 8i + j has the address of 16 bytes
// that get column j of matrix i.
FLUTE_DEVICE void stmatrix4_transposed(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// Two products of 16-bit values, each rounded once.
template <bool kF16>
FLUTE_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t d;
  if constexpr (kF16) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  else asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

#endif

}  // namespace flute::cuda
