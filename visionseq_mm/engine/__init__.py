"""What a training needs besides a model: hooks, mixed precision and learning rates by depth."""

from visionseq_mm.engine.amp import AmpOptimWrapper
from visionseq_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from visionseq_mm.engine.num_class_check import NumClassCheckHook
from visionseq_mm.engine.random_state import RandomStateHook

__all__ = [
    'AmpOptimWrapper',
    'LayerDecayOptimWrapperConstructor',
    'NumClassCheckHook',
    'RandomStateHook',
]
