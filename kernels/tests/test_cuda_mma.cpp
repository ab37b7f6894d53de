// K1's own source, compiled for the CPU and run by simt.h's emulator, against a sum in double over the codes: ragged shapes,
// every bit width, type, group and token tile, fused shards, much and little shared memory, many divisions of the work, with
// bulk copies (sm_90 and whole blocks of inputs) and without.
// Usage: test_cuda_mma [few], where `few` is for sanitizers.
#include "cuda_gemm.h"

using namespace flute;
using namespace flute::cuda;

namespace {

Device device_of(int arch, int sms) { return {arch, sms, (arch == 90 ? 227 : 99) * 1024}; }

void run_and_check(const Layer& layer, const Input& in, const Device& device, bool with_bias, uint64_t order,
                   const std::string& name) {
  check(layer, in, with_bias, bound(layer, in.f16, 1), run(run_mma, layer, in, device, with_bias, order, name), name);
}

void check_shapes(bool few) {
  const Shape shapes[] = {{{8}, 64, 64},           {{72}, 72, 72},     {{200}, 320, 64},         {{200}, 320, 32},
                          {{136}, 576, 16},        {{64}, 1040, 16},   {{64, 8, 200}, 512, 128}, {{320}, 768, 256},
                          {{128, 72}, 1040, 1040}, {{8, 8}, 8, 8},     {{264}, 1024, 64},        {{192, 64, 64}, 832, 64},
                          {{72}, 672, 32},         {{16}, 2048, 128}};
  const int tokens[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 70}, sms[] = {1, 2, 3, 5, 7, 13, 132};
  size_t turn = 0;
  for (const Shape& shape : shapes) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int f16 = 0; f16 < 2; ++f16) {
        const Layer layer = make_layer(shape, bits, turn % 2, turn / 4 % 2 ? kAny : kWhole);
        // Over the shapes every count of tokens meets all bits, types and kinds of device.
        for (int i = 0; i < (few ? 1 : 4); ++i, ++turn) {
          const int m = tokens[turn * 5 % std::size(tokens)];
          const Device device = device_of(turn / 3 % 2 ? 89 : 90, sms[turn % std::size(sms)]);
          const Input in = make_input(layer, m, f16);
          run_and_check(layer, in, device, turn % 2, turn, describe_case(layer, shape, in, device));
        }
      }
    }
  }
}

// lut_mma_bulk.cuh: each of its tiles with all bits, types and sizes of groups, K that ends within an item and at its end, shards
// that end within a tile, and more of them than travel with the call; few multiprocessors, as many as tiles, and many.
void check_bulk(bool few) {
  const Shape shapes[] = {{{200}, 192, 16},        {{72, 64, 8, 200, 16, 136}, 320, 64}, {{264}, 576, 32},
                          {{128, 72}, 1088, 1088}, {{64, 8, 200}, 1024, 128},            {{40, 8, 64, 24, 8}, 768, 256},
                          {{136}, 1088, 16}};
  const int tokens[][3] = {{1, 7, 8}, {9, 13, 16}, {17, 30, 32}}, sms[] = {1, 2, 3, 7, 132};
  size_t turn = 0;
  for (const Shape& shape : shapes) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int f16 = 0; f16 < 2; ++f16) {
        const Layer layer = make_layer(shape, bits, turn % 2, turn / 2 % 2 ? kAny : kWhole);
        for (const auto& of_tile : tokens) {
          const Device device = device_of(90, sms[turn % std::size(sms)]);
          const Input in = make_input(layer, of_tile[turn / 3 % 3], f16);
          run_and_check(layer, in, device, turn % 4 == 0, turn, "bulk, " + describe_case(layer, shape, in, device));
          ++turn;
        }
        if (few) break;
      }
    }
    ++turn;  // which numbers of tokens, scales and values meet which bits and types
  }
}

