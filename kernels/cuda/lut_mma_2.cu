// K1 for codes of 2 bits.
#include "lut_mma.cuh"

namespace flute::cuda {
template const char* run_mma_bits<2>(const Gemm&, int);
}  // namespace flute::cuda
