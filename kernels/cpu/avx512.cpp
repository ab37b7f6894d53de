// The AVX-512 kernels (F, BW, DQ, VL).
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_avx512.inc.h"
#include "decode.inc.h"
#include "math_f32.inc.h"
#include "gemv.inc.h"
#include "gemv_trit.inc.h"
#include "tile.inc.h"
#include "lanes_avx2.inc.h"
#include "lanes_avx512.inc.h"

constexpr int kMaxLanes = 32;
using LanesMax = Lanes32;
#include "vlut.inc.h"

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }

}  // namespace

const Kernel kAvx512Kernels[] = {
    {"gemv-avx512", kAvx512, kFp32, 3, refuses_nothing, gemv_passes, gemv_or_trit_run<MathF32, TritsF32>, true},
    {"tile-avx512", kAvx512, kFp32, 4, refuses_nothing, tile_passes<MathF32>, tile_run<MathF32>},
    {"vlut-avx512", kAvx512, kInt16, 8, vlut_refuses, vlut_passes, vlut_run, true},
    {},
};

}  // namespace flute
