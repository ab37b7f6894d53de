// Rates of the instructions that the GPU kernels lean on, an SM and a cycle, each by itself and in the order in which the
// kernels' inner loop has them. Prints a JSON object a line: name, warps (of the one block that an SM runs), per_cycle
// (lanes' operations, or for decode_* weights, an SM and cycle), cycles, mhz (clock while it ran); and for read_* GB/s.
//
// A block times itself with clock64() (multiprocessor cycles) between barriers, around thousands of operations of several
// independent chains; operands come from memory, so that nothing folds. micro.py has what the design assumes of each.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "../../cuda/decode.h"

#define CHECK(call)                                                                          \
  do {                                                                                       \
    const cudaError_t code = (call);                                                         \
    if (code != cudaSuccess) {                                                               \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(code)); \
      exit(1);                                                                               \
    }                                                                                        \
  } while (0)

namespace {

namespace cuda = flute::cuda;

constexpr int kOps = 64;  // of an unrolled step
constexpr int kChains = 8;

// What every operation starts from: random numbers, a permutation of 0..255 that is one cycle.
struct Inputs {
  const uint32_t* numbers;  // 1024
  const uint8_t* next;      // 256
};

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- one instruction in kChains chains ----

struct Prmt {
  static constexpr int kWork = kOps, kThreads = 1024;
  uint32_t r[kChains], selector;
  __device__ Prmt(uint8_t*, const Inputs& in) : selector(in.numbers[0] & 0x7777) {
    for (int i = 0; i < kChains; ++i) r[i] = in.numbers[(threadIdx.x + i) % 1024];
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i)
      asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(r[i % kChains]) : "r"(r[(i + 1) % kChains]), "r"(selector));
  }
  __device__ uint32_t result() const { return r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5] ^ r[6] ^ r[7]; }
};

struct Lop3 {
  static constexpr int kWork = kOps, kThreads = 1024;
  uint32_t r[kChains];
  __device__ Lop3(uint8_t*, const Inputs& in) {
    for (int i = 0; i < kChains; ++i) r[i] = in.numbers[(threadIdx.x + i) % 1024];
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i) {  // 0xe8: the majority, of which two do not make one
      const uint32_t b = r[(i + 1) % kChains], c = r[(i + 3) % kChains];
      asm volatile("lop3.b32 %0, %0, %1, %2, 0xe8;" : "+r"(r[i % kChains]) : "r"(b), "r"(c));
    }
  }
  __device__ uint32_t result() const { return r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5] ^ r[6] ^ r[7]; }
};

struct Shf {
  static constexpr int kWork = kOps, kThreads = 1024;
  uint32_t r[kChains];
  __device__ Shf(uint8_t*, const Inputs& in) {
    for (int i = 0; i < kChains; ++i) r[i] = in.numbers[(threadIdx.x + i) % 1024];
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i)
      asm volatile("shf.r.wrap.b32 %0, %0, %1, 5;" : "+r"(r[i % kChains]) : "r"(r[(i + 1) % kChains]));
  }
  __device__ uint32_t result() const { return r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5] ^ r[6] ^ r[7]; }
};

struct Shfl {
  static constexpr int kWork = kOps, kThreads = 1024;
  uint32_t r[kChains];
  __device__ Shfl(uint8_t*, const Inputs& in) {
    for (int i = 0; i < kChains; ++i) r[i] = in.numbers[(threadIdx.x + i) % 1024];
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i)
      asm volatile("shfl.sync.bfly.b32 %0, %0, 1, 31, -1;" : "+r"(r[i % kChains]));
  }
  __device__ uint32_t result() const { return r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5] ^ r[6] ^ r[7]; }
};

struct Hmul2 {  // bf16; before sm_90, which has no such multiplication, fp16
  static constexpr int kWork = kOps, kThreads = 1024;
  uint32_t r[kChains];
  __device__ Hmul2(uint8_t*, const Inputs& in) {
    for (int i = 0; i < kChains; ++i) r[i] = in.numbers[(threadIdx.x + i) % 1024] & 0x3fff3fff;
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      asm volatile("mul.rn.bf16x2 %0, %0, %1;" : "+r"(r[i % kChains]) : "r"(r[(i + 1) % kChains]));
#else
      asm volatile("mul.rn.f16x2 %0, %0, %1;" : "+r"(r[i % kChains]) : "r"(r[(i + 1) % kChains]));
#endif
  }
  __device__ uint32_t result() const { return r[0] ^ r[1] ^ r[2] ^ r[3] ^ r[4] ^ r[5] ^ r[6] ^ r[7]; }
};

