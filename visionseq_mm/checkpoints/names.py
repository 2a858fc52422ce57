"""Official parameter names -> ours, as data.

Each table is a sequence of (pattern, replacement). A name goes through the
whole table from top to bottom; replacement None drops the tensor. A name that
no pattern matches is ours already, so that a table may be applied twice. A
replacement is what :func:`re.sub` takes, a string or a function. The official
classifier becomes ``head.fc``, mmpretrain's name for it.
"""

#: hustvl/Vim. The flat position table and the two class tokens of 'double' are
#: taken apart by the backbone, which knows its grid.
VIM = (
    (r'^layers\.', 'blocks.'),
    (r'^norm_f\.', 'final_norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'^rope\.', None),  # of unreleased models; recomputable
)

_VIL_HUB = (
    (r'^pos_embed\.embed$', 'pos_embed'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'causal_mask', None),  # a buffer of old files
)

#: Names of the training code, which the downloadable files have.
_VIL_RAW = (
    (r'\.xlstm\.', '.layer.'),
    (r'^xlstm\.', ''),
    (r'\.xlstm_norm\.', '.norm.'),
    (r'^post_blocks_norm\.', 'final_norm.'),
    (r'^head\.0\.', 'pool_norm.'),
    (r'^head\.1\.', 'head.fc.'),
)


def _pair_member(match):
    """Single block i of the training code -> its place in pair i // 2."""
    pair, second = divmod(int(match[1]), 2)
    return f'blocks.{pair}.{"rowwise_from_bot_right" if second else "rowwise_from_top_left"}.'


#: NX-AI/vision-lstm by version: the names of the published classes, which call the norms before
#: and after the pooling 'legacy_norm' and 'norm' in version 1, the other way round in version 2.
VIL = {
    1: (
        *_VIL_RAW,
        (r'\.layer\.conv1d\.conv\.', '.layer.conv.'),
        (r'^legacy_norm\.', 'final_norm.'),
        (r'^norm\.', 'pool_norm.'),
        *_VIL_HUB,
    ),
    2: (
        *_VIL_RAW,
        (r'^blocks\.(\d+)\.(?=norm|layer)', _pair_member),
        (r'\.layer\.conv1d\.', '.layer.conv.'),
        (r'^norm\.', 'final_norm.'),
        (r'^legacy_norm\.', 'pool_norm.'),
        *_VIL_HUB,
    ),
}

#: facebookresearch/deit's and mmpretrain's files, for the ViT with windows, which has neither
#: class token nor final norm.
DEIT = (
    (r'^blocks\.', 'layers.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    (r'(layers\.\d+)\.norm([12])\.', r'\1.ln\2.'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'^(cls_token$|norm\.|ln1\.)', None),
)

#: Swin as mmpretrain, mmdet and mmseg name it, for SEC-Swin, which has no table of position biases
#: and no masks: clusters have neither a geometry nor a border.
SWIN = (
    (r'\.attn\.w_msa\.', '.attn.'),
    (r'\.relative_position_(bias_table|index)$|\.attn_mask$', None),
    (r'^norm3?\.', 'final_norm.'),  # without a number in old files
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)

#: qhfan/SecViT.
SECVIT = (
    (r'^layers\.', 'stages.'),
    (r'\.norm([12])\.norm\.', r'.norm\1.'),
    (r'^norm\.', 'final_norm.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
    (r'RoPE\.angle$', None),  # a constant of the constructor
)
