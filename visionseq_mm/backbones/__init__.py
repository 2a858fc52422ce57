from visionseq_mm.backbones.secvit import SecViT
from visionseq_mm.backbones.vil import ViL
from visionseq_mm.backbones.vim import Vim

__all__ = ['SecViT', 'ViL', 'Vim']