struct Mma {
  static constexpr int kWork = kOps, kThreads = 1024;  // an operation of all lanes is one m16n8k16
  float d[4][4];
  uint32_t a[4], b[2];
  __device__ Mma(uint8_t*, const Inputs& in) {
    for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = 0;
    for (int i = 0; i < 4; ++i) a[i] = in.numbers[(threadIdx.x + i) % 1024] & 0x3fff3fff;
    for (int i = 0; i < 2; ++i) b[i] = in.numbers[(threadIdx.x + 4 + i) % 1024] & 0x3fff3fff;
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i) cuda::mma<false>(d[i % 4], a, b[0], b[1]);
  }
  __device__ uint32_t result() const { return __float_as_uint(d[0][0] + d[1][1] + d[2][2] + d[3][3]); }
};

// A walk through a table in shared memory of 256 entries of kWords words, each in kCopies copies side by side: an entry's
// first word is the address of the next in the same copy. Lanes begin anywhere, so they meet in banks as random lookups do.
template <int kWords, int kCopies>
struct Table {
  static constexpr int kWork = kOps, kThreads = 1024, kWalks = 4;
  uint32_t at[kWalks];
  __device__ Table(uint8_t* shared, const Inputs& in) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    for (int i = threadIdx.x; i < 256 * kCopies; i += blockDim.x) {
      const int next = in.next[i / kCopies], copy = i % kCopies;
      for (int w = 0; w < kWords; ++w) words[i * kWords + w] = shared_address(words + (next * kCopies + copy) * kWords);
    }
    for (int i = 0; i < kWalks; ++i) {
      const int entry = in.numbers[(threadIdx.x * kWalks + i + blockIdx.x * 7) % 1024] % 256;
      at[i] = shared_address(words + (entry * kCopies + threadIdx.x % kCopies) * kWords);
    }
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i) {
      uint32_t& r = at[i % kWalks];
      // ld.volatile: a load of which one word is used must not shrink to that word.
      if constexpr (kWords == 1) asm volatile("ld.volatile.shared.u32 %0, [%0];" : "+r"(r));
      if constexpr (kWords == 2) asm volatile("{.reg .b32 b; ld.volatile.shared.v2.u32 {%0, b}, [%0];}" : "+r"(r));
      if constexpr (kWords == 4) asm volatile("{.reg .b32 b, c, d; ld.volatile.shared.v4.u32 {%0, b, c, d}, [%0];}" : "+r"(r));
    }
  }
  __device__ uint32_t result() const { return at[0] ^ at[1] ^ at[2] ^ at[3]; }
};

// ldmatrix.x4 from 512 contiguous bytes. The word that a lane gets is the address that it gives: see the fragments of
// ldmatrix in the PTX manual.
struct Ldmatrix {
  static constexpr int kWork = kOps, kThreads = 1024, kWalks = 4;
  uint32_t at[kWalks];
  __device__ Ldmatrix(uint8_t* shared, const Inputs&) {
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    for (int i = threadIdx.x; i < 128; i += blockDim.x) words[i] = shared_address(shared + i % 32 * 16);
    for (int i = 0; i < kWalks; ++i) at[i] = shared_address(shared + threadIdx.x % 32 * 16);
  }
  __device__ void step(int) {
#pragma unroll
    for (int i = 0; i < kOps; ++i) {
      uint32_t& r = at[i % kWalks];
      asm volatile("{.reg .b32 b, c, d; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, b, c, d}, [%0];}" : "+r"(r));
    }
  }
  __device__ uint32_t result() const { return at[0] ^ at[1] ^ at[2] ^ at[3]; }
};

// ---- the inner loop of the design ----

// A step of one warp: 64 rows x 64 inputs of codes of kBits from shared memory through a table with rows of kRow bytes (the
// kernels' own, ../../cuda/decode.h) into mma with kTiles times 8 tokens, whose activations come by ldmatrix. No copies from
// global memory, no scales.
template <int kBits, int kRow, int kTiles>
struct Decode {
  static constexpr int kWork = 64 * 64 / 32;  // weights, spread over the lanes
  static constexpr int kThreads = kTiles == 4 ? 256 : 512;  // more would spill
  static constexpr int kTableBytes = cuda::table_bytes(kBits, kRow), kCodeBytes = int(cuda::block_bytes(kBits));
  static constexpr int kRing = 2, kTokenBytes = (64 + 8) * 2;  // x: with 16 more bytes no two rows are in the same banks
  static constexpr int kXBytes = kTiles * 8 * kTokenBytes;
  static constexpr int kSharedBytes = kTableBytes + kRing * (kThreads / 32 * kCodeBytes + kXBytes);
  float acc[4][kTiles][4];
  uint32_t table, codes, x, copy;

