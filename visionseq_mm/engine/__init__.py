"""What a training needs besides a model: hooks and learning rates by depth."""

from visionseq_mm.engine.layer_decay import LayerDecayOptimWrapperConstructor
from visionseq_mm.engine.num_class_check import NumClassCheckHook
from visionseq_mm.engine.random_state import RandomStateHook

__all__ = ['LayerDecayOptimWrapperConstructor', 'NumClassCheckHook', 'RandomStateHook']
