#include "lut_wgmma.cuh"

namespace flute::cuda {

template const char* run_wgmma_bits<4>(const Gemm&);

}  // namespace flute::cuda
