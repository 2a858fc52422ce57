"""The selective scan in plain PyTorch, a chunk of steps at a time.

    δ_t = softplus(dt_t + dt_bias)            ā_t = exp(δ_t A)
    h_t = ā_t ⊙ h_{t−1} + δ_t u_t ⊗ B_t       y_t = h_t C_t + D ⊙ u_t
    out_t = y_t ⊙ SiLU(z_t)

B batch, L tokens, D channels, N states, T steps of a chunk. Exponentials and products are taken
for a whole chunk; what is left for each step is a single multiply-add in place. Chunk tensors are
(T, B, N, D): a step is contiguous, and the channels are the inner loop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionseq_mm.ops.common import Chunks, widest_dtype

CHUNK = 64
GRAIN = 2**15 - 1  # elements up to which torch runs an operation on one thread


class _Scan:
    """The inputs of one call and the chunk buffers, shared by the two directions."""

    def __init__(self, u, dt, A, B, C, D, z, dt_bias, reverse):
        inputs = u, dt, A, B, C, D, z, dt_bias
        self.chunks = Chunks(u.shape[1], CHUNK, reverse, widest_dtype(*inputs))
        self.inputs = u, dt, B, C, z
        dtype = self.chunks.dtype
        self.A = A.t().to(dtype).contiguous()
        self.D = None if D is None else D.to(dtype)
        self.dt_bias = None if dt_bias is None else dt_bias.to(dtype)
        steps = min(CHUNK, u.shape[1])
        step = (u.shape[0], *self.A.shape)
        self.a = u.new_empty((steps, *step), dtype=dtype)
        self.h = u.new_empty((steps + 1, *step), dtype=dtype)
        self.samples = max(1, GRAIN // self.A.numel())

    def read(self, x, chunk):
        return None if x is None else self.chunks.read(x, chunk).transpose(0, 1)

    def write(self, x, chunk, value):
        self.chunks.write(x, chunk, value.transpose(0, 1))

    def load(self, chunk):
        """(T, B, ·) of u, dt with its bias, B, C and z."""
        u, dt, B, C, z = (self.read(x, chunk) for x in self.inputs)
        if self.dt_bias is not None:
            dt = dt + self.dt_bias
        return u, dt, B, C, z

    def run(self, delta, delta_u, B):
        """States of a chunk from the one in h[0]: ā (T, B, N, D) and h (T + 1, B, N, D)."""
        a, h = self.a[: len(delta)], self.h[: len(delta) + 1]
        torch.mul(delta.unsqueeze(2), self.A, out=a).exp_()
        torch.mul(delta_u.unsqueeze(2), B.unsqueeze(3), out=h[1:])
        _recur(h.split(self.samples, 1), a.split(self.samples, 1))
        return a, h


def _recur(x: Sequence[Tensor], a: Sequence[Tensor], backwards: bool = False) -> None:
    """x_t += a_t ⊙ x_{t−1} in place, for some samples at a time.

    Starting threads would cost more than a step, so a step stays on one.
    """
    for x_, a_ in zip(x, a, strict=True):
        steps, factors = x_.unbind(0), a_.unbind(0)
        if backwards:
            steps, factors = steps[::-1], factors[::-1]
        for before, factor, step in zip(steps[:-1], factors, steps[1:], strict=True):
            step.addcmul_(factor, before)


def _contract(x: Tensor, h: Tensor) -> Tensor:
    """Sum over the states: (T, B, N) and (T, B, N, D) give (T, B, D)."""
    return torch.matmul(x.unsqueeze(2), h).squeeze(2)


def forward(u, dt, A, B, C, D, z, dt_bias, reverse):
    """The output, and the state before each chunk (chunks, B, N, D)."""
    scan = _Scan(u, dt, A, B, C, D, z, dt_bias, reverse)
    out = u.new_empty(u.shape)
    states = scan.h.new_empty((len(scan.chunks), *scan.h.shape[1:]))
    scan.h[0] = 0
    for i, chunk in enumerate(scan.chunks):
        u_, dt_, B_, C_, z_ = scan.load(chunk)
        states[i] = scan.h[0]
        delta = F.softplus(dt_)
        _, h = scan.run(delta, delta * u_, B_)
        y = _contract(C_, h[1:])
        if D is not None:
            y.addcmul_(u_, scan.D)
        if z is not None:
            y.mul_(F.silu(z_))
        scan.write(out, chunk, y)
        scan.h[0] = h[-1]
    return out, states


def backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse):
    """Gradients of the inputs that are there, in their order.

    Chunks are walked from the last to the first; in each, h is computed again from the state
    before it. With λ = dL/dh and p_t = λ_t ⊙ ā_t ⊙ h_{t−1}, the gradient of log ā_t = δ_t A:

        λ_t = C_t ⊗ dy_t + ā_{t+1} ⊙ λ_{t+1}
        dδ_t = Σ_n p_t A + u_t Σ_n λ_t B_t       du_t = δ_t Σ_n λ_t B_t + D dy_t
        dA = Σ_t p_t δ_t     dB_t = Σ_d λ_t δ_t u_t     dC_t = Σ_d h_t dy_t
    """
    scan = _Scan(u, dt, A, B, C, D, z, dt_bias, reverse)
    du, ddt, dB, dC = (x.new_empty(x.shape) for x in (u, dt, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    dA = torch.zeros_like(scan.A)
    dD = None if D is None else torch.zeros_like(scan.D)
    dbias = None if dt_bias is None else torch.zeros_like(scan.dt_bias)
    lam_buffer = torch.empty_like(scan.a)
    carry = torch.zeros_like(scan.h[0])  # ā_{t+1} ⊙ λ_{t+1} at the end of the chunk
    for i, chunk in reversed(list(enumerate(scan.chunks))):
        u_, dt_, B_, C_, z_ = scan.load(chunk)
        dy = scan.read(dout, chunk)
        delta = F.softplus(dt_)
        delta_u = delta * u_
        scan.h[0] = states[i]
        a, h = scan.run(delta, delta_u, B_)
        if z is not None:
            y = _contract(C_, h[1:])
            if D is not None:
                y.addcmul_(u_, scan.D)
            scan.write(dz, chunk, torch.ops.aten.silu_backward(dy * y, z_))
            dy = dy * F.silu(z_)
        scan.write(dC, chunk, torch.matmul(h[1:], dy.unsqueeze(3)).squeeze(3))

        lam = torch.mul(C_.unsqueeze(3), dy.unsqueeze(2), out=lam_buffer[: len(u_)])
        lam[-1] += carry
        _recur(lam.split(scan.samples, 1), a[1:].split(scan.samples, 1), backwards=True)
        carry = a[0] * lam[0]

        scan.write(dB, chunk, torch.matmul(lam, delta_u.unsqueeze(3)).squeeze(3))
        lam_B = _contract(B_, lam)
        p = a.mul_(h[:-1]).mul_(lam)
        ddelta = torch.mul(p, scan.A, out=h[1:]).sum(2).addcmul_(u_, lam_B)
        dA += p.mul_(delta.unsqueeze(2)).sum((0, 1))
        ddt_ = torch.ops.aten.softplus_backward(ddelta, dt_, 1, 20)
        du_ = delta * lam_B
        if D is not None:
            du_.addcmul_(dy, scan.D)
            dD += (dy * u_).sum((0, 1))
        if dt_bias is not None:
            dbias += ddt_.sum((0, 1))
        scan.write(du, chunk, du_)
        scan.write(ddt, chunk, ddt_)
    grads = [du, ddt, dA.t().to(A.dtype).contiguous(), dB, dC]
    if D is not None:
        grads.append(dD.to(D.dtype))
    if z is not None:
        grads.append(dz)
    if dt_bias is not None:
        grads.append(dbias.to(dt_bias.dtype))
    return grads