// Whoever comes last adds up: the order in which CTAs run must not show. The division of work may, in the last bits.
void check_orders(bool few) {
  const Shape shape{{200, 64}, 1088, 64};
  for (int bits = 2; bits <= 4; ++bits) {
    for (int m : {1, 16, 30, 40}) {  // the last without bulk copies
      const Layer layer = make_layer(shape, bits, false, kAny);
      const Input in = make_input(layer, m, m == 16);
      for (int sms : {2, 5, 11}) {
        const Device device = device_of(90, sms);
        const std::string name = "orders, " + describe_case(layer, shape, in, device);
        const std::vector<uint16_t> y = run(run_mma, layer, in, device, true, 1, name);
        check(layer, in, true, bound(layer, in.f16, 1), y, name);
        for (uint64_t order = 2; order < (few ? 3 : 5); ++order) {
          expect(run(run_mma, layer, in, device, true, order, name) == y, name + ": order " + std::to_string(order));
        }
        if (few) return;
      }
    }
  }
}

// SwiGLU at the end of the same launch: halves of whole tiles and of less, pairs finished by one CTA and by two, many times.
void check_gates(bool few) {
  for (const Shape& shape : {Shape{{256, 256}, 192, 64}, Shape{{200, 200}, 320, 32}, Shape{{8, 8}, 64, 64}}) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int m : {1, 9, 30, 40}) {
        const Layer layer = make_layer(shape, bits, false, m == 9 ? kWhole : kAny);
        const Input in = make_input(layer, m, bits == 3);
        for (int sms : {1, 3, 132}) {
          const Device device = device_of(90, sms);
          const std::string name = "gated, " + describe_case(layer, shape, in, device);
          for (uint64_t order = 1; order < 3; ++order) {
            const bool with_bias = order == 2;
            check(layer, in, with_bias, bound(layer, in.f16, 1), run(run_mma, layer, in, device, with_bias, order, name, true), name);
            if (few) return;
          }
        }
      }
    }
  }
}

// What is not finite stays in its token; codebooks beyond what fp16 can hold do not overflow or vanish.
void check_values() {
  for (const int k : {200, 192}) {  // without bulk copies, and with them
    const Shape shape{{72, 64}, k, k};
    for (int bits = 2; bits <= 4; ++bits) {
      for (bool f16 : {false, true}) {
        const int m = (bits + f16) % 3 * 8 + 5;  // of each tile
        const Layer layer = make_layer(shape, bits, f16, kAny);
        Input in = make_input(layer, m, f16);
        set_input(in, 1 * k + 3, INFINITY);
        set_input(in, 3 * k + k - 1, NAN);
        const Device device = device_of(90, 3);
        const std::string name = "special values, " + describe_case(layer, shape, in, device);
        run_and_check(layer, in, device, true, 7, name);
        for (float size : {1e30f, 1e-30f, 1e-38f}) {
          const Layer extreme = make_layer(shape, bits, false, kAny, size, 1 / size);
          const Input plain = make_input(extreme, 9, f16);
          const std::string book = "codebook of 2^" + std::to_string(std::ilogb(size)) + ", ";
          run_and_check(extreme, plain, device, false, 8, book + describe_case(extreme, shape, plain, device));
        }
      }
    }
  }
}

void check_refusals() {
  const Layer layer = make_layer({{8}, 48, 24}, 4, false, kAny);
  const Input in = make_input(layer, 1, false);
  Gemm call{layer.w, layer.packed.data.get(), in.x.data.get(), nullptr, nullptr, nullptr, 1, 0, nullptr, device_of(90, 1), nullptr};
  const auto refused = [&](const char* words) {
    const char* error = run_mma(call);
    const std::string said = error ? error : "nothing";
    expect(said.find(words) != std::string::npos, std::string("refused with the words '") + words + "', not " + said);
  };
  refused("group_size is 24");
  call.w = make_layer({{8}, 48, 48}, 4, false, kAny).w;
  call.device.shared_bytes = 48 * 1024;
  refused("too little shared memory");
  call.w.bits = 5;
  refused("bits is 5");
  call.w = make_layer({{8}, 64, 64}, 4, false, kAny).w;
  call.gated = in.x.data.get();
  refused("two shards of as many rows");
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = argc > 1 && std::string(argv[1]) == "few";
  check_shapes(few);
  check_bulk(few);
  check_orders(few);
  check_gates(few);
  check_values();
  check_refusals();
  if (!failures) std::printf("%d calls of K1 agree with the oracle\n", calls);
  return failures != 0;
}
