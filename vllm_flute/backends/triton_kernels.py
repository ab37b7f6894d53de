"""The Triton kernels: y = x @ W^T from packed layout ROWS (rows.py), accumulated in fp32.

Compiled once for each width, dtype and tile (the constexprs), and by Triton for how pointers and strides are aligned:
no M, N, K or group size is compiled in.

Rows of W come in up to SHARDS shards of one codebook each, which end before rows end0 <= end1 <= end2 <= end3. A tile
of rows lies in one shard, so that a program needs one codebook: its 2^bits values lie in different banks of shared
memory, and tl.gather looks 32 codes up at a time without a conflict.

A program adds one slice of K (program_id 1) for one tile. With one slice ``y`` is the result; with more it is fp32
[slices, M, N], and `add_slices` finishes in a fixed order, so that equal calls have equal results.
"""

import triton
import triton.language as tl

SHARDS = 4
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _cast(values, dtype: tl.constexpr):
    """fp32 to another dtype, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter cuts the low bits off
        bits = values.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + (bits >> 16 & 1) & -0x10000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def _pick(index, a, b, c, d):
    return tl.where(index == 0, a, tl.where(index == 1, b, tl.where(index == 2, c, d)))


@triton.jit
def _tile(index, end0, end1, end2, end3, BLOCK_N: tl.constexpr):
    """(shard, rows int32 [BLOCK_N], the row that the shard ends before) of tile ``index`` of W."""
    tiles0 = tl.cdiv(end0, BLOCK_N)
    tiles1 = tiles0 + tl.cdiv(end1 - end0, BLOCK_N)
    tiles2 = tiles1 + tl.cdiv(end2 - end1, BLOCK_N)
    shard = (index >= tiles0).to(tl.int32) + (index >= tiles1).to(tl.int32) + (index >= tiles2).to(tl.int32)
    begin, end = _pick(shard, 0, end0, end1, end2), _pick(shard, end0, end1, end2, end3)
    first = begin + (index - _pick(shard, 0, tiles0, tiles1, tiles2)) * BLOCK_N
    return shard, first + tl.arange(0, BLOCK_N), end


@triton.jit
def _slice(K, BLOCK_K: tl.constexpr):
    """(first k, end) of this program's slice of K: whole blocks, and as many as any other's but the last."""
    size = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, K)


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0)


@triton.jit
def _scales(scales, k, K, group_size, UNIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K / UNIT] from k of the rows that start at ``scales``, pointers [BLOCK_N, 1]; past K the last."""
    starts = tl.minimum(k + UNIT * tl.arange(0, BLOCK_K // UNIT)[None, :], K - UNIT)
    return tl.load(scales + starts // group_size)


@triton.jit
def _values(
    qweight, codebook, k, K, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """fp32 [BLOCK_N, BLOCK_K], the codebook's values from k of the rows that start at ``qweight``, zero from K on.

    ``qweight``: pointers [BLOCK_N, 1] to 32-bit words.
    """
    # 32 codes are BITS words. They are loaded one word an element (for 3 bits the first, second and third of three).
    STEP: tl.constexpr = 3 if BITS == 3 else 1
    at = k // 32 * BITS + STEP * tl.arange(0, BLOCK_K * BITS // 32 // STEP)[None, :]
    inside = at < tl.cdiv(K, 32) * BITS
    word = _load(qweight + at, inside, WHOLE).to(tl.uint32, bitcast=True)
    # tl.join keeps both values in the thread that has the word: nothing moves between threads.
    if BITS == 4:
        octets = word
    elif BITS == 2:
        octets = tl.join(word, word >> 16)
    else:
        second = _load(qweight + at + 1, inside, WHOLE).to(tl.uint32, bitcast=True)
        third = _load(qweight + at + 2, inside, WHOLE).to(tl.uint32, bitcast=True)
        even = tl.join(word, second >> 16 | third << 16)
        odd = tl.join(word >> 24 | second << 8, third >> 8)
        octets = tl.join(even, odd)
    fours = tl.join(octets, octets >> 4 * BITS)
    pairs = tl.join(fours, fours >> 2 * BITS)
    codes = tl.join(pairs, pairs >> BITS) & (2**BITS - 1)
    values = tl.gather(codebook, codes.reshape(BLOCK_N * BLOCK_K).to(tl.int32), 0).reshape(BLOCK_N, BLOCK_K)
    if not WHOLE:
        values = tl.where(k + tl.arange(0, BLOCK_K)[None, :] < K, values, 0.0)
    return values


@triton.jit(do_not_specialize=["groups", "group_size", "end0", "end1", "end2", "end3"])
def gemv(
    x, qweight, scales, codebooks, bias, y, N, K, row_words, groups, group_size, end0, end1, end2, end3,
    BITS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr
):  # fmt: skip
    """One token: multiply and add, without the exchange between threads that a matrix unit's operands need.

    Weights are not rounded: eight products with values of the codebook are added, then multiplied by their scale.

    x [K], qweight int32 [N, row_words], scales bf16 or fp16 [N, groups], codebooks fp32 [shards, 2^BITS], bias [N]
    or None, y [N] or [slices, N]. Grid: (tiles, slices). WHOLE: slices are whole blocks of K.
    """
    shard, rows, end = _tile(tl.program_id(0), end0, end1, end2, end3, BLOCK_N)
    codebook = tl.load(codebooks + shard * 2**BITS + tl.arange(0, 2**BITS))
    row = tl.minimum(rows, end - 1).to(tl.int64)[:, None]
    qweight, scales = qweight + row * row_words, scales + row * groups
    begin, stop = _slice(K, BLOCK_K)
    # Sums of 8 are within a thread; threads meet once, after the loop.
    sums = tl.zeros((BLOCK_N, BLOCK_K // UNIT, UNIT // 8), dtype=tl.float32)
    scale = _scales(scales, begin, K, group_size, UNIT, BLOCK_K)
    for k in tl.range(begin, stop, BLOCK_K, num_stages=STAGES):
        # A 16-bit load cannot be made asynchronous, as Triton makes the others: fetch it one block ahead.
        ahead = _scales(scales, k + BLOCK_K, K, group_size, UNIT, BLOCK_K)
        values = _values(qweight, codebook, k, K, BITS, BLOCK_N, BLOCK_K, WHOLE)
        columns = k + tl.arange(0, BLOCK_K)
        inputs = _load(x + columns, columns < K, WHOLE).to(tl.float32)
        products = (values * inputs[None, :]).reshape(BLOCK_N, BLOCK_K // UNIT, UNIT // 8, 8)
        sums += tl.sum(products, 3) * scale.to(tl.float32)[:, :, None]
        scale = ahead
    total = tl.sum(tl.sum(sums, 2), 1)
    if bias is not None:
        total += tl.load(bias + rows, mask=rows < end, other=0).to(tl.float32)
    tl.store(y + tl.program_id(1) * N + rows, _cast(total, y.dtype.element_ty), mask=rows < end)


@triton.jit(do_not_specialize=["M", "groups", "group_size", "end0", "end1", "end2", "end3"])
def gemm(
    x, qweight, scales, codebooks, bias, y, M, N, K, row_words, groups, group_size, end0, end1, end2, end3,
    BITS: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """M tokens on the matrix unit, W the left operand: its rows fill the unit's tile where tokens are few.

    A weight is codebook * scale in fp32, rounded once to x's dtype.

    x [M, K], y [M, N] or [slices, M, N], the rest as in `gemv`. Grid: (tiles of M and N, slices).
    """
    tiles_m = tl.cdiv(M, BLOCK_M)  # tiles of one W follow each other, so that it is in the L2 from the second on
    shard, rows, end = _tile(tl.program_id(0) // tiles_m, end0, end1, end2, end3, BLOCK_N)
    tokens = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    codebook = tl.load(codebooks + shard * 2**BITS + tl.arange(0, 2**BITS))
    row = tl.minimum(rows, end - 1).to(tl.int64)[:, None]
    qweight, scales = qweight + row * row_words, scales + row * groups
    token = tl.minimum(tokens, M - 1).to(tl.int64)[None, :]
    begin, stop = _slice(K, BLOCK_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    scale = _scales(scales, begin, K, group_size, UNIT, BLOCK_K)
    for k in tl.range(begin, stop, BLOCK_K, num_stages=STAGES):
        columns = k + tl.arange(0, BLOCK_K)[:, None]
        inputs = _load(x + token * K + columns, columns < K, WHOLE)
        # A 16-bit load cannot be made asynchronous, as Triton makes the others: fetch it one block ahead.
        ahead = _scales(scales, k + BLOCK_K, K, group_size, UNIT, BLOCK_K)
        values = _values(qweight, codebook, k, K, BITS, BLOCK_N, BLOCK_K, WHOLE)
        weights = values.reshape(BLOCK_N, BLOCK_K // UNIT, UNIT) * scale.to(tl.float32)[:, :, None]
        weights = _cast(weights.reshape(BLOCK_N, BLOCK_K), inputs.dtype)
        scale = ahead
        if INTERPRETED:  # its dot takes the bits of bf16 for integers
            weights, inputs = weights.to(tl.float32), inputs.to(tl.float32)
        sums = tl.dot(weights, inputs, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + rows, mask=rows < end, other=0).to(tl.float32)[:, None]
    to = y + tl.program_id(1).to(tl.int64) * M * N + tokens.to(tl.int64)[:, None] * N + rows[None, :]
    tl.store(to, _cast(sums.trans(), y.dtype.element_ty), mask=(tokens < M)[:, None] & (rows < end)[None, :])


@triton.jit(do_not_specialize=["M", "slices"])
def add_slices(parts, bias, y, M, N, slices, BLOCK: tl.constexpr):
    """y [M, N] = parts fp32 [slices, M, N], added from first to last, + bias [N] or None. Grid: (blocks of y,)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(M, tl.int64) * N
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(slices):
        sums += tl.load(parts + part * size + at, mask=at < size, other=0)
    if bias is not None:
        sums += tl.load(bias + at % N, mask=at < size, other=0).to(tl.float32)
    tl.store(y + at, _cast(sums, y.dtype.element_ty), mask=at < size)
