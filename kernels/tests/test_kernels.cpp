// Every kernel that this CPU runs against a naive sum in double over the checkpoint's own bit stream, on ragged
// shapes; the layout there and back; refused headers. No torch: also the program to run under sanitizers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "flute.h"

using namespace flute;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

uint64_t seed = 1;
uint32_t random32() { return uint32_t((seed = seed * 6364136223846793005u + 1442695040888963407u) >> 32); }
float uniform() { return float(random32()) * 0x1p-31f - 1; }

void run_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < n; ++i) pool.emplace_back(body, i, i + 1, context);
  for (std::thread& t : pool) t.join();
}

struct Case {
  int bits;
  int64_t k, group_size;
  std::vector<int64_t> shards;
  ScaleDtype scale_dtype;
  Layout layout = kTile16;
};

// Inputs are summed in 16 bits over blocks of up to 128 in a group, of 160 in layout TRIT20, each product
// rounded by half a unit (vlut.inc.h).
double int16_error(const Weights& w, const double* x, const float* largest) {
  const int64_t longest = w.trits ? 160 : 128;
  double error = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t begin = g * w.group_size; begin < (g + 1) * w.group_size; begin += longest) {
      const int64_t size = std::min(longest, (g + 1) * w.group_size - begin);
      double sum = 0;
      for (int64_t k = begin; k < begin + size; ++k) sum += std::fabs(x[k]);
      error += largest[g] * sum / (32766 - double(longest) / 2) * double(size) / 2;
    }
  }
  return error;
}

// Inputs as whole multiples of a step for each block of up to 128 in a group, weights of 1/16383 of what is the largest in the
// codebook, times the group's scale (dot16.inc.h): |xw - x'w'| <= |w| dx + |x| dw + dx dw with half steps dx and dw. In fp32 a
// step and its reciprocal are off by 2^-20 at most.
double int16_products_error(const Weights& w, const double* x, const float* weight, const float* largest) {
  double error = 0;
  for (int64_t begin = 0, end; begin < w.k; begin = end) {
    const int64_t group = begin / w.group_size;
    end = std::min(begin + 128, (group + 1) * w.group_size);
    double top = 0, sum = 0;
    for (int64_t k = begin; k < end; ++k) {
      top = std::max(top, std::fabs(x[k]));
      sum += std::fabs(x[k]);
    }
    const double dx = std::max(sum / (131072 - 64), top / 32639) / 2 * (1 + 0x1p-20), dw = largest[group] / 32766.0 * (1 + 0x1p-20);
    for (int64_t k = begin; k < end; ++k) error += std::fabs(weight[k]) * dx + std::fabs(x[k]) * dw + dx * dw;
  }
  return error;
}

// Inputs and weights as whole multiples of a step each, 1/127 of the largest magnitude of a block of inputs (up to 256 in a
// group) and of what the group's weights could be (int8.inc.h): |xw - x'w'| <= |w| dx + |x| dw + dx dw with half steps dx
// and dw. In fp32 the step, its reciprocal and the quotient round by 2^-24 each: a half step is 1 + 2^-14 as long.
double int8_error(const Weights& w, const double* x, const float* weight, const float* largest) {
  double error = 0;
  for (int64_t begin = 0, end; begin < w.k; begin = end) {
    const int64_t group = begin / w.group_size;
    end = std::min(begin + 256, (group + 1) * w.group_size);
    double top = 0;
    for (int64_t k = begin; k < end; ++k) top = std::max(top, std::fabs(x[k]));
    const double dx = top / 254 * (1 + 0x1p-14), dw = largest[group] / 254.0 * (1 + 0x1p-14);
    for (int64_t k = begin; k < end; ++k) error += std::fabs(weight[k]) * dx + std::fabs(x[k]) * dw + dx * dw;
  }
  return error;
}

// One call of every kernel that takes it.
struct Result {
  const Kernel* kernel;
  std::vector<uint8_t> y;
  bool failed = false;
};
std::map<std::string, int> compared;  // calls

