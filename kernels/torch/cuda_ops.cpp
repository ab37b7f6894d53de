// The operators for torch's CUDA key, through torch's stable ABI: checks every argument, then calls the launchers. The library
// loads beside a torch without CUDA too: what only a CUDA build has is looked for when it is needed.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/registry.h"
#include "dense.h"

namespace flute::cuda {

namespace {

constexpr size_t kVectorAlignment = 16;

void check_launch(const char* why) {
  if (why) fail(why);
}
void check_cuda(cudaError_t error) { check_launch(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }

void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // by its name among what is loaded
    return torch_cuda ? reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(get, "this torch is not a CUDA build: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  check(get(device, &stream) == AOTI_TORCH_SUCCESS, "torch did not tell its current stream");
  return stream;
}

const char* read_device(int index, Device* device) {
  int major = 0, minor = 0;
  const std::pair<cudaDeviceAttr, int*> wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                                                    {cudaDevAttrComputeCapabilityMinor, &minor},
                                                    {cudaDevAttrMultiProcessorCount, &device->sms},
                                                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes},
                                                    {cudaDevAttrReservedSharedMemoryPerBlock, &device->reserved}};
  for (const auto& [attribute, value] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index); error != cudaSuccess) return cudaGetErrorString(error);
  }
  device->arch = major * 10 + minor;
  return nullptr;
}

// The device of a call while it lasts, for torch and for this library's own copy of the CUDA runtime.
class Current {
 public:
  explicit Current(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    check_cuda(cudaSetDevice(index_));
    stream_ = current_stream(index_);
    static std::mutex mutex;
    static std::map<int, Device> devices;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [found, is_new] = devices.try_emplace(index_);
    if (is_new) check_launch(read_device(index_, &found->second));
    device_ = found->second;
  }
  int index() const { return index_; }
  void* stream() const { return stream_; }
  const Device& device() const { return device_; }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  Device device_;
};

