_base_ = './vil2-tiny_16xb64-ft-20e_in1k.py'
load_from = 'work_dirs/vil2-tiny_16xb128-400e_in1k-192px/epoch_400.pth'
