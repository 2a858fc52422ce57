"""The stand-in's operators, through mmcv.ops, against formulas written out here."""

import importlib
import importlib.machinery
import itertools
import math
import sys

import mmcv
import mmcv.ops
import numpy as np
import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.utils import collect_env
from torch.autograd import gradcheck

from visionseq_mm.compat import mmcv_ext

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, needs_cuda])]
HALVES = [torch.float16, torch.bfloat16]
WRAPPERS = ('nms', 'roi_align', 'modulated_deform_conv', 'multi_scale_deform_attn', 'focal_loss')


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Where mmcv is compiled, its wrappers call the stand-in all the same."""
    for name in WRAPPERS:
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', mmcv_ext)


def assert_same_gradients(actual, expected, inputs, **tolerance):
    """Compare two results of ``inputs``, and the gradients of a random projection of each."""
    torch.testing.assert_close(actual, expected, **tolerance)
    probe = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(actual, inputs, probe),
        torch.autograd.grad(expected, inputs, probe),
        strict=True,
    )
    for got, wanted in pairs:
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, **tolerance)


def random_boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 40, (count, 2))], 1)
    return boxes.astype(np.float32), rng.permutation(count).astype(np.float32) / count


def overlap(a, b, offset):
    """IoU of two boxes, by its definition."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + offset
    h = min(a[3], b[3]) - max(a[1], b[1]) + offset
    shared = max(w, 0) * max(h, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    return shared / (sum(areas) - shared)


# --- non-maximum suppression -----------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(('threshold', 'offset'), [(0.3, 0), (0.5, 1), (0.9, 1)])
def test_nms(threshold, offset, device):
    boxes, scores = random_boxes(80)
    kept = []
    for i in np.argsort(-scores):
        if all(overlap(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(int(i))
    inputs = (torch.tensor(x, device=device) for x in (boxes, scores))
    dets, inds = mmcv.ops.nms(*inputs, threshold, offset=offset)
    assert inds.tolist() == kept
    np.testing.assert_array_equal(dets.cpu(), np.c_[boxes, scores][kept])


def test_nms_offset_decides():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 5, 9, 14]])  # IoU 36/126, with offset 50/150
    scores = torch.tensor([0.9, 0.8])
    assert len(mmcv.ops.nms(boxes, scores, 0.3, offset=0)[1]) == 2
    assert len(mmcv.ops.nms(boxes, scores, 0.3, offset=1)[1]) == 1


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
def test_nms_in_half_precision(dtype, device):
    boxes, scores = (torch.tensor(x, dtype=dtype, device=device) for x in random_boxes(40))
    boxes = boxes * 40  # areas beyond the range of float16
    expected = mmcv.ops.nms(boxes.float(), scores.float(), 0.4)[1]
    assert torch.equal(mmcv.ops.nms(boxes, scores, 0.4)[1], expected)


def test_nms_of_nothing():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    for function in (mmcv.ops.nms, mmcv.ops.soft_nms):
        dets, inds = function(boxes, scores, 0.5)
        assert dets.shape == (0, 5)
        assert inds.dtype == torch.long


