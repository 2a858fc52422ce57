"""Products of small matrices for Numba kernels, with the results in registers meanwhile.

Columns come in whole vectors of lanes (`simd`); rows and their order are free, so that a view of
some tokens of a head will do, the last token first where need be. Kernels pass views, cut in both
dimensions, for the compiler to see one kind of array.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from visionseq_mm.ops.simd import (
    BYTES,
    Vector,
    emit_fma,
    emit_splat,
    fma,
    inline,
    jit,
    lane_sums,
    load,
    splat,
    store,
)

# Of a tile; with 6 vectors 24 results, and what makes them, in the 32 registers of AVX-512.
ROWS = 4


def _strides(builder, array):
    return cgutils.unpack_tuple(builder, array.strides, 2)


def _address(builder, array, i, j, size):
    """Of array[i, j], as an integer; along a row elements follow each other."""
    base = builder.ptrtoint(array.data, i.type)
    base = builder.add(base, builder.mul(i, _strides(builder, array)[0]))
    return builder.add(base, builder.mul(j, i.type(size)))


def _at(builder, address, offset, kind):
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


@intrinsic(prefer_literal=True)
def _tile(typing, rows, vectors, c, i, j, a, b):
    """`add_product` for some rows from i and some vectors of columns from j."""
    R, V = rows.literal_value, vectors.literal_value
    vector = Vector(b.dtype)

    def generate(context, builder, signature, args):
        c_, a_, b_ = (
            context.make_array(signature.args[n])(context, builder, args[n]) for n in (2, 5, 6)
        )
        i_, j_ = args[3:5]
        size, integer = vector.dtype.bitwidth // 8, i_.type
        llvm, element = context.get_value_type(vector), context.get_value_type(vector.dtype)

        a_row, a_step = _strides(builder, a_)
        a_first = builder.add(builder.ptrtoint(a_.data, integer), builder.mul(i_, a_row))
        b_step = _strides(builder, b_)[0]
        b_first = _address(builder, b_, integer(0), j_, size)
        c_first, c_row = _address(builder, c_, i_, j_, size), _strides(builder, c_)[0]

        targets, sums = [], []
        for r in range(R):
            row = builder.add(c_first, builder.mul(integer(r), c_row))
            for v in range(V):
                targets.append(_at(builder, row, integer(v * BYTES), llvm))
                sums.append(cgutils.alloca_once(builder, llvm))
                builder.store(builder.load(targets[-1], align=size), sums[-1])
        depth = cgutils.unpack_tuple(builder, b_.shape, 2)[0]
        with cgutils.for_range(builder, depth) as loop:
            a_k = builder.add(a_first, builder.mul(loop.index, a_step))
            b_k = builder.add(b_first, builder.mul(loop.index, b_step))
            row = [
                builder.load(_at(builder, b_k, integer(v * BYTES), llvm), align=size)
                for v in range(V)
            ]
            for r in range(R):
                place = _at(builder, a_k, builder.mul(integer(r), a_row), element)
                factor = emit_splat(builder, builder.load(place, align=size), vector.lanes)
                for v in range(V):
                    total = sums[r * V + v]
                    builder.store(emit_fma(builder, factor, row[v], builder.load(total)), total)
        for target, total in zip(targets, sums, strict=True):
            builder.store(builder.load(total), target, align=size)
        return context.get_dummy_value()

    return types.void(rows, vectors, c, i, j, a, b), generate


@inline
def _columns(vectors, c, j, a, b):
    whole = len(c) // ROWS * ROWS
    for i in range(0, whole, ROWS):
        _tile(ROWS, vectors, c, i, j, a, b)
    for i in range(whole, len(c)):
        _tile(1, vectors, c, i, j, a, b)


@jit
def add_product(c, a, b):
    """c (M, N) += a (M, K) b (K, N); a may be a transposed view."""
    lanes = BYTES // b.itemsize
    N = c.shape[1]
    j = 0
    while N - j >= 6 * lanes:
        _columns(6, c, j, a, b)
        j += 6 * lanes
    if N - j >= 4 * lanes:
        _columns(4, c, j, a, b)
        j += 4 * lanes
    if N - j >= 2 * lanes:
        _columns(2, c, j, a, b)
        j += 2 * lanes
    if N - j >= lanes:
        _columns(1, c, j, a, b)


@inline
def clear(c):
    """c = 0."""
    for i in range(c.shape[0]):
        for j in range(0, c.shape[1], BYTES // c.itemsize):
            store(c, (i, j), splat(load(c, (i, j)), 0.0))


@inline
def product(c, a, b):
    """c = a b."""
    clear(c)
    add_product(c, a, b)


@intrinsic
def _transpose_tile(typing, out, i, j, x):
    """out[j:j + lanes, i:i + lanes] = the square of x at (i, j), its columns as rows.

    Half of the lanes change places with those of a row half a square away, and so on.
    """
    vector = Vector(x.dtype)

    def generate(context, builder, signature, args):
        out_, x_ = (
            context.make_array(signature.args[n])(context, builder, args[n]) for n in (0, 3)
        )
        i_, j_ = args[1:3]
        lanes, size, integer = vector.lanes, vector.dtype.bitwidth // 8, i_.type
        llvm = context.get_value_type(vector)
        first, step = _address(builder, x_, i_, j_, size), _strides(builder, x_)[0]
        rows = [
            builder.load(_at(builder, first, builder.mul(integer(r), step), llvm), align=size)
            for r in range(lanes)
        ]

        def mix(a, b, places):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), places)
            return builder.shuffle_vector(a, b, mask)

        half = lanes // 2
        while half:
            for r in range(lanes):
                if not r & half:
                    a, b = rows[r], rows[r + half]
                    upper = [n + lanes - half if n & half else n for n in range(lanes)]
                    lower = [n + lanes if n & half else n + half for n in range(lanes)]
                    rows[r], rows[r + half] = mix(a, b, upper), mix(a, b, lower)
            half //= 2
        first, step = _address(builder, out_, j_, i_, size), _strides(builder, out_)[0]
        for r, row in enumerate(rows):
            target = _at(builder, first, builder.mul(integer(r), step), llvm)
            builder.store(row, target, align=size)
        return context.get_dummy_value()

    return types.void(out, i, j, x), generate


@jit
def transpose(out, x):
    """out (N, M') = xᵀ of x (M, N), and zeros beyond M."""
    lanes = BYTES // x.itemsize
    M, N = x.shape
    whole = M // lanes * lanes
    for j in range(0, N, lanes):
        for i in range(0, whole, lanes):
            _transpose_tile(out, i, j, x)
    for n in range(N):
        for m in range(whole, out.shape[1]):
            out[n, m] = x[m, n] if m < M else 0.0


@jit
def dots(out, x, y, lines):
    """out[t] = Σ_d x[t, d] y[t, d]; out and `lines` (lanes, lanes) have whole vectors."""
    lanes = BYTES // x.itemsize
    M, N = x.shape
    for begin in range(0, M, lanes):
        lines[:] = 0
        for r in range(min(lanes, M - begin)):
            total = load(lines, (r, 0))
            for d in range(0, N, lanes):
                total = fma(load(x, (begin + r, d)), load(y, (begin + r, d)), total)
            store(lines, (r, 0), total)
        store(out, (begin,), lane_sums(lines, (0, 0)))
