"""Time and memory beside peers. From the repository's root: ``python -m benchmarks.ops --help``.

ops        the kernels, and one whole mixer of Vim and of ViL, beside the GPU packages of others
           and the official operations
backbones  Vim, ViL and SecViT beside DeiT with plain and with fused attention, Swin and ViTDet
reach      the few rows that have a target, for the device that is there
"""
