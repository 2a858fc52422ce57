"""The selective scan in plain PyTorch, a chunk of steps at a time.

    δ_t = softplus(dt_t + dt_bias)            ā_t = exp(δ_t A)
    h_t = ā_t ⊙ h_{t−1} + δ_t u_t ⊗ B_t       y_t = h_t C_t + D ⊙ u_t
    out = mean of y over the directions ⊙ SiLU(z)

S directions, B batch, L tokens, D channels, N states, T steps of a chunk. Exponentials and
products are taken for a whole chunk; what is left for each step is a single multiply-add in
place. Chunk tensors are (T, B, N, D): a step is contiguous, and the channels are the inner loop.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionseq_mm.ops.common import Chunks, widest_dtype

CHUNK = 64
GRAIN = 2**15 - 1  # elements up to which torch runs an operation on one thread


def new_states(u: Tensor, A: Tensor) -> Tensor:
    """Empty states before each chunk, (S, chunks, B, N, D)."""
    S, B, L, D = u.shape
    chunks = -(-L // CHUNK)
    return u.new_empty((S, chunks, B, A.shape[2], D), dtype=widest_dtype(u, A))


def forward(u, dt, A, B, C, D, z, dt_bias, reverse):
    """The output (B, L, D), and the states before each chunk."""
    states = new_states(u, A)
    y = u.new_zeros(u.shape[1:], dtype=states.dtype)
    for s, direction in enumerate(_directions(u, dt, A, B, C, D, dt_bias, reverse)):
        direction.forward(y, states[s])
    return _gated(y / len(reverse), z).to(u.dtype), states


def backward(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse):
    """Gradients of the inputs that are there, in their order."""
    du, ddt, dA, dB, dC, dD, dbias = (
        None if x is None else x.new_empty(x.shape) for x in (u, dt, A, B, C, D, dt_bias)
    )
    dz = None if z is None else z.new_empty(z.shape)
    grads = du, ddt, dA, dB, dC, dD, dbias
    differentiate(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse, grads, dz)
    return [x for x in (du, ddt, dA, dB, dC, dD, dz, dbias) if x is not None]


def differentiate(dout, u, dt, A, B, C, D, z, dt_bias, states, reverse, grads, dz):
    """Writes the gradients of u, dt, A, B, C, D, dt_bias and z; returns the output once more."""
    dtype, count = states.dtype, len(reverse)
    dy = _gated(dout.to(dtype) / count, z)
    y = torch.zeros_like(dy)
    for s, direction in enumerate(_directions(u, dt, A, B, C, D, dt_bias, reverse)):
        direction.backward(dy, y, states[s], [None if x is None else x[s] for x in grads])
    y /= count
    if z is not None:
        dz.copy_(torch.ops.aten.silu_backward(dout.to(dtype) * y, z.to(dtype)))
    return _gated(y, z).to(u.dtype)


def _gated(y, z):
    return y if z is None else y * F.silu(z.to(y.dtype))


def _directions(u, dt, A, B, C, D, dt_bias, reverse):
    for s, backwards in enumerate(reverse):
        D_, dt_bias_ = (None if x is None else x[s] for x in (D, dt_bias))
        yield _Scan(u[s], dt[s], A[s], B[s], C[s], D_, dt_bias_, backwards)


class _Scan:
    """One direction: u, dt (B, L, D), B, C (B, L, N), A (D, N), D, dt_bias (D)."""

    def __init__(self, u, dt, A, B, C, D, dt_bias, reverse):
        self.chunks = Chunks(u.shape[1], CHUNK, reverse, widest_dtype(u, A))
        self.inputs = u, dt, B, C
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
        return self.chunks.read(x, chunk).transpose(0, 1)

    def write(self, x, chunk, value):
        self.chunks.write(x, chunk, value.transpose(0, 1))

    def load(self, chunk):
        """(T, B, ·) of u, dt with its bias, B and C."""
        u, dt, B, C = (self.read(x, chunk) for x in self.inputs)
        if self.dt_bias is not None:
            dt = dt + self.dt_bias
        return u, dt, B, C

    def run(self, delta, delta_u, B):
        """States of a chunk from the one in h[0]: ā (T, B, N, D) and h (T + 1, B, N, D)."""
        a, h = self.a[: len(delta)], self.h[: len(delta) + 1]
        torch.mul(delta.unsqueeze(2), self.A, out=a).exp_()
        torch.mul(delta_u.unsqueeze(2), B.unsqueeze(3), out=h[1:])
        _recur(h.split(self.samples, 1), a.split(self.samples, 1))
        return a, h

    def add_output(self, y, chunk, u, C, h):
        """Adds that of a chunk to y (B, L, D)."""
        out = _contract(C, h[1:])
        if self.D is not None:
            out.addcmul_(u, self.D)
        self.write(y, chunk, out.add_(self.read(y, chunk)))

    def forward(self, y, states):
        """Adds the output to y (B, L, D) and writes the states before each chunk."""
        self.h[0] = 0
        for i, chunk in enumerate(self.chunks):
            u, dt, B, C = self.load(chunk)
            states[i] = self.h[0]
            delta = F.softplus(dt)
            _, h = self.run(delta, delta * u, B)
            self.add_output(y, chunk, u, C, h)
            self.h[0] = h[-1]

    def backward(self, dy, y, states, grads):
        """Adds the output to y once more and writes the gradients that are not None.

        Chunks are walked from the last to the first; in each, h is computed again from the state
        before it. With λ = dL/dh and p_t = λ_t ⊙ ā_t ⊙ h_{t−1}, the gradient of log ā_t = δ_t A:

            λ_t = C_t ⊗ dy_t + ā_{t+1} ⊙ λ_{t+1}
            dδ_t = Σ_n p_t A + u_t Σ_n λ_t B_t       du_t = δ_t Σ_n λ_t B_t + D dy_t
            dA = Σ_t p_t δ_t     dB_t = Σ_d λ_t δ_t u_t     dC_t = Σ_d h_t dy_t
        """
        du, ddt, dA, dB, dC, dD, dbias = grads
        dA_sum = torch.zeros_like(self.A)
        dD_sum, dbias_sum = (
            None if x is None else torch.zeros_like(x) for x in (self.D, self.dt_bias)
        )
        lam_buffer = torch.empty_like(self.a)
        carry = torch.zeros_like(self.h[0])  # ā_{t+1} ⊙ λ_{t+1} at the end of the chunk
        for i, chunk in reversed(list(enumerate(self.chunks))):
            u_, dt_, B_, C_ = self.load(chunk)
            dy_ = self.read(dy, chunk)
            delta = F.softplus(dt_)
            delta_u = delta * u_
            self.h[0] = states[i]
            a, h = self.run(delta, delta_u, B_)
            self.add_output(y, chunk, u_, C_, h)
            self.write(dC, chunk, torch.matmul(h[1:], dy_.unsqueeze(3)).squeeze(3))

            lam = torch.mul(C_.unsqueeze(3), dy_.unsqueeze(2), out=lam_buffer[: len(u_)])
            lam[-1] += carry
            _recur(lam.split(self.samples, 1), a[1:].split(self.samples, 1), backwards=True)
            carry = a[0] * lam[0]

            self.write(dB, chunk, torch.matmul(lam, delta_u.unsqueeze(3)).squeeze(3))
            lam_B = _contract(B_, lam)
            p = a.mul_(h[:-1]).mul_(lam)
            ddelta = torch.mul(p, self.A, out=h[1:]).sum(2).addcmul_(u_, lam_B)
            dA_sum += p.mul_(delta.unsqueeze(2)).sum((0, 1))
            ddt_ = torch.ops.aten.softplus_backward(ddelta, dt_, 1, 20)
            du_ = delta * lam_B
            if self.D is not None:
                du_.addcmul_(dy_, self.D)
                dD_sum += (dy_ * u_).sum((0, 1))
            if self.dt_bias is not None:
                dbias_sum += ddt_.sum((0, 1))
            self.write(du, chunk, du_)
            self.write(ddt, chunk, ddt_)
        for total, grad in ((dA_sum.t(), dA), (dD_sum, dD), (dbias_sum, dbias)):
            if grad is not None:
                grad.copy_(total)


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
