#include "sm90.h"

#include <cstring>
#include <memory>
#include <set>
#include <vector>

#include "flute.h"
#include "simt.h"

namespace simt {
namespace {

constexpr int kWarpgroup = 128, kMaxWarpgroups = 8;
constexpr int kRegisterFile = 65536;    // 32-bit registers of a multiprocessor (CUDA programming guide, compute capability 9.0)
constexpr int kWarpgroupKey = 64;       // of meet()
constexpr uint32_t kAtom = 1024;        // bytes after which the swizzle repeats

// An mbarrier as its 8 bytes hold it, so that whatever overwrites it is seen.
struct Mbarrier {
  int32_t bytes;  // still to come
  uint8_t count, pending, phase, mark;
};
constexpr uint8_t kMark = 0xb5;

struct Copy {
  uint32_t shared, bytes, bar;
  const uint8_t* global;  // of a run; null: of a box
  TensorMap map;
  int column, row;
};

struct Multiply {
  float* d[kWarpgroup];
  const uint32_t* a[kWarpgroup];
  uint64_t b;
  int tokens, issued;
  bool f16;
};

struct Warpgroup {
  std::vector<Multiply> multiplies;
  size_t done = 0;
  size_t issued[kWarpgroup] = {};
  std::vector<size_t> groups[kWarpgroup];  // where each ends
  bool fenced[kWarpgroup] = {};
  int registers = 0;
};

// The physical place of a byte of a tile: bits 4 to 6 of its address are exchanged by bits 7 to 9.
uint32_t swizzle(uint32_t address) { return address ^ (address / 128 % 8 * 16); }

struct Engine {
  std::vector<Copy> copies;
  std::set<uint32_t> unfenced;  // barriers that the copy engine does not see yet
  Warpgroup warpgroups[kMaxWarpgroups];
  int free_registers = 0, lingering = 0;

  Engine() {
    const int each = std::min(255, kRegisterFile / threads()) / 8 * 8;
    for (Warpgroup& w : warpgroups) w.registers = each;
  }

  Mbarrier& barrier(uint32_t bar) {
    Mbarrier& b = *reinterpret_cast<Mbarrier*>(shared(bar, 8));
    if (b.mark != kMark) fail("no barrier was initialised at %u, or it was overwritten", bar);
    return b;
  }
  void settle(Mbarrier& b) {
    if (b.pending || b.bytes) return;
    b.pending = b.count;
    ++b.phase;
  }
  void arrive(uint32_t bar, int bytes) {
    Mbarrier& b = barrier(bar);
    if (b.pending == 0) fail("more arrive at barrier %u than its count %d", bar, b.count);
    b.bytes += bytes;
    --b.pending;
    settle(b);
  }

  void start(const Copy& copy) {
    if (unfenced.count(copy.bar)) fail("barrier %u is not visible to the copy engine: fence.mbarrier_init is missing", copy.bar);
    copies.push_back(copy);
    if (random32() % 4 == 0) land(copies.size() - 1);
  }
  void land(size_t i) {
    const Copy c = copies[i];
    copies.erase(copies.begin() + long(i));
    if (c.global) {
      for (uint32_t at = 0; at < c.bytes; at += 16) memcpy(shared(c.shared + at, 16), c.global + at, 16);
    } else {
      for (uint32_t r = 0; r < c.map.box_rows; ++r) {
        for (uint32_t k = 0; k < c.map.box_columns; ++k) {
          const int64_t row = c.row + int64_t(r), column = c.column + int64_t(k);
          const bool inside = row >= 0 && row < int64_t(c.map.rows) && column >= 0 && column < int64_t(c.map.columns);
          uint16_t value = 0;
          if (inside) memcpy(&value, c.map.data + row * int64_t(c.map.row_bytes) + column * 2, 2);
          memcpy(shared(swizzle(c.shared + (r * c.map.box_columns + k) * 2), 2), &value, 2);
        }
      }
    }
    Mbarrier& b = barrier(c.bar);
    b.bytes -= int(c.bytes);
    settle(b);
  }

