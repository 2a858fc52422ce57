"""Which cluster each token of a picture is in, in the backbones that attend within clusters."""

from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visionseq_mm.backbones.base import ClusterPyramid
from visionseq_mm.ops.cluster_attention import cluster_labels


def cluster_maps(backbone, image, stages=None, block=-1):
    """The clusters that one block of each of the ``stages`` makes of the tokens of ``image``.

    Args:
        backbone (ClusterPyramid): In eval mode, if its batch norms are to stay as they are.
        image (Tensor): What it takes: (B, 3, H, W), or (B, 4, H, W) with padding marked.
        stages (Sequence[int] | None): Counted from 1, as in the paper; None: all with clusters.
        block (int): Of each stage, counted from 0; negative ones from its end.

    Returns:
        dict[int, Tensor]: {stage: (B, heads, h, w) int64}, on the grid of the stage's tokens.
        Clusters are numbered from 0 by the cosine of their tokens with the mean key, ascending,
        so that those with neighbouring numbers are alike. Padding is -1.

    Raises:
        TypeError: For a backbone that is no ClusterPyramid.
        ValueError: For stages and blocks that do not exist, and stages without clusters.
    """
    if not isinstance(backbone, ClusterPyramid):
        raise TypeError(
            f'{type(backbone).__name__} has no clusters; use SecViT or another backbone that '
            'attends within clusters'
        )
    count = len(backbone.stages)
    if any(not 1 <= stage <= count for stage in stages or ()):
        raise ValueError(f'stages are numbered from 1 to {count} here, got {list(stages)}')
    seen = _Partitions()
    with ExitStack() as stack:
        for stage in backbone.stages:
            stack.enter_context(stage.register_forward_pre_hook(seen.enter_stage))
        stack.enter_context(torch.no_grad())
        stack.enter_context(seen)
        backbone(image)
    clustered = [
        number
        for number, (_, blocks) in enumerate(seen.stages, start=1)
        if any(num_clusters > 1 for _, num_clusters, _ in blocks)
    ]
    if not clustered:
        raise ValueError(f'no stage of this {type(backbone).__name__} has clusters')
    maps = {}
    for stage in clustered if stages is None else stages:
        if stage not in clustered:
            raise ValueError(
                f'stage {stage} of this {type(backbone).__name__} has no clusters; '
                f'those that do: {", ".join(map(str, clustered))}'
            )
        grid, blocks = seen.stages[stage - 1]
        if not -len(blocks) <= block < len(blocks):
            raise ValueError(
                f'the blocks of stage {stage} are numbered from {-len(blocks)} to '
                f'{len(blocks) - 1}, got {block}'
            )
        maps[stage] = cluster_labels(*blocks[block]).unflatten(2, grid)
    return maps


class _Partitions(TorchDispatchMode):
    """Takes down what ``sec_partition`` is given and returns.

    ``stages``: [((h, w), [(idx, num_clusters, valid) of each block])].
    """

    def __init__(self):
        super().__init__()
        self.stages = []

    def enter_stage(self, stage, inputs):
        """A forward pre-hook."""
        self.stages.append((tuple(inputs[0].shape[2:]), []))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.visionseq_mm.sec_partition.default:
            _, num_clusters, valid, _ = args
            self.stages[-1][1].append((out, num_clusters, valid))
        return out
