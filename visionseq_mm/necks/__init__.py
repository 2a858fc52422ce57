from visionseq_mm.necks.multi_scale_adapter import MultiScaleAdapter

__all__ = ['MultiScaleAdapter']
