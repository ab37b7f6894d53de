// ggml's CPU matrix multiplication behind a few C functions, for `vllm-flute bench kernels --peer NAME=libggml_peer.so`:
// llama.cpp's kernels, or those of a fork with more types (vlut.cpp). Compiles against ggml of 2025 and later.
//
// It gives ggml what llama.cpp gives it: weights in the buffer type that the CPU backend prefers for them (repacked, AMX),
// float32 activations, its own threads. Those are paused after every turn, because they would spin into the others' turns;
// and every turn begins with a call that is not timed, which wakes them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Peer {
  int64_t n, k;
  int threads;
  ggml_context* weights_context = nullptr;
  ggml_backend_buffer_t buffer = nullptr;
  std::vector<ggml_tensor*> copies;
  size_t next = 0;
  ggml_threadpool* pool = nullptr;
  std::vector<uint8_t> work;
  std::string buffer_name;

  ~Peer() {
    if (pool) ggml_threadpool_free(pool);
    if (buffer) ggml_backend_buffer_free(buffer);
    if (weights_context) ggml_free(weights_context);
  }
};

thread_local std::string error;

bool find_type(const std::string& name, ggml_type* type) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* known = ggml_type_name(ggml_type(i));
    if (known && ggml_blck_size(ggml_type(i)) && name == known) {
      *type = ggml_type(i);
      return true;
    }
  }
  error = "this ggml has no type " + name;
  return false;
}

ggml_context* make_context(size_t tensors, size_t data, bool no_alloc) {
  ggml_init_params params{};
  params.mem_size = (tensors + 8) * ggml_tensor_overhead() + data + (1 << 16);
  params.no_alloc = no_alloc;
  return ggml_init(params);
}

// The first buffer type that takes y = W x, in the order in which llama.cpp asks.
ggml_backend_buffer_type_t best_buffer_type(ggml_type type, int64_t n, int64_t k) {
  ggml_backend_reg_t reg = ggml_backend_cpu_reg();
  ggml_backend_dev_t device = ggml_backend_reg_dev_get(reg, 0);
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(reg, "ggml_backend_dev_get_extra_bufts"));
  ggml_backend_buffer_type_t found = nullptr;
  for (ggml_backend_buffer_type_t* list = extra ? extra(device) : nullptr; list && *list && !found; ++list) {
    ggml_context* context = make_context(3, 0, true);
    ggml_tensor* w = ggml_new_tensor_2d(context, type, k, n);
    ggml_tensor* y = ggml_mul_mat(context, w, ggml_new_tensor_2d(context, GGML_TYPE_F32, k, 512));
    w->buffer = ggml_backend_buft_alloc_buffer(*list, 0);
    if (w->buffer && ggml_backend_dev_supports_op(device, y)) found = *list;
    if (w->buffer) ggml_backend_buffer_free(w->buffer);
    ggml_free(context);
  }
  return found ? found : ggml_backend_cpu_buffer_type();
}

// W [n, k] in the type's rows. Vec-LUT's types (i1_v.., i2_v..) interleave all rows, the others go by row.
std::vector<uint8_t> quantize(ggml_type type, const float* w, int64_t n, int64_t k, int threads) {
  ggml_quantize_init(type);
  std::vector<uint8_t> rows(ggml_row_size(type, k) * n);
  const std::vector<float> importance(k, 1.0f);
  const auto part = [&](int64_t begin, int64_t end) {
    if (begin < end) ggml_quantize_chunk(type, w, rows.data(), begin * k, end - begin, k, importance.data());
  };
  if (std::strstr(ggml_type_name(type), "_v")) {
    part(0, n);
    return rows;
  }
  std::vector<std::thread> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(part, n * i / threads, n * (i + 1) / threads);
  for (std::thread& worker : workers) worker.join();
  return rows;
}

}  // namespace

// What was compiled, in words.
EXPORT const char* ggml_peer_describe() { return PEER_DESCRIPTION; }

EXPORT const char* ggml_peer_error() { return error.c_str(); }