// The workspace of the calls on one stream, which run one after the other. What a CUDA graph captures may run beside any
// stream's calls when it is replayed, so a capture has a workspace of its own. It is held while the capture lasts and given
// back to the graph's memory pool at the next call: graphs that share a pool, and are not replayed at a time, share it then.
void* workspace(const Current& current, const Tensor& like) {
  struct Owned {
    unsigned long long capture;  // 0: none
    Tensor memory;
  };
  static std::mutex mutex;
  static auto& by_stream = *new std::map<std::tuple<int, void*, bool>, Owned>;  // never destroyed: CUDA may be gone before
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0;
  check_cuda(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(current.stream()), &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  const std::tuple<int, void*, bool> key{current.index(), current.stream(), capture != 0};
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = by_stream.find(key);
  if (found != by_stream.end() && found->second.capture != capture) {
    by_stream.erase(found);
    found = by_stream.end();
  }
  if (found == by_stream.end()) {
    Tensor memory = torch::stable::new_empty(like, {int64_t(workspace_bytes(current.device()))}, ScalarType::Byte);
    check_cuda(cudaMemsetAsync(memory.data_ptr(), 0, cleared_bytes(current.device()), static_cast<cudaStream_t>(current.stream())));
    found = by_stream.emplace(key, Owned{capture, memory}).first;
  }
  return found->second.memory.data_ptr();
}

Layer read_header(const Tensor& header) {
  const int64_t* fields = check_header(header);
  return named([&] { return read_layer(fields, header.numel()); });
}

// Contiguous, and where vector loads can begin.
Tensor readable(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(dense.data_ptr()) % kVectorAlignment ? torch::stable::clone(dense) : dense;
}

// Of W at a time: all of 8192 x 8192 in 16 bits, so that cuBLAS has large matrices and the model does not need its size twice.
constexpr int64_t kScratchBytes = int64_t(128) << 20;

// What a call has besides: SwiGLU of its halves; the norm of x, of which the call before has made `squares`; the residual and the
// norm after it, of which there are `sum`, `squares` and, in place of y, the sum times weight.
struct Beside {
  bool gated = false;
  const Tensor* squares = nullptr;
  double epsilon = 0;
  const Tensor *residual = nullptr, *weight = nullptr;
  Tensor *sum = nullptr, *made_squares = nullptr;
};

std::vector<int64_t> squares_shape(int64_t n) { return {kNormTokens, norm_parts(int(n))}; }

// y = x W^T + bias [.., N]; with `gated` silu(y[.., :N/2]) * y[.., N/2:]; all in the same launch where the kernel can.
Tensor multiply(const Tensor& input, const Tensor& packed, const Tensor& header, const std::optional<Tensor>& bias, int64_t n,
                const std::string& kernel_name, const Beside& beside = {}) {
  const bool gated = beside.gated;
  const Layer layer = read_header(header);
  const Packed& w = layer.w;
  check(packed.is_cuda(), "packed must be a CUDA tensor, as x is");
  Gemm call{};
  call.w = w;
  call.packed = check_packed(packed, w.bytes, kVectorAlignment);
  const Dtype dtype = check_x(input, packed, w.n, w.k, n);
  check_bias(bias, input, n);
  check(!gated || n % 2 == 0, "silu(gate) * up: N is odd");
  const int64_t m = input.numel() / w.k;
  check(m <= INT32_MAX, "x has more than 2^31 - 1 tokens");

  const Current current(input);
  const Kernel& kernel = named([&]() -> const Kernel& { return choose(w, m, dtype, kernel_name, current.device().arch); });
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = n;
  Tensor output = torch::stable::new_empty(input, sizes);
  sizes.back() = n / 2;
  Tensor product = gated ? torch::stable::new_empty(input, sizes) : output;
  if (m == 0) return product;
  bool fused = false;
  Tensor x = readable(input);
  std::optional<Tensor> added, residual, weight;
  if (bias) added = readable(*bias);
  if (beside.residual) {
    residual = readable(*beside.residual);
    weight = readable(*beside.weight);
    call.add = {residual->data_ptr(), weight->data_ptr(), beside.sum->data_ptr(), static_cast<float*>(beside.made_squares->data_ptr())};
  }
  if (beside.squares && m <= kNormTokens) call.normed = {static_cast<const float*>(beside.squares->data_ptr()), float(beside.epsilon)};
  call.m = int(m);
  call.device = current.device();
  const Normed normed = call.normed;
  const AddNorm add = call.add;
  if (kernel.method != kMma || !takes_norms(call)) {
    call.normed = {};
    call.add = {};
    if (normed.squares) {
      Tensor scaled = torch::stable::empty_like(x);
      check_launch(run_scale_tokens(x.data_ptr(), normed, scaled.data_ptr(), m, w.k, dtype, current.stream()));
      x = scaled;
    }
  }
  if (kernel.method == kDequantize) {
    const int64_t fit = kScratchBytes / (int64_t(w.k) * (dtype == kF32 ? 4 : 2)) / kStripRows * kStripRows;
    multiply_by_parts(torch::stable::view(x, {m, int64_t(w.k)}), added, torch::stable::view(output, {m, n}), std::max<int64_t>(fit, kStripRows),
                      [&](int64_t first, int64_t rows, void* dense) {
                        check_launch(run_dequantize(w, call.packed, first, rows, dtype, dense, current.stream()));
                      });
  } else {
    call.x = x.data_ptr();
    call.bias = added ? added->data_ptr() : nullptr;
    call.y = output.data_ptr();
    fused = gated && takes_gate(w, m) && layer.shards[0].rows == layer.shards[1].rows;
    call.gated = fused ? product.data_ptr() : nullptr;
    call.f16 = dtype == kF16;
    call.workspace = workspace(current, input);
    call.stream = current.stream();
    check_launch(kernel.method == kMma ? run_mma(call) : run_wgmma(call));
  }
  if (gated && !fused) check_launch(run_silu_and_mul(output.data_ptr(), product.data_ptr(), m, int(n / 2), dtype, current.stream()));
  if (add.residual && !call.add.residual) {
    check_launch(run_add_norm(output.data_ptr(), add, float(beside.epsilon), output.data_ptr(), m, int(n), dtype, current.stream()));
  }
  count(kernel, w, m);
  return product;
}

Tensor lut_linear(const Tensor& x, const Tensor& packed, const Tensor& header, const std::optional<Tensor>& bias, int64_t n, const std::string& kernel) {
  return multiply(x, packed, header, bias, n, kernel);
}
Tensor lut_linear_silu(const Tensor& x, const Tensor& packed, const Tensor& header, const std::optional<Tensor>& bias, int64_t n, const std::string& kernel) {
  Beside beside;
  beside.gated = true;
  return multiply(x, packed, header, bias, n, kernel, beside);
}

std::tuple<Tensor, Tensor, Tensor> lut_linear_add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double epsilon,
                                                       const Tensor& packed, const Tensor& header, const std::optional<Tensor>& bias,
                                                       int64_t n, const std::string& kernel) {
  check_norm(x, residual, weight, n);
  Tensor sum = torch::stable::empty_like(readable(residual)), squares = torch::stable::new_empty(x, squares_shape(n), ScalarType::Float);
  Beside beside;
  beside.residual = &residual;
  beside.weight = &weight;
  beside.epsilon = epsilon;
  beside.sum = &sum;
  beside.made_squares = &squares;
  Tensor scaled = multiply(x, packed, header, bias, n, kernel, beside);
  return {scaled, sum, squares};
}
Tensor normed(const Tensor& x, const Tensor& squares, double epsilon, const Tensor& packed, const Tensor& header,
              const std::optional<Tensor>& bias, int64_t n, const std::string& kernel, bool gated) {
  const std::vector<int64_t> shape = squares_shape(x.dim() ? x.size(x.dim() - 1) : 0);
  check(squares.is_cuda() && squares.scalar_type() == ScalarType::Float && squares.is_contiguous() && squares.dim() == 2 &&
            squares.size(0) == shape[0] && squares.size(1) == shape[1],
        "squares must be the contiguous fp32 tensor that lut_linear_add_norm returned with x");
  Beside beside;
  beside.gated = gated;
  beside.squares = &squares;
  beside.epsilon = epsilon;
  return multiply(x, packed, header, bias, n, kernel, beside);
}
Tensor lut_linear_normed(const Tensor& x, const Tensor& squares, double epsilon, const Tensor& packed, const Tensor& header,
                         const std::optional<Tensor>& bias, int64_t n, const std::string& kernel) {
  return normed(x, squares, epsilon, packed, header, bias, n, kernel, false);
}
Tensor lut_linear_normed_silu(const Tensor& x, const Tensor& squares, double epsilon, const Tensor& packed, const Tensor& header,
                              const std::optional<Tensor>& bias, int64_t n, const std::string& kernel) {
  return normed(x, squares, epsilon, packed, header, bias, n, kernel, true);
}

