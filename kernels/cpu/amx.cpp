// The AMX kernels: bf16 inputs and weights, or int8 ones.
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_avx512.inc.h"
#include "decode.inc.h"
#include "int8.inc.h"
#include "tile.inc.h"
#include "pairs_bf16.inc.h"
#include "amx_tile.inc.h"
#include "amx.inc.h"

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }
const char* takes_bf16(const Weights&, Dtype dtype) { return dtype == kBf16 ? nullptr : "activations other than bfloat16"; }
const char* sums_refuse(const Weights& w, Dtype dtype) {
  return MathBf16Sums::takes(w) ? takes_bf16(w, dtype) : "group sizes other than 32, 64, 128, multiples of 256 and K";
}

}  // namespace

const Kernel kAmxKernels[] = {
    {"tile-amxbf16", kAmx, kBf16Weights, 12, takes_bf16, amx_passes<MathBf16>, amx_run<MathBf16>},
    {"sums-amxbf16", kAmx, kBf16Weights, 15, sums_refuse, amx_passes<MathBf16Sums>, amx_run<MathBf16Sums>},
    {"tile-amxint8", kAmx, kInt8, 13, refuses_nothing, amx_passes<MathInt8>, amx_run<MathInt8>},
    {},
};

}  // namespace flute
