"""Vectors of lanes for Numba kernels, and the functions of them that the ops share.

LLVM vectorises a loop only where it can prove that arrays do not overlap, and never one that
carries a state. Kernels therefore say what they mean: a vector is 64 bytes of one dtype, 16
float32 or 8 float64, arithmetic is written with operators, and the back end cuts it into the
registers that the processor has.
"""

import operator
import zlib
from functools import partial
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.core.datamodel.registry import register_default
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

BYTES = 64
_FEATURES = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
#: Whether what Numba compiles for scales by powers of two itself, whatever the power.
AVX512 = '+avx512f' in _FEATURES.split(',')


#: Modules whose functions kernels of other modules may call, and what they hold.
SHARED = ('simd', 'tiles')
_SHARED_CODE = b''.join(Path(__file__).with_name(f'{n}.py').read_bytes() for n in SHARED)


def jit(function):
    """Numba's compiler, without the interpreter's lock; kept on disk where there is a place."""
    options = dict(nogil=True, error_model='numpy')
    # Numba looks for changes in the kernel's file alone, and files the result by this name.
    function.__qualname__ += f'_{zlib.crc32(_SHARED_CODE):08x}'
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache can be written
        return numba.njit(**options)(function)


inline = partial(numba.njit, forceinline=True, error_model='numpy')


# ------------------------------------------------------------------- the type


class Vector(types.Type):
    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = BYTES * 8 // dtype.bitwidth
        super().__init__(f'Vector({dtype})')


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        element = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _mantissa(vector):
    """Bits of the mantissa of an element."""
    return {32: 23, 64: 52}[vector.dtype.bitwidth]


def _of_vector(builder, name, vector, count):
    """LLVM's function `name` of `count` vectors."""
    bits = 64 if vector.element == ir.DoubleType() else 32
    return cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector] * count),
        f'{name}.v{vector.count}f{bits}',
    )


def emit_fma(builder, a, b, c):
    return builder.call(_of_vector(builder, 'llvm.fma', a.type, 3), (a, b, c))


def emit_splat(builder, scalar, lanes):
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _pointer(context, builder, signature, args):
    """Address of the element of args[0] at the indices args[1], which are not negative."""
    array_type, index_type = signature.args[:2]
    array = context.make_array(array_type)(context, builder, args[0])
    indices = cgutils.unpack_tuple(builder, args[1], count=len(index_type))
    indices = [
        context.cast(builder, i, t, types.intp) for i, t in zip(indices, index_type, strict=True)
    ]
    return cgutils.get_item_pointer(context, builder, array_type, array, indices)


@intrinsic
def load(typing, array, index):
    """The vector that begins at array[index], along the last dimension, of stride 1."""
    vector = Vector(array.dtype)

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args)
        llvm = context.get_value_type(vector)
        pointer = builder.bitcast(pointer, llvm.as_pointer())
        return builder.load(pointer, align=vector.dtype.bitwidth // 8)

    return vector(array, index), generate


@intrinsic
def store(typing, array, index, value):
    """Writes a vector to where `load` would read it."""

    def generate(context, builder, signature, args):
        pointer = _pointer(context, builder, signature, args)
        pointer = builder.bitcast(pointer, args[2].type.as_pointer())
        builder.store(args[2], pointer, align=value.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@intrinsic
def prefetch(typing, array, index):
    """Has what is around array[index] brought to the nearest cache; it need not be there."""

    def generate(context, builder, signature, args):
        pointer = builder.bitcast(
            _pointer(context, builder, signature, args), ir.IntType(8).as_pointer()
        )
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type] + [number] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, 'llvm.prefetch.p0i8')
        to_read, to_keep, data = number(0), number(3), number(1)
        builder.call(function, (pointer, to_read, to_keep, data))
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic
def broadcast(typing, array, index):
    """array[index] in every lane."""
    vector = Vector(array.dtype)

    def generate(context, builder, signature, args):
        scalar = builder.load(_pointer(context, builder, signature, args))
        return emit_splat(builder, scalar, vector.lanes)

    return vector(array, index), generate


@intrinsic
def splat(typing, like, scalar):
    """A number in every lane of a vector like `like`."""

    def generate(context, builder, signature, args):
        number = context.cast(builder, args[1], scalar, like.dtype)
        return emit_splat(builder, number, like.lanes)

    return like(like, scalar), generate


