// The AVX-512 VNNI kernel: int8 inputs and weights.
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_avx512.inc.h"
#include "decode.inc.h"
#include "int8.inc.h"
#include "dot8.inc.h"

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }

}  // namespace

const Kernel kAvx512VnniKernels[] = {
    {"dot8-avx512vnni", kAvx512Vnni, kInt8, 14, refuses_nothing, dot8_passes, dot8_run},
    {},
};

}  // namespace flute
