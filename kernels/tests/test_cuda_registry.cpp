// Which GPU kernel a call takes and what headers are refused: registry.cpp as it would be compiled for all that nvcc knows,
// without a GPU.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "registry.h"

namespace flute::cuda {

static int checks = 0;

static void expect(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

static std::vector<int64_t> header_of(int bits, int64_t group, int64_t k, std::vector<int64_t> rows, int64_t layout = kMma64) {
  std::vector<int64_t> header = {kMagic, kAbi, layout, bits, group, k, kScaleBf16, int64_t(rows.size())};
  header.insert(header.end(), rows.begin(), rows.end());
  return header;
}

static Packed weights(int bits, int64_t group = 128, int64_t k = 4096, std::vector<int64_t> rows = {4096}) {
  const std::vector<int64_t> header = header_of(bits, group, k, rows);
  return read_layer(header.data(), int64_t(header.size())).w;
}

// The line of what `f` throws; empty if nothing.
template <class F>
static std::string refusal(const F& f) {
  try {
    f();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

static bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

static void check_headers() {
  const std::vector<int64_t> good = header_of(3, 40, 200, {128, 72, 1});
  const Layer layer = read_layer(good.data(), int64_t(good.size()));
  expect(layer.w.n == 201 && layer.w.groups == 5 && layer.w.strips == 5 && layer.w.blocks == 4 && layer.w.bits == 3, "sizes");
  const Shard expected[] = {{0, 2, 0, 128}, {2, 2, 128, 72}, {4, 1, 200, 1}};
  expect(layer.shards.size() == 3 && !memcmp(layer.shards.data(), expected, sizeof expected), "the shards' table");
  const struct {
    int field;
    int64_t value;
    const char* why;
  } broken[] = {{kFieldMagic, 1, "not one"},       {kFieldAbi, 2, "ABI 2"},
                {kFieldLayout, kTile16, "layout 1, the GPU kernels read layout 4"}, {kFieldLayout, 5, "layout 5"},
                {kFieldBits, 5, "5 bits"},         {kFieldGroupSize, 48, "group size 48"},
                {kFieldK, 204, "K=204"},           {kFieldScaleDtype, 2, "dtype of scales"},
                {kFieldShards, 2, "number of shards"}, {kHeaderFixed, 0, "shard 0 has 0 rows"}};
  for (const auto& each : broken) {
    std::vector<int64_t> header = good;
    header[each.field] = each.value;
    const std::string why = refusal([&] { read_layer(header.data(), int64_t(header.size())); });
    expect(has(why, each.why) && !has(why, "\n"), std::string(each.why) + ", found: " + why);
    expect(std::string(flute_cuda_choose(header.data(), 1, kBf16, 90)).empty() || each.field == kFieldShards, each.why);
  }
}

static std::string chosen(const Packed& w, int64_t m, Dtype dtype, int arch, const std::string& name = "") {
  return choose(w, m, dtype, name, arch).name;
}

static void check_default() {
  for (int arch : {80, 86, 89, 90, 100, 120, 121}) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (Dtype dtype : {kBf16, kF16}) {
        // Few tokens, more and many: one kernel each, in this order.
        std::vector<std::string> seen;
        for (int64_t m = 1; m <= 4096; ++m) {
          const std::string name = chosen(weights(bits), m, dtype, arch);
          if (seen.empty() || seen.back() != name) seen.push_back(name);
          if (m <= 32) expect(name == "mma", "up to 32 tokens");
          if (m > 32 && arch == 90) expect(name == (m <= 2048 ? "wgmma" : "dequantize-cublas"), "more than 32 tokens on Hopper");
          if (m > 32 && m <= 64 && arch != 90) expect(name == "mma", "33 to 64 tokens elsewhere");
          if (m >= 1024 && arch != 90) expect(name == "dequantize-cublas", "many tokens");
        }
        expect(seen == (arch == 90 ? std::vector<std::string>{"mma", "wgmma", "dequantize-cublas"} : std::vector<std::string>{"mma", "dequantize-cublas"}),
               "sm_" + std::to_string(arch));
      }
      expect(chosen(weights(bits), 1, kF32, arch) == "dequantize-cublas", "fp32 activations");
    }
    // No shape is refused.
    for (const Packed& w : {weights(4, 8, 4096), weights(4, 24, 48), weights(4, 512, 4096)}) {
      for (int64_t m : {1, 64}) expect(chosen(w, m, kBf16, arch) == "dequantize-cublas", "what the fused kernels do not take");
    }
    expect(chosen(weights(4, 48, 48, {4095, 1}), 1, kBf16, arch) == "mma", "one group of any size, and any rows");
  }
}

static void check_names() {
  const Packed w = weights(4);
  for (const char* name : {"mma", "wgmma", "dequantize-cublas"}) expect(chosen(w, 4096, kF16, 90, name) == name, name);
  const struct {
    const char* name;
    int arch;
    Dtype dtype;
    const char* why;
  } refused[] = {{"warp", 90, kBf16, "there is no such kernel (available: mma, wgmma, dequantize-cublas)"},
                 {"wgmma", 80, kBf16, "only sm_90 has its instructions (available: mma, dequantize-cublas)"},
                 {"mma", 90, kF32, "does not take float32 activations"},
                 {"mma", 75, kBf16, "compute capability 7.5 is older than 8.0"},
                 {"", 103, kBf16, "the library has no code for sm_103 (it has 80 89 90a 100a 120)"}};
  for (const auto& each : refused) {
    const std::string why = refusal([&] { choose(w, 1, each.dtype, each.name, each.arch); });
    expect(has(why, each.why), std::string(each.why) + ", found: " + why);
  }
}

static void check_table() {
  constexpr int64_t kWeights = int64_t(4096) * 4096;
  const TableLine lines[] = {{4, kBf16, 8, kWeights, 22}, {4, kBf16, 8, INT64_MAX, 21}, {4, kF32, 8, INT64_MAX, 20}};
  flute_cuda_set_table(lines, 3);
  expect(chosen(weights(4), 8, kBf16, 90) == "dequantize-cublas", "a line's kernel");
  expect(chosen(weights(4), 9, kBf16, 90) == "mma" && chosen(weights(4), 8, kF16, 90) == "mma" && chosen(weights(3), 8, kBf16, 90) == "mma", "other calls");
  const Packed larger = weights(4, 128, 4096, {4104});
  expect(chosen(larger, 8, kBf16, 90) == "wgmma", "the second line");
  expect(chosen(larger, 8, kBf16, 80) == "mma", "a kernel that does not run there");
  expect(chosen(weights(4), 1, kF32, 90) == "dequantize-cublas", "a kernel that does not take the call");
  flute_cuda_set_table(nullptr, 0);
  expect(chosen(weights(4), 8, kBf16, 90) == "mma", "without a table");
}

static void check_counters() {
  uint64_t page[kSlots][kBuckets][kFields] = {};
  flute_cuda_set_counters(page);
  const Packed w = weights(4);
  count(choose(w, 33, kBf16, "mma", 90), w, 33);
  count(choose(w, 33, kBf16, "dequantize-cublas", 90), w, 33);
  expect(page[20][5][kCalls] == 1 && page[20][5][kTokens] == 33 && page[20][5][kBytes] == uint64_t(2 * w.bytes), "mma reads weights for 32 tokens");
  expect(page[22][5][kCalls] == 1 && page[22][5][kBytes] == uint64_t(w.bytes), "dequantize reads them once");
}

}  // namespace flute::cuda

int main() {
  using namespace flute::cuda;
  check_headers();
  check_default();
  check_names();
  check_table();
  check_counters();
  for (int arch : {80, 90, 103}) std::printf("%s\n", flute_cuda_describe(arch));
  std::printf("all passed (%d checks)\n", checks);
}
