// K1's own source, compiled for the CPU and run by simt.h's emulator, against a sum in double over the codes: ragged shapes,
// every bit width, type, group and token tile, fused shards, both distances of table rows, many divisions of the work.
// Usage: test_cuda_mma [few], where `few` is for sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "flute.h"
#include "launch.h"
#include "simt.h"

using namespace flute;
using namespace flute::cuda;

namespace {

int failures = 0, calls = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

uint64_t seed = 1;
uint32_t random32() { return uint32_t((seed = seed * 6364136223846793005u + 1442695040888963407u) >> 32); }
float uniform() { return float(random32()) * 0x1p-31f - 1; }

// Exactly `bytes`, aligned as a GPU's allocations are where it counts, so that a sanitizer sees the first byte beyond.
struct Buffer {
  explicit Buffer(size_t bytes) : size(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, std::max<size_t>(bytes, 1))) std::abort();
    data.reset(static_cast<uint8_t*>(p));
    memset(p, 0xff, bytes);
  }
  struct Free {
    void operator()(uint8_t* p) const { free(p); }
  };
  size_t size;
  std::unique_ptr<uint8_t, Free> data;
};

struct Shape {
  std::vector<int64_t> shards;
  int64_t k, group_size;
};

struct Layer {
  Packed w;
  std::vector<double> weight;  // [N, K]
  Buffer packed{0};
};

float widen(uint16_t h, bool f16) { return f16 ? f16_to_f32(h) : bf16_to_f32(h); }
uint16_t narrow(float f, bool f16) { return f16 ? f32_to_f16(f) : f32_to_bf16(f); }

// Random codes and scales. `book_size` and `scale_size` are the magnitudes of the codebooks' and the scales' values.
Layer make_layer(const Shape& shape, int bits, bool scale_f16, float book_size = 1, float scale_size = 1) {
  Layer layer;
  const Packed w = layer.w = describe(bits, scale_f16, shape.group_size, shape.k, shape.shards.data(), int64_t(shape.shards.size()));
  layer.packed = Buffer(w.bytes);
  uint8_t* const packed = layer.packed.data.get();
  memset(packed, 0, w.bytes);
  layer.weight.resize(size_t(w.n) * w.k);
  int strip = 0, first_row = 0;
  for (size_t s = 0; s < shape.shards.size(); ++s) {
    float* const book = reinterpret_cast<float*>(packed) + 16 * s;
    for (int c = 0; c < 16; ++c) book[c] = c < 1 << bits ? uniform() * book_size * float(s + 1) : book[c % (1 << bits)];
    const int rows = int(shape.shards[s]), strips = (rows + kStripRows - 1) / kStripRows;
    const Shard shard{strip, strips, first_row, rows};
    memcpy(packed + shape.shards.size() * 64 + s * sizeof(Shard), &shard, sizeof shard);
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < w.groups; ++g) {
        const uint16_t scale = narrow((1.5f + uniform()) * scale_size, scale_f16);
        uint16_t* const scales = const_cast<uint16_t*>(strip_scales(w, packed, strip + r / kStripRows, g));
        scales[scale_place(r % kStripRows)] = scale;
        for (int64_t k = g * shape.group_size; k < (g + 1) * shape.group_size; ++k) {
          const int code = int(random32() % (1u << bits)), kb = int(k % kBlockInputs), rb = r % kStripRows;
          uint8_t* const block = const_cast<uint8_t*>(block_codes(w, packed, strip + r / kStripRows, k / kBlockInputs));
          const Place low = code_place(bits, rb, kb);
          block[low.byte] = uint8_t(block[low.byte] | (code & (bits == 4 ? 15 : 3)) << low.shift);
          if (bits == 3) {
            const Place high = high_place(rb, kb);
            block[high.byte] = uint8_t(block[high.byte] | code >> 2 << high.shift);
          }
          layer.weight[size_t(first_row + r) * w.k + k] = double(book[code]) * widen(scale, scale_f16);
        }
      }
    }
    strip += strips;
    first_row += rows;
  }
  return layer;
}

