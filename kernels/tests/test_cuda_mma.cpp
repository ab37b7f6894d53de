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

// One launch of run_mma with what launch.h has for norms.
void run_norms(Gemm call, const Device& device, uint64_t order, const std::string& name) {
  Buffer workspace(workspace_bytes(device));
  memset(workspace.data.get(), 0, cleared_bytes(device));
  call.workspace = workspace.data.get();
  call.device = device;
  simt::config = {order, device.shared_bytes};
  expect(takes_norms(call), name + ": takes norms");
  const char* const error = run_mma(call);
  ++calls;
  expect(!error, name + ": " + (error ? error : ""));
}
float value_at(const Buffer& b, size_t i, bool f16) {
  uint16_t h;
  memcpy(&h, b.data.get() + 2 * i, 2);
  return widen(h, f16);
}
Buffer random_values(size_t count, bool f16) {
  Buffer b(count * 2);
  for (size_t i = 0; i < count; ++i) {
    const uint16_t h = narrow(uniform(), f16);
    memcpy(b.data.get() + 2 * i, &h, 2);
  }
  return b;
}

// What a layer before a norm writes, `scaled`, `sum` and `squares`, of its y: bits of all but the order in which squares are added.
void check_added(const std::vector<uint16_t>& y, const Buffer& residual, const Buffer& weight, const Buffer& scaled, const Buffer& sum,
                 const Buffer& squares, int m, int n, bool f16, float epsilon, const std::string& name) {
  const bool whole = m > kNormTokens;
  for (int t = 0; t < m; ++t) {
    double all = 0, found = 0;
    for (int i = 0; i < n; ++i) {
      const float total = widen(y[size_t(t) * n + i], f16) + value_at(residual, size_t(t) * n + i, f16);
      all += double(total) * total;
      expect(value_at(sum, size_t(t) * n + i, f16) == widen(narrow(total, f16), f16), name + ": sum");
      if (!whole) {
        const float times = widen(narrow(total * value_at(weight, i, f16), f16), f16);
        expect(value_at(scaled, size_t(t) * n + i, f16) == times, name + ": sum * weight");
      }
    }
    for (int i = 0; i < n && whole; ++i) {
      const double total = widen(y[size_t(t) * n + i], f16) + value_at(residual, size_t(t) * n + i, f16);
      const double normed = total / std::sqrt(all / n + epsilon) * value_at(weight, i, f16);
      expect(std::fabs(value_at(scaled, size_t(t) * n + i, f16) - normed) <= std::fabs(normed) * 0x1p-7 + 0x1p-24, name + ": the norm");
    }
    if (whole) continue;
    for (int i = 0; i < norm_parts(n); ++i) found += reinterpret_cast<const float*>(squares.data.get())[t * norm_parts(n) + i];
    expect(std::fabs(found - all) <= 1e-5 * all, name + ": squares of token " + std::to_string(t));
  }
}

