// Which kernels exist, which of them this CPU and VLLM_FLUTE_ISA allow, and which one a call takes.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef FLUTE_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "flute.h"

namespace flute {

namespace {

constexpr const char* kIsaNames[kIsas] = {"scalar", "neon", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};
constexpr const char* kArithmeticNames[kArithmetics] = {"fp32", "bf16 weights", "int16", "int16 products", "int8"};

// Whether this kind of CPU can have the instruction set at all.
constexpr bool of_this_architecture(int isa) {
#ifdef FLUTE_X86
  return isa != kNeon;
#else
  return isa <= kNeon;
#endif
}

#ifdef FLUTE_X86
// Whether the CPU has AMX tiles of bf16 and int8, and the system lets this process use them: it does not save the
// tiles of one that has not asked (a system that knows none refuses).
bool may_use_amx() {
#ifdef FLUTE_EMULATE_AMX
  return true;
#else
  constexpr unsigned kBf16Bit = 1u << 22, kTileBit = 1u << 24, kInt8Bit = 1u << 25, kAll = kBf16Bit | kTileBit | kInt8Bit;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, the state's number
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#endif

struct Registry {
  Isa cpu = kScalar;  // what the CPU and its operating system have
  Isa used = kScalar;
  // VLLM_FLUTE_ACTIVATIONS: whether calls that name no kernel may round their inputs to 8 bits, and whether some kernel
  // does so here. Lines of the measured table for other kernels do not count then.
  bool int8 = false, int8_first = false;
  std::string forced, error, description;

  Registry() {
#ifdef FLUTE_X86
    // libgcc's feature test includes XCR0: the operating system saves the registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      cpu = kAvx2;
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        cpu = kAvx512;
        if (__builtin_cpu_supports("avx512vnni")) cpu = __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512Vnni;
        if (cpu == kAvx512Bf16 && may_use_amx()) cpu = kAmx;
      }
    }
#elif defined(__aarch64__)
    cpu = kNeon;  // part of the architecture
#endif
    used = cpu;
    if (const char* value = std::getenv("VLLM_FLUTE_ISA"); value && *value) {
      forced = value;
      used = kIsas;
      for (int i = 0; i < kIsas; ++i) {
        if (of_this_architecture(i) && forced == kIsaNames[i]) used = Isa(i);
      }
      std::string names;
      for (int i = 0; i <= cpu; ++i) {
        if (of_this_architecture(i)) names += std::string(i ? ", " : "") + kIsaNames[i];
      }
      if (used == kIsas) error = "is not an instruction set of this kind of CPU";
      else if (used > cpu) error = "is not what this CPU has";
      if (!error.empty()) error = "VLLM_FLUTE_ISA=" + printable(forced) + " " + error + " (available: " + names + ")";
    }
    if (const char* value = std::getenv("VLLM_FLUTE_ACTIVATIONS"); value && *value) {
      int8 = std::string(value) == "int8";
      if (!int8 && std::string(value) != "16" && error.empty()) {
        error = "VLLM_FLUTE_ACTIVATIONS=" + printable(value) + " is not a type of activations (available: 16, int8)";
      }
    }
    for (const Kernel* const* k = all_kernels(); *k; ++k) int8_first |= int8 && (*k)->arithmetic == kInt8 && lacks(**k).empty();
    description = describe();
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

  static const char* refuses(const Kernel& kernel, const Weights& w, Dtype dtype) {
    return w.trits && !kernel.trits ? "layout trit20" : kernel.refuses(w, dtype);
  }

  // Whether the dispatcher may choose it of its own accord: int8 where asked, and for fp32 inputs nothing that rounds.
  bool may_take(const Kernel& kernel, const Weights& w, Dtype dtype) const {
    if (kernel.arithmetic == kInt8 ? !int8 : dtype == kF32 && kernel.arithmetic != kFp32) return false;
    return lacks(kernel).empty() && !refuses(kernel, w, dtype);
  }

  std::string available() const {
    std::string names;
    for (const Kernel* const* k = all_kernels(); *k; ++k) {
      if (lacks(**k).empty()) names += (names.empty() ? "" : ", ") + std::string((*k)->name);
    }
    return names;
  }

  const Kernel* find(const std::string& name) const {
    for (const Kernel* const* k = all_kernels(); *k; ++k) {
      if (name == (*k)->name) return *k;
    }
    return nullptr;
  }

  const Kernel* find(int64_t slot) const {
    for (const Kernel* const* k = all_kernels(); *k; ++k) {
      if (slot == (*k)->slot) return *k;
    }
    return nullptr;
  }

  std::string describe() const {
    const auto quoted = [](const std::string& s) { return "\"" + s + "\""; };
    std::string json = "{\"abi\":" + std::to_string(kAbi) + ",\"isa\":" + quoted(error.empty() ? kIsaNames[used] : "none") +
                       ",\"forced\":" + quoted(printable(forced)) + ",\"activations\":" + quoted(int8 ? "int8" : "16") +
                       ",\"error\":" + quoted(error) + ",\"kernels\":[";
    for (const Kernel* const* all = all_kernels(); *all; ++all) {
      const Kernel& k = **all;
      const std::string why = lacks(k);
      json += std::string(all == all_kernels() ? "" : ",") + "{\"name\":" + quoted(k.name) + ",\"isa\":" + quoted(kIsaNames[k.isa]) +
              ",\"arithmetic\":" + quoted(kArithmeticNames[k.arithmetic]) + ",\"slot\":" + std::to_string(k.slot) +
              ",\"available\":" + (why.empty() ? "true" : "false") + ",\"why\":" + quoted(why) + "}";
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

const TableLine* table = nullptr;
int64_t table_lines = 0;

// The analytic default: the first of its list that runs here, takes the call, and is meant for so few tokens. The limits
// are crossings measured with `vllm-flute bench kernels` on Zen 4: for few tokens reading weights is what costs, and gemv
// reads them best; for more, vector LUT gives most operations a cycle where a table's row serves several weights, and
// decoded blocks where it does not: 4 bits beside bf16 multiply-adds. Those of AMX are measured on a Xeon that has it
// (docs/speed.md): its bf16 multiply-adds outside tiles are slower than fp32's; decoding to scaled weights costs once what
// scaling a group's sums costs for each token. Those of dot16-avx2 are measured on Zen 3, those of NEON reckoned.
constexpr int64_t kMany = INT64_MAX;
constexpr struct {
  const char* name;
  int64_t below[4];  // tokens, for ternary weights and 2, 3, 4 bits
  Isa least = kScalar;     // only where so much may be used
  bool per_chunk = false;  // tokens for every chunk of a group, or of 256 inputs where that is less
} kPreference[] = {
    // Only where VLLM_FLUTE_ACTIVATIONS asks for int8.
    {"dot8-avx512vnni", {9, 12, 12, 14}},
    {"tile-amxint8", {kMany, kMany, kMany, kMany}},
    {"dot8-avx512vnni", {kMany, kMany, kMany, kMany}},

    {"gemv-avx512", {2, 2, 2, 2}, kAmx},
    {"sums-amxbf16", {48, 48, 48, 48}, kAmx, true},
    {"gemv-avx512", {6, 6, 7, 8}, kAmx},  // groups that sums-amxbf16 does not take
    {"tile-amxbf16", {kMany, kMany, kMany, kMany}},
    {"gemv-avx512bf16", {10, 24, 64, 65}},
    {"tile-avx512bf16", {0, 0, 0, kMany}},
    {"gemv-avx512", {8, 8, 9, 17}},
    {"vlut-avx512", {kMany, kMany, kMany, kMany}},
    {"tile-avx512bf16", {kMany, kMany, kMany, kMany}},
    {"gemv-avx512", {65, 65, 65, 65}},
    {"tile-avx512", {kMany, kMany, kMany, kMany}},

    {"dot16-avx2", {6, 9, 13, kMany}},
    {"gemv-avx2", {5, 6, 8, 8}},
    {"vlut-avx2", {kMany, kMany, kMany, kMany}},
    {"gemv-avx2", {9, 9, 9, 9}},
    {"tile-avx2", {kMany, kMany, kMany, kMany}},

    {"gemv-neon", {9, 9, 17, 9}},
    {"vlut-neon", {kMany, kMany, kMany, 0}},
    {"gemv-neon", {9, 9, 9, 9}},
    {"tile-neon", {kMany, kMany, kMany, kMany}},

    // What tiles do not take: trit20 in fp32.
    {"gemv-avx512", {kMany, kMany, kMany, kMany}},
    {"gemv-avx2", {kMany, kMany, kMany, kMany}},
    {"reference", {kMany, kMany, kMany, kMany}},
};

}  // namespace

const Kernel* const* all_kernels() {
  static const std::vector<const Kernel*> instance = [] {
    std::vector<const Kernel*> all;
    for (const Kernel* list : {
#ifdef FLUTE_EMULATE_AMX
             kAmxKernels,
#elif defined(FLUTE_X86)
             kAvx2Kernels, kAvx512Kernels, kAvx512VnniKernels, kAvx512Bf16Kernels, kAmxKernels,
#elif defined(__aarch64__)
             kNeonKernels,
#endif
             kReferenceKernels}) {
      for (; list->name; ++list) all.push_back(list);
    }
    all.push_back(nullptr);
    return all;
  }();
  return instance.data();
}

const Kernel& choose(const Weights& w, int64_t m, Dtype dtype, const std::string& name) {
  const Registry& r = registry();
  if (!r.error.empty()) throw std::invalid_argument(r.error);
  const Kernel* kernel = r.find(name);
  if (name.empty()) {
    const int64_t bits = w.ternary ? 1 : w.bits;
    for (const TableLine* line = table; line != table + table_lines; ++line) {
      if (line->bits != bits || line->dtype != dtype || m > line->max_tokens || w.n * w.k > line->max_weights) continue;
      const Kernel* measured = r.find(line->slot);
      if (!measured || (r.int8_first && measured->arithmetic != kInt8)) continue;
      if (r.may_take(*measured, w, dtype)) return *measured;
    }
    for (const auto& preferred : kPreference) {
      kernel = r.find(preferred.name);
      const int64_t times = preferred.per_chunk ? (w.group_size < 256 ? w.group_size : 256) / kChunk : 1;
      if (kernel && r.used >= preferred.least && m < preferred.below[bits - 1] * times && r.may_take(*kernel, w, dtype)) break;
    }
  }
  std::string why = !kernel ? "there is no such kernel" : r.lacks(*kernel);
  if (why.empty() && r.refuses(*kernel, w, dtype)) why = std::string("does not take ") + r.refuses(*kernel, w, dtype);
  if (!why.empty()) throw std::invalid_argument("kernel '" + name + "': " + why + " (available: " + r.available() + ")");
  return *kernel;
}

void count(const Kernel& kernel, const Weights& w, int64_t m) {
  count_call(__atomic_load_n(&page, __ATOMIC_ACQUIRE), kernel.slot, m, w.bytes * kernel.passes(w, m));
}

}  // namespace flute

const char* flute_cpu_describe() { return flute::registry().description.c_str(); }

void flute_cpu_set_counters(void* page) { __atomic_store_n(&flute::page, static_cast<uint64_t*>(page), __ATOMIC_RELEASE); }

void flute_cpu_set_table(const void* lines, int64_t count) {
  flute::table = static_cast<const flute::TableLine*>(lines);
  flute::table_lines = count;
}

const char* flute_cpu_choose(const int64_t* header, int64_t m, int dtype) {
  try {
    if (dtype < flute::kF32 || dtype > flute::kF16) return "";
    const flute::Weights w = flute::parse_header(header, flute::kHeaderFixed + header[flute::kFieldShards]);
    return flute::choose(w, m, flute::Dtype(dtype), "").name;
  } catch (const std::exception&) {
    return "";
  }
}