  // wgmma as "Asynchronous Warpgroup Level Matrix Instructions" defines it: fragments of A and D by thread, B by the 64 bits
  // of its matrix descriptor (start address, stride of eight rows, swizzle), K the contiguous direction.
  void multiply(Multiply& m) {
    const uint32_t start = uint32_t(m.b & 0x3fff) << 4, stride = uint32_t(m.b >> 32 & 0x3fff) << 4;
    if (m.b >> 62 != 1) fail("the descriptor's swizzle is %d, not 1 (128 bytes)", int(m.b >> 62));
    if (m.b >> 49 & 7) fail("the descriptor has base offset %d: tiles begin at multiples of 1024", int(m.b >> 49 & 7));
    if (stride != kAtom) fail("eight rows of B are %u bytes apart, not 1024", stride);
    const uint32_t tile = start / kAtom * kAtom;
    if (start - tile >= 128) fail("B starts %u bytes into a row of 128", start - tile);
    for (const Copy& c : copies) {
      const bool apart = c.shared >= tile + uint32_t(m.tokens) * 128 || tile >= c.shared + c.bytes;
      if (!apart) fail("wgmma reads B while a copy to it is under way");
    }
    const auto value = [&](uint16_t h) { return m.f16 ? flute::f16_to_f32(h) : flute::bf16_to_f32(h); };
    static float a[64][16], b[16][256];
    for (int n = 0; n < m.tokens; ++n) {
      for (int k = 0; k < 16; ++k) {
        uint16_t h;
        memcpy(&h, shared(swizzle(start + uint32_t(n / 8) * stride + uint32_t(n % 8) * 128 + uint32_t(k) * 2), 2), 2);
        b[k][n] = value(h);
      }
    }
    const auto row = [](int t) { return t / 32 * 16 + t % 32 / 4; };
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < 4; ++i) {
        for (int e = 0; e < 2; ++e) a[row(t) + i % 2 * 8][t % 4 * 2 + i / 2 * 8 + e] = value(uint16_t(m.a[t][i] >> 16 * e));
      }
    }
    static float d[64][256];
    for (int r = 0; r < 64; ++r) {
      for (int n = 0; n < m.tokens; ++n) d[r][n] = 0;
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < m.tokens; ++n) d[r][n] += a[r][k] * b[k][n];
      }
    }
    for (int t = 0; t < kWarpgroup; ++t) {
      for (int i = 0; i < m.tokens / 2; ++i) {
        m.d[t][i] += d[row(t) + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
      }
    }
  }
  bool next_ready(const Warpgroup& w) const { return w.done < w.multiplies.size() && w.multiplies[w.done].issued == kWarpgroup; }

  // Copies land and multiplications run now and then, so that what uses them too early differs from run to run.
  bool step() {
    bool busy = !copies.empty() || lingering;
    if (!copies.empty() && random32() % 4 == 0) land(random32() % copies.size());
    for (Warpgroup& w : warpgroups) {
      if (!next_ready(w)) continue;
      busy = true;
      if (random32() % 2) multiply(w.multiplies[w.done++]);
    }
    return busy;
  }

  void finish() {  // what a kernel must not leave behind
    if (!copies.empty()) fail("the CTA ended with %zu copies under way", copies.size());
    for (const Warpgroup& w : warpgroups) {
      if (w.done != w.multiplies.size()) fail("the CTA ended with wgmma under way");
    }
  }
};

// The running CTA's, which ends with it.
Engine& engine() {
  static std::weak_ptr<Engine> of_residents[kMostAtOnce];
  std::weak_ptr<Engine>& current = of_residents[resident()];
  std::shared_ptr<Engine> e = current.lock();
  if (!e) {
    e = std::shared_ptr<Engine>(new Engine, [](Engine* old) {
      old->finish();
      delete old;
    });
    current = e;
    add_engine([e] { return e->step(); });
  }
  return *e;
}
Warpgroup& warpgroup() {
  if (threads() % kWarpgroup || threads() > kMaxWarpgroups * kWarpgroup) fail("%d threads are no whole warpgroups", threads());
  return engine().warpgroups[thread() / kWarpgroup];
}
int rank() { return thread() % kWarpgroup; }

// Others get ahead of a thread that is about to tell them something, or just has.
void linger() {
  if (random32() % 8) return;
  uint32_t turns = random32() % 32;
  ++engine().lingering;
  wait([&] { return turns-- == 0; });
  --engine().lingering;
}

void meet_warpgroup() {
  meet(kWarpgroupKey + thread() / kWarpgroup, kWarpgroup, rank(), nullptr, [](void**) {});
}

}  // namespace