// Bytes of W [n, k] in a type; 0 where this ggml does not have it.
EXPORT int64_t ggml_peer_size(const char* type_name, int64_t n, int64_t k) {
  ggml_type type;
  if (!find_type(type_name, &type)) return 0;
  const int64_t block = ggml_blck_size(type);
  return n * int64_t(ggml_row_size(type, (k + block - 1) / block * block));
}

// Quantizes W, float32 [n, k], to `type` ("q4_K", "tq2_0", ...) and keeps `copies` of it. Null and ggml_peer_error on failure.
EXPORT Peer* ggml_peer_open(const char* type_name, const float* w, int64_t n, int64_t k, int64_t copies, int threads) {
  ggml_cpu_init();
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);  // it tells of every copy that it repacks
  ggml_type type;
  if (!find_type(type_name, &type)) return nullptr;
  if (k % ggml_blck_size(type) && !std::strstr(type_name, "i1_v")) {
    error = std::string(type_name) + " takes K in blocks of " + std::to_string(ggml_blck_size(type));
    return nullptr;
  }
  Peer* peer = new Peer{n, k, threads};
  peer->weights_context = make_context(size_t(copies), 0, true);
  for (int64_t i = 0; i < copies; ++i) peer->copies.push_back(ggml_new_tensor_2d(peer->weights_context, type, k, n));
  const ggml_backend_buffer_type_t buffer_type = best_buffer_type(type, n, k);
  peer->buffer_name = ggml_backend_buft_name(buffer_type);
  peer->buffer = ggml_backend_alloc_ctx_tensors_from_buft(peer->weights_context, buffer_type);
  if (!peer->buffer) {
    error = "no memory for " + std::to_string(copies) + " copies";
    delete peer;
    return nullptr;
  }
  const std::vector<uint8_t> rows = quantize(type, w, n, k, threads);
  for (ggml_tensor* copy : peer->copies) ggml_backend_tensor_set(copy, rows.data(), 0, ggml_nbytes(copy));
  ggml_threadpool_params params = ggml_threadpool_params_default(threads);
  params.paused = true;
  peer->pool = ggml_threadpool_new(&params);
  return peer;
}

// The buffer type that ggml preferred.
EXPORT const char* ggml_peer_buffer(const Peer* peer) { return peer->buffer_name.c_str(); }

// A turn: y[m, n] = x[m, k] W^T, float32, once untimed and then `calls` times, each with the next copy; `seconds` [calls].
EXPORT int ggml_peer_turn(Peer* peer, int64_t m, const float* x, float* y, int calls, double* seconds) {
  ggml_context* context = make_context(2, size_t(m * (peer->n + peer->k)) * sizeof(float) + ggml_graph_overhead_custom(8, false), false);
  ggml_tensor* input = ggml_new_tensor_2d(context, GGML_TYPE_F32, peer->k, m);
  memcpy(input->data, x, ggml_nbytes(input));
  ggml_tensor* product = ggml_mul_mat(context, peer->copies[0], input);
  ggml_cgraph* graph = ggml_new_graph_custom(context, 8, false);
  ggml_build_forward_expand(graph, product);
  ggml_cplan plan = ggml_graph_plan(graph, peer->threads, peer->pool);
  // vlut.cpp writes whole tiles of 32 tokens, but plans for those that there are.
  const size_t tiles = size_t((m + 31) / 32 * 32 * (peer->k + sizeof(float)));
  peer->work.resize(std::max(plan.work_size, tiles) + (1 << 16));
  plan.work_data = peer->work.data();
  int status = 0;
  for (int i = -1; i < calls && !status; ++i) {
    product->src[0] = peer->copies[peer->next++ % peer->copies.size()];
    const auto begin = std::chrono::steady_clock::now();
    status = ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS;
    if (i >= 0) seconds[i] = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  ggml_threadpool_pause(peer->pool);
  memcpy(y, product->data, ggml_nbytes(product));
  ggml_free(context);
  return status;
}

EXPORT void ggml_peer_close(Peer* peer) { delete peer; }
