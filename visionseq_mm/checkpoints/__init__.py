"""Official checkpoints: their names as tables, checks, and the list of published files."""

from visionseq_mm.checkpoints.loading import (
    CheckpointMismatchError,
    adapt,
    rename,
    select_weights,
)
from visionseq_mm.checkpoints.names import SECVIT, VIL, VIM
from visionseq_mm.checkpoints.published import PUBLISHED, Published, fetch

__all__ = [
    'PUBLISHED',
    'SECVIT',
    'VIL',
    'VIM',
    'CheckpointMismatchError',
    'Published',
    'adapt',
    'fetch',
    'rename',
    'select_weights',
]