void mbarrier_init(uint32_t bar, uint32_t count) {
  linger();
  const Mbarrier fresh = {0, uint8_t(count), uint8_t(count), 0, kMark};
  memcpy(shared(bar, 8), &fresh, 8);
  engine().unfenced.insert(bar);
}
void fence_mbarrier_init() { engine().unfenced.clear(); }
void mbarrier_arrive(uint32_t bar) {
  engine().arrive(bar, 0);
  linger();
}
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes) {
  engine().arrive(bar, int(bytes));
  linger();
}
void mbarrier_wait(uint32_t bar, uint32_t parity) {
  wait([&] { return engine().barrier(bar).phase % 2 != parity; });
}

void bulk_load(uint32_t to, const void* global, uint32_t bytes, uint32_t bar) {
  if ((to | bytes | reinterpret_cast<uintptr_t>(global)) % 16) fail("bulk copy: addresses and size must be multiples of 16");
  engine().start({to, bytes, bar, static_cast<const uint8_t*>(global), {}, 0, 0});
}
void load_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t bar) {
  if (to % kAtom) fail("tensor copy: a tile swizzled by 128 bytes must begin at a multiple of 1024, not at %u", to);
  if (map->box_columns * 2 != 128) fail("tensor copy: rows of the box have %u bytes, not 128", map->box_columns * 2);
  if (map->box_rows > 256 || (map->row_bytes | reinterpret_cast<uintptr_t>(map->data)) % 16) fail("tensor copy: no valid map");
  engine().start({to, map->box_columns * 2 * map->box_rows, bar, nullptr, *map, column, row});
}

void give_registers(int count) {
  Warpgroup& w = warpgroup();
  meet_warpgroup();
  if (count % 8 || count < 24 || count > w.registers) fail("setmaxnreg.dec to %d from %d registers", count, w.registers);
  meet_warpgroup();
  if (rank() == 0) {
    engine().free_registers += (w.registers - count) * kWarpgroup;
    w.registers = count;
  }
}
void take_registers(int count) {
  Warpgroup& w = warpgroup();
  meet_warpgroup();
  if (count % 8 || count > 256 || count < w.registers) fail("setmaxnreg.inc to %d from %d registers", count, w.registers);
  meet_warpgroup();
  if (rank() == 0) {
    const int more = (count - w.registers) * kWarpgroup;
    wait([&] { return engine().free_registers >= more; });
    engine().free_registers -= more;
    w.registers = count;
  }
  meet_warpgroup();
}

void wgmma_fence() { warpgroup().fenced[rank()] = true; }
void wgmma(float* d, const uint32_t* a, uint64_t b, int tokens, bool f16) {
  Warpgroup& w = warpgroup();
  const int t = rank();
  if (!w.fenced[t]) fail("wgmma without a wgmma.fence since the last group");
  const size_t i = w.issued[t]++;
  if (i == w.multiplies.size()) w.multiplies.push_back({{}, {}, b, tokens, 0, f16});
  Multiply& m = w.multiplies[i];
  if (m.b != b || m.tokens != tokens || m.f16 != f16) fail("the threads of a warpgroup issue different wgmma");
  m.d[t] = d;
  m.a[t] = a;
  ++m.issued;
}
void wgmma_commit() {
  Warpgroup& w = warpgroup();
  w.groups[rank()].push_back(w.issued[rank()]);
  w.fenced[rank()] = false;
}
void wgmma_wait(int pending) {
  Warpgroup& w = warpgroup();
  const std::vector<size_t>& groups = w.groups[rank()];
  if (groups.size() <= size_t(pending)) return;
  const size_t end = groups[groups.size() - 1 - size_t(pending)];
  wait([&] { return w.done >= end; });
}

void stmatrix4_transposed(uint32_t address, const uint32_t* r) {
  struct Lane {
    uint32_t address;
    const uint32_t* r;
  } mine = {address, r};
  meet(thread() / 32, 32, thread() % 32, &mine, [](void** lanes) {
    // Lane 8 i + j has the address of row j of matrix i; its columns are what the fragments call rows.
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 8; ++j) {
        uint8_t* row = shared(static_cast<Lane*>(lanes[8 * i + j])->address, 16);
        for (int k = 0; k < 8; ++k) {
          const uint16_t h = uint16_t(static_cast<Lane*>(lanes[4 * k + j / 2])->r[i] >> j % 2 * 16);
          memcpy(row + 2 * k, &h, 2);
        }
      }
    }
  });
}

}  // namespace simt
