#include "registry.h"

#include <climits>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "header.h"

namespace flute::cuda {

namespace {

#ifndef FLUTE_CUDA_ARCHS  // what the build names, see CMakeLists.txt
#error "FLUTE_CUDA_ARCHS is the list of compute capabilities compiled in, such as \"80 89 90a\""
#endif
constexpr const char* kArchs = FLUTE_CUDA_ARCHS;
constexpr const char* kCompiler = FLUTE_CUDA_COMPILER;

constexpr Kernel kKernels[] = {
    {"mma", kMma, 20, "16-bit weights", 32},
    {"wgmma", kWgmma, 21, "scaled 16-bit weights", 128},
    {"dequantize-cublas", kDequantize, 22, "weights in the dtype of x", INT_MAX},
};

// Whether the library has code for a capability; `own`: compiled for it alone, with the instructions that no other has (a
// letter behind the number). Machine code without a letter runs on its own major version from its minor one on (CUDA C++
// Programming Guide, "Binary Compatibility" and "Feature Set Compiler Targets").
bool has_code(int arch, bool own = false) {
  for (const char* at = kArchs; *at;) {
    char* end;
    const int compiled = int(strtol(at, &end, 10));
    const bool letter = *end && *end != ' ';
    if (letter ? compiled == arch : !own && compiled / 10 == arch / 10 && compiled <= arch) return true;
    at = end + strcspn(end, " ");
    at += strspn(at, " ");
  }
  return false;
}

std::string sm(int arch) { return "sm_" + std::to_string(arch); }

// Why nothing runs on a GPU of this capability, or an empty string.
std::string error(int arch) {
  if (arch < 80) return "compute capability " + std::to_string(arch / 10) + "." + std::to_string(arch % 10) + " is older than 8.0";
  return has_code(arch) ? "" : "the library has no code for " + sm(arch) + " (it has " + kArchs + "): build it with -DFLUTE_CUDA_ARCHS=" + std::to_string(arch);
}

// Why a kernel does not run on a GPU, or an empty string.
std::string lacks(const Kernel& kernel, int arch) {
  const std::string why = error(arch);
  if (!why.empty()) return why;
  if (kernel.method != kWgmma) return "";
  if (arch != 90) return "only sm_90 has its instructions";
  return has_code(arch, true) ? "" : "the library has no code for sm_90a";
}

// What a kernel does not take, or null.
const char* refuses(const Kernel& kernel, const Packed& w, Dtype dtype) {
  if (kernel.method == kDequantize) return nullptr;
  if (dtype == kF32) return "float32 activations";
  const bool power_of_two = (w.group_size & (w.group_size - 1)) == 0;
  return w.groups > 1 && (w.group_size < 16 || w.group_size > 256 || !power_of_two) ? "a group size other than 16, 32, 64, 128, 256 and K" : nullptr;
}

const Kernel* find(const std::string& name) {
  for (const Kernel& k : kKernels) {
    if (name == k.name) return &k;
  }
  return nullptr;
}

const Kernel* find(int64_t slot) {
  for (const Kernel& k : kKernels) {
    if (k.slot == slot) return &k;
  }
  return nullptr;
}

uint64_t private_page[kSlots * kBuckets * kFields];
uint64_t* page = private_page;

const TableLine* table = nullptr;
int64_t table_lines = 0;

// What was measured where, by `vllm-flute bench kernels` or benchmarks/gpu: calls on this arch of at most so many tokens take the
// kernel; the first line that matches decides.
//
// 90: an H100, kernels/benchmarks/gpu/results, over the matrices of LLaMA-3 8B and groups of 128. At 1024 tokens wgmma is ahead
// of dequantizing (28672 x 4096, 4 bits: 376 to 431 us), at 4096 behind (1707 to 1548).
struct MeasuredLine {
  int arch;
  int64_t max_tokens;
  Method method;
};
constexpr MeasuredLine kMeasured[] = {{90, 32, kMma}, {90, 2048, kWgmma}, {90, INT64_MAX, kDequantize}};

// The analytic default of the other GPUs, none of it measured.
//
// Up to 32 tokens the time is the packed weights' bytes, and mma reads them once. From there to some number of tokens it is
// behind cuBLAS, since it decodes while it multiplies; cuBLAS has to be given W first, which costs a fixed time. They are equal where
//
//   M * 2 * NK * (1 / (f * P) - 1 / P) = NK * (4 + bits / 8) / B
//
// with P the rate of cuBLAS, f the fraction of it that mma attains, B the memory's bandwidth; W is written and read in 2 bytes a
// weight and the packed weights are read once. So M = (4 + bits / 8) * (P / B) / (2 * (1 / f - 1)). With 70% of an A100's data
// sheet's 312 TFLOP/s and 90% of its 2.0 TB/s, P / B is 121 operations a byte, of an H100 230; 160 is between. Guessed: f is
// 1/6, since all weights are read and decoded again for every 32 tokens. That makes 72 tokens at 4 bits.
constexpr int64_t kBalance = 160;
Method default_method(int bits, int64_t m) { return m <= (32 + bits) * kBalance / (8 * 2 * (6 - 1)) ? kMma : kDequantize; }

std::string description(int arch) {
  const auto quoted = [](const std::string& s) { return "\"" + s + "\""; };
  std::string json = "{\"abi\":" + std::to_string(kAbi) + ",\"archs\":" + quoted(kArchs) + ",\"compiler\":" + quoted(kCompiler) +
                     ",\"error\":" + quoted(error(arch)) + ",\"kernels\":[";
  for (const Kernel& k : kKernels) {
    const std::string why = lacks(k, arch);
    json += std::string(&k == kKernels ? "" : ",") + "{\"name\":" + quoted(k.name) + ",\"isa\":" + quoted(sm(arch)) + ",\"arithmetic\":" +
            quoted(k.arithmetic) + ",\"slot\":" + std::to_string(k.slot) + ",\"available\":" + (why.empty() ? "true" : "false") +
            ",\"why\":" + quoted(why) + "}";
  }
  return json + "]}";
}

}  // namespace

Layer read_layer(const int64_t* header, int64_t length) {
  const HeaderFields f = read_fields(header, length, kMma64, kMma64, "the GPU kernels read layout 4 (mma64)");
  Layer layer{describe(f.bits, f.scale_dtype == kScaleF16, f.group_size, f.k, f.shards, f.n_shards), {}};
  Shard next{};
  for (int64_t s = 0; s < f.n_shards; ++s) {
    next.rows = int32_t(f.shards[s]);
    next.strips = int32_t(divide_up(f.shards[s], kStripRows));
    layer.shards.push_back(next);
    next.first_row += next.rows;
    next.first_strip += next.strips;
  }
  return layer;
}

const Kernel& choose(const Packed& w, int64_t m, Dtype dtype, const std::string& name, int arch) {
  const auto takes = [&](const Kernel& k) { return lacks(k, arch).empty() && !refuses(k, w, dtype); };
  const Kernel* kernel = find(name);
  if (name.empty()) {
    for (const TableLine* line = table; line != table + table_lines; ++line) {
      if (line->bits != w.bits || line->dtype != dtype || m > line->max_tokens || int64_t(w.n) * w.k > line->max_weights) continue;
      const Kernel* measured = find(line->slot);
      if (measured && takes(*measured)) return *measured;
    }
    Method method = default_method(w.bits, m);
    for (const MeasuredLine& line : kMeasured) {
      if (line.arch != arch || m > line.max_tokens) continue;
      if (takes(kKernels[line.method])) method = line.method;
      break;
    }
    kernel = &kKernels[method];
    if (!takes(*kernel)) kernel = &kKernels[kDequantize];
  }
  std::string why = !kernel ? "there is no such kernel" : lacks(*kernel, arch);
  if (why.empty() && refuses(*kernel, w, dtype)) why = std::string("does not take ") + refuses(*kernel, w, dtype);
  if (why.empty()) return *kernel;
  if (name.empty()) throw std::invalid_argument(why);
  std::string names;
  for (const Kernel& k : kKernels) {
    if (lacks(k, arch).empty()) names += (names.empty() ? "" : ", ") + std::string(k.name);
  }
  throw std::invalid_argument("kernel '" + name + "': " + why + " (available: " + names + ")");
}

void count(const Kernel& kernel, const Packed& w, int64_t m) {
  count_call(__atomic_load_n(&page, __ATOMIC_ACQUIRE), kernel.slot, m, w.bytes * divide_up(m, kernel.tokens));
}

}  // namespace flute::cuda

const char* flute_cuda_describe(int arch) {
  static thread_local std::string json;
  json = flute::cuda::description(arch);
  return json.c_str();
}

void flute_cuda_set_counters(void* page) { __atomic_store_n(&flute::cuda::page, static_cast<uint64_t*>(page), __ATOMIC_RELEASE); }

void flute_cuda_set_table(const void* lines, int64_t count) {
  flute::cuda::table = static_cast<const flute::TableLine*>(lines);
  flute::cuda::table_lines = count;
}

const char* flute_cuda_choose(const int64_t* header, int64_t m, int dtype, int arch) {
  try {
    if (dtype < flute::kF32 || dtype > flute::kF16) return "";
    const flute::cuda::Packed w = flute::cuda::read_layer(header, flute::kHeaderFixed + header[flute::kFieldShards]).w;
    return flute::cuda::choose(w, m, flute::Dtype(dtype), "", arch).name;
  } catch (const std::exception&) {
    return "";
  }
}