// The results against the sum in double. An fp32 operation rounds by at most 2^-24 of what it sums, a bf16 weight by 2^-8
// of itself, and the result is rounded to its dtype (fp16 also has a smallest step). `largest` [N, G] is the magnitude of
// the largest weight that a group could hold.
void check_call(const Weights& w, const std::vector<float>& weight, const std::vector<float>& largest, Dtype dtype, int64_t m, const std::string& name) {
  const int64_t bytes = dtype == kF32 ? 4 : 2;
  std::vector<uint8_t> x(m * w.k * bytes), bias(w.n * bytes);
  std::vector<double> inputs(m * w.k);
  for (int64_t i = 0; i < m * w.k; ++i) {
    store_value(x.data(), i, dtype, uniform());
    inputs[i] = load_value(x.data(), i, dtype);
  }
  for (int64_t i = 0; i < w.n; ++i) store_value(bias.data(), i, dtype, uniform());
  const bool with_bias = m % 2;
  std::vector<Result> results;
  bool used[kArithmetics] = {};
  for (const Kernel* const* kernel = all_kernels(); *kernel; ++kernel) {
    try {
      choose(w, m, dtype, (*kernel)->name);
    } catch (const std::invalid_argument&) {
      continue;  // another CPU's, or not for these weights
    }
    results.push_back({*kernel, std::vector<uint8_t>(m * w.n * bytes)});
    (*kernel)->run({w, x.data(), with_bias ? bias.data() : nullptr, results.back().y.data(), m, dtype, {2, run_threads}});
    used[(*kernel)->arithmetic] = true;
    ++compared[(*kernel)->name];
  }
  if (results.empty()) return;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t n = 0; n < w.n; ++n) {
      const double* in = inputs.data() + i * w.k;
      const float *row = weight.data() + n * w.k, *top = largest.data() + n * w.groups;
      double sum = with_bias ? load_value(bias.data(), n, dtype) : 0, magnitude = std::fabs(sum);
      for (int64_t k = 0; k < w.k; ++k) {
        const double p = in[k] * row[k];
        sum += p;
        magnitude += std::fabs(p);
      }
      double bound[kArithmetics] = {};
      if (used[kBf16Weights]) bound[kBf16Weights] = magnitude * 0x1p-8;
      if (used[kInt16]) bound[kInt16] = int16_error(w, in, top);
      if (used[kInt16Products]) bound[kInt16Products] = int16_products_error(w, in, row, top) * (1 + (double(w.k) + 8) * 0x1p-24);
      if (used[kInt8]) bound[kInt8] = int8_error(w, in, row, top) * (1 + (double(w.k) + 8) * 0x1p-24);  // the fp32 operations also sum what is in error
      for (double& b : bound) {
        b += magnitude * (double(w.k) + 8) * 0x1p-24;
        if (dtype == kBf16) b += std::fabs(sum) * 0x1p-8;
        if (dtype == kF16) b += std::fabs(sum) * 0x1p-11 + 0x1p-24;
      }
      for (Result& r : results) {
        const double got = load_value(r.y.data(), i * w.n + n, dtype);
        if (r.failed || std::fabs(got - sum) <= bound[r.kernel->arithmetic]) continue;
        r.failed = true;
        expect(false, std::string(r.kernel->name) + ", " + name + ", dtype " + std::to_string(dtype) + ", M=" + std::to_string(m) + ": y[" +
                          std::to_string(i) + ", " + std::to_string(n) + "] is " + std::to_string(got) + ", not " + std::to_string(sum));
      }
    }
  }
}

