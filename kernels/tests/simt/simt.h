// CUDA's execution model on a CPU, for tests: a grid's CTAs run one after another in a random order, or a few at once in the
// order of their numbers, their threads are fibers, and collective instructions meet across a warp or a CTA. What a GPU leaves
// open is left open on purpose:
// warps run ahead of each other at random, an asynchronous copy lands at any time between its issue and its wait, and shared
// memory starts as NaNs. What a GPU forbids ends the program with one line: addresses out of bounds or not aligned,
// deadlock, a launch that asks for too much.
#pragma once

#include <cstdint>
#include <functional>

namespace simt {

constexpr uint32_t kSharedBase = 1024;  // where dynamic shared memory starts; a multiple of what any copy needs

// Of every launch from now on.
struct Config {
  uint64_t seed = 1;               // of the order of CTAs, warps and copies
  int shared_limit = 227 * 1024;   // bytes of a CTA
};
extern Config config;

// Runs `body` once for every thread of every CTA. Where CTAs wait for others of lower numbers (`in_order`), a random number of
// them runs at a time, the lowest first, as on a GPU, whose CTAs start in that order; else one at a time in any order. Returns
// null, or what a launch may fail with.
const char* launch(int grid, int threads, int shared_bytes, const std::function<void()>& body, bool in_order = false);
uint64_t launches();

// Inside a kernel.
int thread();
int threads();
int cta();
int ctas();
constexpr int kMostAtOnce = 4;  // CTAs
int resident();  // this CTA's number among those that run at once
uint8_t* shared(uint32_t address, int bytes);  // checked; aligned to `bytes`
uint32_t random32();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Lets other threads run until `ready` says true.
void wait(const std::function<bool()>& ready);
// `count` threads meet at `key` (unique for each group of threads, below kKeys; 0 .. 31 are warps, 32 .. 47 named barriers,
// others are free); the last to come calls op(arguments) with every thread's argument, by rank, and all go on.
constexpr int kKeys = 256;
void meet(int key, int count, int rank, void* argument, const std::function<void(void**)>& op);
// Called between turns of threads while this CTA runs, and forgotten with it: for engines that work on their own (copies).
// Returns whether it did something; threads that wait while nothing does are a deadlock.
void add_engine(const std::function<bool()>& step);

void sync_warp();
void barrier(int id, int threads);
void cp_async(uint32_t to, const void* from, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);
uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector);
void ldmatrix4(uint32_t address, uint32_t* r);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool f16);

}  // namespace simt
