# Boxes and masks; the longer side is 1024, and the model pads the rest.
_base_ = './coco_detection_1024x1024.py'
masks = dict(LoadAnnotations=dict(with_mask=True))
train_pipeline = [dict(step, **masks.get(step['type'], {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **masks.get(step['type'], {})) for step in _base_.test_pipeline]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
