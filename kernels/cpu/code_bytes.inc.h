// Codes as bytes of four-byte lanes, a lane a row: which inputs of a chunk they belong to, for the kernels that look codes
// up by byte shuffles. And blocks of inputs, which have one step for each token.
//
// Included inside a translation unit's own namespace, after decode.inc.h and kBlock, the longest block.

constexpr int kChunkVectors = 8;  // of four inputs each, in a chunk of 32

// The input of a chunk whose code is byte B of vector V.
constexpr int input_of(int bits, int v, int b) {
  if (bits == 4) return v / 2 * 8 + b * 2 + v % 2;
  if (bits == 2) return v / 4 * 16 + b * 4 + v % 4;
  const int half = b / 2 * 5;
  if (v < 6) return v / 2 * 10 + half + v % 2 + b % 2 * 3;
  if (v == 6) return b % 2 * 10 + half + 2;
  return b % 2 ? 30 + b / 2 : 20 + half + 2;
}

// A block is a group of weights, or at most kBlock inputs of a longer one. The last chunk of one may be the first of the
// next.
struct Block {
  int64_t begin = 0, end = 0, group = 0;
  INLINE bool next(const Weights& w) {
    if (end == w.k) return false;
    begin = end;
    group = begin / w.group_size;
    const int64_t left = (group + 1) * w.group_size - begin;
    end = begin + (left < kBlock ? left : kBlock);
    return true;
  }
  INLINE int64_t first_chunk() const { return begin / kChunk; }
  INLINE int64_t chunks() const { return (end - 1) / kChunk - begin / kChunk + 1; }
};
