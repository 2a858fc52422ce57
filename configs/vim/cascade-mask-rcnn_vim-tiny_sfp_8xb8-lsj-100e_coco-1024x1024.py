# The recipe of Vim's detection code, cascade_mask_rcnn_vimdet_t_100ep_adj1.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_sfp.py',
    '../_base_/datasets/coco_instance_lsj-1024x1024.py',
    '../_base_/schedules/adamw_100e.py',
    '../_base_/default_runtime_det.py',
]
model = dict(
    backbone=dict(
        type='visionseq_mm.Vim',
        arch='tiny',
        img_size=1024,
        out_indices=-1,
        drop_path_rate=0.1,
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint='visionseq://vim-tiny'),
    ),
    neck=dict(in_channels=192),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1),
    paramwise_cfg=dict(layer_decay_rate=0.837),
)
train_dataloader = dict(batch_size=8, num_workers=8)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