struct Input {
  int m;
  bool f16;
  Buffer x{0}, bias{0};
  std::vector<double> values, bias_values;
};
Input make_input(const Layer& layer, int m, bool f16) {
  Input in;
  in.m = m;
  in.f16 = f16;
  in.x = Buffer(size_t(m) * layer.w.k * 2);
  in.bias = Buffer(size_t(layer.w.n) * 2);
  const auto fill = [&](Buffer& to, std::vector<double>& values) {
    for (size_t i = 0; i < to.size / 2; ++i) {
      const uint16_t h = narrow(uniform(), f16);
      memcpy(to.data.get() + 2 * i, &h, 2);
      values.push_back(widen(h, f16));
    }
  };
  fill(in.x, in.values);
  fill(in.bias, in.bias_values);
  return in;
}
void set_input(Input& in, size_t i, float value) {
  const uint16_t h = narrow(value, in.f16);
  memcpy(in.x.data.get() + 2 * i, &h, 2);
  in.values[i] = widen(h, in.f16);
}

// arch 90 has wide table rows, 89 the others.
Device device_of(int arch, int sms) { return {arch, sms, (arch == 90 ? 227 : 99) * 1024}; }

std::vector<uint16_t> run(const Layer& layer, const Input& in, const Device& device, bool with_bias, uint64_t order, const std::string& name) {
  Buffer workspace(workspace_bytes(device)), y(size_t(in.m) * layer.w.n * 2);  // 0xff, NaNs
  memset(workspace.data.get(), 0, kCounterBytes);
  simt::config = {order, device.shared_bytes};
  const uint64_t before = simt::launches();
  const char* error = run_mma({layer.w, layer.packed.data.get(), in.x.data.get(), with_bias ? in.bias.data.get() : nullptr, y.data.get(),
                               in.m, in.f16, workspace.data.get(), device, nullptr});
  ++calls;
  expect(!error, name + ": " + (error ? error : ""));
  expect(simt::launches() == before + 1, name + ": one launch");
  expect(std::all_of(workspace.data.get(), workspace.data.get() + kCounterBytes, [](uint8_t b) { return b == 0; }), name + ": counters are zero again");
  std::vector<uint16_t> result(y.size / 2);
  memcpy(result.data(), y.data.get(), y.size);
  return result;
}

// fp32 sums round by K * 2^-24 in any order, twice for the scales' part in it; a weight is rounded once to x's type, and so
// is the result: half a unit each (tests/tolerance.py). fp16 results also have a smallest step.
void check(const Layer& layer, const Input& in, bool with_bias, const std::vector<uint16_t>& y, const std::string& name) {
  const double unit = 2.0 * layer.w.k * 0x1p-24 + (in.f16 ? 0x1p-10 : 0x1p-7), smallest = in.f16 ? 0x1p-25 : 0;
  double worst = 0;
  for (int m = 0; m < in.m; ++m) {
    for (int n = 0; n < layer.w.n; ++n) {
      const double *x = in.values.data() + size_t(m) * layer.w.k, *w = layer.weight.data() + size_t(n) * layer.w.k;
      double sum = with_bias ? in.bias_values[n] : 0, magnitude = std::fabs(sum);
      for (int k = 0; k < layer.w.k; ++k) {
        sum += x[k] * w[k];
        magnitude += std::fabs(x[k] * w[k]);
      }
      const double value = widen(y[size_t(m) * layer.w.n + n], in.f16), error = std::fabs(value - sum) / (magnitude * unit + smallest);
      const bool same = std::isnan(sum) ? std::isnan(value) : std::isinf(sum) ? value == sum : error <= 1;
      if (!same) {
        expect(false, name + ": y[" + std::to_string(m) + ", " + std::to_string(n) + "] is " + std::to_string(value) + ", expected " + std::to_string(sum));
        return;
      }
      if (std::isfinite(sum)) worst = std::max(worst, error);
    }
  }
  expect(worst > 0 || layer.w.k < 64, name + ": an error of nothing at all is no sum in fp32");
}

std::string describe_case(const Shape& shape, int bits, bool f16, int m, const Device& device) {
  std::string shards;
  for (int64_t rows : shape.shards) shards += (shards.empty() ? "" : "+") + std::to_string(rows);
  return "N=" + shards + " K=" + std::to_string(shape.k) + " group " + std::to_string(shape.group_size) + ", " + std::to_string(bits) + " bits, " +
         (f16 ? "fp16" : "bf16") + ", M=" + std::to_string(m) + ", " + std::to_string(device.sms) + " multiprocessors of sm_" + std::to_string(device.arch);
}

