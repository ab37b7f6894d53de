// The tile operations that the AMX kernels use: registers 0 to 7 of up to 16 rows of up to 64 bytes.
//
// The instructions are written out, because gcc 12's intrinsics do not tell it which memory they read: it drops the stores
// that fill a configuration, and may move others past a load. With FLUTE_EMULATE_AMX they are plain C++ that computes what
// the instructions do, for tests on a CPU without them (tests/test_amx.py).
//
// Included inside a translation unit's own namespace, after isa.inc.h.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifdef FLUTE_EMULATE_AMX

struct Tiles {
  TileConfig config;
  alignas(64) uint8_t data[8][16][64];
};
thread_local Tiles tiles;

void tile_configure(const TileConfig& config) { tiles.config = config; }
void tile_release() { memset(static_cast<void*>(&tiles), 0, sizeof(tiles)); }

template <int T>
void tile_zero() {
  memset(tiles.data[T], 0, sizeof(tiles.data[T]));
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    memcpy(tiles.data[T][r], static_cast<const char*>(p) + r * stride, tiles.config.column_bytes[T]);
  }
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    memcpy(static_cast<char*>(p) + r * stride, tiles.data[T][r], tiles.config.column_bytes[T]);
  }
}

// An instruction faults where the shapes of its tiles do not fit.
template <int C, int A, int B>
void tile_check() {
  const TileConfig& c = tiles.config;
  const bool fits = c.palette == 1 && c.rows[C] == c.rows[A] && c.column_bytes[C] == c.column_bytes[B] && c.column_bytes[A] == 4 * c.rows[B];
  if (!fits) __builtin_trap();
}

// Denormal inputs are zero, denormal results become zero, and a fused product rounds once.
INLINE float flushed(float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0, v) : v; }
template <int C, int A, int B>
void tile_dpbf16() {
  tile_check<C, A, B>();
  const TileConfig& c = tiles.config;
  for (int m = 0; m < c.rows[C]; ++m) {
    alignas(64) float sum[2][16] = {}, total[16];
    for (int k = 0; k < c.column_bytes[A] / 4; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 2; ++i) {
          uint16_t a, b;
          memcpy(&a, &tiles.data[A][m][4 * k + 2 * i], 2);
          memcpy(&b, &tiles.data[B][k][4 * n + 2 * i], 2);
          sum[i][n] = flushed(__builtin_fmaf(flushed(bf16_to_f32(a)), flushed(bf16_to_f32(b)), sum[i][n]));
        }
      }
    }
    memcpy(total, tiles.data[C][m], 64);
    for (int n = 0; n < 16; ++n) total[n] = flushed(flushed(total[n]) + flushed(sum[0][n] + sum[1][n]));
    memcpy(tiles.data[C][m], total, c.column_bytes[C]);
  }
}

template <int C, int A, int B>
void tile_dpbssd() {
  tile_check<C, A, B>();
  const TileConfig& c = tiles.config;
  for (int m = 0; m < c.rows[C]; ++m) {
    int32_t total[16];
    memcpy(total, tiles.data[C][m], 64);
    for (int k = 0; k < c.column_bytes[A] / 4; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) total[n] += int8_t(tiles.data[A][m][4 * k + i]) * int8_t(tiles.data[B][k][4 * n + i]);
      }
    }
    memcpy(tiles.data[C][m], total, c.column_bytes[C]);
  }
}

#else

INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
INLINE void tile_release() { asm volatile("tilerelease"); }
template <int T>
INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dpbf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_dpbssd() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// What the products below want: tiles 0 to 3 are sums of `rows` tokens by 16 rows of weights (tile 2 * token + row), 4 and
// 5 inputs of `rows` tokens, 6 and 7 weights.
INLINE void tile_configure(int rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = uint8_t(t < 6 ? rows : 16);
    config.column_bytes[t] = 64;
  }
  tile_configure(config);
}
