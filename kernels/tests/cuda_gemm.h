// Layers, inputs and the oracle for the tests of the GPU's GEMM kernels: random codes placed by layout.h, and sums in double
// over the codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../cuda/launch.h"
#include "flute.h"
#include "simt.h"

namespace flute::cuda {

inline int failures = 0, calls = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

inline uint64_t seed = 1;
inline uint32_t random32() { return uint32_t((seed = seed * 6364136223846793005u + 1442695040888963407u) >> 32); }
inline float uniform() { return float(random32()) * 0x1p-31f - 1; }

// Exactly `bytes`, aligned as a GPU's allocations are where it counts, so that a sanitizer sees the first byte beyond; NaNs.
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

inline float widen(uint16_t h, bool f16) { return f16 ? f16_to_f32(h) : bf16_to_f32(h); }
inline uint16_t narrow(float f, bool f16) { return f16 ? f32_to_f16(f) : f32_to_bf16(f); }

// What codebooks, scales and inputs are: small whole numbers times powers of two, whose products and sums no arithmetic
// here rounds, so that one wrong weight shows; or any.
enum Values { kWhole, kAny };

struct Layer {
  Packed w;
  Values values;
  std::vector<double> weight;  // [N, K]
  double largest = 0;          // magnitude that a weight could have
  Buffer packed{0};
};

// `book_size` and `scale_size` are the magnitudes of any values.
inline Layer make_layer(const Shape& shape, int bits, bool scale_f16, Values values, float book_size = 1, float scale_size = 1) {
  Layer layer;
  layer.values = values;
  const int64_t n_shards = int64_t(shape.shards.size());
  const Packed w = layer.w = describe(bits, scale_f16, shape.group_size, shape.k, shape.shards.data(), n_shards);
  layer.packed = Buffer(w.bytes);
  uint8_t* const packed = layer.packed.data.get();
  memset(packed, 0, w.bytes);
  layer.weight.resize(size_t(w.n) * w.k);
  int strip = 0, first_row = 0;
  for (int64_t s = 0; s < n_shards; ++s) {
    float* const book = reinterpret_cast<float*>(packed) + 16 * s;
    for (int c = 0; c < 16; ++c) {
      const float whole = std::ldexp(float(int(random32() % 31) - 15), int(s)), any = uniform() * book_size * float(s + 1);
      const float value = values == kWhole ? whole : any;
      book[c] = c < 1 << bits ? value : book[c % (1 << bits)];
    }
    const int rows = int(shape.shards[size_t(s)]), strips = (rows + kStripRows - 1) / kStripRows;
    const Shard shard{strip, strips, first_row, rows};
    memcpy(packed + n_shards * 64 + s * sizeof(Shard), &shard, sizeof shard);
    for (int r = 0; r < rows; ++r) {
      for (int g = 0; g < w.groups; ++g) {
        const float value = values == kWhole ? float(int(random32() % 15) - 7) * 0.125f : (1.5f + uniform()) * scale_size;
        const uint16_t scale = narrow(value, scale_f16);
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
        for (int c = 0; c < 1 << bits; ++c) {
          layer.largest = std::max(layer.largest, std::fabs(double(book[c]) * widen(scale, scale_f16)));
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
inline Input make_input(const Layer& layer, int m, bool f16) {
  Input in;
  in.m = m;
  in.f16 = f16;
  in.x = Buffer(size_t(m) * layer.w.k * 2);
  in.bias = Buffer(size_t(layer.w.n) * 2);
  const auto fill = [&](Buffer& to, std::vector<double>& values) {
    for (size_t i = 0; i < to.size / 2; ++i) {
      const uint16_t h = narrow(layer.values == kWhole ? float(int(random32() % 7) - 3) : uniform(), f16);
      memcpy(to.data.get() + 2 * i, &h, 2);
      values.push_back(widen(h, f16));
    }
  };
  fill(in.x, in.values);
  fill(in.bias, in.bias_values);
  return in;
}
inline void set_input(Input& in, size_t i, float value) {
  const uint16_t h = narrow(value, in.f16);
  memcpy(in.x.data.get() + 2 * i, &h, 2);
  in.values[i] = widen(h, in.f16);
}

// silu(gate) * up, rounded as vLLM does, of the y of a call without it: exactly that of its values, or, where sums round in the
// order of another division of the work, of neighbours of theirs.
inline void check_gated(const std::vector<uint16_t>& y, const Buffer& product, int half, bool f16, Values values, const std::string& name) {
  const auto silu_mul = [f16](uint16_t gate, uint16_t up) {
    const float x = widen(gate, f16), silu = widen(narrow(x / (1 + std::exp(-x)), f16), f16);
    return narrow(silu * widen(up, f16), f16);
  };
  const int step = values == kWhole ? 0 : 1;
  for (size_t i = 0; i < product.size / 2; ++i) {
    const uint16_t* const gate = y.data() + i / half * half * 2 + i % half;
    uint16_t found;
    memcpy(&found, product.data.get() + 2 * i, 2);
    bool right = false;
    for (int g = -step; g <= step; ++g) {
      for (int u = -step; u <= step; ++u) right |= found == silu_mul(uint16_t(gate[0] + g), uint16_t(gate[half] + u));
    }
    if (right) continue;
    expect(false, name + ": silu(gate) * up at " + std::to_string(i) + " is " + std::to_string(widen(found, f16)));
    return;
  }
}

using Kernel = const char* (*)(const Gemm&);

// y of one launch, whose counters and workspace it checks; `gated` checks the product as well, of a second one. `order` seeds what
// the emulator leaves open.
inline std::vector<uint16_t> run(Kernel kernel, const Layer& layer, const Input& in, const Device& device, bool with_bias,
                                 uint64_t order, const std::string& name, bool gated = false) {
  Buffer workspace(workspace_bytes(device)), y(size_t(in.m) * layer.w.n * 2), product(gated ? y.size / 2 : 0);
  const std::vector<uint16_t> alone = gated ? run(kernel, layer, in, device, with_bias, order, name) : std::vector<uint16_t>();
  memset(workspace.data.get(), 0, cleared_bytes(device));
  simt::config = {order, device.shared_bytes};
  const uint64_t before = simt::launches();
  const void* const bias = with_bias ? in.bias.data.get() : nullptr;
  const char* error = kernel({layer.w, layer.packed.data.get(), in.x.data.get(), bias, y.data.get(), gated ? product.data.get() : nullptr, in.m, in.f16,
                              workspace.data.get(), device, nullptr});
  ++calls;
  expect(!error, name + ": " + (error ? error : ""));
  expect(simt::launches() == before + 1, name + ": one launch");
  const uint8_t* const cleared = workspace.data.get();
  expect(std::all_of(cleared, cleared + cleared_bytes(device), [](uint8_t b) { return b == 0; }), name + ": counters and mail are zero again");
  std::vector<uint16_t> result(y.size / 2);
  memcpy(result.data(), y.data.get(), y.size);
  if (!gated) return result;
  check_gated(alone, product, layer.w.n / 2, in.f16, layer.values, name);
  return alone;
}

// An error that a result may have: `unit` of sum |x||w|, and of sum |x| the `step` that is a weight's error below fp16's
// normal numbers.
struct Bound {
  double unit, step;
};
// fp32 sums round by K * 2^-24 in any order (tests/tolerance.py), twice for what else is computed in fp32. Each of
// `weight_roundings` of a weight and that of the result is half a unit in the last place of x's type.
inline Bound bound(const Layer& layer, bool f16, int weight_roundings) {
  const double half_unit = f16 ? 0x1p-11 : 0x1p-8;
  return {std::pow(1 + half_unit, weight_roundings + 1) * (1 + 2.0 * layer.w.k * 0x1p-24) - 1, 0};
}

// Whole numbers must come out as the rounded sum itself, others within the bound.
inline void check(const Layer& layer, const Input& in, bool with_bias, const Bound& bound, const std::vector<uint16_t>& y,
                  const std::string& name) {
  double worst = 0;
  for (int m = 0; m < in.m; ++m) {
    for (int n = 0; n < layer.w.n; ++n) {
      const double *x = in.values.data() + size_t(m) * layer.w.k, *w = layer.weight.data() + size_t(n) * layer.w.k;
      double sum = with_bias ? in.bias_values[n] : 0, magnitude = std::fabs(sum), inputs = 0;
      for (int k = 0; k < layer.w.k; ++k) {
        sum += x[k] * w[k];
        magnitude += std::fabs(x[k] * w[k]);
        inputs += std::fabs(x[k]);
      }
      const double value = widen(y[size_t(m) * layer.w.n + n], in.f16);
      const double allowed = magnitude * bound.unit + inputs * bound.step + (in.f16 ? 0x1p-25 : 0);  // fp16's smallest step
      const double error = std::fabs(value - sum) / allowed;
      const bool whole = layer.values == kWhole || !std::isfinite(sum);
      const double rounded = widen(narrow(float(sum), in.f16), in.f16);
      if (std::isnan(sum) ? !std::isnan(value) : whole ? value != rounded : !(error <= 1)) {
        const std::string where = ": y[" + std::to_string(m) + ", " + std::to_string(n) + "] is ";
        expect(false, name + where + std::to_string(value) + ", expected " + std::to_string(sum));
        return;
      }
      if (!whole) worst = std::max(worst, error);
    }
  }
  expect(layer.values == kWhole || worst > 0 || layer.w.k < 64, name + ": an error of nothing at all is no sum in fp32");
}

inline std::string describe_case(const Layer& layer, const Shape& shape, const Input& in, const Device& device) {
  std::string shards;
  for (int64_t rows : shape.shards) shards += (shards.empty() ? "" : "+") + std::to_string(rows);
  const auto type = [](bool f16) { return f16 ? "fp16" : "bf16"; };
  return "N=" + shards + " K=" + std::to_string(shape.k) + " group " + std::to_string(shape.group_size) + ", " +
         std::to_string(layer.w.bits) + " bits, " + type(in.f16) + ", scales " + type(layer.w.scale_f16) + ", M=" +
         std::to_string(in.m) + ", " + std::to_string(device.sms) + " multiprocessors of sm_" + std::to_string(device.arch);
}

}  // namespace flute::cuda