def test_batched_nms_keeps_classes_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    scores, classes = torch.tensor([0.5, 0.9, 0.8]), torch.tensor([0, 0, 1])
    for kind in ('nms', 'soft_nms'):
        cfg = dict(type=kind, iou_threshold=0.5)
        dets, keep = mmcv.ops.batched_nms(boxes, scores, classes, cfg)
        assert keep.tolist() == [1, 2]
        torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.8]))


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('offset', [0, 1])
def test_soft_nms(method, offset):
    threshold, sigma, min_score = 0.2, 0.4, 0.05
    boxes, scores = random_boxes(40, seed=1)
    current, left, expected = scores.astype(float), set(range(40)), []
    while left:
        best = max(left, key=lambda i: current[i])
        left.remove(best)
        expected.append((best, current[best]))
        for i in list(left):
            iou = overlap(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                current[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= threshold:
                current[i] *= 0 if method == 'naive' else 1 - iou
            if current[i] < min_score:
                left.remove(i)
    assert len(expected) < 40
    inputs = (torch.from_numpy(boxes), torch.from_numpy(scores))
    dets, inds = mmcv.ops.soft_nms(*inputs, threshold, sigma, min_score, method, offset)
    assert inds.tolist() == [i for i, _ in expected]
    np.testing.assert_allclose(dets[:, 4], [s for _, s in expected], rtol=1e-5)
    np.testing.assert_array_equal(dets[:, :4], boxes[inds])
    np.testing.assert_array_equal(inputs[1], scores)  # not changed in place

    inputs = (x.requires_grad_() for x in inputs)
    _, again = mmcv.ops.soft_nms(*inputs, threshold, sigma, min_score, method, offset)
    assert torch.equal(again, inds)


def test_soft_nms_of_boxes_without_area():
    boxes = torch.tensor([[3.0, 1, 3, 1]] * 3)
    dets, inds = mmcv.ops.soft_nms(boxes, torch.tensor([0.5, 0.9, 0.4]), method='gaussian')
    assert inds.tolist() == [1, 0, 2]
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.5, 0.4]))


# --- RoI align -------------------------------------------------------------------------------


def sample_clamped(image, y, x):
    """Bilinear sample (C,) of an image (C, H, W): 0 more than a pixel outside, else clamped."""
    h, w = image.shape[1:]
    if not (-1 <= y <= h and -1 <= x <= w):
        return image[:, 0, 0] * 0
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = min(int(y), h - 2), min(int(x), w - 2)
    down, right = y - top, x - left
    upper = image[:, top, left] * (1 - right) + image[:, top, left + 1] * right
    lower = image[:, top + 1, left] * (1 - right) + image[:, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def roi_align_by_hand(maps, rois, size, scale, ratio, aligned):
    pooled = []
    for index, *box in rois.tolist():
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in box)
        least = 0 if aligned else 1
        bin_h, bin_w = max(y2 - y1, least) / size[0], max(x2 - x1, least) / size[1]
        rows, cols = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for i, j in itertools.product(range(size[0]), range(size[1])):
            samples = [
                sample_clamped(
                    maps[int(index)],
                    y1 + (i + (k + 0.5) / rows) * bin_h,
                    x1 + (j + (m + 0.5) / cols) * bin_w,
                )
                for k in range(rows)
                for m in range(cols)
            ]
            pooled.append(sum(samples) / len(samples))
    shape = len(rois), *size, maps.shape[1]
    return torch.stack(pooled).reshape(shape).permute(0, 3, 1, 2)


ROIS = [[0, 1.3, 0.7, 15.2, 11.0], [1, -6.0, 2.2, 7.9, 30.0], [0, 4.0, 4.0, 4.5, 4.2]]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align(ratio, aligned, device):
    maps = torch.randn(2, 3, 7, 9, dtype=torch.float64, device=device, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64, device=device)
    layer = mmcv.ops.RoIAlign((2, 3), 0.5, ratio, aligned=aligned)
    expected = roi_align_by_hand(maps, rois, (2, 3), 0.5, ratio, aligned)
    assert_same_gradients(layer(maps, rois), expected, [maps])


def test_roi_align_gradcheck():
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    assert gradcheck(lambda x: mmcv.ops.roi_align(x, rois, (2, 2), 0.5, 0, 'avg', True), maps)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALVES)
def test_roi_align_in_half_precision(dtype, device):
    maps = torch.randn(2, 3, 7, 9, device=device).to(dtype)
    rois = torch.tensor(ROIS, device=device)
    grads = []
    for x in (maps.requires_grad_(), maps.detach().float().requires_grad_()):
        pooled = mmcv.ops.roi_align(x, rois, (2, 3), 0.5)
        assert pooled.dtype == x.dtype
        pooled.float().square().sum().backward()
        grads.append(x.grad.float())
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


