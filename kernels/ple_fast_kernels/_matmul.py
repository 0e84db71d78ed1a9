"""Device helpers of every kernel with a matrix product: order of tiles, table look-up, the loop over the depth."""

import triton
import triton.language as tl


@triton.jit
def swizzle(pid, rows, columns, GROUP: tl.constexpr):
    """Tile ``(row, column)`` of a program: GROUP rows of tiles go together, so that they share columns in L2."""
    width = GROUP * columns
    first = pid // width * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def pick(TABLE: tl.constexpr, i):
    """``TABLE[i]`` for a run-time ``i``: tables live in the code, not in memory."""
    found = 0
    for j in tl.static_range(len(TABLE)):
        found = tl.where(i == j, TABLE[j], found)
    return found


@triton.jit
def pick_wide(TABLE: tl.constexpr, i):
    """``pick`` in 64 bits, for what is multiplied by a stride of slots: a slot may begin 2**31 elements on."""
    return tl.cast(pick(TABLE, i), tl.int64)


@triton.jit
def accumulate(acc, p_a, p_b, depth, A_STEP, B_STEP, m_b, DEPTH: tl.constexpr, MASK_B: tl.constexpr,
               PRECISION: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """``acc += a @ b`` along the depth: ``p_a`` ``[M, BLOCK_K]``, ``p_b`` ``[BLOCK_K, N]``; ``m_b`` masks columns of b.

    ``depth`` is ``DEPTH`` or a multiple: as a constant it decides about masks, as a loop bound it would be unrolled.
    """
    o_k = tl.arange(0, BLOCK_K)
    for k in range(0, depth, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(p_a)
            if MASK_B:
                b = tl.load(p_b, mask=m_b[None, :], other=0.0)
            else:
                b = tl.load(p_b)
        else:  # both are masked: what lies behind the end may be NaN, and NaN times 0 is NaN
            m_k = o_k < depth - k
            a = tl.load(p_a, mask=m_k[None, :], other=0.0)
            if MASK_B:
                b = tl.load(p_b, mask=m_k[:, None] & m_b[None, :], other=0.0)
            else:
                b = tl.load(p_b, mask=m_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
        p_a += A_STEP
        p_b += B_STEP
    # What follows works on a copy: of the accumulator itself, ptxas would wait for every product (C7514).
    return acc + tl.zeros_like(acc)


@triton.jit
def add_at(values, INDEX: tl.constexpr, value):
    """The tuple ``values`` with ``value`` added to entry INDEX."""
    out = ()
    for j in tl.static_range(len(values)):
        if j == INDEX:
            out = out + (values[j] + value,)
        else:
            out = out + (values[j],)
    return out
