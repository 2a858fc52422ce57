import torch.nn.functional as F
from selective_scan_cuda import scan


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert delta_softplus
    return scan(u, delta, A, B.unsqueeze(1), C.unsqueeze(1), D, delta_bias) * F.silu(z)
