// Checks of the operators' arguments, which every device's implementation makes; each failure is a RuntimeError of one line in
// Python. The first tensor of a call says on which device the others have to be.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "flute.h"

namespace flute {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] static inline void fail(const std::string& message) { throw std::runtime_error("vllm_flute: " + message); }
static inline void check(bool ok, const char* message) {
  if (!ok) fail(message);
}

// Throws what the core throws as `check` does.
template <class F>
static auto named(const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::invalid_argument& e) {
    fail(e.what());
  }
}

static inline std::string shape(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

static inline std::string device_name(const Tensor& t) {
  return t.is_cpu() ? "CPU" : t.is_cuda() ? "CUDA" : "foreign";
}

static inline bool same_device(const Tensor& a, const Tensor& b) {
  return (a.is_cpu() && b.is_cpu()) || (a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index());
}

// The header's values and their number.
static inline const int64_t* check_header(const Tensor& header) {
  check(header.is_cpu() && header.scalar_type() == ScalarType::Long && header.dim() == 1 && header.is_contiguous(),
        "header must be a contiguous int64 CPU tensor of one dimension");
  return static_cast<const int64_t*>(header.data_ptr());
}

static inline const uint8_t* check_packed(const Tensor& packed, int64_t bytes, size_t alignment) {
  if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 1 || !packed.is_contiguous() || packed.numel() != bytes) {
    fail("packed is " + shape(packed) + ", its header says a contiguous uint8 " + device_name(packed) + " tensor of " + std::to_string(bytes) + " bytes");
  }
  const auto* data = static_cast<const uint8_t*>(packed.data_ptr());
  if (reinterpret_cast<uintptr_t>(data) % alignment) fail("packed is not aligned to " + std::to_string(alignment) + " bytes");
  return data;
}

// x [..., K] for weights [n, k]; `said` is the N that the caller gave.
static inline Dtype check_x(const Tensor& x, const Tensor& packed, int64_t n, int64_t k, int64_t said) {
  const ScalarType type = x.scalar_type();
  if (!same_device(x, packed) || (type != ScalarType::Float && type != ScalarType::BFloat16 && type != ScalarType::Half)) {
    fail("x must be a float32, bfloat16 or float16 " + device_name(packed) + " tensor, on the device of packed");
  }
  if (x.dim() < 1 || x.size(x.dim() - 1) != k || said != n) {
    fail("x is " + shape(x) + " for weights of N=" + std::to_string(n) + ", K=" + std::to_string(k) + " (the caller said N=" + std::to_string(said) + ")");
  }
  return type == ScalarType::Float ? kF32 : type == ScalarType::BFloat16 ? kBf16 : kF16;
}

static inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t n) {
  if (bias && (!same_device(*bias, x) || bias->scalar_type() != x.scalar_type() || bias->dim() != 1 || bias->size(0) != n)) {
    fail("bias is " + shape(*bias) + ", expected [" + std::to_string(n) + "] in the dtype and on the device of x");
  }
}

// What is added to y [.., n] before a norm, and the norm's weight.
static inline void check_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, int64_t n) {
  const bool alike = same_device(residual, x) && residual.scalar_type() == x.scalar_type() && residual.dim() == x.dim();
  if (!alike || residual.size(residual.dim() - 1) != n || residual.numel() / n * x.size(x.dim() - 1) != x.numel()) {
    fail("residual is " + shape(residual) + ", expected x's shape " + shape(x) + " with N=" + std::to_string(n) + ", its dtype and device");
  }
  if (!same_device(weight, x) || weight.scalar_type() != x.scalar_type() || weight.dim() != 1 || weight.size(0) != n) {
    fail("the norm's weight is " + shape(weight) + ", expected [" + std::to_string(n) + "] in the dtype and on the device of x");
  }
}

static inline void check_matrix(const Tensor& t, const Tensor& like, const char* name, int64_t rows, int64_t columns) {
  if (!same_device(t, like) || t.dim() != 2 || t.size(0) != rows || t.size(1) != columns || !t.is_contiguous()) {
    fail(std::string(name) + " is " + shape(t) + ", expected a contiguous " + device_name(like) + " tensor [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
}

static inline ScalarType scale_type(ScaleDtype dtype) { return dtype == kScaleF16 ? ScalarType::Half : ScalarType::BFloat16; }

// What lut_pack takes, for weights [n, k].
static inline void check_parts(const Tensor& qweight, const Tensor& scales, const Tensor& codebooks, int64_t n, int64_t k, int bits,
                               int64_t groups, int64_t n_shards, ScaleDtype scale_dtype) {
  check_matrix(qweight, qweight, "qweight", n, k * bits / 8);
  check_matrix(scales, qweight, "scales", n, groups);
  check_matrix(codebooks, qweight, "codebooks", n_shards, int64_t(1) << bits);
  check(qweight.scalar_type() == ScalarType::Byte, "qweight must be uint8");
  check(scales.scalar_type() == scale_type(scale_dtype), "scales do not have the dtype that the header says");
  check(codebooks.scalar_type() == ScalarType::Float, "codebooks must be float32");
}

}  // namespace flute
