"""ViTDet's ViT (Li et al., arXiv 2203.16527), with which Vim's paper compares: a baseline.

mmpretrain has it as the image encoder of SAM. Here it has DeiT's sizes and loads DeiT's files.
"""

import math

from visionseq_mm import checkpoints
from visionseq_mm.layers import resize_grid
from visionseq_mm.registry import MODELS, register_absent

try:
    from mmpretrain.models import ViTSAM
except ImportError:  # without mmpretrain, or without what it imports
    WindowedViT = register_absent(MODELS, 'WindowedViT', 'mmpretrain')
else:

    @MODELS.register_module()
    class WindowedViT(checkpoints.LoadsOfficialFiles, ViTSAM):
        """mmpretrain's ``ViTSAM``, with its arguments: attention in windows, and in all of the
        image in the blocks ``global_attn_indexes`` of ``arch``.

        Loads DeiT's files, those of its authors and mmpretrain's; the class token and its place in
        the position table are left out, positions relative to a window start at zero.

        ``arch`` may also be 'deit-tiny' or 'deit-small', with ViTDet's four global blocks.
        ``window_size=0`` makes all blocks global, ``out_channels=0`` returns the maps themselves.
        """

        arch_zoo = {
            **ViTSAM.arch_zoo,
            **{
                name: dict(
                    embed_dims=dims,
                    num_layers=12,
                    num_heads=dims // 64,
                    feedforward_channels=4 * dims,
                    global_attn_indexes=[2, 5, 8, 11],
                )
                for name, dims in (('deit-tiny', 192), ('deit-small', 384))
            },
        }
        official_names = checkpoints.DEIT

        def no_weight_decay(self):
            """What weight decay leaves alone beside norms and biases."""
            return {'pos_embed'}

        def convert_tensors(self, tensors):
            """(1, 1 + rows * columns, D), the class token's row first, -> (1, h, w, D)."""
            table = tensors.get('pos_embed')
            if table is not None and table.ndim == 3:
                side = math.isqrt(table.shape[1])
                if side * side != table.shape[1] - 1:
                    raise checkpoints.CheckpointMismatchError(
                        f'a position table of {table.shape[1]} rows is no square and a class token'
                    )
                table = table[:, 1:].unflatten(1, (side, side))
                tensors['pos_embed'] = resize_grid(table, self.patch_resolution)
            return tensors
