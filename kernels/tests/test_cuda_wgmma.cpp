// K2's own source, compiled for the CPU and run by the emulator (simt.h, sm90.h), against a sum in double over the codes.
// Usage: test_cuda_wgmma [few], where `few` is for sanitizers.
#include "cuda_gemm.h"

using namespace flute;
using namespace flute::cuda;

namespace {

// With 227 KB a ring has 6 stages and more, with 172 KB few.
Device hopper(int sms, int shared = 227) { return {90, sms, shared * 1024}; }

// The codebook's value and its product with the scale are rounded to x's type; so is the scale where it is fp16 and x bf16
// (bf16 scales are fp16 numbers, in its range). Below fp16's normal numbers each rounds by up to 2^-25: the value, which is
// less than 2, multiplied by the scale, which is at most the largest weight, the scale by the value, and the product.
Bound wgmma_bound(const Layer& layer, bool f16) {
  Bound b = bound(layer, f16, 2 + (!f16 && layer.w.scale_f16));
  if (f16) b.step = 0x1p-25 * (layer.largest + 2 + 1);
  return b;
}

void check_call(const Layer& layer, const Shape& shape, int m, bool f16, const Device& device, bool with_bias, uint64_t order) {
  const Input in = make_input(layer, m, f16);
  const std::string name = describe_case(layer, shape, in, device);
  check(layer, in, with_bias, wgmma_bound(layer, f16), run(run_wgmma, layer, in, device, with_bias, order, name), name);
}

void check_shapes(bool few) {
  const Shape shapes[] = {{{8}, 64, 64},       {{72}, 72, 72},           {{200}, 320, 64},  {{264}, 320, 32},
                          {{136}, 576, 16},    {{64}, 1040, 16},         {{320}, 768, 256}, {{128, 72}, 1040, 1040},
                          {{8, 8}, 8, 8},      {{64, 8, 200}, 512, 128}, {{520}, 1024, 64}, {{192, 64, 300, 4}, 832, 64},
                          {{72}, 672, 32},     {{16}, 2048, 128}};
  const int tokens[] = {33, 64, 65, 16, 128, 1, 31, 129, 17, 32, 8}, sms[] = {1, 2, 3, 5, 7, 40};
  size_t turn = 0;
  for (const Shape& shape : shapes) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int f16 = 0; f16 < 2; ++f16) {
        for (const Values values : {kWhole, kAny}) {
          if (few && values == kAny) continue;
          const Layer layer = make_layer(shape, bits, turn / 2 % 2, values);
          // Steps without a common divisor: every count of tokens meets every bits, types and values.
          for (int i = 0; i < (few ? 1 : 2); ++i, ++turn) {
            // As many as an H100 has now and then: CTAs without work take most of the emulator's time.
            const Device device = hopper(turn % 24 == 5 ? 132 : sms[turn % std::size(sms)], turn % 4 ? 227 : 172);
            check_call(layer, shape, tokens[turn * 5 % std::size(tokens)], f16, device, turn % 3 > 0, turn);
          }
        }
      }
    }
    ++turn;
  }
}

// Whoever comes last adds up: the order in which CTAs, warps and copies run must not show.
void check_orders(bool few) {
  const Shape shape{{200, 64}, 1088, 64};
  for (int bits = 2; bits <= 4; ++bits) {
    const Layer layer = make_layer(shape, bits, false, kAny);
    for (int m : {16, 40, 100}) {
      const Input in = make_input(layer, m, m == 40);
      for (int sms : {2, 11}) {  // tiles of four strips, and of two
        const Device device = hopper(sms, 172);
        const std::string name = "orders, " + describe_case(layer, shape, in, device);
        const std::vector<uint16_t> y = run(run_wgmma, layer, in, device, true, 1, name);
        check(layer, in, true, wgmma_bound(layer, in.f16), y, name);
        for (uint64_t order = 2; order < (few ? 3 : 5); ++order) {
          expect(run(run_wgmma, layer, in, device, true, order, name) == y, name + ": order " + std::to_string(order));
        }
        if (few) return;
      }
    }
  }
}

// SwiGLU at the end of the same launch, pairs of tiles finished by one CTA and by two.
void check_gates(bool few) {
  for (const Shape& shape : {Shape{{512, 512}, 192, 64}, Shape{{200, 200}, 320, 32}}) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int m : {9, 30, 40, 100, 150}) {
        const Layer layer = make_layer(shape, bits, false, m == 100 ? kWhole : kAny);
        const Input in = make_input(layer, m, bits == 3);
        for (int sms : {m == 100 ? 1 : 3, 40}) {  // tiles of four strips, and of two
          const Device device = hopper(sms);
          const std::string name = "gated, " + describe_case(layer, shape, in, device);
          const bool with_bias = sms == 40;
          check(layer, in, with_bias, wgmma_bound(layer, in.f16), run(run_wgmma, layer, in, device, with_bias, m, name, true), name);
          if (few) return;
        }
      }
    }
  }
}

// What is not finite stays in its token; codebooks beyond what fp16 can hold are no harm where weights are not.
void check_values() {
  const Shape shape{{72, 64}, 200, 200};
  for (int bits = 2; bits <= 4; ++bits) {
    for (bool f16 : {false, true}) {
      const Device device = hopper(3);
      const Layer layer = make_layer(shape, bits, f16, kAny);
      Input in = make_input(layer, 35, f16);
      set_input(in, 1 * 200 + 3, INFINITY);
      set_input(in, 33 * 200 + 199, NAN);
      const std::string name = "special values, " + describe_case(layer, shape, in, device);
      check(layer, in, true, wgmma_bound(layer, f16), run(run_wgmma, layer, in, device, true, 7, name), name);
      for (float size : {1e30f, 1e-30f}) {
        check_call(make_layer(shape, bits, false, kAny, size, 1 / size), shape, 9, f16, device, false, 8);
      }
    }
  }
}

void check_refusals() {
  const Layer layer = make_layer({{8}, 48, 24}, 4, false, kWhole);
  const Input in = make_input(layer, 1, false);
  Gemm call{layer.w, layer.packed.data.get(), in.x.data.get(), nullptr, nullptr, nullptr, 1, 0, nullptr, hopper(1), nullptr};
  const auto refused = [&](const char* words) {
    const char* error = run_wgmma(call);
    expect(error && strstr(error, words), std::string("refused as '") + words + "', not '" + (error ? error : "") + "'");
  };
  refused("group_size is 24");
  call.w = make_layer({{8}, 48, 48}, 4, false, kWhole).w;
  call.device.shared_bytes = 99 * 1024;
  refused("too little shared memory");
  call.w.bits = 5;
  refused("bits is 5");
  call.device.arch = 100;
  refused("sm_100");
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = argc > 1 && std::string(argv[1]) == "few";
  check_shapes(few);
  check_orders(few);
  check_gates(few);
  check_values();
  check_refusals();
  if (!failures) std::printf("%d calls of K2 agree with the oracle\n", calls);
  return failures != 0;
}
