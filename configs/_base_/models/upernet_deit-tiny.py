# UperNet on DeiT-Ti with the adapter and the head that Vim-Ti gets.
_base_ = './upernet.py'
dims = 192
model = dict(
    backbone=dict(
        type='visionseq_mm.WindowedViT',
        arch='deit-tiny',
        out_channels=0,
        out_indices=[2, 5, 8, 11],
        use_rel_pos=False,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth',
        ),
    ),
    neck=dict(
        type='visionseq_mm.MultiScaleAdapter', in_channels=[dims] * 4, norm_cfg=_base_.norm_cfg
    ),
    decode_head=dict(in_channels=[dims] * 4, channels=dims),
    auxiliary_head=dict(in_channels=dims),
)
