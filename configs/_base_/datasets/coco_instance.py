# COCO 2017 boxes and masks at mmdet's scale.
_base_ = './coco_detection.py'
masks = dict(LoadAnnotations=dict(with_mask=True))
train_pipeline = [dict(step, **masks.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **masks.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