  __device__ Decode(uint8_t* shared, const Inputs& in) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    table = shared_address(shared);
    codes = table + kTableBytes;
    x = codes + kRing * kThreads / 32 * kCodeBytes;
    uint32_t* const words = reinterpret_cast<uint32_t*>(shared + kTableBytes);
    for (int i = threadIdx.x; i < (kSharedBytes - kTableBytes) / 4; i += blockDim.x) {  // codes are any bits, x is finite
      const uint32_t number = in.numbers[i % 1024];
      words[i] = uint32_t(i) * 4 < x - codes ? number ^ uint32_t(i) * 0x9e3779b9 : number & 0x3fff3fff;
    }
    __shared__ float book[16];
    if (threadIdx.x < 16) book[threadIdx.x] = float(in.numbers[threadIdx.x]) * 0x1p-32f;
    __syncthreads();
    cuda::build_table<kBits, kRow, false>(table, book, 1, threadIdx.x, blockDim.x);
    codes += warp * kRing * kCodeBytes + lane * 16;
    x += lane % 8 * kTokenBytes + lane / 8 * 16;
    copy = cuda::lane_copy<kBits>(lane);
    for (int i = 0; i < 16 * kTiles; ++i) acc[i / 4 / kTiles][i / 4 % kTiles][i % 4] = 0;
  }

  __device__ void step(int iteration) {
    const uint32_t ring = iteration % kRing;
    uint32_t word[4 * kBits], b[kTiles][2][4];
#pragma unroll
    for (int v = 0; v < kBits; ++v) {
      const cuda::Words4 four = cuda::lds128(codes + ring * kCodeBytes + v * cuda::kVectorBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) word[4 * v + i] = four.w[i];
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      cuda::ldmatrix4(x + ring * kXBytes + t * 8 * kTokenBytes, b[t][0]);
      cuda::ldmatrix4(x + ring * kXBytes + t * 8 * kTokenBytes + 64, b[t][1]);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u)
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        uint32_t a[4];
        cuda::fragment<kBits, kRow>(table, copy, word, u, s, a);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) cuda::mma<false>(acc[u][t], a, b[t][s / 2][s % 2 * 2], b[t][s / 2][s % 2 * 2 + 1]);
      }
  }
  __device__ uint32_t result() const {
    float sum = 0;
    for (int i = 0; i < 16 * kTiles; ++i) sum += acc[i / 4 / kTiles][i / 4 % kTiles][i % 4];
    return __float_as_uint(sum);
  }
};

// ---- measuring ----

template <class Op>
__global__ void __launch_bounds__(Op::kThreads, 1) rate(Inputs in, int iterations, long long* cycles, uint32_t* results) {
  extern __shared__ __align__(1024) uint8_t shared[];
  Op op(shared, in);
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) op.step(i);
  __syncthreads();
  const long long end = clock64();
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
  results[blockIdx.x * blockDim.x + threadIdx.x] = op.result();
}

struct Device {
  int sms, shared_bytes;
  Inputs in;
  long long* cycles;
  uint32_t* results;
  cudaEvent_t begin, end;
};

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

template <class Op>
void measure(const Device& d, const char* name, int shared_bytes, int warps, int iterations) {
  if (shared_bytes > d.shared_bytes) return;
  CHECK(cudaFuncSetAttribute(rate<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  std::vector<double> cycles, mhz;
  for (int round = 0; round < 6; ++round) {
    CHECK(cudaEventRecord(d.begin));
    rate<Op><<<d.sms, warps * 32, shared_bytes>>>(d.in, iterations, d.cycles, d.results);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(d.end));
    CHECK(cudaEventSynchronize(d.end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, d.begin, d.end));
    std::vector<long long> each(d.sms);
    CHECK(cudaMemcpy(each.data(), d.cycles, d.sms * sizeof(long long), cudaMemcpyDeviceToHost));
    if (round == 0) continue;  // loads the code
    cycles.push_back(median(std::vector<double>(each.begin(), each.end())));
    mhz.push_back(cycles.back() / (ms * 1e3));  // a little low: the launch is in the time, not in the cycles
  }
  const double c = median(cycles), per_cycle = double(Op::kWork) * 32 * warps * iterations / c;
  const auto range = std::minmax_element(cycles.begin(), cycles.end());
  printf("{\"name\": \"%s\", \"warps\": %d, \"per_cycle\": %.6g, \"cycles\": %.0f, \"spread\": %.4f, \"mhz\": %.0f}\n", name,
         warps, per_cycle, c, *range.second / *range.first - 1, median(mhz));
  fflush(stdout);
}

template <int kBits, int kRow, int kTiles>
void measure_decode(const Device& d) {
  using Op = Decode<kBits, kRow, kTiles>;
  char name[64];
  snprintf(name, sizeof name, "decode_%dbit_%dtokens_row%d", kBits, 8 * kTiles, kRow);
  for (int warps = 8; warps <= Op::kThreads / 32; warps *= 2) measure<Op>(d, name, Op::kSharedBytes, warps, 2000);
}
template <int kBits, int kRow>
void measure_decode(const Device& d) {
  measure_decode<kBits, kRow, 1>(d);
  measure_decode<kBits, kRow, 2>(d);
  measure_decode<kBits, kRow, 4>(d);
}

// Reading alone: what a call with one token does. 16 bytes a lane, 8 loads in flight.
__global__ void __launch_bounds__(512) read(const uint4* data, size_t count, uint32_t* results) {
  constexpr int kAhead = 8;
  uint32_t sum = 0;
  const size_t stride = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i + (kAhead - 1) * stride < count; i += kAhead * stride) {
    uint4 v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x9e3779b9) results[0] = sum;  // never, but the compiler does not know
}

