# ViL's classifier: cross-entropy with the mixed labels, without smoothing.
_base_ = './classifier.py'
model = dict(
    backbone=dict(type='visionseq_mm.ViL', arch='tiny', out_type='cls'),
    head=dict(loss=dict(_delete_=True, type='CrossEntropyLoss', use_soft=True)),
)