void check_case(const Case& c) {
  std::vector<int64_t> header = {kMagic, kAbi, c.layout, c.bits, c.group_size, c.k, c.scale_dtype, int64_t(c.shards.size())};
  header.insert(header.end(), c.shards.begin(), c.shards.end());
  Weights w = parse_header(header.data(), int64_t(header.size()));
  const std::string name = std::to_string(c.bits) + " bits, layout " + std::to_string(c.layout) + ", N=" + std::to_string(w.n) + ", K=" + std::to_string(c.k) + ", group " + std::to_string(c.group_size);
  const int64_t row_bytes = c.k * c.bits / 8, size = int64_t(1) << c.bits;
  std::vector<uint8_t> qweight(w.n * row_bytes);
  std::vector<uint16_t> scales(w.n * w.groups);
  std::vector<float> books(w.n_shards * size);
  for (auto& v : qweight) v = uint8_t(random32());
  for (auto& v : scales) v = c.scale_dtype == kScaleF16 ? f32_to_f16(uniform()) : f32_to_bf16(uniform());
  for (auto& v : books) v = uniform();
  for (int64_t s = 0; w.ternary && s < w.n_shards; ++s) books[4 * s + 3] = books[4 * s + 2];

  const Parallel parallel{2, run_threads};
  // Exactly as large as promised: a sanitizer sees a byte read or written beyond.
  std::vector<uint8_t> packed(w.bytes);
  pack(w, qweight.data(), scales.data(), books.data(), packed.data(), parallel);
  w.packed = packed.data();
  std::vector<uint8_t> qweight2(qweight.size());
  std::vector<uint16_t> scales2(scales.size());
  std::vector<float> books2(books.size());
  unpack(w, qweight2.data(), scales2.data(), books2.data(), parallel);
  if (w.ternary) {
    for (auto& v : qweight) v &= uint8_t(~(v >> 1 & 0x55));  // code 3 is stored as 2
  }
  expect(qweight == qweight2 && scales == scales2 && books == books2, "pack and unpack, " + name);

  std::vector<float> weight(w.n * c.k), largest(w.n * w.groups);
  for (int64_t n = 0, shard = 0, left = c.shards[0]; n < w.n; ++n, --left) {
    if (left == 0) left = c.shards[++shard];
    float top = 0;
    for (int64_t i = 0; i < size; ++i) top = std::max(top, std::fabs(books[shard * size + i]));
    for (int64_t g = 0; g < w.groups; ++g) largest[n * w.groups + g] = top * std::fabs(scale_to_f32(scales[n * w.groups + g], c.scale_dtype));
    for (int64_t k = 0; k < c.k; ++k) {
      unsigned code = 0;
      for (int b = 0; b < c.bits; ++b) {
        const int64_t bit = k * c.bits + b;
        code |= unsigned(qweight[n * row_bytes + bit / 8] >> bit % 8 & 1) << b;
      }
      weight[n * c.k + k] = books[shard * size + code] * scale_to_f32(scales[n * w.groups + k / c.group_size], c.scale_dtype);
    }
  }
  for (const Dtype dtype : {kF32, kBf16, kF16}) {
    for (const int64_t m : {1, 2, 3, 5, 8, 13, 33, 70}) {
      if (w.n < 1000 || m == 1 || m == 33) check_call(w, weight, largest, dtype, m, name);  // many rows: the sum in double takes long
    }
  }
}

// An infinity and a NaN of the inputs come out in their token's results, and in no other's.
void check_special_values() {
  const std::vector<int64_t> header = {kMagic, kAbi, kTile16, 4, 8, 40, kScaleF16, 1, 20};
  Weights w = parse_header(header.data(), int64_t(header.size()));
  std::vector<uint8_t> qweight(w.n * w.k / 2), packed(w.bytes);
  std::vector<uint16_t> scales(w.n * w.groups, f32_to_f16(1));
  std::vector<float> book(16);
  for (auto& v : qweight) v = uint8_t(random32());
  for (auto& v : book) v = uniform();
  pack(w, qweight.data(), scales.data(), book.data(), packed.data(), {1, run_threads});
  w.packed = packed.data();
  for (const Kernel* const* kernel = all_kernels(); *kernel; ++kernel) {
    for (const Dtype dtype : {kF32, kBf16, kF16}) {
      try {
        choose(w, 3, dtype, (*kernel)->name);
      } catch (const std::invalid_argument&) {
        continue;
      }
      const int64_t bytes = dtype == kF32 ? 4 : 2;
      std::vector<uint8_t> x(3 * w.k * bytes), y(3 * w.n * bytes);
      store_value(x.data(), w.k - 1, dtype, INFINITY);
      store_value(x.data(), w.k, dtype, NAN);
      (*kernel)->run({w, x.data(), nullptr, y.data(), 3, dtype, {1, run_threads}});
      bool ok = true;
      for (int64_t n = 0; n < w.n; ++n) {
        ok &= !std::isfinite(load_value(y.data(), n, dtype)) && std::isnan(load_value(y.data(), w.n + n, dtype));
        ok &= load_value(y.data(), 2 * w.n + n, dtype) == 0;
      }
      expect(ok, std::string(kernel[0]->name) + ": special values, dtype " + std::to_string(dtype));
    }
  }
}

