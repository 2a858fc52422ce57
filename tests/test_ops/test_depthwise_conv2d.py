import pytest
import torch
import torch.nn.functional as F
from ops_twins import assert_close, normal, run
from torch.utils.flop_counter import FlopCounterMode

from visionseq_mm.ops import depthwise_conv2d
from visionseq_mm.ops.depthwise_conv2d import BACKENDS
from visionseq_mm.ops.dispatch import INSTALLED

NAMES = ['reference']
if 'cpu' in BACKENDS.names and INSTALLED['numba']:
    NAMES.append('cpu')

pytestmark = pytest.mark.parametrize('backend', NAMES)


def twin(x, weight, bias, residual=False):
    """Shifted maps, tap by tap."""
    h, w, K = *x.shape[1:3], weight.shape[2]
    padded = F.pad(x, (0, 0, *[K // 2] * 4))
    out = bias.expand_as(x)
    for m in range(K):
        for n in range(K):
            out = out + weight[:, 0, m, n] * padded[:, m : m + h, n : n + w]
    return out + x if residual else out


def conv_inputs(B, h, w, C, K, dtype=torch.float64):
    return [x.to(dtype) for x in normal((B, h, w, C), (C, 1, K, K), (C,))]


SHAPES = [(1, 1, 1, 3, 1), (2, 5, 7, 20, 3), (1, 3, 9, 8, 5), (1, 2, 2, 4, 7), (1, 4, 3, 5, 9)]


@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_twin(backend, shape, residual):
    inputs = conv_inputs(*shape)
    actual = run(lambda *xs: depthwise_conv2d(*xs, residual, backend), inputs)
    assert_close(actual, run(lambda *xs: twin(*xs, residual), inputs), 1e-12)
    assert actual[0].is_contiguous()


@pytest.mark.parametrize('dtype, ratio', [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_other_dtypes(backend, dtype, ratio):
    inputs = conv_inputs(2, 7, 6, 16, 3, dtype)
    actual = run(lambda *xs: depthwise_conv2d(*xs, True, backend), inputs)
    assert all(x.dtype == dtype for x in actual)
    expected = run(lambda *xs: twin(*xs, True), [x.double() for x in inputs])
    assert_close(actual, expected, ratio)


@pytest.mark.parametrize('residual', [False, True])
def test_gradcheck(backend, residual):
    inputs = [x.requires_grad_() for x in conv_inputs(2, 3, 2, 2, 3)]
    torch.autograd.gradcheck(lambda *xs: depthwise_conv2d(*xs, residual, backend), inputs)


def test_views_equal_copies(backend):
    """A third of a wider tensor, another order of memory, and an expanded gradient."""
    x = normal((2, 4, 5, 3 * 8))[0][..., 8:16]
    _, weight, bias = conv_inputs(2, 4, 5, 8, 3)
    strided = x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    dout = normal((1, 1, 1, 8))[0].expand(2, 4, 5, 8)

    def op(*xs):
        return depthwise_conv2d(*xs, True, backend)

    expected = run(op, (x.contiguous(), weight, bias), dout.contiguous())
    for view in (x, strided):
        assert_close(run(op, (view, weight, bias), dout), expected, 1e-14)


def test_autocast(backend):
    inputs = conv_inputs(1, 4, 5, 8, 3, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        actual = run(lambda *xs: depthwise_conv2d(*xs, True, backend), inputs)
    assert [x.dtype for x in actual] == [torch.bfloat16, *[torch.float32] * 3]
    assert_close(actual, run(lambda *xs: twin(*xs, True), inputs), 1e-2)


@pytest.mark.parametrize('residual', [False, True])
def test_registration(backend, residual):
    inputs = [x.requires_grad_() for x in conv_inputs(2, 3, 4, 8, 3)]
    op = torch.ops.visionseq_mm.depthwise_conv2d.default
    torch.library.opcheck(op, (*inputs, residual, backend))


def test_flops(backend):
    """As torch counts a convolution, and twice that for the gradients, which torch counts as if
    groups were one."""
    inputs = conv_inputs(2, 3, 4, 8, 3)
    x, weight, bias = inputs
    with FlopCounterMode(display=False) as plain:
        F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=8)
    with FlopCounterMode(display=False) as counter:
        run(lambda *xs: depthwise_conv2d(*xs, False, backend), inputs)
    assert counter.get_total_flops() == 3 * plain.get_total_flops()


def test_bad_arguments(backend, monkeypatch):
    x, weight, bias = conv_inputs(1, 2, 3, 4, 3)
    with pytest.raises(ValueError, match='odd K, got shape'):
        depthwise_conv2d(x, weight[:, :, :2, :2], bias, backend=backend)
    with pytest.raises(ValueError, match='bias must be a tensor, got None'):
        depthwise_conv2d(x, weight, None, backend=backend)
    with pytest.raises(ValueError, match='odd K, got shape'):
        depthwise_conv2d(x, weight.expand(4, 2, 3, 3), bias, backend=backend)
    with pytest.raises(ValueError, match='weight must be'):
        depthwise_conv2d(x, weight[:3], bias, backend=backend)
    with pytest.raises(ValueError, match='bias must be'):
        depthwise_conv2d(x, weight, bias[:1], backend=backend)
    with pytest.raises(ValueError, match='empty along h'):
        depthwise_conv2d(x[:, :0], weight, bias, backend=backend)
    with pytest.raises(ValueError, match='weight has dtype'):
        depthwise_conv2d(x, weight.float(), bias, backend=backend)
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        depthwise_conv2d(x, weight, bias, backend='gpu')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(ValueError, match='at most 7×7, got K = 9'):
        depthwise_conv2d(*(t.float() for t in conv_inputs(1, 2, 3, 4, 9)), backend='triton')
