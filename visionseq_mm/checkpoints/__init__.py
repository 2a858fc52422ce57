"""Official checkpoints: their names as tables, checks, and the list of published files."""

from visionseq_mm.checkpoints.loading import (
    CheckpointMismatchError,
    LoadsOfficialFiles,
    adapt,
    convert,
    rename,
    select_weights,
    weights_key,
)
from visionseq_mm.checkpoints.names import DEIT, SECVIT, SWIN, VIL, VIM
from visionseq_mm.checkpoints.published import (
    PUBLISHED,
    Published,
    find_published,
    install,
    published_table,
)

__all__ = [
    'DEIT',
    'PUBLISHED',
    'SECVIT',
    'SWIN',
    'VIL',
    'VIM',
    'CheckpointMismatchError',
    'LoadsOfficialFiles',
    'Published',
    'adapt',
    'convert',
    'find_published',
    'install',
    'published_table',
    'rename',
    'select_weights',
    'weights_key',
]
