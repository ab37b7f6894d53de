// Which kernels exist, which of them this CPU and VLLM_FLUTE_ISA allow, and which one a call takes.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "flute.h"

namespace flute {

namespace {

constexpr const char* kIsaNames[kIsas] = {"scalar", "avx2", "avx512", "avx512bf16"};

struct Registry {
  Isa cpu = kScalar;  // what the CPU and its operating system have
  Isa used = kScalar;
  std::string forced, error, description;
  std::vector<const Kernel*> kernels;

  Registry() {
#ifdef FLUTE_X86
    // libgcc's feature test includes XCR0: the operating system saves the registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      cpu = kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        cpu = __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
      }
    }
    add(kAvx2Kernels), add(kAvx512Kernels), add(kAvx512Bf16Kernels);
#endif
    add(kReferenceKernels);
    used = cpu;
    if (const char* value = std::getenv("VLLM_FLUTE_ISA"); value && *value) {
      forced = value;
      used = kIsas;
      for (int i = 0; i < kIsas; ++i) {
        if (forced == kIsaNames[i]) used = Isa(i);
      }
      std::string names;
      for (int i = 0; i <= cpu; ++i) names += std::string(i ? ", " : "") + kIsaNames[i];
      if (used == kIsas) error = "is not an instruction set";
      else if (used > cpu) error = "is not what this CPU has";
      if (!error.empty()) error = "VLLM_FLUTE_ISA=" + printable(forced) + " " + error + " (available: " + names + ")";
    }
    description = describe();
  }

  void add(const Kernel* list) {
    for (; list->name; ++list) kernels.push_back(list);
  }

  // Safe in a message of one line and in JSON.
  static std::string printable(std::string s) {
    for (char& c : s) {
      if (c < ' ' || c > '~' || c == '"' || c == '\\') c = '?';
    }
    return s;
  }

  std::string lacks(const Kernel& kernel) const {
    if (!error.empty()) return error;
    if (kernel.isa > cpu) return std::string("this CPU has no ") + kIsaNames[kernel.isa];
    if (kernel.isa > used) return "VLLM_FLUTE_ISA=" + forced + " excludes it";
    return "";
  }

  std::string available() const {
    std::string names;
    for (const Kernel* k : kernels) {
      if (lacks(*k).empty()) names += (names.empty() ? "" : ", ") + std::string(k->name);
    }
    return names;
  }

  const Kernel* find(const std::string& name) const {
    for (const Kernel* k : kernels) {
      if (name == k->name) return k;
    }
    return nullptr;
  }

  std::string describe() const {
    const auto quoted = [](const std::string& s) { return "\"" + s + "\""; };
    std::string json = "{\"abi\":" + std::to_string(kAbi) + ",\"isa\":" + quoted(error.empty() ? kIsaNames[used] : "none") +
                       ",\"forced\":" + quoted(printable(forced)) + ",\"error\":" + quoted(error) + ",\"kernels\":[";
    for (const Kernel* k : kernels) {
      const std::string why = lacks(*k);
      json += std::string(k == kernels.front() ? "" : ",") + "{\"name\":" + quoted(k->name) + ",\"isa\":" + quoted(kIsaNames[k->isa]) +
              ",\"slot\":" + std::to_string(k->slot) + ",\"available\":" + (why.empty() ? "true" : "false") +
              ",\"why\":" + quoted(why) + "}";
    }
    return json + "]}";
  }
};

const Registry& registry() {
  static const Registry instance;
  return instance;
}

uint64_t private_page[kSlots * kBuckets * kFields];
uint64_t* page = private_page;

// The analytic default: the first of its list that runs here, takes the call, and is meant for so many tokens. The
// limits are crossings measured with benchmarks/cpu_linear.py: below them reading weights is what costs, and gemv
// reads them best; from there on a decoded block pays.
constexpr struct {
  const char* name;
  int64_t below;  // tokens
} kPreference[] = {
    {"gemv-avx512bf16", 65}, {"tile-avx512bf16", INT64_MAX}, {"gemv-avx512", 65}, {"tile-avx512", INT64_MAX},
    {"gemv-avx2", 9},        {"tile-avx2", INT64_MAX},       {"reference", INT64_MAX},
};

}  // namespace

const Kernel& choose(const Weights& w, int64_t m, Dtype dtype, const std::string& name) {
  const Registry& r = registry();
  if (!r.error.empty()) throw std::invalid_argument(r.error);
  const Kernel* kernel = r.find(name);
  if (name.empty()) {
    for (const auto& preferred : kPreference) {
      kernel = r.find(preferred.name);
      if (kernel && m < preferred.below && r.lacks(*kernel).empty() && !kernel->refuses(w, dtype)) break;
    }
  }
  std::string why = !kernel ? "there is no such kernel" : r.lacks(*kernel);
  if (why.empty() && kernel->refuses(w, dtype)) why = std::string("does not take ") + kernel->refuses(w, dtype);
  if (!why.empty()) throw std::invalid_argument("kernel '" + name + "': " + why + " (available: " + r.available() + ")");
  return *kernel;
}

void count(const Kernel& kernel, const Weights& w, int64_t m) {
  int bucket = 0;
  while (bucket < kBuckets - 1 && m > kBucketUpper[bucket]) ++bucket;
  uint64_t* row = __atomic_load_n(&page, __ATOMIC_ACQUIRE) + (kernel.slot * kBuckets + bucket) * kFields;
  __atomic_fetch_add(row + kCalls, 1, __ATOMIC_RELAXED);
  __atomic_fetch_add(row + kTokens, uint64_t(m), __ATOMIC_RELAXED);
  __atomic_fetch_add(row + kBytes, uint64_t(w.bytes * kernel.passes(w, m)), __ATOMIC_RELAXED);
}

}  // namespace flute

const char* flute_cpu_describe() { return flute::registry().description.c_str(); }

void flute_cpu_set_counters(void* page) { __atomic_store_n(&flute::page, static_cast<uint64_t*>(page), __ATOMIC_RELEASE); }

const char* flute_cpu_choose(const int64_t* header, int64_t m, int dtype) {
  try {
    if (dtype < flute::kF32 || dtype > flute::kF16) return "";
    const flute::Weights w = flute::parse_header(header, flute::kHeaderFixed + header[flute::kFieldShards]);
    return flute::choose(w, m, flute::Dtype(dtype), "").name;
  } catch (const std::exception&) {
    return "";
  }
}