void measure_read(const Device& d, size_t bytes) {
  uint4* data;
  CHECK(cudaMalloc(&data, bytes));
  CHECK(cudaMemset(data, 0x5a, bytes));
  std::vector<double> gbs;
  for (int round = 0; round < 12; ++round) {
    CHECK(cudaEventRecord(d.begin));
    read<<<d.sms * 4, 512>>>(data, bytes / 16, d.results);
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(d.end));
    CHECK(cudaEventSynchronize(d.end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, d.begin, d.end));
    if (round >= 2) gbs.push_back(bytes / (ms * 1e6));
  }
  printf("{\"name\": \"read_global\", \"gb_s\": %.1f, \"bytes\": %zu}\n", median(gbs), bytes);
  CHECK(cudaFree(data));
}

}  // namespace

int main() {
  Device d{};
  CHECK(cudaDeviceGetAttribute(&d.sms, cudaDevAttrMultiProcessorCount, 0));
  CHECK(cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  std::mt19937 random(20240710);
  std::vector<uint32_t> numbers(1024);
  for (uint32_t& n : numbers) n = random();
  std::vector<int> order(256);  // one cycle through all entries
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<uint8_t> next(256);
  for (int i = 0; i < 256; ++i) next[order[i]] = uint8_t(order[(i + 1) % 256]);
  uint32_t* numbers_device;
  uint8_t* next_device;
  CHECK(cudaMalloc(&numbers_device, numbers.size() * 4));
  CHECK(cudaMalloc(&next_device, next.size()));
  CHECK(cudaMemcpy(numbers_device, numbers.data(), numbers.size() * 4, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(next_device, next.data(), next.size(), cudaMemcpyHostToDevice));
  d.in = {numbers_device, next_device};
  CHECK(cudaMalloc(&d.cycles, d.sms * sizeof(long long)));
  CHECK(cudaMalloc(&d.results, size_t(d.sms) * 1024 * 4));
  CHECK(cudaEventCreate(&d.begin));
  CHECK(cudaEventCreate(&d.end));

  measure<Prmt>(d, "prmt", 0, 32, 2000);
  measure<Lop3>(d, "lop3", 0, 32, 2000);
  measure<Shf>(d, "shf", 0, 32, 2000);
  measure<Shfl>(d, "shfl", 0, 32, 1000);
  measure<Hmul2>(d, "hmul2", 0, 32, 2000);
  measure<Mma>(d, "mma_m16n8k16_bf16", 0, 8, 1000);
  measure<Mma>(d, "mma_m16n8k16_bf16", 0, 16, 1000);
  measure<Table<1, 32>>(d, "lds32_x32", 256 * 32 * 4, 32, 500);
  measure<Table<1, 16>>(d, "lds32_x16", 256 * 16 * 4, 32, 500);
  measure<Table<1, 8>>(d, "lds32_x8", 256 * 8 * 4, 32, 500);
  measure<Table<1, 1>>(d, "lds32_x1", 256 * 4, 32, 500);
  measure<Table<2, 16>>(d, "lds64_x16", 256 * 16 * 8, 32, 500);
  measure<Table<2, 8>>(d, "lds64_x8", 256 * 8 * 8, 32, 500);
  measure<Table<2, 1>>(d, "lds64_x1", 256 * 8, 32, 500);
  measure<Table<4, 8>>(d, "lds128_x8", 256 * 8 * 16, 32, 500);
  measure<Ldmatrix>(d, "ldmatrix_x4", 512, 32, 500);
  measure_decode<4, cuda::kWideRow>(d);
  measure_decode<4, cuda::kRow>(d);
  measure_decode<3, cuda::kWideRow>(d);
  measure_decode<3, cuda::kRow>(d);
  measure_decode<2, cuda::kWideRow>(d);
  measure_decode<2, cuda::kRow>(d);
  measure_read(d, size_t(1) << 30);
  return 0;
}
