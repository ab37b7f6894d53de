// The NEON kernels, for every 64-bit Arm CPU.
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_neon.inc.h"
#include "decode.inc.h"
#include "math_f32.inc.h"
#include "gemv.inc.h"
#include "tile.inc.h"

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }

}  // namespace

const Kernel kNeonKernels[] = {
    {"gemv-neon", kNeon, kFp32, 10, refuses_nothing, gemv_passes, gemv_run<MathF32>},
    {"tile-neon", kNeon, kFp32, 11, refuses_nothing, tile_passes<MathF32>, tile_run<MathF32>},
    {},
};

}  // namespace flute