// Every number of ten codes there and back, its fraction, and that no kernel takes the layout who does not say so.
void check_trits() {
  const std::vector<int64_t> header = {kMagic, kAbi, kTrit20, 2, 40, 40, kScaleBf16, 1, 29525};
  Weights w = parse_header(header.data(), int64_t(header.size()));
  std::vector<uint8_t> qweight(w.n * w.k / 4), back(qweight.size()), packed(w.bytes);
  std::vector<uint16_t> scales(w.n, 0x3f80);
  const std::vector<float> book = {-1, 0, 1, 1};
  std::vector<float> book_back(4);
  // A row has four numbers: of the even and of the odd inputs of two chunks.
  const auto number = [](int64_t n, int64_t k) { return n + k / 20 * 29524 + k % 2; };
  for (int64_t n = 0; n < w.n; ++n) {
    for (int64_t k = 0; k < w.k; ++k) {
      int64_t digits = number(n, k) % 59049;
      for (int64_t i = k % 20 / 2; i < 9; ++i) digits /= 3;
      qweight[n * w.k / 4 + k / 4] |= uint8_t(digits % 3 << k % 4 * 2);
    }
  }
  pack(w, qweight.data(), scales.data(), book.data(), packed.data(), {2, run_threads});
  w.packed = packed.data();
  unpack(w, back.data(), scales.data(), book_back.data(), {2, run_threads});
  expect(qweight == back && book == book_back, "every number of ten trits");
  bool exact = true;
  for (int64_t n = 0; n < w.n; ++n) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(tile_data(w, n / kTileRows)) + n % kTileRows;
    for (int64_t k : {0, 1, 20, 21}) {
      exact &= (words[k / 20 * kTileRows] >> k % 2 * 16 & 0xffff) == (number(n, k) % 59049 * 65536 + 59048) / 59049;
    }
  }
  expect(exact, "fractions of trits");
  for (const Kernel* const* kernel = all_kernels(); *kernel; ++kernel) {
    try {
      choose(w, 1, kBf16, (*kernel)->name);
      expect((*kernel)->trits, std::string((*kernel)->name) + " takes trit20");
    } catch (const std::invalid_argument&) {  // the layout is not for it, or it does not run here
    }
  }
}

void check_refused(std::vector<int64_t> header, int field, int64_t value) {
  header[field] = value;
  try {
    parse_header(header.data(), int64_t(header.size()));
    expect(false, "header field " + std::to_string(field) + " = " + std::to_string(value) + " was accepted");
  } catch (const std::invalid_argument&) {
  }
}

void check_conversions() {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    const float b = bf16_to_f32(uint16_t(h)), f = f16_to_f32(uint16_t(h));
    expect(std::isnan(b) || f32_to_bf16(b) == h, "bf16 " + std::to_string(h));
    expect(std::isnan(f) || f32_to_f16(f) == h, "fp16 " + std::to_string(h));
  }
  expect(f32_to_f16(1 + 0x1p-11f) == 0x3c00 && f32_to_f16(1 + 0x1.8p-10f) == 0x3c02, "fp16 ties to even");
  expect(f32_to_f16(0x1.8p-24f) == 2 && f32_to_f16(65519.0f) == 0x7bff && f32_to_f16(65520.0f) == 0x7c00, "fp16 limits");
}

// Squared error of a group with a scale, by trying all levels.
double lost(const std::vector<float>& group, const std::vector<float>& levels, const float* importance, double scale) {
  double sum = 0;
  for (size_t i = 0; i < group.size(); ++i) {
    double least = INFINITY;
    for (const float level : levels) least = std::min(least, (group[i] - scale * level) * (group[i] - scale * level));
    sum += least * (importance ? importance[i] : 1);
  }
  return sum;
}

// Nothing near the scale that was found, nor any of a scan, is better; values of all magnitudes are safe.
void check_scales(const std::vector<float>& levels, int64_t size, bool weighted) {
  const int kinds = 5, period = 3;
  std::vector<float> groups(kinds * size), importance(period * size), scales(kinds, 7);
  for (float& v : importance) v = random32() % 8 ? std::fabs(uniform()) : 0;
  for (int64_t i = 0; i < size; ++i) {
    groups[0 * size + i] = 0;
    groups[1 * size + i] = uniform() * uniform() * uniform();
    groups[2 * size + i] = random32() % 2 ? 1.5f : -1.5f;
    groups[3 * size + i] = std::ldexp(uniform(), int(random32() % 250) - 125);
    groups[4 * size + i] = i ? uniform() : NAN;
  }
  const float* const given = weighted ? importance.data() : nullptr;
  flute_cpu_search_scales(groups.data(), kinds, size, levels.data(), int(levels.size()), given, period, scales.data());
  const std::string what = "scale search, " + std::to_string(levels.size()) + " levels, groups of " + std::to_string(size);
  expect(scales[0] == 0 && std::isnan(scales[4]) && !std::isnan(scales[3]), what);
  for (const int g : {1, 2}) {
    const std::vector<float> group(groups.begin() + g * size, groups.begin() + (g + 1) * size);
    const float* const counts = weighted ? importance.data() + g % period * size : nullptr;
    const double best = lost(group, levels, counts, scales[g]), all = lost(group, {0}, counts, 0);
    for (int i = -2000; i <= 2000; ++i) {
      for (const double scale : {i * 0.005, scales[g] * (1 + i * 1e-4)}) {
        expect(best <= lost(group, levels, counts, scale) + 1e-6 * all, what);
      }
    }
  }
}

}  // namespace

