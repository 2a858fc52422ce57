import torch


def get_mlstm_kernel(name):
    assert name == 'chunkwise--triton_xl_chunk'
    return recurrent


def recurrent(q, k, v, i, f, *, eps=1e-6, autocast_kernel_dtype=torch.float32):
    """Heads first, token by token: the state, the normaliser's and the stabiliser."""
    assert autocast_kernel_dtype == q.dtype and i.shape == f.shape == q.shape[:3]
    assert all(x.is_contiguous() for x in (q, k, v))
    q = q / q.shape[-1] ** 0.5
    decay = torch.nn.functional.logsigmoid(f)
    C, n, m, hs = 0, 0, i[..., 0], []
    for t in range(q.shape[2]):
        m_new = i[..., t] if t == 0 else torch.maximum(decay[..., t] + m, i[..., t])
        keep = (decay[..., t] + m - m_new).exp()[..., None]
        key = k[:, :, t] * (i[..., t] - m_new).exp()[..., None]
        C = keep[..., None] * C + key[..., None] * v[:, :, t, None]
        n, m = keep * n + key, m_new
        size = (q[:, :, t] * n).sum(-1).abs()
        num = (q[:, :, t, None] @ C).squeeze(-2)
        hs.append(num / (torch.maximum(size, (-m).exp()) + eps)[..., None])
    return torch.stack(hs, 2)
