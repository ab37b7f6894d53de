// y = x W^T + bias by torch (cuBLAS on a GPU) where all of W would take too much memory: a part of its rows at a time.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "checks.h"

namespace flute {

static inline void call(const char* name, const char* overload, StableIValue* stack) {
  if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) fail(std::string("torch could not run ") + name);
}

// Not on the graph of gradients: aten::linear with an output refuses tensors that want one.
static inline Tensor detached(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  call("aten::detach", "", stack.data());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x [M, K], bias [N] or none, y [M, N], of one dtype. fill(first, rows, data) writes rows first .. first + rows of W there, row
// after row in the dtype of x; at most `step` rows are asked for.
template <class Fill>
void multiply_by_parts(const Tensor& x, const std::optional<Tensor>& bias, const Tensor& y, int64_t step, const Fill& fill) {
  using torch::stable::narrow;
  using torch::stable::detail::from;
  const int64_t n = y.size(1);
  const Tensor inputs = detached(x);
  Tensor outputs = detached(y), scratch = torch::stable::new_empty(x, {std::min(step, n), x.size(1)});
  std::optional<Tensor> added;
  if (bias) added = detached(*bias);
  for (int64_t first = 0; first < n; first += step) {
    const int64_t rows = std::min(step, n - first);
    fill(first, rows, scratch.data_ptr());
    std::optional<Tensor> part;
    if (added) part = narrow(*added, 0, first, rows);
    std::array<StableIValue, 4> stack{from(inputs), from(narrow(scratch, 0, 0, rows)), from(part), from(narrow(outputs, 1, first, rows))};
    call("aten::linear", "out", stack.data());
    torch::stable::detail::to<Tensor>(stack[0]);  // the returned reference is the caller's to release
  }
}

}  // namespace flute