// Norms in the last steps of the calls before and after them, and by themselves.
void check_norms(bool few) {
  constexpr float kEpsilon = 1e-5f;
  size_t turn = 0;
  for (const Shape& shape : {Shape{{264}, 576, 64}, Shape{{72}, 1088, 32}, Shape{{512}, 256, 128}}) {
    for (int bits = 2; bits <= 4; ++bits) {
      for (int m : {1, 7, 8, 13, 16, 30, 32}) {
        const bool f16 = turn % 3 == 0;
        const int sms[] = {1, 3, 7, 132}, n = int(shape.shards[0]), k = int(shape.k);
        const Device device = device_of(90, sms[turn++ % 4]);
        const Layer layer = make_layer(shape, bits, false, kAny);
        const Input in = make_input(layer, m, f16);
        const std::string name = "norms, " + describe_case(layer, shape, in, device);
        const std::vector<uint16_t> y = run(run_mma, layer, in, device, true, turn, name);
        const Buffer residual = random_values(size_t(m) * n, f16), weight = random_values(n, f16);
        Buffer scaled(size_t(m) * n * 2), sum(size_t(m) * n * 2), squares(size_t(kNormTokens) * norm_parts(n) * 4);
        const AddNorm add{residual.data.get(), weight.data.get(), sum.data.get(), reinterpret_cast<float*>(squares.data.get())};
        Gemm call{layer.w, layer.packed.data.get(), in.x.data.get(), in.bias.data.get(), scaled.data.get(), nullptr, m, f16, nullptr, {}, nullptr};
        call.add = add;
        run_norms(call, device, turn, name);
        check_added(y, residual, weight, scaled, sum, squares, m, n, f16, kEpsilon, name);
        const uint8_t* const beyond = squares.data.get() + size_t(m) * norm_parts(n) * 4;
        expect(std::all_of(beyond, static_cast<const uint8_t*>(squares.data.get() + squares.size), [](uint8_t b) { return b == 0xff; }), name + ": squares of no token");

        Buffer own_scaled(scaled.size), own_sum(sum.size), own_squares(squares.size);
        const AddNorm own{residual.data.get(), weight.data.get(), own_sum.data.get(), reinterpret_cast<float*>(own_squares.data.get())};
        expect(!run_add_norm(y.data(), own, kEpsilon, own_scaled.data.get(), m, n, f16 ? kF16 : kBf16, nullptr), name);
        check_added(y, residual, weight, own_scaled, own_sum, own_squares, m, n, f16, kEpsilon, name + ", by itself");

        // The next layer: of any squares.
        std::vector<float> of_x(size_t(kNormTokens) * norm_parts(k), NAN);
        Input normed = make_input(layer, m, f16);
        const size_t parts = norm_parts(k);
        for (int t = 0; t < m; ++t) {
          double all = 0;
          for (size_t i = 0; i < parts; ++i) all += of_x[t * parts + i] = 1.5f + uniform();
          for (int i = 0; i < k; ++i) normed.values[size_t(t) * k + i] /= std::sqrt(all / k + kEpsilon);
        }
        Buffer out(size_t(m) * n * 2);
        Gemm next{layer.w, layer.packed.data.get(), normed.x.data.get(), in.bias.data.get(), out.data.get(), nullptr, m, f16, nullptr, {}, nullptr};
        next.normed = {of_x.data(), kEpsilon};
        run_norms(next, device, turn, name);
        std::vector<uint16_t> found(out.size / 2);
        memcpy(found.data(), out.data.get(), out.size);
        normed.bias_values = in.bias_values;
        check(layer, normed, true, bound(layer, f16, 1), found, name + ", normed");
        Buffer scaled_x(normed.x.size);
        expect(!run_scale_tokens(normed.x.data.get(), next.normed, scaled_x.data.get(), m, k, f16 ? kF16 : kBf16, nullptr), name);
        for (size_t i = 0; i < normed.values.size(); ++i) {
          const double error = std::fabs(value_at(scaled_x, i, f16) - normed.values[i]);
          expect(error <= std::fabs(normed.values[i]) * 0x1p-8 + 0x1p-24, name + ": tokens by themselves");
        }

        // Shards of rows that tiles do not divide, each with a table of its own.
        const Layer fused = make_layer({{40, 8, 136}, shape.k, shape.group_size}, bits, false, kAny);
        found.resize(size_t(m) * fused.w.n);
        next.w = fused.w;
        next.packed = fused.packed.data.get();
        next.bias = nullptr;
        next.y = found.data();
        run_norms(next, device, turn, name + ", three shards");
        check(fused, normed, false, bound(fused, f16, 1), found, name + ", normed, three shards");

        const Layer halves = make_layer({{shape.shards[0], shape.shards[0]}, shape.k, shape.group_size}, bits, false, kAny);
        Buffer both(size_t(m) * n * 4), product(size_t(m) * n * 2);
        next.w = halves.w;
        next.packed = halves.packed.data.get();
        next.y = both.data.get();
        run_norms(next, device, turn, name + ", both halves");
        next.gated = product.data.get();
        run_norms(next, device, turn, name + ", gated");
        found.resize(both.size / 2);
        memcpy(found.data(), both.data.get(), both.size);
        check_gated(found, product, n, f16, kAny, name + ", normed and gated");
        if (few) return;
      }
    }
  }
  for (const int n : {256, 100}) {
    const Buffer residual = random_values(size_t(40) * n, false), weight = random_values(n, false), made = random_values(size_t(40) * n, false);
    std::vector<uint16_t> y(size_t(40) * n);
    memcpy(y.data(), made.data.get(), made.size);
    Buffer sum(made.size), squares(4);
    const AddNorm add{residual.data.get(), weight.data.get(), sum.data.get(), reinterpret_cast<float*>(squares.data.get())};
    expect(!run_add_norm(made.data.get(), add, kEpsilon, made.data.get(), 40, n, kBf16, nullptr), "add_norm in place");
    check_added(y, residual, weight, made, sum, squares, 40, n, false, kEpsilon, "many tokens");
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
  call.gated = nullptr;
  call.device = device_of(89, 1);
  call.normed.squares = reinterpret_cast<const float*>(in.x.data.get());
  refused("only the bulk kernel has norms");
  call.device = device_of(90, 1);
  expect(takes_norms(call), "a norm before a call");
  call.normed.squares = nullptr;
  call.add.residual = in.x.data.get();
  call.w = make_layer({{8, 8}, 64, 64}, 4, false, kAny).w;
  refused("only the bulk kernel has norms");  // a sum of more shards than one
  call.device.reserved = 2048;
  call.w = make_layer({{8}, 64, 64}, 4, false, kAny).w;
  refused("only the bulk kernel has norms");  // addresses of another system
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = argc > 1 && std::string(argv[1]) == "few";
  check_shapes(few);
  check_bulk(few);
  check_orders(few);
  check_gates(few);
  check_norms(few);
  check_values();
  check_refusals();
  if (!failures) std::printf("%d calls of K1 agree with the oracle\n", calls);
  return failures != 0;
}
