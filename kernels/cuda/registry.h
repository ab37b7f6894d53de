// Which GPU kernels exist, which of them a GPU can run with what was compiled in, and which one a call takes. Neither torch
// nor CUDA: a GPU is its compute capability.
#pragma once

#include <string>
#include <vector>

#include "flute.h"
#include "launch.h"

namespace flute::cuda {

// A layer's weights, as a valid header explains them; the shards' table in the form that packed weights carry.
struct Layer {
  Packed w;
  std::vector<Shard> shards;
};

// Reads a header of `length` fields; throws std::invalid_argument with one line that says what is wrong.
Layer read_layer(const int64_t* header, int64_t length);

enum Method { kMma, kWgmma, kDequantize };
struct Kernel {
  const char* name;
  Method method;
  int slot;                // row of the counters' page; never reused for another kernel
  const char* arithmetic;  // what is multiplied, which sets the error
  int tokens;              // that one reading of the packed weights serves
};

// The kernel for m tokens on a GPU: the named one, or with an empty name the dispatcher's choice. Throws std::invalid_argument
// where the name is unknown or the kernel cannot run there or does not take the call.
const Kernel& choose(const Packed& w, int64_t m, Dtype dtype, const std::string& name, int arch);
void count(const Kernel& kernel, const Packed& w, int64_t m);

}  // namespace flute::cuda

// A JSON object for a GPU of this compute capability (major * 10 + minor): abi, archs (compiled in), compiler, error (why no
// kernel runs there), kernels with their arithmetic, slot, whether they are available, and why not.
FLUTE_EXPORT const char* flute_cuda_describe(int arch);
// As flute_cpu_set_counters and flute_cpu_set_table.
FLUTE_EXPORT void flute_cuda_set_counters(void* page);
FLUTE_EXPORT void flute_cuda_set_table(const void* table, int64_t lines);
// The name of the kernel that a call would run; empty where the header or the dtype is not valid or no kernel runs there.
FLUTE_EXPORT const char* flute_cuda_choose(const int64_t* header, int64_t m, int dtype, int arch);
