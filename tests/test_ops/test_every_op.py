"""What holds for every op on every backend of a CPU.

Its twin, gradients, dtypes, contexts, registration, memory.
"""

import pytest
import torch
from ops_twins import (
    CASES,
    SIZES,
    LargestTensor,
    assert_close,
    fixed_order,
    flipped,
    run,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint


def cases(*names):
    chosen = [case for case in CASES if case.name in names or not names]
    return pytest.mark.parametrize('case', chosen, ids=str)


all_ops = cases()
scans = cases('selective_scan', 'mlstm')
one_direction = cases('selective_scan', 'mlstm', 'sec_attention')


@pytest.mark.parametrize('size', SIZES)
@all_ops
def test_equals_twin(case, size):
    inputs = case.inputs(size)
    assert_close(run(case.op, inputs), run(case.twin, inputs), 1e-10)


@pytest.mark.parametrize('size', SIZES)
@scans
def test_reverse(case, size):
    inputs = case.inputs(size)
    reverse = run(lambda *xs: case.op(*xs, reverse=True), inputs)
    torch.testing.assert_close(
        reverse, run(lambda *xs: flipped(case.op, xs), inputs), rtol=1e-12, atol=1e-14
    )
    assert_close(reverse, run(lambda *xs: flipped(case.twin, xs), inputs), 1e-10)


@scans
def test_causal(case):
    inputs = case.inputs(130)
    other = [x + 1 if x.dim() > 2 else x for x in inputs]
    at = 70
    mixed = [
        torch.cat([x[:, :at], y[:, at:]], 1) if x.dim() > 2 else x
        for x, y in zip(inputs, other, strict=True)
    ]
    torch.testing.assert_close(case.op(*mixed)[:, :at], case.op(*inputs)[:, :at], rtol=0, atol=0)
    backwards = case.op(*mixed, reverse=True)[:, at:]
    torch.testing.assert_close(backwards, case.op(*other, reverse=True)[:, at:], rtol=0, atol=0)


@all_ops
def test_gradcheck(case):
    inputs = [x.requires_grad_() for x in case.inputs(7)]
    op = fixed_order(case, inputs) if case.name == 'sec_attention' else case.op
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@all_ops
def test_low_precision(case, dtype):
    ratio = case.half if dtype == torch.bfloat16 else 2e-5
    inputs = [x.to(dtype) for x in case.inputs(200)]
    actual = run(case.op, inputs)
    assert [x.dtype for x in actual] == [dtype] * (1 + len(inputs))
    # The order of the twin would be that of float64 cosines.
    twin = fixed_order(case, inputs) if case.name == 'sec_attention' else case.twin
    assert_close(actual, run(twin, [x.double() for x in inputs]), ratio)


@all_ops
def test_mixed_dtypes(case):
    inputs = case.inputs(65)
    dtypes = [torch.float32 if n in case.wide else torch.bfloat16 for n in range(len(inputs))]
    inputs = [x.to(dtype) for x, dtype in zip(inputs, dtypes, strict=True)]
    actual = run(case.op, inputs)
    assert [x.dtype for x in actual] == [torch.bfloat16, *dtypes]
    twin = fixed_order(case, inputs) if case.name == 'sec_attention' else case.twin
    assert_close(actual, run(twin, [x.double() for x in inputs]), case.half)


@all_ops
def test_strides_do_not_matter(case):
    inputs = case.inputs(65)
    strided = [
        x.mT.contiguous().mT if x.dim() > 1 else x.repeat_interleave(2)[::2] for x in inputs
    ]
    strided[0] = torch.stack(inputs[:1] * 2, -1)[..., 1]
    assert not any(x.is_contiguous() for x in strided)
    dout = torch.ones(()).expand_as(case.op(*inputs))
    torch.testing.assert_close(
        run(case.op, strided, dout), run(case.op, inputs, dout), rtol=1e-12, atol=1e-12
    )


@all_ops
def test_deterministic(case):
    torch.set_num_threads(2)
    inputs = [x.float() for x in case.inputs(200)]
    torch.testing.assert_close(run(case.op, inputs), run(case.op, inputs), rtol=0, atol=0)


@all_ops
def test_contexts(case):
    """Autocast, no_grad, inference_mode and recomputation change nothing."""
    inputs = [x.float() for x in case.inputs(65)]
    expected = run(case.op, inputs)

    def autocast(*xs):
        with torch.autocast('cpu', torch.bfloat16):
            return case.op(*xs)

    def recompute(*xs):
        return checkpoint(case.op, *xs, use_reentrant=False)

    with torch.autocast('cpu', torch.bfloat16):
        everything = run(case.op, inputs)  # the backward too
    contexts = [run(recompute, inputs)]
    if case.name not in ('vim_mixer', 'vil_mixer'):  # whose projections follow autocast
        contexts += [run(autocast, inputs), everything]
    for actual in contexts:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(case.op(*inputs), expected[0], rtol=0, atol=0)


@all_ops
def test_gradients_of_some_inputs(case):
    """One input at a time, the others without gradient."""
    inputs = case.inputs(65)
    expected = run(case.op, inputs)[1:]
    for n in range(len(inputs)):
        xs = [x.detach() for x in inputs]
        (grad,) = run(lambda x, n=n, xs=xs: case.op(*xs[:n], x, *xs[n + 1 :]), [inputs[n]])[1:]
        torch.testing.assert_close(grad, expected[n], rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@all_ops
def test_registration(case, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs(65)]
    op = getattr(torch.ops.visionseq_mm, case.registered).default
    torch.library.opcheck(op, case.schema(inputs), rtol=2e-2, atol=2e-2)


@all_ops
def test_compiles_whole(case):
    inputs = [x.float() for x in case.inputs(65)]
    torch._dynamo.reset()  # one function more than it compiles before it gives up
    compiled = torch.compile(case.op, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(run(compiled, inputs), run(case.op, inputs), rtol=0, atol=0)


@pytest.mark.parametrize('case', [c for c in CASES if c.steps and c.backend == 'reference'])
def test_memory(case):
    """Nothing as large as the states of all steps or the attention of all pairs."""
    L = 2048
    if case.name == 'selective_scan':
        inputs, chunk = case.inputs(L, D=24, N=16), 2 * 65 * 24 * 16
    elif case.name == 'mlstm':
        inputs, chunk = case.inputs(L, Dh=16, H=2), 2 * 2 * 64 * 64
    else:
        inputs, chunk = case.inputs(L, Dh=16, H=2), 2**20
    with LargestTensor() as mode:
        case.steps([x.float() for x in inputs])
    most = max(chunk, *(x.numel() for x in inputs))
    assert most < 2 * L * L
    assert mode.elements <= most


@pytest.mark.parametrize('n', range(3))
@one_direction
def test_bad_inputs(case, n):
    good = case.inputs(7)

    def call(x):
        inputs = list(good)
        inputs[n] = x
        return case.op(*inputs)

    with pytest.raises(ValueError, match=r'must be \(.*got shape'):
        call(good[n][..., None])
    with pytest.raises(ValueError, match=r'must be \(.*\) = \(.*\), got shape'):
        call(torch.cat([good[n], good[n]], -2 if n == 2 and case.name == 'selective_scan' else 1))
    with pytest.raises(ValueError, match='floating point'):
        call(good[n].long())
    if n:
        with pytest.raises(ValueError, match=r'(is|are) on meta'):
            call(good[n].to('meta'))


@all_ops
def test_empty_sequence(case):
    empty = [x.narrow(x.shape.index(7), 0, 0) if 7 in x.shape else x for x in case.inputs(7)]
    with pytest.raises(ValueError, match=r'is empty along [LSw]'):
        case.op(*empty)


@all_ops
def test_unknown_backend(case, monkeypatch):
    inputs = case.inputs(7)
    with pytest.raises(ValueError, match=r"backend='nope' is unknown.*\['auto', 'reference'"):
        case.op(*inputs, backend='nope')
    monkeypatch.setenv('VISIONSEQ_BACKEND', 'nope')
    with pytest.raises(ValueError, match="VISIONSEQ_BACKEND='nope'"):
        case.op(*inputs, backend=None)
    monkeypatch.setenv('VISIONSEQ_BACKEND', case.backend)
    torch.testing.assert_close(
        case.op(*inputs, backend=None), case.op(*inputs, backend=case.backend), rtol=0, atol=0
    )


@all_ops
def test_nan_stays_nan(case):
    """Where it enters, and in what follows it; never a number in its place."""
    for n, x in enumerate(case.inputs(30)):
        inputs = case.inputs(30)
        if x.dim() < 3 or 30 not in x.shape:
            continue
        token = inputs[n].select(x.shape.index(30), 11)
        token[..., -1] = torch.nan
        assert case.op(*inputs).isnan().any(), f'input {n}'


@all_ops
def test_results_lie_as_promised(case):
    """Contiguous, as the fake kernels say and compiled code relies on."""
    inputs = [x.mT.contiguous().mT if x.dim() > 1 else x for x in case.inputs(33)]
    assert case.op(*inputs).is_contiguous()
    with Contiguous() as mode:
        run(case.op, inputs)
    names = case.registered, case.registered_backward
    assert {f'visionseq_mm.{name}' for name in names} <= mode.seen


class Contiguous(TorchDispatchMode):
    """Checks every result of the package's operations."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == 'visionseq_mm':
            self.seen.add(f'visionseq_mm.{func._schema.name.split("::")[1]}')
            for x in torch.utils._pytree.tree_leaves(out):
                assert x.is_contiguous(), f'{func}: {tuple(x.shape)}, strides {x.stride()}'
        return out


@all_ops
def test_on_meta(case):
    inputs = [x.to('meta') for x in case.inputs(9)]
    out = case.op(*inputs, backend='reference')
    assert out.is_meta
    assert out.shape == case.op(*case.inputs(9)).shape


@all_ops
def test_forward_mode_is_refused(case):
    """torch would drop the tangents and go on."""
    inputs = tuple(case.inputs(9))
    with pytest.raises(NotImplementedError, match='carries a tangent'):
        torch.func.jvp(case.op, inputs, inputs)
