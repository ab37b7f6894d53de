// Fibers, and the instructions of sm_80 as the PTX manual defines them; nothing here knows the packed layout.
#ifdef _FORTIFY_SOURCE
#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#endif
#include "simt.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

#include "flute.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Config config;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;  // of a thread; touched only as far as it is used, and redzones need room

struct Copy {
  uint32_t to;
  const void* from;
  int bytes;
};
using CopyGroup = std::vector<Copy>;

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  void* shadow = nullptr;  // of the address sanitizer
  CopyGroup open;
  std::vector<CopyGroup> committed;
};

struct Meeting {
  int arrived = 0;
  uint64_t round = 0;
  std::vector<void*> arguments;
};

struct Cta {
  int id;
  std::vector<Meeting> meetings;
  std::vector<std::function<bool()>> engines;
  std::vector<uint8_t> shared;
};

// A launch under way, and of it the CTAs that run at once, and their threads one CTA's after another's.
std::vector<Cta> group;
std::vector<Fiber> fibers;
const std::function<void()>* kernel;
int n_threads, n_ctas, current_resident = 0, current = -1;
bool progress;
uint64_t random_state = 1, n_launches;

jmp_buf scheduler;
void* scheduler_shadow;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

// The sanitizer has to know whose stack is in use.
void leave([[maybe_unused]] void** shadow, [[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(shadow, stack, bytes);
#endif
}
void arrive([[maybe_unused]] void* shadow, [[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(shadow, stack, bytes);
#endif
}

void start_fiber() {
  arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel)();
  Fiber& f = fibers[current];
  f.done = progress = true;
  leave(nullptr, scheduler_stack, scheduler_stack_bytes);
  _longjmp(scheduler, 1);
}

void yield() {
  Fiber& f = fibers[current];
  if (_setjmp(f.resume) == 0) {
    leave(&f.shadow, scheduler_stack, scheduler_stack_bytes);
    _longjmp(scheduler, 1);
  }
  arrive(f.shadow, &scheduler_stack, &scheduler_stack_bytes);
}

void run_fiber(int thread) {
  Fiber& f = fibers[thread];
  current = thread;
  current_resident = thread / n_threads;
  if (_setjmp(scheduler) == 0) {
    leave(&scheduler_shadow, f.stack.get(), kStackBytes);
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    setcontext(&f.start);
  }
  arrive(scheduler_shadow, nullptr, nullptr);
  current = -1;
}

void start_group(int first_cta) {
  for (Cta& c : group) {
    c.id = first_cta + int(&c - group.data());
    std::fill(c.shared.begin(), c.shared.end(), 0xff);  // a NaN in every format
    c.meetings.assign(kKeys, {});
    c.engines.clear();
  }
  for (Fiber& f : fibers) {
    f.started = f.done = false;
    f.open.clear();
    f.committed.clear();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, start_fiber, 0);
  }
}

void run_group(int first_cta) {
  start_group(first_cta);
  const int cta_warps = (n_threads + kWarp - 1) / kWarp, warps = cta_warps * int(group.size());
  int idle = 0;
  std::vector<int> pause(warps);
  for (bool alive = true; alive;) {
    alive = progress = false;
    bool paused = false;
    for (int w = 0; w < warps; ++w) {
      const int begin = w / cta_warps * n_threads + w % cta_warps * kWarp;
      const int end = std::min(begin + kWarp, (w / cta_warps + 1) * n_threads);
      if (std::all_of(fibers.begin() + begin, fibers.begin() + end, [](const Fiber& f) { return f.done; })) continue;
      if (pause[w] > 0) {
        --pause[w];
        alive = paused = true;
        continue;
      }
      if (random32() % 64 == 0) pause[w] = random32() % 64;  // others get ahead
      for (int t = begin; t < end; ++t) {
        if (fibers[t].done) continue;
        alive = true;
        run_fiber(t);
      }
    }
    for (current_resident = 0; current_resident < int(group.size()); ++current_resident) {
      for (auto& engine : group[current_resident].engines) progress |= engine();
    }
    current_resident = 0;
    idle = progress || paused ? 0 : idle + 1;
    if (alive && idle > 2) fail("deadlock: every thread of the CTAs from %d on waits", first_cta);
  }
  for (const Cta& c : group) {
    for (int key = 0; key < kKeys; ++key) {
      if (c.meetings[key].arrived) fail("CTA %d ended while threads wait at %d", c.id, key);
    }
  }
  for (const Fiber& f : fibers) {
    for (const CopyGroup& group : f.committed) {
      if (!group.empty()) fail("a CTA from %d on ended with copies under way", first_cta);
    }
  }
}

void deliver(const Copy& c) {
  uint8_t* to = shared(c.to, 16);
  memset(to, 0, 16);
  memcpy(to, c.from, c.bytes);
}

// A CTA's end is the program's own affair where nothing is under way; what is not waited for may land at any time.
void deliver_at_random(Fiber& f) {
  for (CopyGroup& group : f.committed) {
    for (size_t i = group.size(); i-- > 0;) {
      if (random32() % 4) continue;
      deliver(group[i]);
      group.erase(group.begin() + i);
    }
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "simt: thread %d of CTA %d: ", current < 0 ? -1 : current % n_threads, cta());
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::exit(1);
}

uint32_t random32() { return uint32_t((random_state = random_state * 6364136223846793005u + 1442695040888963407u) >> 32); }

const char* launch(int grid, int threads, int bytes, const std::function<void()>& body, bool in_order) {
  if (bytes > config.shared_limit) return "invalid argument: more shared memory than the device has";
  if (threads < 1 || threads > 1024 || grid < 1) return "invalid configuration argument";
  random_state = config.seed;
  ++n_launches;
  n_threads = threads;
  n_ctas = grid;
  kernel = &body;
  const auto run = [&](int first_cta, int at_once) {
    group.resize(size_t(at_once));
    for (Cta& c : group) {
      c.shared.resize(size_t(bytes));
      c.shared.shrink_to_fit();
    }
    fibers.resize(size_t(threads) * at_once);
    for (Fiber& f : fibers) {
      if (!f.stack) f.stack.reset(new char[kStackBytes]);
    }
    run_group(first_cta);
  };
  if (in_order) {
    for (int first = 0, at_once; first < grid; first += at_once) {
      at_once = std::min(int(random32() % kMostAtOnce) + 1, grid - first);
      run(first, at_once);
    }
    return nullptr;
  }
  std::vector<int> order(grid);
  std::iota(order.begin(), order.end(), 0);
  for (int i = grid - 1; i > 0; --i) std::swap(order[i], order[random32() % (i + 1)]);
  for (int cta : order) run(cta, 1);
  return nullptr;
}
uint64_t launches() { return n_launches; }

int thread() { return current % n_threads; }
int threads() { return n_threads; }
int cta() { return group[current_resident].id; }
int ctas() { return n_ctas; }
int resident() { return current_resident; }

uint8_t* shared(uint32_t address, int bytes) {
  std::vector<uint8_t>& memory = group[current_resident].shared;
  const int64_t offset = int64_t(address) - kSharedBase;
  if (offset < 0 || offset + bytes > int64_t(memory.size())) {
    fail("%d bytes at shared address %lld of %zu", bytes, static_cast<long long>(offset), memory.size());
  }
  if (offset % std::min(bytes, 16)) fail("shared address %lld is not aligned to %d bytes", static_cast<long long>(offset), bytes);
  return memory.data() + offset;
}
void wait(const std::function<bool()>& ready) {
  while (!ready()) yield();
  progress = true;
}

void meet(int key, int count, int rank, void* argument, const std::function<void(void**)>& op) {
  if (key < 0 || key >= kKeys || rank < 0 || rank >= count) fail("no meeting %d of %d threads for rank %d", key, count, rank);
  Meeting& m = group[current_resident].meetings[key];
  const uint64_t round = m.round;
  if (m.arrived == 0) m.arguments.assign(count, nullptr);
  if (int(m.arguments.size()) != count) fail("%d threads meet where others wait for %zu", count, m.arguments.size());
  m.arguments[rank] = argument;
  progress = true;
  if (++m.arrived == count) {
    op(m.arguments.data());
    m.arrived = 0;
    ++m.round;
    return;
  }
  while (m.round == round) yield();
}

void add_engine(const std::function<bool()>& step) { group[current_resident].engines.push_back(step); }

void sync_warp() {
  meet(thread() / kWarp, kWarp, thread() % kWarp, nullptr, [](void**) {});
}
void barrier(int id, int threads) {
  // Whoever comes takes the next place: ranks do not matter here.
  Meeting& m = group[current_resident].meetings[kWarp + id];
  meet(kWarp + id, threads, m.arrived, nullptr, [](void**) {});
}

void cp_async(uint32_t to, const void* from, int bytes) {
  if (bytes != 0 && bytes != 16) fail("a copy of %d bytes", bytes);
  if (bytes && uintptr_t(from) % 16) fail("a copy from an address not aligned to 16 bytes");
  shared(to, 16);
  fibers[current].open.push_back({to, from, bytes});
}
void cp_async_commit() {
  Fiber& f = fibers[current];
  f.committed.push_back(std::move(f.open));
  f.open.clear();
  deliver_at_random(f);
}
void cp_async_wait(int pending) {
  Fiber& f = fibers[current];
  while (int(f.committed.size()) > pending) {
    for (const Copy& c : f.committed.front()) deliver(c);
    f.committed.erase(f.committed.begin());
  }
  deliver_at_random(f);
}

// PTX manual, "prmt", default mode: bit 3 of a selector's nibble would replicate the sign.
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (s & 7)) & 255;
    d |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return d;
}

