// K1's entry, and the workspace that it shares with K2.
#include "lut_mma.cuh"

namespace flute::cuda {

#ifdef FLUTE_SM90A
template <int kBits>
const char* run_mma_bulk_bits(const Gemm& call, int group_shift);  // lut_mma_bulk_<kBits>.cu

// Bulk copies want Hopper and whole blocks of inputs, and pay where a few tokens wait for weights. The kernel's shared addresses are
// constants behind what the system reserves.
bool takes_bulk(const Gemm& call) {
  const Device& device = call.device;
  const bool fits = device.arch == 90 && device.reserved == Device{}.reserved && device.shared_bytes >= 200 * 1024;
  return fits && call.m <= 32 && call.w.k % kBlockInputs == 0;
}
static_assert(kNormTokens == 32, "what the bulk kernel takes");
const char* run_bulk(const Gemm& call, int group_shift) {
  if (call.w.bits == 2) return run_mma_bulk_bits<2>(call, group_shift);
  return call.w.bits == 3 ? run_mma_bulk_bits<3>(call, group_shift) : run_mma_bulk_bits<4>(call, group_shift);
}
#endif

bool takes_norms(const Gemm& call) {
#ifdef FLUTE_SM90A
  return takes_bulk(call) && (!call.add.residual || (call.w.n_shards == 1 && call.w.n % 8 == 0));
#else
  return false;
#endif
}

size_t workspace_bytes(const Device& device) {
  const size_t slots = device.arch == 90 && kWgmmaSlotBytes > kMmaSlotBytes ? kWgmmaSlotBytes : kMmaSlotBytes;
  return cleared_bytes(device) + size_t(device.sms) * slots;
}

const char* run_mma(const Gemm& call) {
  thread_local char error[200];
  int shift = 30;  // one group: every input is in group 0
  if (call.w.groups > 1) {
    for (shift = 4; shift <= 8 && 1 << shift != call.w.group_size; ++shift) {
    }
    if (shift > 8) {
      std::snprintf(error, sizeof error, "lut_mma: group_size is %d; it takes 16, 32, 64, 128, 256 or K", call.w.group_size);
      return error;
    }
  }
  if (const char* error = check_gate(call)) return error;
  if ((call.normed.squares || call.add.residual) && !takes_norms(call)) return "lut_mma: only the bulk kernel has norms";
  if (call.m == 0) return nullptr;
#ifdef FLUTE_SM90A
  if (call.w.bits >= 2 && call.w.bits <= 4 && takes_bulk(call)) return run_bulk(call, shift);
#endif
  switch (call.w.bits) {
    case 2: return run_mma_bits<2>(call, shift);
    case 3: return run_mma_bits<3>(call, shift);
    case 4: return run_mma_bits<4>(call, shift);
  }
  std::snprintf(error, sizeof error, "lut_mma: bits is %d; it takes 2, 3 or 4", call.w.bits);
  return error;
}

}  // namespace flute::cuda
