from visionseq_mm.backbones.sec_fastervit import SECFasterViT
from visionseq_mm.backbones.sec_swin import SECSwin
from visionseq_mm.backbones.secvit import SecViT
from visionseq_mm.backbones.vil import ViL
from visionseq_mm.backbones.vim import Vim
from visionseq_mm.backbones.windowed_vit import WindowedViT

__all__ = ['SECFasterViT', 'SECSwin', 'SecViT', 'ViL', 'Vim', 'WindowedViT']