def test_roi_align_without_regions():
    maps = torch.randn(1, 3, 4, 4, requires_grad=True)
    pooled = mmcv.ops.roi_align(maps, torch.zeros(0, 5), 7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert maps.grad.count_nonzero() == 0


def test_roi_align_max_is_refused():
    layer = mmcv.ops.RoIAlign(2, pool_mode='max')
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*pip uninstall mmcv-lite"):
        layer(torch.zeros(1, 1, 4, 4), torch.tensor(ROIS[:1]))


# --- modulated deformable convolution --------------------------------------------------------


def sample_zeros(image, y, x):
    """Bilinear samples (C, …) of an image (C, H, W) among zeros, at y and x (…)."""
    h, w = image.shape[1:]
    total = 0
    for dy, dx in itertools.product((0, 1), (0, 1)):
        row, col = y.floor() + dy, x.floor() + dx
        weight = (1 - (y - row).abs()) * (1 - (x - col).abs())
        inside = (row >= 0) & (row < h) & (col >= 0) & (col < w)
        index = row.clamp(0, h - 1).long(), col.clamp(0, w - 1).long()
        total = total + image[:, index[0], index[1]] * weight * inside
    return total


def deform_conv_by_hand(
    x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups
):
    batch, channels = x.shape[:2]
    out_channels, per_group, kh, kw = weight.shape
    h, w = offset.shape[2:]
    offset = offset.view(batch, deform_groups, kh, kw, 2, h, w)
    mask = mask.view(batch, deform_groups, kh, kw, h, w)
    rows, cols = torch.meshgrid(
        torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing='ij'
    )
    output = []
    for b in range(batch):
        columns = x.new_zeros(channels, kh, kw, h, w)
        for g, i, j in itertools.product(range(deform_groups), range(kh), range(kw)):
            dy, dx = offset[b, g, i, j]
            y = rows * stride[0] - padding[0] + i * dilation[0] + dy
            z = cols * stride[1] - padding[1] + j * dilation[1] + dx
            part = slice(g * channels // deform_groups, (g + 1) * channels // deform_groups)
            columns[part, i, j] = sample_zeros(x[b, part], y, z) * mask[b, g, i, j]
        columns = columns.view(groups, per_group, kh, kw, h, w)
        kernel = weight.view(groups, out_channels // groups, per_group, kh, kw)
        output.append(torch.einsum('gcijhw,gocij->gohw', columns, kernel).flatten(0, 1))
    output = torch.stack(output)
    return output if bias is None else output + bias[:, None, None]


def deform_conv_inputs(deform_groups, groups, with_bias, device='cpu'):
    """Kernel 3×2, stride (2, 1), padding (1, 2), dilation (1, 2) on 2×4×5×6 maps give 3×8."""
    generator = torch.Generator().manual_seed(0)
    points, shapes = deform_groups * 3 * 2, [(2, 4, 5, 6)]
    shapes += [(2, 2 * points, 3, 8), (2, points, 3, 8), (6, 4 // groups, 3, 2)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in [*shapes, (6,)][: 4 + with_bias]
    ]
    inputs[1] *= 1.5
    return [x.requires_grad_() for x in inputs]


GEOMETRY = (2, 1), (1, 2), (1, 2)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize(
    ('groups', 'deform_groups', 'with_bias'), [(1, 1, True), (2, 1, False), (1, 2, True)]
)
def test_modulated_deform_conv(groups, deform_groups, with_bias, device):
    inputs = deform_conv_inputs(deform_groups, groups, with_bias, device)
    arguments = inputs if with_bias else [*inputs, None]
    settings = (*GEOMETRY, groups, deform_groups)
    actual = mmcv.ops.modulated_deform_conv2d(*arguments, *settings)
    assert_same_gradients(actual, deform_conv_by_hand(*arguments, *settings), inputs)


def test_modulated_deform_conv_gradcheck():
    def call(*inputs):
        return mmcv.ops.modulated_deform_conv2d(*inputs, *GEOMETRY, 2, 2)

    assert gradcheck(call, deform_conv_inputs(2, 2, True), fast_mode=True)


@pytest.mark.parametrize('dtype', HALVES)
def test_modulated_deform_conv_in_half_precision(dtype):
    inputs = [x.detach().to(dtype).requires_grad_() for x in deform_conv_inputs(1, 1, True)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    settings = (*GEOMETRY, 1, 1)
    actual = mmcv.ops.modulated_deform_conv2d(*inputs, *settings)
    expected = mmcv.ops.modulated_deform_conv2d(*wide, *settings)
    assert actual.dtype == dtype
    for output in (actual, expected):
        output.float().sum().backward()
    for got, wanted in zip([actual, *inputs], [expected, *wide], strict=True):
        got, wanted = (got.grad, wanted.grad) if got.is_leaf else (got, wanted)
        torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02)


def test_modulated_deform_conv_pack_is_a_convolution_at_first():
    pack = mmcv.ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1, bias=True)
    x = torch.randn(1, 4, 5, 5)
    # No offsets yet, and a mask of sigmoid(0).
    expected = torch.nn.functional.conv2d(x, pack.weight / 2, pack.bias, padding=1)
    torch.testing.assert_close(pack(x), expected, rtol=1e-4, atol=1e-5)


# --- multi-scale deformable attention --------------------------------------------------------


def attention_inputs(device='cpu'):
    """Two images, 3 heads of 4 channels, levels of 3×5 and 2×2, 5 queries of 2 points a level."""
    shapes = torch.tensor([[3, 5], [2, 2]], device=device)
    starts = torch.tensor([0, 15], device=device)
    value = torch.randn(2, 19, 3, 4, dtype=torch.float64, device=device)
    locations = torch.rand(2, 5, 3, 2, 2, 2, dtype=torch.float64, device=device) * 1.4 - 0.2
    weights = torch.rand(2, 5, 3, 2, 2, dtype=torch.float64, device=device)
    return shapes, starts, [t.requires_grad_() for t in (value, locations, weights)]


def attend_by_hand(value, shapes, starts, locations, weights):
    batch, queries, heads = locations.shape[:3]
    output = []
    for b, q, head in itertools.product(range(batch), range(queries), range(heads)):
        total = 0
        for level, (h, w) in enumerate(shapes.tolist()):
            first = int(starts[level])
            image = value[b, first : first + h * w, head].T.reshape(-1, h, w)
            x, y = locations[b, q, head, level].unbind(-1)
            samples = sample_zeros(image, y * h - 0.5, x * w - 0.5)
            total = total + (samples * weights[b, q, head, level]).sum(-1)
        output.append(total)
    return torch.stack(output).reshape(batch, queries, -1)


@pytest.mark.parametrize('device', DEVICES)
def test_ms_deform_attn(device):
    shapes, starts, (value, locations, weights) = attention_inputs(device)
    arguments = value, shapes, starts, locations, weights
    actual = MultiScaleDeformableAttnFunction.apply(*arguments, 64)
    assert_same_gradients(actual, attend_by_hand(*arguments), [value, locations, weights])


def test_ms_deform_attn_gradcheck():
    shapes, starts, inputs = attention_inputs()

    def call(value, locations, weights):
        return MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, locations, weights, 64
        )

    assert gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize('dtype', HALVES)
def test_ms_deform_attn_in_half_precision(dtype):
    shapes, starts, inputs = attention_inputs()
    value, locations, weights = (t.detach().to(dtype) for t in inputs)
    value.requires_grad_()
    output = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    wide = (value.double(), shapes, starts, locations.double(), weights.double())
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), attend_by_hand(*wide), rtol=0.02, atol=0.02)
    output.sum().backward()
    assert value.grad.dtype == dtype


