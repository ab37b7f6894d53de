// K2's entry. FLUTE_SM90A says that the build has code for sm_90a: lut_wgmma_2.cu, _3.cu and _4.cu, compiled for it alone.
#include <cstdio>

#include "gate.h"

namespace flute::cuda {

#ifdef FLUTE_SM90A
template <int kBits>
const char* run_wgmma_bits(const Gemm& call);  // lut_wgmma_<kBits>.cu

const char* run_wgmma(const Gemm& call) {
  thread_local char error[200];
  const Packed& w = call.w;
  if (call.device.arch != 90) {
    std::snprintf(error, sizeof error, "lut_wgmma: the device is sm_%d; only sm_90 has wgmma", call.device.arch);
    return error;
  }
  const bool power_of_two = (w.group_size & (w.group_size - 1)) == 0;
  if (w.groups > 1 && (w.group_size < 16 || w.group_size > 256 || !power_of_two)) {
    std::snprintf(error, sizeof error, "lut_wgmma: group_size is %d; it takes 16, 32, 64, 128, 256 or K", w.group_size);
    return error;
  }
  if (const char* error = check_gate(call)) return error;
  if (call.m == 0) return nullptr;
  switch (w.bits) {
    case 2: return run_wgmma_bits<2>(call);
    case 3: return run_wgmma_bits<3>(call);
    case 4: return run_wgmma_bits<4>(call);
  }
  std::snprintf(error, sizeof error, "lut_wgmma: bits is %d; it takes 2, 3 or 4", w.bits);
  return error;
}
#else
const char* run_wgmma(const Gemm&) { return "lut_wgmma: this build has no code for sm_90a; name it in FLUTE_CUDA_ARCHS"; }
#endif

}  // namespace flute::cuda