@intrinsic
def lane_sums(typing, array, index):
    """Sum of the lanes of as many vectors as there are lanes, a vector each after the other.

    The sum of the first is in the first lane. Halves are added to halves, and two vectors that
    are half empty by that become one.
    """
    vector = Vector(array.dtype)
    lanes = vector.lanes

    def generate(context, builder, signature, args):
        llvm = context.get_value_type(vector)
        first = builder.bitcast(_pointer(context, builder, signature, args), llvm.as_pointer())
        size = vector.dtype.bitwidth // 8
        rows = [
            builder.load(builder.gep(first, [ir.IntType(64)(i)]), align=size) for i in range(lanes)
        ]
        block = lanes  # lanes that belong to one sum
        while block > 1:
            half = block // 2
            masks = []
            for start in (0, half):
                places = [
                    source * lanes + at + start + i
                    for at in range(0, lanes, block)
                    for source in (0, 1)
                    for i in range(half)
                ]
                mask = [ir.IntType(32)(place) for place in places]
                masks.append(ir.Constant(ir.VectorType(ir.IntType(32), lanes), mask))
            middle = len(rows) // 2
            rows = [
                builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))
                for x, y in zip(rows[:middle], rows[middle:], strict=True)
            ]
            block = half
        return rows[0]

    return vector(array, index), generate


@intrinsic
def lane_sum(typing, x):
    """Sum of the lanes of a vector, a number."""

    def generate(context, builder, signature, args):
        (total,) = args
        count = x.lanes
        while count > 1:
            count //= 2
            mask = [ir.IntType(32)(i ^ count) for i in range(x.lanes)]
            mask = ir.Constant(ir.VectorType(ir.IntType(32), x.lanes), mask)
            total = builder.fadd(total, builder.shuffle_vector(total, total, mask))
        return builder.extract_element(total, ir.IntType(32)(0))

    return x.dtype(x), generate


