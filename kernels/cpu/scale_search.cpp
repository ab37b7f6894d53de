// Scale search: for each group of weights the scale of least squared error with the nearest table entries, exactly.
//
// The method is vllm_flute/quantization/scale_search.py's: as the scale falls, a weight moves outward through the table, one
// entry at each of its thresholds, and between two such events the best scale of the codes is A / B, which lowers the error by
// A^2 / B. There all events are sorted. Here they are counted into buckets of u = 1 / scale, and only a few buckets' events are.
// A weight of magnitude m that goes from entry p to q does so at u = (p + q) / 2 / m and adds m (q - p) to A and (q^2 - p^2) to
// B, which is 2 u times as much. So within a bucket that begins at u, after t of what it adds to A, the error is lowered by at
// most (A + t)^2 / (B + 2 u t), which is convex in t: by no more than at one of the bucket's ends. Where that is not more than the
// best of all ends, nothing within is better. Around the best scale u A = B, where the bound meets the values at both ends to
// first order: of 100 buckets 5 are sorted (groups of 64, Gaussian weights).
#include <algorithm>
#include <cmath>
#include <vector>

#include "flute.h"

namespace flute {

namespace {

// Buckets begin where the largest weight reaches its first threshold, and end at a quarter of the scale that gives it the
// largest entry. What comes later is in the last.
constexpr float kSmallestScale = 0.25f;
constexpr float kRounding = 1 + 1e-5f;  // what the sums of a group may be wrong by

// The entries that weights of one sign go through, in magnitudes.
struct Side {
  int count = 0;      // of thresholds
  float first, last;  // the entry before them all, of either sign, and the entry beyond them
  float thresholds[16], level_steps[16], square_steps[16];
};

// `levels` ascending and distinct; sign: of the weights.
Side side_of(const float* levels, int n, int sign) {
  const auto level = [&](int i) { return sign > 0 ? levels[i] : -levels[n - 1 - i]; };
  int i = 0;
  while (i + 1 < n && level(i) / 2 + level(i + 1) / 2 <= 0) ++i;
  Side side;
  side.first = level(i);
  for (; i + 1 < n; ++i, ++side.count) {
    const float from = level(i), to = level(i + 1);
    side.thresholds[side.count] = from / 2 + to / 2;
    side.level_steps[side.count] = to - from;
    side.square_steps[side.count] = to * to - from * from;
  }
  side.last = level(n - 1);
  return side;
}

// A floating-point number of at least 0 as an integer of the same order.
int32_t order_of(float v) {
  int32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}
float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

struct Best {
  float gain = 0, scale = 0;
};

class Search {
 public:
  Search(int32_t size, const Side& negative, const Side& positive) : size_(size) {
    while (fraction_bits_ < 12 && size > 4 << fraction_bits_) ++fraction_bits_;
    nearest_ = INFINITY;
    for (const Side* side : {&negative, &positive}) {
      if (side->count) nearest_ = std::min(nearest_, side->thresholds[0]);
    }
    const float octaves = std::log2(std::max(negative.last, positive.last) / nearest_ / kSmallestScale);
    buckets_ = octaves > 0 ? (int(octaves) + 2) << fraction_bits_ : 1;
    for (auto* values : {&magnitude_, &inverse_, &importance_, &weighted_}) values->resize(size);
    for (auto* values : {&a_, &b_, &gain_, &bound_}) values->resize(buckets_);
    head_.resize(buckets_);
    bucket_of_.resize(size);
    next_.resize(size_t(size) * std::max(negative.count, positive.count));
  }

  // The weights of a group, those of each sign together; `importance` may be null.
  void load(const float* weights, const float* importance) {
    int32_t front = 0, back = size_;
    for (int32_t i = 0; i < size_; ++i) {
      const int32_t to = weights[i] > 0 ? --back : front++;
      magnitude_[to] = std::fabs(weights[i]);
      importance_[to] = importance ? importance[i] : 1;
    }
    begin_[0] = 0;
    begin_[1] = front;
    begin_[2] = size_;
    for (int32_t i = 0; i < size_; ++i) {
      inverse_[i] = 1 / magnitude_[i];  // of zero: its events come after all others, and add nothing to A
      weighted_[i] = magnitude_[i] * importance_[i];
    }
    largest_ = 0;
    finite_ = true;
    for (int s = 0; s < 2; ++s) {
      weighted_sum_[s] = importance_sum_[s] = 0;
      for (int32_t i = begin_[s]; i < begin_[s + 1]; ++i) {
        largest_ = std::max(largest_, magnitude_[i]);
        weighted_sum_[s] += weighted_[i];
        importance_sum_[s] += importance_[i];
      }
      finite_ = finite_ && std::isfinite(weighted_sum_[s]) && std::isfinite(importance_sum_[s]);
    }
  }
  bool finite() const { return finite_; }