void check_shapes(bool few) {
  const Shape shapes[] = {{{8}, 64, 64},           {{72}, 72, 72},     {{200}, 320, 64},         {{200}, 320, 32},
                          {{136}, 576, 16},        {{64}, 1040, 16},   {{64, 8, 200}, 512, 128}, {{320}, 768, 256},
                          {{128, 72}, 1040, 1040}, {{8, 8}, 8, 8},     {{264}, 1024, 64},        {{192, 64, 64}, 832, 64},
                          {{72}, 672, 32},         {{16}, 2048, 128}};
  const int tokens[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 70}, sms[] = {1, 2, 3, 5, 7, 13, 132};
  size_t turn = 0;
  for (const Shape& shape : shapes) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int f16 = 0; f16 < 2; ++f16) {
        const Layer layer = make_layer(shape, bits, turn % 2);
        // Over the shapes every count of tokens meets all bits, types and kinds of device.
        for (int i = 0; i < (few ? 1 : 4); ++i, ++turn) {
          const int m = tokens[turn * 5 % std::size(tokens)];
          const Device device = device_of(turn / 3 % 2 ? 89 : 90, sms[turn % std::size(sms)]);
          const std::string name = describe_case(shape, bits, f16, m, device);
          const Input in = make_input(layer, m, f16);
          check(layer, in, turn % 2, run(layer, in, device, turn % 2, turn, name), name);
        }
      }
    }
  }
}

// Whoever comes last adds up: the order in which CTAs run must not show. The division of work may, in the last bits.
void check_orders(bool few) {
  const Shape shape{{200, 64}, 1088, 64};
  for (int bits = 2; bits <= 4; ++bits) {
    for (int m : {1, 16, 40}) {
      const Layer layer = make_layer(shape, bits, false);
      const Input in = make_input(layer, m, m == 16);
      for (int sms : {2, 5, 11}) {
        const Device device = device_of(90, sms);
        const std::string name = "orders, " + describe_case(shape, bits, in.f16, m, device);
        const std::vector<uint16_t> y = run(layer, in, device, true, 1, name);
        check(layer, in, true, y, name);
        for (uint64_t order = 2; order < (few ? 3 : 5); ++order) expect(run(layer, in, device, true, order, name) == y, name + ": order " + std::to_string(order));
        if (few) return;
      }
    }
  }
}

// What is not finite stays in its token; codebooks beyond what fp16 can hold do not overflow or vanish.
void check_values() {
  const Shape shape{{72, 64}, 200, 200};
  for (int bits = 2; bits <= 4; ++bits) {
    for (bool f16 : {false, true}) {
      const Layer layer = make_layer(shape, bits, f16);
      Input in = make_input(layer, 5, f16);
      set_input(in, 1 * 200 + 3, INFINITY);
      set_input(in, 3 * 200 + 199, NAN);
      const Device device = device_of(90, 3);
      const std::string name = "special values, " + describe_case(shape, bits, f16, 5, device);
      check(layer, in, true, run(layer, in, device, true, 7, name), name);
      for (float size : {1e30f, 1e-30f, 1e-38f}) {
        const Layer extreme = make_layer(shape, bits, false, size, 1 / size);
        const Input plain = make_input(extreme, 9, f16);
        const std::string what = "codebook of " + std::to_string(size) + ", " + name;
        check(extreme, plain, false, run(extreme, plain, device, false, 8, what), what);
      }
    }
  }
}

void check_refusals() {
  const Layer layer = make_layer({{8}, 48, 24}, 4, false);
  const Input in = make_input(layer, 1, false);
  Gemm call{layer.w, layer.packed.data.get(), in.x.data.get(), nullptr, nullptr, 1, 0, nullptr, device_of(90, 1), nullptr};
  const auto refused = [&](const char* words) {
    const char* error = run_mma(call);
    expect(error && strstr(error, words), std::string("refused with the words '") + words + "', not " + (error ? error : "nothing"));
  };
  refused("group_size is 24");
  call.w = make_layer({{8}, 48, 48}, 4, false).w;
  call.device.shared_bytes = 48 * 1024;
  refused("too little shared memory");
  call.w.bits = 5;
  refused("bits is 5");
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = argc > 1 && std::string(argv[1]) == "few";
  check_shapes(few);
  check_orders(few);
  check_values();
  check_refusals();
  if (!failures) std::printf("%d calls of K1 agree with the oracle\n", calls);
  return failures != 0;
}
