"""ViL's layer: what the suite of every op does not ask."""

import pytest
import torch
from ops_twins import CASES, assert_close, layer_inputs, layer_twin, on_grid, run, run_and_count

from visionseq_mm.ops import vil_mixer
from visionseq_mm.ops.vil_mixer import BIASES, Weights

BACKENDS = [case.backend for case in CASES if case.name == 'vil_mixer']
every_backend = pytest.mark.parametrize('backend', BACKENDS)
ONE = dict(reverse=(False,), columns=(False,))


@every_backend
@pytest.mark.parametrize('kernel', [(1,), (4,), (1, 1), (3, 3), (5, 5)])
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('columns', [False, True])
def test_directions(backend, kernel, reverse, columns):
    way = dict(reverse=(reverse,), columns=(columns,))
    inputs = layer_inputs(35, S=1, kernel=kernel)
    actual = run(lambda *xs: on_grid(*xs, **way, backend=backend), inputs)
    assert_close(actual, run(lambda *xs: layer_twin(*xs, **way), inputs), 1e-10)


@every_backend
def test_four_directions(backend):
    way = dict(reverse=(False, True, False, True), columns=(False, False, True, True))
    inputs = layer_inputs(35, S=4)
    actual = run(lambda *xs: on_grid(*xs, **way, backend=backend), inputs)
    assert_close(actual, run(lambda *xs: layer_twin(*xs, **way), inputs), 1e-10)


@every_backend
@pytest.mark.parametrize(('D', 'E', 'H'), [(16, 32, 4), (10, 20, 5), (12, 24, 1), (48, 96, 2)])
def test_widths(backend, D, E, H):
    inputs = layer_inputs(66, D, H, S=1, E=E)
    actual = run(lambda *xs: on_grid(*xs, **ONE, backend=backend), inputs)
    assert_close(actual, run(lambda *xs: layer_twin(*xs, **ONE), inputs), 1e-10)


@every_backend
@pytest.mark.parametrize('columns', [False, True])
def test_a_reversed_direction_is_that_of_flipped_tokens(backend, columns):
    tokens, *weights = layer_inputs(48, S=1)
    grid, way = (6, 8), dict(columns=(columns,), backend=backend)
    out = vil_mixer(tokens, Weights(*weights), grid, (True,), **way)
    flipped = vil_mixer(tokens.flip(1), Weights(*weights), grid, (False,), **way).flip(1)
    torch.testing.assert_close(out, flipped, rtol=1e-10, atol=1e-12)


@every_backend
def test_absent_biases_are_zero(backend):
    tokens, *weights = layer_inputs(20, S=1)
    weights = Weights(*weights)
    none = weights._replace(**dict.fromkeys(BIASES))
    zero = weights._replace(**{name: torch.zeros_like(getattr(weights, name)) for name in BIASES})
    out = [vil_mixer(tokens, w, (4, 5), backend=backend) for w in (none, zero)]
    torch.testing.assert_close(*out, rtol=0, atol=0)


@every_backend
def test_recomputation_changes_nothing_but_memory(backend):
    inputs = [x.float() for x in layer_inputs(130, D=16, S=1)]
    results, kept = zip(
        *(
            run_and_count(
                lambda *xs, r=r: on_grid(*xs, **ONE, recompute=r, backend=backend), inputs
            )
            for r in (True, False)
        ),
        strict=True,
    )
    torch.testing.assert_close(*results, rtol=0, atol=0)
    inner, rows = 2 * 130 * 32, 2 * 2 * 130
    assert kept[0] == inner + rows  # h and the sums of its rows
    assert kept[1] - kept[0] == 6 * inner + 2 * rows  # x, z, c, q, k, v and the gates


