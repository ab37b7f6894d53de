// The operators for torch's CPU key, through torch's stable ABI: checks every argument, then calls the core.
// The schemas are in vllm_flute/ops.py. The only file that includes torch headers.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "flute.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("vllm_flute: " + message);  // RuntimeError in Python
}

std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
  check(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(),
        std::string(name) + " is " + shape(t) + ", expected a contiguous CPU tensor [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
}

// Throws what the core throws as `check` does.
template <class F>
auto named(const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::invalid_argument& e) {
    throw std::runtime_error(std::string("vllm_flute: ") + e.what());
  }
}

flute::Weights read_header(const Tensor& header) {
  check(header.is_cpu() && header.scalar_type() == ScalarType::Long && header.dim() == 1 && header.is_contiguous(),
        "header must be a contiguous int64 CPU tensor of one dimension");
  return named([&] { return flute::parse_header(static_cast<const int64_t*>(header.data_ptr()), header.numel()); });
}

flute::Weights read_packed(const Tensor& packed, const Tensor& header) {
  flute::Weights w = read_header(header);
  check(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == w.bytes,
        "packed is " + shape(packed) + ", its header says a contiguous uint8 CPU tensor of " + std::to_string(w.bytes) + " bytes");
  w.packed = static_cast<const uint8_t*>(packed.data_ptr());
  check(reinterpret_cast<uintptr_t>(w.packed) % alignof(float) == 0, "packed is not aligned to 4 bytes");
  return w;
}

void run_parallel(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

flute::Parallel threads() { return {int(torch::stable::get_num_threads()), run_parallel}; }

Tensor lut_linear(const Tensor& input, const Tensor& packed, const Tensor& header, const std::optional<Tensor>& bias, int64_t n, const std::string& kernel_name) {
  flute::Call call{};
  call.w = read_packed(packed, header);
  const flute::Weights& w = call.w;
  const ScalarType type = input.scalar_type();
  check(input.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
        "x must be a float32, bfloat16 or float16 CPU tensor");
  const int64_t dims = input.dim();
  check(dims >= 1 && input.size(dims - 1) == w.k && n == w.n,
        "x is " + shape(input) + " for weights of N=" + std::to_string(w.n) + ", K=" + std::to_string(w.k) + " (the caller said N=" + std::to_string(n) + ")");
  Tensor bias_values;
  if (bias) {
    check(bias->is_cpu() && bias->scalar_type() == type && bias->dim() == 1 && bias->size(0) == n,
          "bias is " + shape(*bias) + ", expected [" + std::to_string(n) + "] in the dtype of x");
    bias_values = torch::stable::contiguous(*bias);
    call.bias = bias_values.data_ptr();
  }
  call.m = input.numel() / w.k;
  call.dtype = type == ScalarType::Float ? flute::kF32 : type == ScalarType::BFloat16 ? flute::kBf16 : flute::kF16;
  const flute::Kernel& kernel = named([&]() -> const flute::Kernel& { return flute::choose(w, call.m, call.dtype, kernel_name); });

  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = n;
  Tensor output = torch::stable::new_empty(input, sizes);
  if (call.m == 0) return output;
  const Tensor x = torch::stable::contiguous(input);
  call.x = x.data_ptr();
  call.y = output.data_ptr();
  call.parallel = threads();
  kernel.run(call);
  flute::count(kernel, w, call.m);
  return output;
}

// An uninitialized uint8 tensor. A large one starts where a huge page does; the room that this takes is never touched.
Tensor on_huge_pages(const Tensor& like, int64_t bytes) {
  const int64_t page = int64_t(flute::kHugePage);
  if (bytes < 2 * page) return torch::stable::new_empty(like, {bytes});
  Tensor room = torch::stable::new_empty(like, {bytes + page});
  const int64_t start = (page - int64_t(reinterpret_cast<uintptr_t>(room.data_ptr()) % flute::kHugePage)) % page;
  Tensor packed = torch::stable::narrow(room, 0, start, bytes);
  flute::prefer_huge_pages(packed.data_ptr(), size_t(bytes));
  return packed;
}

Tensor lut_pack(const Tensor& qweight, const Tensor& scales, const Tensor& codebooks, const Tensor& header) {
  const flute::Weights w = read_header(header);
  check_matrix(qweight, "qweight", w.n, w.k * w.bits / 8);
  check_matrix(scales, "scales", w.n, w.groups);
  check_matrix(codebooks, "codebooks", w.n_shards, int64_t(1) << w.bits);
  const ScalarType scale_type = w.scale_dtype == flute::kScaleF16 ? ScalarType::Half : ScalarType::BFloat16;
  check(qweight.scalar_type() == ScalarType::Byte, "qweight must be uint8");
  check(scales.scalar_type() == scale_type, "scales do not have the dtype that the header says");
  check(codebooks.scalar_type() == ScalarType::Float, "codebooks must be float32");
  Tensor packed = on_huge_pages(qweight, w.bytes);
  flute::pack(w, static_cast<const uint8_t*>(qweight.data_ptr()), static_cast<const uint16_t*>(scales.data_ptr()),
              static_cast<const float*>(codebooks.data_ptr()), static_cast<uint8_t*>(packed.data_ptr()), threads());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> lut_unpack(const Tensor& packed, const Tensor& header) {
  const flute::Weights w = read_packed(packed, header);
  const ScalarType scale_type = w.scale_dtype == flute::kScaleF16 ? ScalarType::Half : ScalarType::BFloat16;
  Tensor qweight = torch::stable::new_empty(packed, {w.n, w.k * w.bits / 8});
  Tensor scales = torch::stable::new_empty(packed, {w.n, w.groups}, scale_type);
  Tensor codebooks = torch::stable::new_empty(packed, {w.n_shards, int64_t(1) << w.bits}, ScalarType::Float);
  flute::unpack(w, static_cast<uint8_t*>(qweight.data_ptr()), static_cast<uint16_t*>(scales.data_ptr()),
                static_cast<float*>(codebooks.data_ptr()), threads());
  return {qweight, scales, codebooks};
}

}  // namespace

// The ABI version is part of each name: see vllm_flute/ops.py.
STABLE_TORCH_LIBRARY_IMPL(vllm_flute, CPU, m) {
  m.impl("lut_linear_v1", TORCH_BOX(&lut_linear));
  m.impl("lut_pack_v1", TORCH_BOX(&lut_pack));
  m.impl("lut_unpack_v1", TORCH_BOX(&lut_unpack));
}
