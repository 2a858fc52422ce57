"""Time and memory beside peers. From the repository's root: ``python -m benchmarks.ops --help``.

ops        the kernels, and one whole Vim mixer, beside the CUDA packages of others
backbones  Vim beside DeiT with plain and with fused attention
reach      the few rows that have a target, for the device that is there
"""