# --- sigmoid focal loss ----------------------------------------------------------------------


def focal_loss_by_hand(logits, target, gamma, alpha, weight):
    p = torch.sigmoid(logits)
    hot = torch.nn.functional.one_hot(target, logits.shape[1] + 1)[:, :-1]
    positive = -alpha * (1 - p) ** gamma * p.log()
    negative = -(1 - alpha) * p**gamma * (1 - p).log()
    loss = torch.where(hot == 1, positive, negative)
    if weight is not None:
        # The class weight of the row's target, 1 for background.
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]
    return loss


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('reduction', ['none', 'mean', 'sum'])
@pytest.mark.parametrize(('gamma', 'alpha', 'weighted'), [(2.0, 0.25, False), (1.5, 0.6, True)])
def test_sigmoid_focal_loss(gamma, alpha, weighted, reduction, device):
    logits = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 3, 4, 1, 4, 2], device=device)  # 4 is background
    weight = torch.rand(4, dtype=torch.float64, device=device) if weighted else None
    actual = mmcv.ops.sigmoid_focal_loss(logits, target, gamma, alpha, weight, reduction)
    expected = focal_loss_by_hand(logits, target, gamma, alpha, weight)
    if reduction == 'mean':
        expected = expected.sum() / len(logits)
    elif reduction == 'sum':
        expected = expected.sum()
    assert_same_gradients(actual, expected, [logits])