// PTX manual, "ldmatrix": lanes 8j .. 8j + 7 hold the addresses of matrix j's rows; of it lane l gets row l / 4, elements
// 2 (l % 4) and the next.
void ldmatrix4(uint32_t address, uint32_t* r) {
  struct Lane {
    uint32_t address;
    uint32_t* r;
  } lane{address, r};
  meet(thread() / kWarp, kWarp, thread() % kWarp, &lane, [](void** all) {
    for (int j = 0; j < 4; ++j) {
      for (int row = 0; row < 8; ++row) {
        const uint8_t* source = shared(static_cast<Lane*>(all[8 * j + row])->address, 16);
        for (int q = 0; q < 4; ++q) memcpy(static_cast<Lane*>(all[4 * row + q])->r + j, source + 4 * q, 4);
      }
    }
  });
}

// PTX manual, "Matrix fragments for mma.m16n8k16" with 16-bit floats: with g = lane / 4 and t = lane % 4, element i of A
// (8 halves) is row g (i = 0, 1, 4, 5) or g + 8, column 2t + i % 2, + 8 from i = 4; of B (4 halves) row 2t + i % 2, + 8
// from i = 2, column g; of C (4 floats) row g, + 8 from i = 2, column 2t + i % 2.
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool f16) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
    bool f16;
  } lane{d, a, b, f16};
  meet(thread() / kWarp, kWarp, thread() % kWarp, &lane, [](void** all) {
    float a_matrix[16][16], b_matrix[16][8];
    const auto half = [&](const Lane& l, const uint32_t* words, int i) {
      const uint16_t h = uint16_t(words[i / 2] >> i % 2 * 16);
      return l.f16 ? flute::f16_to_f32(h) : flute::bf16_to_f32(h);
    };
    for (int n = 0; n < kWarp; ++n) {
      const Lane& l = *static_cast<Lane*>(all[n]);
      const int g = n / 4, t = n % 4;
      for (int i = 0; i < 8; ++i) a_matrix[g + (i % 4 >= 2 ? 8 : 0)][2 * t + i % 2 + (i >= 4 ? 8 : 0)] = half(l, l.a, i);
      for (int i = 0; i < 4; ++i) b_matrix[2 * t + i % 2 + (i >= 2 ? 8 : 0)][g] = half(l, l.b, i);
    }
    for (int n = 0; n < kWarp; ++n) {
      const Lane& l = *static_cast<Lane*>(all[n]);
      for (int i = 0; i < 4; ++i) {
        const int row = n / 4 + (i >= 2 ? 8 : 0), column = n % 4 * 2 + i % 2;
        float sum = l.d[i];
        for (int k = 0; k < 16; ++k) sum += a_matrix[row][k] * b_matrix[k][column];
        l.d[i] = sum;
      }
    }
  });
}

}  // namespace simt
