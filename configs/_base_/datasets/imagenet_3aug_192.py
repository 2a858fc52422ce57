# As imagenet_3aug_224.py, at 192 pixels.
_base_ = './imagenet_3aug_224.py'
size = 192
sizes = dict(
    RandomResizedCrop=dict(scale=size),
    ResizeEdge=dict(scale=size),
    CenterCrop=dict(crop_size=size),
)
train_pipeline = [dict(step, **sizes.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **sizes.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
