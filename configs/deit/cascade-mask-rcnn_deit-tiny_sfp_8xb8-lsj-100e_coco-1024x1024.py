# The baseline of Vim's detection code, cascade_mask_rcnn_vitdet_t: Vim's recipe for a ViT that
# attends in windows of 14 tokens and in all of the image in every third block.
_base_ = '../vim/cascade-mask-rcnn_vim-tiny_sfp_8xb8-lsj-100e_coco-1024x1024.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='visionseq_mm.WindowedViT',
        arch='deit-tiny',
        img_size=1024,
        out_channels=0,
        use_rel_pos=False,
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth',
        ),
    )
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
