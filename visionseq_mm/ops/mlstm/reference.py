"""The mLSTM cell in plain PyTorch: attention within chunks, a matrix state between them.

With F_t = Σ_{s≤t} logσ(f_s), a_j = i_j − F_j and g_i = max_{j≤i} a_j, the stabiliser is
m_i = F_i + g_i, and the weight of token j in row i needs no forget gate any more:

    D_ij − m_i = a_j − g_i ≤ 0
    C_ij = exp(a_j − g_i) q_i·k_j / √Dh        n_i = max(|Σ_j C_ij|, exp(−m_i))
    h_i = Σ_j C_ij v_j / (n_i + eps)

The sums F grow with the sequence while only their differences count, so F, a and g are float64;
they are a Dh-th of the work. Below, `num` is Σ_j C_ij [v_j, 1]: a column of ones beside v gives
the normaliser's sum. The part of the earlier chunks comes from the state

    state = Σ_j exp(a_j − g) k_jᵀ [v_j, 1],   g that of the last row so far.

B batch, S tokens, H heads, Dh channels of a head, T tokens of a chunk; batch and heads are one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionseq_mm.ops.common import Chunks, widest_dtype

CHUNK = 64


class _Cell:
    """The inputs of one call, chunk by chunk; gates and rows are in the order of the scan."""

    def __init__(self, q, k, v, i, f, reverse):
        self.B, S, self.H, self.Dh = q.shape
        self.q, self.k, self.v = q, k, v
        self.chunks = Chunks(S, CHUNK, reverse, widest_dtype(q, k, v, i, f))
        self.whole = slice(0, S)
        self.f = self.rows(f)
        # logσ(f), not torch's own, which starts its threads for a single gate too.
        log_f = self.f.clamp(max=0) - self.f.abs().neg().exp().log1p()
        F_ = log_f.cumsum(-1)
        self.a = self.rows(i) - F_
        self.g, self.source = self.a.cummax(-1)  # the token that sets a row's maximum
        self.bound = (-F_ - self.g).exp()  # exp(−m)
        self.t = torch.arange(min(CHUNK, S), device=q.device)

    def rows(self, x: Tensor) -> Tensor:
        """A number for each token and head (B, S, H), as float64 (B·H, S)."""
        x = self.chunks.read(x, self.whole).double()
        return x.transpose(1, 2).reshape(self.B * self.H, -1)

    def unrows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `rows`."""
        out = x.new_empty((self.B, x.shape[1], self.H), dtype=dtype)
        self.chunks.write(out, self.whole, x.view(self.B, self.H, -1).transpose(1, 2))
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

    def empty_state(self):
        """The state before the first chunk, or its gradient after the last."""
        return self.q.new_zeros((self.B * self.H, self.Dh, self.Dh + 1), dtype=self.chunks.dtype)

    def fill_from(self, x, diagonal, value):
        """`x` (B·H, T, T) with `value` on and above a diagonal.

        As `triu` and `tril`, which start torch's threads however small the matrix.
        """
        t = self.t[: x.shape[-1]]
        return x.masked_fill_(t >= t.unsqueeze(1) + diagonal, value)

    def within(self, chunk):
        """exp(a_j − g_i) for j ≤ i, else 0: (B·H, T, T)."""
        a, g = self.a[:, chunk], self.g[:, chunk]
        weight = (a.unsqueeze(1) - g.unsqueeze(2)).to(self.chunks.dtype)
        return self.fill_from(weight, 1, -torch.inf).exp_()

    def across(self, chunk):
        """What multiplies the state before a chunk in each row, each key in the state after it,
        and the state itself from before to after: (B·H, T, 1) twice and (B·H, 1, 1).
        """
        a, g = self.a[:, chunk, None], self.g[:, chunk, None]
        last = g[:, -1:]
        # The state before the first chunk is 0: any finite weight will do.
        before = self.g[:, max(chunk.start - 1, 0), None, None]
        return (x.exp().to(self.chunks.dtype) for x in (before - g, a - last, before - last))


def forward(q, k, v, i, f, reverse, eps):
    """h (B, S, H, Dh) and the sums Σ_j C_ij (B·H, S) in the order of the scan."""
    cell = _Cell(q, k, v, i, f, reverse)
    h = v.new_empty(v.shape)
    sums = torch.empty_like(cell.a, dtype=cell.chunks.dtype)
    state = cell.empty_state()
    for chunk in cell.chunks:
        q_, k_, v1 = cell.load(chunk)
        from_state, to_state, decay = cell.across(chunk)
        num = ((q_ @ k_.mT) * cell.within(chunk)) @ v1
        num.baddbmm_(q_ * from_state, state)
        state.mul_(decay).baddbmm_((k_ * to_state).mT, v1)
        sums[:, chunk] = num[..., -1]
        n = torch.maximum(sums[:, chunk].double().abs(), cell.bound[:, chunk])
        cell.write(h, chunk, num[..., :-1] / (n + eps).unsqueeze(2))
    return h, sums


