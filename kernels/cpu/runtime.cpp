// What every kernel needs and no instruction set changes: work shared among threads, and scratch memory.
#include <algorithm>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "flute.h"

namespace flute {

namespace {

struct Shared {
  int64_t n, grab, next;
  void (*item)(int64_t, void*);
  void* context;
};

void drain(int64_t, int64_t, void* p) {
  Shared& s = *static_cast<Shared*>(p);
  for (;;) {
    const int64_t begin = __atomic_fetch_add(&s.next, s.grab, __ATOMIC_RELAXED);
    if (begin >= s.n) return;
    for (int64_t i = begin; i < std::min(begin + s.grab, s.n); ++i) s.item(i, s.context);
  }
}

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[kScratchUses];

}  // namespace

void for_each(const Parallel& parallel, int64_t n, int64_t workers, void (*item)(int64_t, void*), void* context) {
  workers = std::min({workers, n, int64_t(parallel.threads)});
  if (workers <= 1) {
    for (int64_t i = 0; i < n; ++i) item(i, context);
    return;
  }
  // Eight grabs a worker: the last one to finish is at most an eighth of its share behind.
  Shared shared{n, std::max<int64_t>(1, n / (workers * 8)), 0, item, context};
  parallel.run(workers, drain, &shared);
}

void prefer_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: its refusal costs speed only
#else
  (void)data, (void)bytes;
#endif
}

void* scratch(ScratchUse use, size_t bytes) {
  Buffer& b = buffers[use];
  if (b.size < bytes) {
    std::free(b.data);
    b.size = 0;
    // Sums and tables that fill a second-level cache touch more small pages than a core translates at once.
    const size_t page = bytes < kHugePage / 16 ? 4096 : kHugePage;
    bytes = (bytes + page - 1) / page * page;
    b.data = std::aligned_alloc(page, bytes);
    if (!b.data) throw std::bad_alloc();
    b.size = bytes;
    prefer_huge_pages(b.data, bytes);
  }
  return b.data;
}

}  // namespace flute
