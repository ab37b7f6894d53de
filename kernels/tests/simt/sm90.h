// Hopper's asynchronous instructions for the emulator: barriers that count bytes, bulk copies, wgmma. They do their work as
// late and in as odd an order as the PTX manual allows: copies land in random order, a multiplication reads its registers and
// its shared memory when it runs, some time between its issue and the wait that covers it.
#pragma once

#include <cstdint>

namespace simt {

// A matrix of 16-bit values in global memory and the box of it that a tensor copy brings, swizzled by 128 bytes.
struct TensorMap {
  const uint8_t* data;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
};

void mbarrier_init(uint32_t bar, uint32_t count);
void fence_mbarrier_init();
void mbarrier_arrive(uint32_t bar);
void mbarrier_arrive_expect(uint32_t bar, uint32_t bytes);
void mbarrier_wait(uint32_t bar, uint32_t parity);

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t bar);
void load_box(uint32_t shared, const TensorMap* map, int column, int row, uint32_t bar);

void take_registers(int count);
void give_registers(int count);

void wgmma_fence();
void wgmma(float* d, const uint32_t* a, uint64_t b, int tokens, bool f16);
void wgmma_commit();
void wgmma_wait(int pending);

void stmatrix4_transposed(uint32_t address, const uint32_t* r);

}  // namespace simt