def backward(dh, q, k, v, i, f, h, sums, reverse, eps):
    """Gradients of q, k, v, i and f.

    With r = 1 / (n + eps) and δ_i = dh_i·h_i, the gradient of `num` is that of linear attention:

        dnum_i = [r_i dh_i, −r_i δ_i sign(Σ_j C_ij)], the last 0 in rows where n = exp(−m)
        dP_ij = exp(a_j − g_i) dnum_i·[v_j, 1]
        dq_i = Σ_j dP_ij k_j / √Dh       dk_j = Σ_i dP_ij q_i / √Dh       dv_j = Σ_i C_ij dnum_i

    With E_ij = C_ij dP_ij, the gradient of D_ij, and that of the maximum, which cancels but for
    eps and goes to the token s(t) that set it:

        dm_t = −eps r_t δ_t
        di_t = Σ_i E_it + Σ_{s(i)=t} dm_i              (Σ_i E_it = k_t·dk_t)
        dF_t = Σ_j E_tj − Σ_i E_it + dm_t − Σ_{s(i)=t} dm_i

    The sums over E in dF leave out the diagonal, which is most of E when the gates forget and
    would bury the rest in its rounding errors.
    """
    cell = _Cell(q, k, v, i, f, reverse)
    dtype = cell.chunks.dtype
    sign, size = sums.sign(), sums.double().abs()
    r = 1 / (torch.maximum(size, cell.bound) + eps)
    delta = cell.rows((dh.to(dtype) * h.to(dtype)).sum(-1))
    dsum = (-r * delta).to(dtype).mul_(sign).masked_fill_(size <= cell.bound, 0)
    r_ = r.to(dtype)

    def read_dnum(chunk):
        dnum = cell.read(dh, chunk) * r_[:, chunk, None]
        return torch.cat([dnum, dsum[:, chunk, None]], -1)

    # With the state, from the first chunk to the last: dq of what came through it.
    dq = q.new_empty(q.shape, dtype=dtype)
    state = cell.empty_state()
    for chunk in cell.chunks:
        _, k_, v1 = cell.load(chunk)
        from_state, to_state, decay = cell.across(chunk)
        cell.write(dq, chunk, (read_dnum(chunk) @ state.mT) * from_state)
        state.mul_(decay).baddbmm_((k_ * to_state).mT, v1)

    # With the gradient of the state, from the last chunk to the first: everything else.
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    di, dF = torch.empty_like(cell.a), torch.empty_like(cell.a)
    dstate = cell.empty_state()
    for chunk in reversed(cell.chunks):
        q_, k_, v1 = cell.load(chunk)
        dnum = read_dnum(chunk)
        from_state, to_state, decay = cell.across(chunk)
        weight = cell.within(chunk)
        scores = q_ @ k_.mT
        dP = (dnum @ v1.mT).mul_(weight)
        dq_ = cell.read(dq, chunk)
        dk_ = (v1 @ dstate.mT) * to_state
        dv_ = (k_ @ dstate) * to_state

        E = cell.fill_from(scores * dP, 0, 0)
        dF[:, chunk] = (q_ * dq_).sum(-1) + E.sum(2) - (k_ * dk_).sum(-1) - E.sum(1)
        dq_ = torch.baddbmm(dq_, dP, k_)
        dk_.baddbmm_(dP.mT, q_)
        dv_.baddbmm_((scores * weight).mT, dnum)
        di[:, chunk] = (k_ * dk_).sum(-1)
        dstate.mul_(decay).baddbmm_((q_ * from_state).mT, dnum)
        cell.write(dq, chunk, dq_ * cell.Dh**-0.5)
        cell.write(dk, chunk, dk_)
        cell.write(dv, chunk, dv_[..., :-1])

    # A token sets the maximum for a run of rows: a difference of cumulative sums, no atomics.
    dm = -eps * r * delta
    tokens = torch.arange(dm.shape[1], device=dm.device).expand_as(dm).contiguous()
    ends = torch.searchsorted(cell.source, tokens, right=True)
    to_source = F.pad(dm.cumsum(-1), (1, 0)).gather(-1, F.pad(ends, (1, 0))).diff()
    di += to_source
    dF += dm - to_source
    df = dF.flip(-1).cumsum(-1).flip(-1) * (-cell.f).sigmoid()
    return [dq.to(q.dtype), dk, dv, cell.unrows(di, i.dtype), cell.unrows(df, f.dtype)]
