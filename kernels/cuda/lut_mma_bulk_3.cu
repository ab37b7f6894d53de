// K1 with bulk copies, for codes of 3 bits.
#include "lut_mma_bulk.cuh"

namespace flute::cuda {
template const char* run_mma_bulk_bits<3>(const Gemm&, int);
}  // namespace flute::cuda