@intrinsic
def spread(typing, x):
    """Four vectors, the d-th with lane 4 g + d in the lanes 4 g to 4 g + 3."""

    def generate(context, builder, signature, args):
        index = ir.VectorType(ir.IntType(32), x.lanes)
        masks = (
            ir.Constant(index, [ir.IntType(32)(i // 4 * 4 + d) for i in range(x.lanes)])
            for d in range(4)
        )
        spreads = [builder.shuffle_vector(args[0], args[0], mask) for mask in masks]
        return context.make_tuple(builder, signature.return_type, spreads)

    return types.UniTuple(x, 4)(x), generate


# ----------------------------------------------------------------- arithmetic


def _binary(generate_one):
    @intrinsic
    def function(typing, a, b):
        def generate(context, builder, signature, args):
            return generate_one(builder, *args)

        return a(a, b), generate

    return function


_add = _binary(lambda builder, a, b: builder.fadd(a, b))
_sub = _binary(lambda builder, a, b: builder.fsub(a, b))
_mul = _binary(lambda builder, a, b: builder.fmul(a, b))
_div = _binary(lambda builder, a, b: builder.fdiv(a, b))


def _select(predicate):
    # A NaN compares as false: the second operand, which a NaN has to be to go on.
    def generate(builder, a, b):
        return builder.select(builder.fcmp_ordered(predicate, a, b), a, b)

    return _binary(generate)


_greater = _select('>')
_less = _select('<')


def _operator(symbol, of_vectors):
    @overload(symbol)
    def typed(a, b):
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: of_vectors(a, b)
        if isinstance(a, Vector) and isinstance(b, types.Number):
            return lambda a, b: of_vectors(a, splat(a, b))
        if isinstance(a, types.Number) and isinstance(b, Vector):
            return lambda a, b: of_vectors(splat(b, a), b)
        return None


for _symbol, _function in (
    (operator.add, _add),
    (operator.sub, _sub),
    (operator.mul, _mul),
    (operator.truediv, _div),
):
    _operator(_symbol, _function)


@intrinsic
def fma(typing, a, b, c):
    """a · b + c, rounded once."""
    if not (isinstance(a, Vector) and a == b == c):
        raise TypingError('fma takes three vectors of one dtype')

    def generate(context, builder, signature, args):
        return emit_fma(builder, *args)

    return a(a, b, c), generate


@inline
def at_least(x, bound):
    """max(bound, x) of a vector and a number; NaN stays."""
    return _greater(splat(x, bound), x)


@inline
def at_most(x, bound):
    """min(bound, x) of a vector and a number; NaN stays."""
    return _less(splat(x, bound), x)


@intrinsic
def where_greater(typing, x, bound, a, b):
    """For each lane, a where x > bound, else b."""

    def generate(context, builder, signature, args):
        x, bound, a, b = args
        return builder.select(builder.fcmp_ordered('>', x, bound), a, b)

    return a(x, bound, a, b), generate


# ------------------------------------------------------------------ functions


def _polynomial(function, degree, low, high):
    """Coefficients, highest first, of the interpolation at Chebyshev's nodes."""
    series = np.polynomial.chebyshev.Chebyshev.interpolate(function, degree, domain=[low, high])
    coefficients = series.convert(kind=np.polynomial.Polynomial).coef
    return tuple(float(c) for c in reversed(coefficients))


# (2^f − 1) / f for |f| ≤ ½, which makes 2^0 exactly 1, and log1p(y) / y for 0 ≤ y ≤ 1; exact to
# the last bit or two of a float32, and of a float64.
def _exp2_part(f):
    g = f * np.log(2)
    return np.log(2) * np.divide(np.expm1(g), g, out=np.ones_like(g), where=g != 0)


_EXP2_32, _EXP2_64 = (_polynomial(_exp2_part, degree, -0.5, 0.5) for degree in (4, 11))
_LOG1P_32, _LOG1P_64 = (_polynomial(lambda y: np.log1p(y) / y, degree, 0, 1) for degree in (9, 21))


@intrinsic
def _horner(typing, x, coefficients):
    """Value of a polynomial, its coefficients a tuple, highest first."""
    count = len(coefficients)

    def generate(context, builder, signature, args):
        numbers = cgutils.unpack_tuple(builder, args[1], count=count)
        terms = [
            emit_splat(builder, context.cast(builder, c, types.float64, x.dtype), x.lanes)
            for c in numbers
        ]
        total = terms[0]
        for term in terms[1:]:
            total = emit_fma(builder, total, args[0], term)
        return total

    return x(x, coefficients), generate


def _by_width(x, single, double):
    raise NotImplementedError('known to the compiler alone')


@overload(_by_width, inline='always')
def _(x, single, double):
    if x.dtype.bitwidth == 32:
        return lambda x, single, double: single
    return lambda x, single, double: double


@intrinsic
def _exponents(typing, x):
    """(nearest integers to x, what `_scale` wants to know of them)."""

    def generate(context, builder, signature, args):
        (x_,) = args
        if AVX512:
            rounded = builder.call(_of_vector(builder, 'llvm.rint', x_.type, 1), args)
            scales = rounded
        else:
            # Adding 1.5 · 2^mantissa leaves the integer in the low bits.
            magic = emit_splat(builder, x_.type.element(1.5 * 2.0 ** _mantissa(x)), x.lanes)
            scales = builder.fadd(x_, magic)
            rounded = builder.fsub(scales, magic)
        return context.make_tuple(builder, signature.return_type, (rounded, scales))

    return types.UniTuple(x, 2)(x), generate


@intrinsic
def _scale(typing, x, scales):
    """x · 2ⁿ."""

    def generate(context, builder, signature, args):
        x_, scales_ = args
        if AVX512:
            lanes = ir.IntType(x.lanes)
            kind = {32: 'ps', 64: 'pd'}[x.dtype.bitwidth]
            arguments = [x_.type] * 3 + [lanes, ir.IntType(32)]
            function = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(x_.type, arguments),
                f'llvm.x86.avx512.mask.scalef.{kind}.512',
            )
            current_rounding = ir.IntType(32)(4)
            return builder.call(function, (x_, scales_, x_, lanes(-1), current_rounding))
        integers = ir.VectorType(ir.IntType(x.dtype.bitwidth), x.lanes)
        bits, n = (builder.bitcast(v, integers) for v in args)
        shift = ir.Constant(integers, [_mantissa(x)] * x.lanes)
        scaled = builder.bitcast(builder.add(bits, builder.shl(n, shift)), x_.type)
        # A NaN has an exponent too.
        return builder.select(builder.fcmp_unordered('uno', x_, x_), x_, scaled)

    return x(x, scales), generate


@inline
def exp2(x):
    """2^x; without AVX-512 the ends of the exponent's range stand for what lies beyond."""
    if not AVX512:
        largest = _by_width(x, 127.0, 1023.0)
        x = at_most(at_least(x, 1.0 - largest), largest)
    n, scales = _exponents(x)
    f = x - n
    p = _horner(f, _by_width(x, _EXP2_32, _EXP2_64))
    return _scale(fma(p, f, splat(f, 1.0)), scales)


@inline
def sigmoid(x):
    """1 / (1 + e^−x)."""
    return 1.0 / (1.0 + exp2(x * -1.4426950408889634))


@inline
def softplus(x):
    """log(1 + e^x), and x itself above 20, as torch has it."""
    y = exp2(_less(x, 0.0 - x) * 1.4426950408889634)
    log1p = _horner(y, _by_width(x, _LOG1P_32, _LOG1P_64)) * y
    return where_greater(x, splat(x, 20.0), x, log1p + at_least(x, 0.0))
