"""Vim, ViL and SecViT as backbones of mmdet, mmsegmentation and mmpretrain.

Importing this package is cheap on purpose: ``visionseq_mm.registry`` is what
the toolboxes import, and ``visionseq_mm.ops`` needs nothing but torch.
"""

__version__ = '0.1.0'
