"""Sequence mixers on channels-last tensors; plain PyTorch, of nothing else in this package."""

from visionseq_mm.ops.cluster_attention import cluster_attention, sec_attention, sec_partition
from visionseq_mm.ops.mlstm import mlstm
from visionseq_mm.ops.selective_scan import selective_scan

__all__ = ['cluster_attention', 'mlstm', 'sec_attention', 'sec_partition', 'selective_scan']
