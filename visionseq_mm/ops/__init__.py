"""Sequence mixers on channels-last tensors; they know nothing of the rest of this package."""

from visionseq_mm.ops.cluster_attention import cluster_attention, sec_attention, sec_partition
from visionseq_mm.ops.conv1d_silu import conv1d_silu
from visionseq_mm.ops.depthwise_conv2d import depthwise_conv2d
from visionseq_mm.ops.mlstm import mlstm
from visionseq_mm.ops.rotary_2d import rotary_2d
from visionseq_mm.ops.selective_scan import bidirectional_scan, selective_scan
from visionseq_mm.ops.vil_mixer import vil_mixer
from visionseq_mm.ops.vim_mixer import vim_mixer

__all__ = [
    'bidirectional_scan',
    'cluster_attention',
    'conv1d_silu',
    'depthwise_conv2d',
    'mlstm',
    'rotary_2d',
    'sec_attention',
    'sec_partition',
    'selective_scan',
    'vil_mixer',
    'vim_mixer',
]
