// The NEON kernels, for every 64-bit Arm CPU.
#include "isa.inc.h"

namespace flute {
namespace {
#include "vec_neon.inc.h"
#include "decode.inc.h"
#include "math_f32.inc.h"
#include "gemv.inc.h"
#include "tile.inc.h"

// In a namespace of its own, because its words are of another kind.
namespace vlut {
#include "lanes_neon.inc.h"
#include "chunk.inc.h"

constexpr int kMaxLanes = 16;
using LanesMax = Lanes16;
#include "vlut.inc.h"
}  // namespace vlut

const char* refuses_nothing(const Weights&, Dtype) { return nullptr; }

}  // namespace

const Kernel kNeonKernels[] = {
    {"gemv-neon", kNeon, kFp32, 10, refuses_nothing, gemv_passes, gemv_run<MathF32>},
    {"tile-neon", kNeon, kFp32, 11, refuses_nothing, tile_passes<MathF32>, tile_run<MathF32>},
    {"vlut-neon", kNeon, kInt16, 9, vlut::vlut_refuses, vlut::vlut_passes, vlut::vlut_run},
    {},
};

}  // namespace flute
