# Long-sequence fine-tuning, the released script ft-vim-s.sh, as of Vim-Ti.
_base_ = './vim-tiny-stride8_8xb128-ft-30e_in1k.py'
model = dict(backbone=dict(arch='small'), head=dict(in_channels=384))
load_from = 'visionseq://vim-small/cls'
