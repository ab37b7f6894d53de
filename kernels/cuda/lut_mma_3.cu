// K1 for codes of 3 bits.
#include "lut_mma.cuh"

namespace flute::cuda {
template const char* run_mma_bits<3>(const Gemm&, int);
}  // namespace flute::cuda