Tensor lut_pack(const Tensor& qweight, const Tensor& scales, const Tensor& codebooks, const Tensor& header) {
  const Layer layer = read_header(header);
  const Packed& w = layer.w;
  check(qweight.is_cuda(), "qweight must be a CUDA tensor");
  check_parts(qweight, scales, codebooks, w.n, w.k, w.bits, w.groups, w.n_shards, w.scale_f16 ? kScaleF16 : kScaleBf16);
  const Current current(qweight);
  Tensor packed = torch::stable::new_empty(qweight, {w.bytes});
  check_launch(run_pack(w, layer.shards.data(), static_cast<const uint8_t*>(qweight.data_ptr()), static_cast<const uint16_t*>(scales.data_ptr()),
                        static_cast<const float*>(codebooks.data_ptr()), static_cast<uint8_t*>(packed.data_ptr()), current.stream()));
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> lut_unpack(const Tensor& packed, const Tensor& header) {
  const Packed w = read_header(header).w;
  check(packed.is_cuda(), "packed must be a CUDA tensor");
  const uint8_t* data = check_packed(packed, w.bytes, kVectorAlignment);
  const Current current(packed);
  Tensor qweight = torch::stable::new_empty(packed, {int64_t(w.n), int64_t(w.k) * w.bits / 8});
  Tensor scales = torch::stable::new_empty(packed, {int64_t(w.n), int64_t(w.groups)}, scale_type(w.scale_f16 ? kScaleF16 : kScaleBf16));
  Tensor codebooks = torch::stable::new_empty(packed, {int64_t(w.n_shards), int64_t(1) << w.bits}, ScalarType::Float);
  check_launch(run_unpack(w, data, static_cast<uint8_t*>(qweight.data_ptr()), static_cast<uint16_t*>(scales.data_ptr()),
                          static_cast<float*>(codebooks.data_ptr()), current.stream()));
  return {qweight, scales, codebooks};
}

}  // namespace

}  // namespace flute::cuda

// What the library's CUDA runtime says of a GPU: null, or one line that says why it cannot use it.
FLUTE_EXPORT const char* flute_cuda_device(int index, int* arch, int* sms) {
  flute::cuda::Device device{};
  const char* why = flute::cuda::read_device(index, &device);
  *arch = device.arch;
  *sms = device.sms;
  return why;
}

// Registers the operators, once. Not done by loading the library: on a GPU that it has no code for, others implement them.
// The ABI version is part of each name: see vllm_flute/ops.py.
FLUTE_EXPORT void flute_cuda_register() {
  using namespace torch::stable::detail;
  static const StableTorchLibraryInit implementations(
      StableLibrary::Kind::IMPL,
      [](StableLibrary& m) {
        m.impl("lut_linear_v1", TORCH_BOX(&flute::cuda::lut_linear));
        m.impl("lut_linear_silu_v1", TORCH_BOX(&flute::cuda::lut_linear_silu));
        m.impl("lut_linear_add_norm_v1", TORCH_BOX(&flute::cuda::lut_linear_add_norm));
        m.impl("lut_linear_normed_v1", TORCH_BOX(&flute::cuda::lut_linear_normed));
        m.impl("lut_linear_normed_silu_v1", TORCH_BOX(&flute::cuda::lut_linear_normed_silu));
        m.impl("lut_pack_v1", TORCH_BOX(&flute::cuda::lut_pack));
        m.impl("lut_unpack_v1", TORCH_BOX(&flute::cuda::lut_unpack));
      },
      "vllm_flute", "CUDA", __FILE__, __LINE__);
}