  // What is better than `best` of the scales of at least 0 with `sides` for negative and for positive weights, or `best`.
  Best sweep(const Side* const (&sides)[2], float sign, Best best) {
    if (!(largest_ > 0)) return best;
    float a = 0, b = 0;
    for (int s = 0; s < 2; ++s) {
      a += weighted_sum_[s] * sides[s]->first;
      b += importance_sum_[s] * sides[s]->first * sides[s]->first;
    }
    const float start_a = a, start_b = b;
    if (a > 0 && b > 0 && a * a > best.gain * b) best = {a * a / b, sign * a / b};
    count_events(sides);
    // Sums up to each bucket's end, the gain there, and a bound of the gains within.
    float *const sum_a = a_.data(), *const sum_b = b_.data(), *const gain = gain_.data(), *const bound = bound_.data();
    for (int k = 0; k < buckets_; ++k) {
      sum_a[k] = a += sum_a[k];
      sum_b[k] = b += sum_b[k];
    }
    const int32_t first = first_bucket(), shift = 23 - fraction_bits_;
    for (int k = 0; k < buckets_; ++k) {
      const float before_a = k ? sum_a[k - 1] : start_a, before_b = k ? sum_b[k - 1] : start_b;
      const float square = sum_a[k] > 0 ? sum_a[k] * sum_a[k] : 0, least_b = before_b + 2 * float_of(uint32_t(first + k) << shift) * (sum_a[k] - before_a);
      gain[k] = sum_b[k] > 0 ? square / sum_b[k] : 0;
      bound[k] = least_b > 0 ? square / least_b * kRounding : square * INFINITY;
    }
    for (int k = 0; k < buckets_; ++k) {
      if (gain[k] > best.gain) best = {gain[k], sign * sum_a[k] / sum_b[k]};
    }
    for (int k = 0; k < buckets_; ++k) {
      if (!(bound[k] > best.gain) || head_[k] < 0 || next_[head_[k]] < 0) continue;
      look_into(k, sides, sign, k ? sum_a[k - 1] : start_a, k ? sum_b[k - 1] : start_b, best);
    }
    return best;
  }

 private:
  struct Event {
    float at, a, b;  // 1 / scale, and what it adds
  };

  int32_t first_bucket() const { return order_of(nearest_ / largest_) >> (23 - fraction_bits_); }

  // Events are numbered by side, threshold and weight.
  void count_events(const Side* const (&sides)[2]) {
    float *const a = a_.data(), *const b = b_.data();
    int32_t *const head = head_.data(), *const next = next_.data(), *const bucket_of = bucket_of_.data();
    const float *const inverse = inverse_.data(), *const weighted = weighted_.data(), *const importance = importance_.data();
    std::fill(a, a + buckets_, 0.f);
    std::fill(b, b + buckets_, 0.f);
    std::fill(head, head + buckets_, -1);
    const int shift = 23 - fraction_bits_, last = buckets_ - 1;
    const int32_t base = first_bucket();
    int32_t id = 0;
    for (int s = 0; s < 2; ++s) {
      const Side& side = *sides[s];
      for (int j = 0; j < side.count; ++j) {
        const float threshold = side.thresholds[j], level_step = side.level_steps[j], square_step = side.square_steps[j];
        for (int32_t i = begin_[s]; i < begin_[s + 1]; ++i) {
          bucket_of[i] = std::min(std::max((order_of(threshold * inverse[i]) >> shift) - base, 0), last);
        }
        for (int32_t i = begin_[s]; i < begin_[s + 1]; ++i, ++id) {
          const int32_t k = bucket_of[i];
          a[k] += weighted[i] * level_step;
          b[k] += importance[i] * square_step;
          next[id] = head[k];
          head[k] = id;
        }
      }
    }
  }

  void look_into(int bucket, const Side* const (&sides)[2], float sign, float a, float b, Best& best) {
    const uint32_t negative = uint32_t(begin_[1] * sides[0]->count);
    found_.clear();
    for (int32_t id = head_[bucket]; id >= 0; id = next_[id]) {
      const int s = uint32_t(id) >= negative;
      const uint32_t of_side = uint32_t(begin_[s + 1] - begin_[s]), number = uint32_t(id) - (s ? negative : 0);
      const uint32_t i = uint32_t(begin_[s]) + number % of_side, j = number / of_side;
      const Side& side = *sides[s];
      found_.push_back({side.thresholds[j] * inverse_[i], weighted_[i] * side.level_steps[j], importance_[i] * side.square_steps[j]});
    }
    std::sort(found_.begin(), found_.end(), [](const Event& x, const Event& y) { return x.at < y.at; });
    for (const Event& e : found_) {
      a += e.a;
      b += e.b;
      if (a > 0 && b > 0 && a * a > best.gain * b) best = {a * a / b, sign * a / b};
    }
  }

  int32_t size_, begin_[3];  // of the weights of each sign
  bool finite_;
  int fraction_bits_ = 4, buckets_;  // buckets an octave: 2 to this, 16 or a quarter of the weights
  float nearest_, largest_, weighted_sum_[2], importance_sum_[2];
  std::vector<float> magnitude_, inverse_, importance_, weighted_;  // of weights
  std::vector<float> a_, b_, gain_, bound_;                         // of buckets
  std::vector<int32_t> head_, bucket_of_, next_;                    // lists of the events in a bucket
  std::vector<Event> found_;
};

}  // namespace

}  // namespace flute

void flute_cpu_search_scales(const float* groups, int64_t count, int64_t size, const float* levels, int n, const float* importance,
                             int64_t period, float* scales) {
  using namespace flute;
  const Side negative = side_of(levels, n, -1), positive = side_of(levels, n, 1);
  bool symmetric = true;
  for (int i = 0; i < n; ++i) symmetric = symmetric && levels[i] == -levels[n - 1 - i];
  Search search(int32_t(size), negative, positive);
  for (int64_t g = 0; g < count; ++g) {
    search.load(groups + g * size, importance ? importance + g % period * size : nullptr);
    if (!search.finite()) {  // such events could not be put in order
      scales[g] = NAN;
      continue;
    }
    Best best = search.sweep({&negative, &positive}, 1, Best{});
    if (!symmetric) best = search.sweep({&positive, &negative}, -1, best);
    scales[g] = best.scale;
  }
}