int main() {
  std::printf("%s\n", flute_cpu_describe());
  check_conversions();
  check_special_values();
  check_trits();
  for (int bits = 2; bits <= 4; ++bits) {
    for (const ScaleDtype scale_dtype : {kScaleBf16, kScaleF16}) {
      for (const Case& c : std::vector<Case>{{bits, 8, 8, {1}, scale_dtype},
                                             {bits, 24, 24, {16}, scale_dtype},
                                             {bits, 24, 8, {17}, scale_dtype},
                                             {bits, 40, 40, {8, 3}, scale_dtype},
                                             {bits, 64, 16, {48}, scale_dtype},
                                             {bits, 96, 48, {5, 16, 20}, scale_dtype},
                                             {bits, 320, 32, {33}, scale_dtype},
                                             {bits, 576, 64, {40}, scale_dtype},
                                             {bits, 640, 128, {24}, scale_dtype},
                                             {bits, 1536, 512, {18}, scale_dtype},
                                             {bits, 264, 88, {19}, scale_dtype},
                                             {bits, 264, 264, {1030}, scale_dtype}}) {
        check_case(c);
        if (bits == 2) {
          Case ternary = c;
          ternary.layout = kTernary16;
          check_case(ternary);
        }
      }
      if (bits > 2) continue;
      for (const int64_t k : {8, 16, 24, 40, 80, 120, 264, 480, 576, 4104}) {
        std::vector<int64_t> shards = {1 + k % 37};
        if (k % 3 == 0) shards.insert(shards.end(), {16, 5});
        if (k == 576) shards.push_back(1030);
        check_case({2, k, k, shards, scale_dtype, kTrit20});
      }
    }
  }
  const std::vector<int64_t> header = {kMagic, kAbi, kTile16, 4, 32, 64, 0, 2, 16, 16};
  const struct {
    int field;
    int64_t values[4];
  } bad[] = {{0, {0, 1, -1, 2}}, {1, {0, 2, 3, -1}}, {2, {0, 2, 3, -1}}, {3, {0, 1, 5, -4}}, {4, {0, -32, 12, 48}},
             {5, {0, -64, 60, int64_t(1) << 60}}, {6, {-1, 2, 3, 4}}, {7, {0, 1, 3, int64_t(1) << 62}}, {8, {0, -16, int64_t(1) << 40, INT64_MIN}}};
  for (const auto& b : bad) {
    for (const int64_t value : b.values) check_refused(header, b.field, value);
  }
  const std::vector<int64_t> trits = {kMagic, kAbi, kTrit20, 2, 64, 64, 0, 1, 16};
  check_refused(trits, kFieldBits, 3);
  check_refused(trits, kFieldGroupSize, 32);
  for (const std::vector<float>& levels : std::vector<std::vector<float>>{
           {-1, -0.6f, -0.4f, -0.25f, -0.1f, 0, 0.15f, 0.3f, 0.7f, 1}, {-1, 0, 1}, {-3, -1, 1, 3}, {0, 1, 2.5f}, {-2, -0.5f, 0.25f}, {0.5f}, {0}}) {
    for (const int64_t size : {1, 2, 7, 64, 200}) {
      for (const bool weighted : {false, true}) check_scales(levels, size, weighted);
    }
  }
  expect(!compared.empty(), "no kernel can run");
  for (const auto& [name, calls] : compared) std::printf("%s: %d calls\n", name.c_str(), calls);
  std::printf(failures ? "%d failures\n" : "all passed\n", failures);
  return failures != 0;
}
