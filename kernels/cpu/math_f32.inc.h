// How the kernels multiply: this is fp32, any activations; avx512bf16.cpp has the other.
//
// Included inside a translation unit's own namespace, after decode.inc.h.

struct MathF32 {
  using X = float;                    // inputs as they are multiplied
  using Weight = F16;                 // 16 rows by kStep inputs
  static constexpr int kStep = 1;     // inputs that one multiply-add takes
  static constexpr int kDepth = 128;  // inputs in a block of the tile kernels: 512 bytes

  // gemv: weights straight from the codebook, in the order in which `arrange` leaves the inputs of a chunk.
  template <int BITS>
  using Table = Book<BITS>;
  template <int BITS>
  INLINE static Table<BITS> load_table(const float* book) {
    return load_book<BITS>(book);
  }
  template <int BITS, int I>
  INLINE static Weight weight(const Table<BITS>& table, const Words<BITS>& words) {
    return code_value<BITS, I>(table, words);
  }
  static void arrange(X* to, const void* from, int64_t i, int count, Dtype dtype, int) {
    store(to, load_lanes(from, i, count < 16 ? count : 16, dtype));
    store(to + 16, load_lanes(from, i + 16, count < 16 ? 0 : count - 16, dtype));
  }

  // tile: inputs in their own order, and the weights of two of them at a time, `distance` floats apart if they are
  // two steps.
  INLINE static void convert(X* to, const void* from, int64_t i, int count, Dtype dtype) { store(to, load_lanes(from, i, count, dtype)); }
  INLINE static void put(float* to, int distance, F16 even, F16 odd) {
    store(to, even);
    store(to + distance, odd);
  }
  INLINE static Weight get(const float* p) { return load(p); }

  INLINE static F16 multiply_add(F16 sum, Weight w, const X* x) { return fma(w, set1(*x), sum); }
};
