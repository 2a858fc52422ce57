"""The mLSTM cell in plain PyTorch: attention within chunks, a matrix state between them.

With F_t = Σ_{s≤t} logσ(f_s), a_j = i_j − F_j and g_i = max_{j≤i} a_j, the stabiliser is
m_i = F_i + g_i, and the weight of token j in row i needs no forget gate any more:

    D_ij − m_i = a_j − g_i ≤ 0
    C_ij = exp(a_j − g_i) q_i·k_j / √Dh        n_i = max(|Σ_j C_ij|, exp(−m_i))
    h_i = Σ_j C_ij v_j / (n_i + eps)

The sums F grow with the sequence while only their differences count, so F, a and g are float64;
they are a Dh-th of the work. Below, `num` is Σ_j C_ij [v_j, 1]: a column of ones beside v gives
the normaliser's sum. The part of the earlier chunks comes from the state

    C = Σ_j exp(a_j − g) k_jᵀ [v_j, 1],   g that of the last row so far.

B batch, S tokens, H heads, Dh channels of a head, T tokens of a chunk; batch and heads are one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import Chunks, widest_dtype

CHUNK = 64


class _Cell:
    """The inputs of one call, chunk by chunk; gates and rows are in the order of the scan."""

    def __init__(self, q, k, v, i, f, reverse):
        self.B, S, self.H, self.Dh = q.shape
        self.q, self.k, self.v = q, k, v
        self.chunks = Chunks(S, CHUNK, reverse, widest_dtype(q, k, v, i, f))
        self.f = self.rows(f)
        F_ = F.logsigmoid(self.f).cumsum(-1)
        self.a = self.rows(i) - F_
        self.g, self.source = self.a.cummax(-1)  # the token that sets a row's maximum
        self.bound = (-F_ - self.g).exp()  # exp(−m)
        T = min(CHUNK, S)
        self.future = torch.ones((T, T), dtype=torch.bool, device=q.device).triu(1)

    def rows(self, x: Tensor) -> Tensor:
        """A number for each token and head (B, S, H), as float64 (B·H, S)."""
        x = self.chunks.read(x, slice(None)).double()
        return x.transpose(1, 2).reshape(self.B * self.H, -1)

    def unrows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        out = x.new_empty((self.B, x.shape[1], self.H), dtype=dtype)
        self.chunks.write(out, slice(None), x.view(self.B, self.H, -1).transpose(1, 2))
        return out

    def read(self, x, chunk):
        """(B·H, T, Dh)."""
        return self.chunks.read(x, chunk).transpose(1, 2).flatten(0, 1).contiguous()

    def write(self, x, chunk, value):
        self.chunks.write(x, chunk, value.view(self.B, self.H, -1, self.Dh).transpose(1, 2))

    def load(self, chunk):
        """q / √Dh, k and [v, 1] of a chunk."""
        q, k, v = (self.read(x, chunk) for x in (self.q, self.k, self.v))
        return q.mul(self.Dh**-0.5), k, F.pad(v, (0, 1), value=1.0)

    def state(self):
        """C, or its gradient, where there is none yet."""
        return self.q.new_zeros((self.B * self.H, self.Dh, self.Dh + 1), dtype=self.chunks.dtype)

    def __iter__(self):
        return zip(self.chunks, self.steps(), strict=True)

    def steps(self):
        """The places of each chunk in rows."""
        S = self.a.shape[1]
        return (slice(start, min(start + CHUNK, S)) for start in range(0, S, CHUNK))

    def within(self, step):
        """exp(a_j − g_i) for j ≤ i, else 0: (B·H, T, T)."""
        a, g = self.a[:, step], self.g[:, step]
        weight = (a.unsqueeze(1) - g.unsqueeze(2)).to(self.chunks.dtype)
        T = a.shape[1]
        return weight.masked_fill_(self.future[:T, :T], -torch.inf).exp_()

    def across(self, step):
        """What multiplies the state before a chunk in each row, each key in the state after it,
        and the state itself from before to after: (B·H, T, 1) twice and (B·H, 1, 1).
        """
        a, g = self.a[:, step, None], self.g[:, step, None]
        last = g[:, -1:]
        # The state before the first chunk is 0: any finite weight will do.
        before = self.g[:, max(step.start - 1, 0), None, None]
        return (x.exp().to(self.chunks.dtype) for x in (before - g, a - last, before - last))


def forward(q, k, v, i, f, reverse, eps):
    """h (B, S, H, Dh) and the sums Σ_j C_ij (B·H, S) in the order of the scan."""
    cell = _Cell(q, k, v, i, f, reverse)
    h = v.new_empty(v.shape)
    sums = torch.empty_like(cell.a, dtype=cell.chunks.dtype)
    C = cell.state()
    for chunk, step in cell:
        q_, k_, v1 = cell.load(chunk)
        from_state, to_state, decay = cell.across(step)
        num = ((q_ @ k_.mT) * cell.within(step)) @ v1
        num.baddbmm_(q_ * from_state, C)
        C.mul_(decay).baddbmm_((k_ * to_state).mT, v1)
        sums[:, step] = num[..., -1]
        n = torch.maximum(sums[:, step].double().abs(), cell.bound[:, step])
        cell.write(h, chunk, num[..., :-1] / (n + eps).unsqueeze(2))
    return h, sums


def backward(dh, q, k, v, i, f, h, sums, reverse, eps):
    """Gradients of q, k, v, i and f.

    With r = 1 / (n + eps) and δ_i = dh_i·h_i, the gradient of `num` is that of linear attention:

        dnum_i = [r_i dh_i, −r_i δ_i sign(Σ_j C_ij)], the last 0 in rows where n = exp(−m)
        dP_ij = exp(a_j − g_i) dnum_i·[v_j, 1]
        dq_i = Σ_j dP_ij k_j / √Dh       dk_j = Σ_i dP_ij q_i / √Dh       dv_j = Σ_i C_ij dnum_i

    A factor exp(a_j) comes with every k_j, so da_j = k_j·dk_j. The maximum g_i cancels but for
    eps: dg_i = −eps r_i δ_i, which goes to the token that set it. F is left in a_j = i_j − F_j
    and in the rows where n = exp(−F_i − g_i).
    """
    cell = _Cell(q, k, v, i, f, reverse)
    dtype = cell.chunks.dtype
    sign, size = sums.sign(), sums.double().abs()
    bounded = size <= cell.bound
    r = 1 / (torch.maximum(size, cell.bound) + eps)
    delta = cell.rows((dh.to(dtype) * h.to(dtype)).sum(-1))
    dsum = (-r * delta).to(dtype).mul_(sign).masked_fill_(bounded, 0)
    r_ = r.to(dtype)

    def dnum_of(chunk, step):
        dnum = cell.read(dh, chunk) * r_[:, step, None]
        return torch.cat([dnum, dsum[:, step, None]], -1)

    # With the state, from the first chunk to the last: dq of what came through it.
    dq = q.new_empty(q.shape, dtype=dtype)
    C = cell.state()
    for chunk, step in cell:
        _, k_, v1 = cell.load(chunk)
        from_state, to_state, decay = cell.across(step)
        cell.write(dq, chunk, (dnum_of(chunk, step) @ C.mT) * from_state)
        C.mul_(decay).baddbmm_((k_ * to_state).mT, v1)

    # With the gradient of the state, from the last chunk to the first: everything else.
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    da = torch.empty_like(cell.a)
    dC = cell.state()
    for chunk, step in reversed(list(cell)):
        q_, k_, v1 = cell.load(chunk)
        dnum = dnum_of(chunk, step)
        from_state, to_state, decay = cell.across(step)
        weight = cell.within(step)
        dP = (dnum @ v1.mT) * weight
        dq_ = torch.baddbmm(cell.read(dq, chunk), dP, k_)
        dk_ = torch.baddbmm((v1 @ dC.mT) * to_state, dP.mT, q_)
        dv_ = ((k_ @ dC) * to_state).baddbmm_(((q_ @ k_.mT) * weight).mT, dnum)
        dC.mul_(decay).baddbmm_((q_ * from_state).mT, dnum)
        cell.write(dq, chunk, dq_.mul_(cell.Dh**-0.5))
        cell.write(dk, chunk, dk_)
        cell.write(dv, chunk, dv_[..., :-1])
        da[:, step] = (k_ * dk_).sum(-1)

    # dg to the tokens that set the maxima. Such a token serves a run of rows: a difference of
    # cumulative sums, and no atomic addition.
    dg = F.pad((-eps * r * delta).cumsum(-1), (1, 0))
    tokens = torch.arange(da.shape[1], device=da.device).expand_as(da).contiguous()
    served = dg.gather(-1, torch.searchsorted(cell.source, tokens, right=True))
    da += served.diff(dim=-1, prepend=torch.zeros_like(served[:, :1]))
    # n r = 1 − eps r also where exp(−m) is infinite.
    dF = torch.where(bounded, delta * (1 - eps * r), 0) - da
    dlog = dF.flip(-1).cumsum(-1).flip(-1)
    return [
        dq.to(q.dtype),
        dk,
        dv,
        cell.unrows(da, i.dtype),
        cell.unrows(dlog * (-cell.f).sigmoid(), f.dtype),
    ]