def test_sigmoid_focal_loss_gradcheck():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2])
    assert gradcheck(lambda x: mmcv.ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None), logits)


def test_sigmoid_focal_loss_of_extreme_logits():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([1]), 2.0, 0.25, None, 'none')
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([[150.0, 50.0]]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.25]]))


@pytest.mark.parametrize('dtype', HALVES)
def test_sigmoid_focal_loss_in_half_precision(dtype):
    logits = torch.randn(6, 4).to(dtype).requires_grad_()
    target = torch.tensor([0, 3, 4, 1, 4, 2])
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    assert loss.dtype == dtype
    expected = focal_loss_by_hand(logits.float(), target, 2.0, 0.25, None)
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0.02)
    loss.sum().backward()
    assert logits.grad.isfinite().all()


# --- everything else -------------------------------------------------------------------------


def test_unsupported_operator_names_itself_and_the_remedy():
    with pytest.raises(NotImplementedError) as caught:
        mmcv.ops.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
    message = str(caught.value)
    for part in ("'nms_rotated'", 'sigmoid_focal_loss', 'pip uninstall mmcv-lite', 'mmcv==2.1.0'):
        assert part in message


def test_no_special_attribute_is_invented():
    for name in ('__path__', '__wrapped__', '_private'):
        assert not hasattr(mmcv_ext, name)
    assert mmcv_ext.nms_match.__name__


def test_environment_report():
    report = collect_env()  # asks the extension, ours or a compiled one, for its compilers
    assert report['MMCV Compiler'] and report['MMCV CUDA Compiler']
    assert mmcv_ext.get_compiler_version().startswith('n/a')
    assert mmcv_ext.get_compiling_cuda_version().startswith('n/a')


@pytest.fixture
def compiled():
    spec = importlib.machinery.PathFinder.find_spec('mmcv._ext', mmcv.__path__)
    if spec is None:
        pytest.skip('compiled mmcv is not installed')
    return importlib.import_module('mmcv._ext')


def test_stand_in_equals_compiled_mmcv(compiled, monkeypatch):
    boxes, scores = (torch.from_numpy(x) for x in random_boxes(200, seed=2))
    maps, rois = torch.randn(2, 3, 7, 9, requires_grad=True), torch.tensor(ROIS)
    inputs = [x.detach().float().requires_grad_() for x in deform_conv_inputs(2, 2, True)]

    def results():
        yield from mmcv.ops.nms(boxes, scores, 0.4, offset=1)
        for method in ('naive', 'linear', 'gaussian'):
            yield from mmcv.ops.soft_nms(boxes, scores, method=method)
        for ratio, aligned in itertools.product((0, 2), (True, False)):
            pooled = mmcv.ops.roi_align(maps, rois.abs(), (2, 3), 0.5, ratio, 'avg', aligned)
            yield pooled
            yield from torch.autograd.grad(pooled.square().sum(), [maps])
        output = mmcv.ops.modulated_deform_conv2d(*inputs, *GEOMETRY, 2, 2)
        yield output
        yield from torch.autograd.grad(output.square().sum(), inputs)

    ours = list(results())
    for name in WRAPPERS:
        monkeypatch.setattr(sys.modules[f'mmcv.ops.{name}'], 'ext_module', compiled)
    for got, wanted in zip(ours, results(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
