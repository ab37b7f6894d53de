// The operators for torch's CPU key, through torch's stable ABI: checks every argument, then calls the core.
// The schemas are in vllm_flute/ops.py. Only files of this folder include torch headers.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace {

using flute::check;
using flute::named;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

flute::Weights read_header(const Tensor& header) {
  const int64_t* fields = flute::check_header(header);
  return named([&] { return flute::parse_header(fields, header.numel()); });
}

flute::Weights read_packed(const Tensor& packed, const Tensor& header) {
  flute::Weights w = read_header(header);
  check(packed.is_cpu(), "packed must be a CPU tensor");
  w.packed = flute::check_packed(packed, w.bytes, alignof(float));
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
  call.dtype = flute::check_x(input, packed, w.n, w.k, n);
  flute::check_bias(bias, input, n);
  Tensor bias_values;
  if (bias) {
    bias_values = torch::stable::contiguous(*bias);
    call.bias = bias_values.data_ptr();
  }
  call.m = input.numel() / w.k;
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
  check(qweight.is_cpu(), "qweight must be a CPU tensor");
  flute::check_parts(qweight, scales, codebooks, w.n, w.k, w.bits, w.groups, w.n_shards, w.scale_dtype);
  Tensor packed = on_huge_pages(qweight, w.bytes);
  flute::pack(w, static_cast<const uint8_t*>(qweight.data_ptr()), static_cast<const uint16_t*>(scales.data_ptr()),
              static_cast<const float*>(codebooks.data_ptr()), static_cast<uint8_t*>(packed.data_ptr()), threads());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> lut_unpack(const Tensor& packed, const Tensor& header) {
  const flute::Weights w = read_packed(packed, header);
  Tensor qweight = torch::stable::new_empty(packed, {w.n, w.k * w.bits / 8});
  Tensor scales = torch::stable::new_empty(packed, {w.n, w.groups}, flute::scale_type(w.scale_dtype));
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
