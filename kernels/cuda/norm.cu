// RMS norms by themselves, where no layer's kernel has them (launch.h, AddNorm and Normed): a CTA a token.
#include <type_traits>

#include "flute.h"
#include "launch.h"
#include "ptx.h"

namespace flute::cuda {

namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;

// Eight values at a time of a 16-bit type, or one of any.
template <int kDtype>
struct Values {
  using T = typename std::conditional<kDtype == kF32, float, uint16_t>::type;
  static FLUTE_DEVICE float widen(T v) {
    if constexpr (kDtype == kF32) return v;
    else return widen16<kDtype == kF16>(v);
  }
  static FLUTE_DEVICE T round(float v) {
    if constexpr (kDtype == kF32) return v;
    else return round16<kDtype == kF16>(v);
  }
  template <int kCount>
  static FLUTE_DEVICE void load(const void* from, int64_t at, float (&v)[kCount]) {
    const T* const p = static_cast<const T*>(from) + at;
    if constexpr (kCount == 8) {
      const Words4 four = *reinterpret_cast<const Words4*>(p);
      FLUTE_UNROLL
      for (int i = 0; i < 8; ++i) v[i] = widen(T(four.w[i / 2] >> i % 2 * 16));
    } else {
      v[0] = widen(*p);
    }
  }
  template <int kCount>
  static FLUTE_DEVICE void store(void* to, int64_t at, const float (&v)[kCount]) {
    T* const p = static_cast<T*>(to) + at;
    if constexpr (kCount == 8) {
      Words4 four;
      FLUTE_UNROLL
      for (int i = 0; i < 4; ++i) four.w[i] = round_pair<kDtype == kF16>(v[2 * i], v[2 * i + 1]);
      store_global(p, four);
    } else {
      *p = round(v[0]);
    }
  }
};

// The sum over a CTA's threads, to all of them, always in the same order.
FLUTE_DEVICE float sum_of_threads(float v) {
  FLUTE_UNROLL
  for (int bit = 1; bit < 32; bit *= 2) v += as_f32(other_lane(as_bits(v), bit));
  const uint32_t sums = shared_base();
  if (lane_id() == 0) sts32(sums + thread_id() / 32 * 4, as_bits(v));
  barrier();
  float all = 0;
  FLUTE_UNROLL
  for (int i = 0; i < kNormWarps; ++i) all += as_f32(lds32(sums + i * 4));
  return all;
}

struct AddNormCall {
  const void* y;
  AddNorm add;
  float epsilon;
  void* out;
  int m, n;
};

template <int kDtype, int kCount>
FLUTE_KERNEL(kNormThreads, 1) add_norm(FLUTE_PARAMETER AddNormCall p) {
  using V = Values<kDtype>;
  const int64_t row = int64_t(cta_id()) * p.n;
  const bool whole = p.m > kNormTokens;
  float squares = 0;
  for (int i = thread_id() * kCount; i < p.n; i += kNormThreads * kCount) {
    float y[kCount], sum[kCount];
    V::load(p.y, row + i, y);
    V::load(p.add.residual, row + i, sum);
    FLUTE_UNROLL
    for (int j = 0; j < kCount; ++j) {
      sum[j] += y[j];
      squares += sum[j] * sum[j];
    }
    V::store(p.add.sum, row + i, sum);
    if (whole) continue;  // the norm is not known yet, and `out` may be y
    float weight[kCount];
    V::load(p.add.weight, i, weight);
    FLUTE_UNROLL
    for (int j = 0; j < kCount; ++j) sum[j] *= weight[j];
    V::store(p.out, row + i, sum);
  }
  const float all = sum_of_threads(squares);
  if (!whole) {
    const int parts = norm_parts(p.n);
    float* const to = p.add.squares + int64_t(cta_id()) * parts;
    for (int i = thread_id(); i < parts; i += kNormThreads) to[i] = i ? 0 : all;
    return;
  }
  const float factor = 1 / sqrtf(all / float(p.n) + p.epsilon);
  for (int i = thread_id() * kCount; i < p.n; i += kNormThreads * kCount) {
    float y[kCount], sum[kCount], weight[kCount];
    V::load(p.y, row + i, y);
    V::load(p.add.residual, row + i, sum);
    V::load(p.add.weight, i, weight);
    FLUTE_UNROLL
    for (int j = 0; j < kCount; ++j) sum[j] = V::widen(V::round((sum[j] + y[j]) * factor)) * weight[j];  // as vLLM rounds it
    V::store(p.out, row + i, sum);
  }
}

struct ScaleCall {
  const void* x;
  Normed normed;
  void* out;
  int k;
};

template <int kDtype, int kCount>
FLUTE_KERNEL(kNormThreads, 1) scale_tokens(FLUTE_PARAMETER ScaleCall p) {
  using V = Values<kDtype>;
  const int parts = norm_parts(p.k);
  const float* const squares = p.normed.squares + int64_t(cta_id()) * parts;
  float sum = 0;
  for (int i = thread_id(); i < parts; i += kNormThreads) sum += squares[i];
  const float factor = 1 / sqrtf(sum_of_threads(sum) / float(p.k) + p.normed.epsilon);
  const int64_t row = int64_t(cta_id()) * p.k;
  for (int i = thread_id() * kCount; i < p.k; i += kNormThreads * kCount) {
    float x[kCount];
    V::load(p.x, row + i, x);
    FLUTE_UNROLL
    for (int j = 0; j < kCount; ++j) x[j] *= factor;
    V::store(p.out, row + i, x);
  }
}

// kernel(dtype, count): as constants, for rows of `n` values.
template <class Launch>
const char* by_type(int dtype, int n, const Launch& launch) {
  using One = std::integral_constant<int, 1>;
  using Eight = std::integral_constant<int, 8>;
  const auto of_16_bits = [&](auto type) { return n % 8 ? launch(type, One{}) : launch(type, Eight{}); };
  if (dtype == kF32) return launch(std::integral_constant<int, kF32>{}, One{});
  return dtype == kF16 ? of_16_bits(std::integral_constant<int, kF16>{}) : of_16_bits(std::integral_constant<int, kBf16>{});
}
constexpr int kNormShared = kNormWarps * 4;

}  // namespace

const char* run_add_norm(const void* y, const AddNorm& add, float epsilon, void* out, int64_t m, int n, int dtype, void* stream) {
  if (m == 0) return nullptr;
  const AddNormCall call{y, add, epsilon, out, int(m), n};
  return by_type(dtype, n, [&](auto type, auto count) {
    return launch(add_norm<type.value, count.value>, int(m), kNormThreads, kNormShared, stream, call);
  });
}

const char* run_scale_tokens(const void* x, const Normed& normed, void* out, int64_t m, int k, int dtype, void* stream) {
  if (m == 0) return nullptr;
  const ScaleCall call{x, normed, out, k};
  return by_type(dtype, k, [&](auto type, auto count) {
    return launch(scale_tokens<type.value, count.value>, int(m), kNormThreads, kNormShared, stream, call);
  });
}

}  // namespace flute::cuda
