// The AVX2 kernels (with FMA and F16C).
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_avx2.inc.h"
#include "decode.inc.h"
#include "math_f32.inc.h"
#include "gemv.inc.h"
#include "gemv_trit.inc.h"
#include "tile.inc.h"
#include "lanes_avx2.inc.h"

constexpr int kMaxLanes = 16;
using LanesMax = Lanes16;
#include "vlut.inc.h"
#include "dot16.inc.h"

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }

}  // namespace

const Kernel kAvx2Kernels[] = {
    {"gemv-avx2", kAvx2, kFp32, 1, refuses_nothing, gemv_passes, gemv_or_trit_run<MathF32, TritsF32>, true},
    {"tile-avx2", kAvx2, kFp32, 2, refuses_nothing, tile_passes<MathF32>, tile_run<MathF32>},
    {"vlut-avx2", kAvx2, kInt16, 7, vlut_refuses, vlut_passes, vlut_run, true},
    {"dot16-avx2", kAvx2, kInt16Products, 16, dot16_refuses, dot16_passes, dot16_run},
    {},
};

}  // namespace flute
