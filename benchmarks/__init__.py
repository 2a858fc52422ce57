"""Time and memory beside peers. From the repository's root: ``python -m benchmarks.ops --help``.

ops        the kernels, and one whole mixer of Vim and of ViL, beside the GPU packages of others
backbones  Vim and ViL beside DeiT with plain and with fused attention
reach      the few rows that have a target, for the device that is there
"""
