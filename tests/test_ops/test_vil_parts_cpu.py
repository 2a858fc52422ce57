"""The parts of ViL's layer in Numba against those in PyTorch."""

import pytest
import torch
from ops_twins import assert_close

pytest.importorskip('numba')

from visionseq_mm.ops.vil_mixer import cpu, reference

RATIOS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}

# batch, grid, E, H, taps, origin
CASES = {
    'a token': (1, (1, 1), 8, 1, (3, 3), (1, 1)),
    'a small grid': (2, (3, 5), 8, 2, (5, 5), (2, 2)),
    'causal': (2, (1, 65), 24, 4, (1, 4), (0, 3)),
    'reversed': (2, (1, 65), 96, 4, (1, 4), (0, 0)),
    'a grid': (1, (7, 9), 96, 2, (3, 3), (1, 1)),
    'whole vectors': (2, (24, 26), 160, 2, (3, 3), (1, 1)),
}


def make(case, dtype):
    """Inputs of the parts by name, what is (B, L, E) in every second place of memory."""
    B, grid, E, H, taps, origin = CASES[case]
    L = grid[0] * grid[1]
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(0)

    def new(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {name: new(B, L, 2, E)[:, :, 1] for name in ('x', 'c', 'z', 'dc', 'dy')}
    inputs |= {name: new(B, H, L, E // H).transpose(1, 2) for name in ('h', 'dq', 'dk', 'dv')}
    inputs |= {name: new(B, L, H, dtype=wide) for name in ('di', 'df')}
    inputs |= {name: new(E) for name in ('conv_bias', 'norm_weight', 'norm_bias', 'skip')}
    inputs |= {name: new(2 * H, E, dtype=wide) / E for name in ('gates_c', 'gates_x')}
    return inputs | dict(
        taps=new(E, *taps),
        qkv=new(3, E // 4, 4, 4),
        qkv_bias=new(3, E),
        gates_bias=new(2 * H, dtype=wide),
        grid=grid,
        origin=origin,
        eps=1e-5,
    )


PRE = 'x taps conv_bias qkv qkv_bias gates_c gates_x gates_bias grid origin'
PRE_BACKWARD = 'dc dq dk dv di df x c taps conv_bias qkv gates_c gates_x grid origin'
POST = 'h c z norm_weight norm_bias skip eps'


def call(part, names, inputs, *out):
    return part(*(inputs[name] for name in names.split()), *out)


def run(ops, inputs):
    """Results of the parts, at last dx and dz, halves of one tensor."""
    x = inputs['x']
    dx, dz = x.new_empty((*x.shape[:2], 2 * x.shape[2])).chunk(2, -1)
    return [
        *call(ops.pre, PRE, inputs),
        *call(ops.pre_backward, PRE_BACKWARD, inputs, dx),
        call(ops.post, POST, inputs),
        *call(ops.post_backward, f'dy {POST}', inputs, dz),
        dx,
        dz,
    ]


@pytest.mark.parametrize('dtype', RATIOS)
@pytest.mark.parametrize('case', CASES)
def test_equal_the_reference(case, dtype):
    inputs = make(case, dtype)
    actual, expected = (run(ops, inputs) for ops in (cpu, reference))
    assert_close(actual, expected, RATIOS[dtype])
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(x.is_contiguous() for x in actual[:-2])


def test_what_is_written_may_lie_in_any_order():
    inputs = make('whole vectors', torch.float32)
    *_, dx, dz = run(cpu, inputs)
    B, L, E = dx.shape
    for out in (dx.new_empty(B, E, L).mT, dx.new_empty(L, B, E).transpose(0, 1)):
        call(cpu.pre_backward, PRE_BACKWARD, inputs, out)
        torch.testing.assert_close(out, dx, rtol=0, atol=0)
        call(cpu.post_backward, f'dy {POST}', inputs, out)
        torch.testing.assert_close(out, dz, rtol=0, atol=0)


def test_nan_is_where_the_reference_has_it():
    for name in ('x', 'c', 'z', 'h', 'dc', 'dq', 'dk', 'dv', 'di', 'df', 'dy'):
        inputs = make('a grid', torch.float64)
        inputs[name][0, 30, -1] = torch.nan
        actual, expected = (run(ops, inputs) for ops in (cpu, reference))
        for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
            assert torch.equal(x.isnan(), y.isnan()), (name, n)


def test_do_not_depend_on_the_number_of_threads():
    inputs = make('whole vectors', torch.float32)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(cpu, inputs))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
