"""Stand-in for mmcv's compiled extension ``mmcv._ext``, over torch and torchvision.

``mmcv.ops`` wraps the operators of this module; nobody else needs to call
them. Names, arguments and in-place results are those of mmcv 2.1.0, and a
call means the same on a CPU and on a GPU. Half precision inputs are computed
in float32 and rounded once. What is not here can be imported, because
``mmcv.ops`` looks up every operator as soon as it is imported, and raises when
it is called.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

_OPERATORS = (
    'nms, softnms, roi_align (average), modulated_deform_conv, ms_deform_attn, sigmoid_focal_loss'
)
_INSTALL_HINT = (
    'Install compiled mmcv, which has every operator: `pip uninstall mmcv-lite`, then '
    '`MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir mmcv==2.1.0`. It is built '
    'from source and needs a C++ compiler, for GPUs also the CUDA toolkit of your torch. Never '
    'keep both packages: they write the same folder.'
)


def _missing(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} is not available: mmcv's compiled operators are not installed, and the stand-in "
        f'of visionseq_mm covers only {_OPERATORS}. {_INSTALL_HINT}'
    )


def __getattr__(name: str):
    if name.startswith('_'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def unavailable(*args, **kwargs):
        raise _missing(f'The operator {name!r}')

    return unavailable


def _widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype, float32 at the least."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [t.to(dtype) for t in tensors]


# --- non-maximum suppression -----------------------------------------------------------------


def _closed(boxes: Tensor, offset: int) -> Tensor:
    """Boxes (N, 4) whose width is x2 - x1 + ``offset``, as boxes of width x2 - x1."""
    return boxes + boxes.new_tensor([0, 0, offset, offset]) if offset else boxes


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices (K,) of the boxes (N, 4) that no better one overlaps by more than the threshold.

    ``scores`` is (N,); the best box comes first. Widths and heights are x2 - x1 + ``offset``.
    """
    boxes, scores = _widen(boxes, scores)
    return ops.nms(_closed(boxes, offset), scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (https://arxiv.org/abs/1704.04503): the best box lowers the scores of the others.

    ``method`` 0 drops boxes that overlap by the threshold or more, 1 multiplies their scores by
    1 - IoU, 2 multiplies every score by exp(-IoU² / ``sigma``). Boxes whose score sinks below
    ``min_score`` are out. Equal scores are taken in the order of their indices.

    Fills the first K rows of ``dets`` (N, 5) with boxes and new scores; returns indices (K,).
    """
    # numpy, because thousands of small steps would start torch's threads every time.
    corners, current = _widen(boxes.detach(), scores.detach())
    x1, y1, x2, y2 = _closed(corners, offset).cpu().numpy().T
    current = current.cpu().numpy().copy()
    area = (x2 - x1) * (y2 - y1)
    left, kept = np.arange(len(current)), []
    while len(left):
        position = current[left].argmax()
        best = left[position]
        kept.append(best)
        left = np.delete(left, position)
        width = np.minimum(x2[best], x2[left]) - np.maximum(x1[best], x1[left])
        height = np.minimum(y2[best], y2[left]) - np.maximum(y1[best], y1[left])
        shared = width.clip(min=0) * height.clip(min=0)
        union = area[best] + area[left] - shared
        iou = np.divide(shared, union, out=np.zeros_like(union), where=union > 0)
        if method == 2:
            current[left] *= np.exp(-(iou**2) / sigma)
        else:
            current[left] *= np.where(iou >= iou_threshold, (1 - iou) * method, 1)
        left = left[current[left] >= min_score]
    kept = torch.tensor(kept, dtype=torch.long, device=boxes.device)
    dets[: len(kept), :4] = boxes[kept]
    dets[: len(kept), 4] = torch.from_numpy(current).to(dets)[kept.to(dets.device)]
    return kept


# --- RoI align -------------------------------------------------------------------------------


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise _missing("roi_align with pool_mode='max'")


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average-pool bilinear samples of each region into ``output`` (K, C, height, width).

    ``input`` is (B, C, H, W); ``rois`` (K, 5) are (batch index, x1, y1, x2, y2). Raises
    NotImplementedError for max pooling (``pool_mode`` 0).
    """
    _check_pool_mode(pool_mode)
    input, rois = _widen(input, rois)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input`` (B, C, H, W) from ``grad_output`` (K, C, height, width)."""
    _check_pool_mode(pool_mode)
    grad_output, rois = _widen(grad_output, rois)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


# --- modulated deformable convolution --------------------------------------------------------


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable ConvNets v2 (https://arxiv.org/abs/1811.11168) into ``output`` (B, O, h, w).

    ``input`` (B, C, H, W), ``weight`` (O, C / group, kernel_h, kernel_w), ``bias`` (O,), empty
    without ``with_bias``; per kernel point and output position ``offset`` has (y, x) and ``mask``
    a factor: (B, deformable_group · kernel_h · kernel_w · 2 or 1, h, w). ``ones`` and
    ``columns`` are scratch space of mmcv's.
    """
    input, weight, bias, offset, mask = _widen(input, weight, bias, offset, mask)
    output.copy_(
        torch.ops.torchvision.deform_conv2d(
            input,
            weight,
            offset,
            mask,
            bias if with_bias else bias.new_zeros(len(weight)),
            stride_h,
            stride_w,
            pad_h,
            pad_w,
            dilation_h,
            dilation_w,
            group,
            deformable_group,
            True,
        )
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the five gradients, each of its tensor's shape, from ``grad_output`` (B, O, h, w)."""
    grad_output, input, weight, bias, offset, mask = _widen(
        grad_output, input, weight, bias, offset, mask
    )
    grads = torch.ops.torchvision._deform_conv2d_backward(
        grad_output,
        input,
        weight,
        offset,
        mask,
        bias if with_bias else bias.new_zeros(len(weight)),
        stride_h,
        stride_w,
        pad_h,
        pad_w,
        dilation_h,
        dilation_w,
        group,
        deformable_group,
        True,
    )
    targets = [grad_input, grad_weight, grad_offset, grad_mask]
    if with_bias:
        targets.append(grad_bias)
    for target, grad in zip(targets, grads, strict=False):
        target.copy_(grad)


# --- multi-scale deformable attention --------------------------------------------------------


def _attend(value, shapes, starts, locations, weights):
    """Weighted sum of bilinear samples over levels and points: (B, Q, H · D)."""
    batch, _, heads, dims = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = value.new_zeros(batch * heads, dims, queries)
    for level, ((h, w), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, dims, h, w)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2)
        weight = weight.reshape(batch * heads, 1, queries, points)
        output = output + (sampled * weight).sum(-1)
    return output.view(batch, heads * dims, queries).transpose(1, 2).contiguous()


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (https://arxiv.org/abs/2010.04159), (B, Q, H · D).

    ``value`` (B, S, H, D) holds L levels of sizes ``value_spatial_shapes`` (L, 2) from
    ``value_level_start_index`` (L,) on; ``sampling_locations`` (B, Q, H, L, P, 2) are (x, y) in
    [0, 1], ``attention_weights`` is (B, Q, H, L, P). ``im2col_step`` has no effect.
    """
    tensors = _widen(value, sampling_locations, attention_weights)
    output = _attend(
        tensors[0], value_spatial_shapes, value_level_start_index, tensors[1], tensors[2]
    )
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fill the gradients of ``value``, locations and weights from ``grad_output`` (B, Q, H · D).

    The samples are taken again: keeping them would cost B · Q · L · P · H · D numbers.
    """
    tensors = _widen(value, sampling_locations, attention_weights, grad_output)
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in tensors[:3]]
        output = _attend(
            inputs[0], value_spatial_shapes, value_level_start_index, inputs[1], inputs[2]
        )
        grads = torch.autograd.grad(output, inputs, tensors[3])
    for target, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        target.copy_(grad)


# --- sigmoid focal loss ----------------------------------------------------------------------


def _focal_terms(logits, target, weight, alpha):
    """What forward and backward share, each (N, C).

    With s = x for the target class and -x for the others, both cases of the loss are
    a · σ(-s)^γ · -log σ(s). Returns the sign of s, σ(-s), -log σ(s) and a, which holds α or
    1 - α and the class weight of the row's target. Rows with a target outside [0, C) have no
    positive class, and class weight 1.
    """
    classes = logits.shape[1]
    positive = target[:, None] == torch.arange(classes, device=target.device)
    sign = positive.to(logits.dtype) * 2 - 1
    factor = torch.where(positive, alpha, 1 - alpha).to(logits.dtype)
    if weight.numel():
        known = (target >= 0) & (target < classes)
        row_weight = torch.where(known, weight[target.where(known, 0)], 1)
        factor = factor * row_weight[:, None]
    signed = sign * logits
    return sign, torch.sigmoid(-signed), -F.logsigmoid(signed), factor


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (https://arxiv.org/abs/1708.02002) of each logit into ``output`` (N, C).

    ``input`` (N, C) are logits, ``target`` (N,) class indices, where C means background;
    ``weight`` (C,) or empty are class weights.
    """
    logits, weight = _widen(input, weight)
    _, wrong, loss, factor = _focal_terms(logits, target, weight, alpha)
    output.copy_(factor * wrong**gamma * loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fill ``grad_input`` (N, C) with the derivative of each loss by its logit."""
    logits, weight = _widen(input, weight)
    sign, wrong, loss, factor = _focal_terms(logits, target, weight, alpha)
    grad_input.copy_(-sign * factor * wrong**gamma * (gamma * (1 - wrong) * loss + wrong))


# --- build information, which mmcv's environment report asks for -----------------------------


def get_compiler_version() -> str:
    """Nothing was compiled."""
    return 'n/a (operators of visionseq_mm)'


def get_compiling_cuda_version() -> str:
    """Nothing was compiled."""
    return 'n/a (operators of visionseq_mm)'