@every_backend
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Projections and convolution in its dtype, gates, norm and skip as they are."""
    inputs = [x.float() for x in layer_inputs(70)]
    wide = next(case.wide for case in CASES if case.name == 'vil_mixer')

    def op(*xs):
        with torch.autocast('cpu', dtype):
            return on_grid(*xs, backend=backend)

    actual = run(op, inputs)
    assert [x.dtype for x in actual] == [dtype] + [torch.float32] * 14
    cast = [x if n in wide else x.to(dtype) for n, x in enumerate(inputs)]
    expected = run(lambda *xs: on_grid(*xs, backend=backend), cast)
    torch.testing.assert_close(
        actual, [x.to(y.dtype) for x, y in zip(expected, actual, strict=True)]
    )


@every_backend
def test_columns_need_no_square(backend):
    """Rows of the transposed grid."""
    tokens, *weights = layer_inputs(40, S=1)
    weights = Weights(*weights)
    turned = weights._replace(conv_weight=weights.conv_weight.mT)
    out = vil_mixer(tokens, weights, (4, 10), columns=(True,), backend=backend)
    tokens = tokens.unflatten(1, (4, 10)).transpose(1, 2).flatten(1, 2)

    def by_rows(weights):
        out = vil_mixer(tokens, weights, (10, 4), backend=backend)
        return out.unflatten(1, (10, 4)).transpose(1, 2).flatten(1, 2)

    torch.testing.assert_close(out, by_rows(weights))
    assert not torch.allclose(out, by_rows(turned))


@every_backend
@pytest.mark.parametrize('recompute', [True, False])
def test_one_token(backend, recompute):
    inputs = [x[:1] if n == 0 else x for n, x in enumerate(layer_inputs(1, S=1))]
    actual = run(lambda *xs: on_grid(*xs, **ONE, recompute=recompute, backend=backend), inputs)
    assert_close(actual, run(lambda *xs: layer_twin(*xs, **ONE), inputs), 1e-10)


@every_backend
def test_strided_biases(backend):
    """Of float32, whose projections have a way of their own on some processors."""
    tokens, *weights = (x.float() for x in layer_inputs(20, S=1))
    weights = Weights(*weights)
    strided = weights._replace(
        **{n: torch.stack([getattr(weights, n)] * 2, -1)[..., 0] for n in BIASES}
    )
    out = [vil_mixer(tokens, w, (4, 5), backend=backend) for w in (weights, strided)]
    torch.testing.assert_close(*out)


@pytest.mark.parametrize('n', range(14))
def test_bad_shapes(n):
    inputs = layer_inputs(6)
    inputs[n] = torch.cat([inputs[n], inputs[n]], -1)
    with pytest.raises(ValueError, match=r'vil_mixer: .* must .*got '):
        on_grid(*inputs)


def test_bad_inputs():
    tokens, *weights = layer_inputs(6)
    weights = Weights(*weights)

    def call(grid=(2, 3), reverse=(False, True), columns=None, tokens=tokens, **others):
        return vil_mixer(tokens, weights._replace(**others), grid, reverse, columns)

    call()
    with pytest.raises(ValueError, match=r'grid must be the rows and columns of 6 .*got \(3, 3\)'):
        call((3, 3))
    with pytest.raises(ValueError, match=r'reverse must have an entry for each of 2 directions'):
        call(reverse=(True,))
    with pytest.raises(ValueError, match=r'reverse must have an entry for each of 2 .*got True'):
        call(reverse=True)
    for name in ('skip', 'gates', 'conv_weight', 'proj_up'):
        with pytest.raises(ValueError, match=f'{name} must be a tensor, got None'):
            call(**{name: None})
    for grid in (6, (2.0, 3.0)):
        with pytest.raises(ValueError, match='grid must be two integers'):
            call(grid)
    with pytest.raises(ValueError, match=r"recompute must be True or False, got 'kernel'"):
        vil_mixer(tokens, weights, (2, 3), (False, True), recompute='kernel')
    with pytest.raises(ValueError, match=r'gates must be \(S, 2H, 3E\) = \(2, 4, 36\), where E'):
        call(gates=weights.gates[..., :20])
    with pytest.raises(ValueError, match=r'columns must have an entry for each of 2 .*\(True,\)'):
        call(columns=(True,))
    with pytest.raises(ValueError, match='a kernel on the grid has an odd side, got 4'):
        call(conv_weight=torch.randn(2, 12, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match='E must be a multiple of 4 and of H, got E = 12'):
        call(gates=weights.gates.repeat(1, 4, 1)[:, :10], gates_bias=torch.zeros(2, 10).double())
    with pytest.raises(ValueError, match=r'proj_up has dtype torch\.float64, and beside tokens'):
        call(tokens=tokens.float())
    with pytest.raises(ValueError, match='is on meta, the other inputs on cpu'):
        call(skip=weights.skip.to('meta'))
    with pytest.raises(ValueError, match=r"backend='nope' is unknown"):
        vil_mixer(tokens, weights, (2, 3), (False, True), backend='nope')
