// torch/dense.h as an operator for the CPU, so that a test can compare it with torch: multiply(x, weight, bias, step).
#include "dense.h"

#include <torch/csrc/stable/library.h>

namespace {

using torch::stable::Tensor;

Tensor multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t step) {
  const int64_t row_bytes = x.size(1) * int64_t(x.element_size());
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  flute::multiply_by_parts(x, bias, y, step, [&](int64_t first, int64_t rows, void* data) {
    memcpy(data, static_cast<const uint8_t*>(weight.data_ptr()) + first * row_bytes, size_t(rows * row_bytes));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(vllm_flute_test, m) { m.def("multiply(Tensor x, Tensor weight, Tensor? bias, int step) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(vllm_flute_test, CPU, m) { m.impl("multiply", TORCH_BOX(&multiply)); }
