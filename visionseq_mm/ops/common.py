"""What the ops share: input checks, the accumulator's type, and walking a sequence in chunks."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.forward_ad import unpack_dual


def check_inputs(op: str, **inputs: tuple[Tensor | None, str]) -> dict[str, int]:
    """Checks tensors against shapes given in letters, as in `u=(u, 'B L D')`.

    A letter stands for the same size everywhere. Absent (None) tensors pass.

    Returns:
        The size of each letter.

    Raises:
        ValueError: a shape, a type other than floating point, or a second device.
        NotImplementedError: a tensor of forward-mode differentiation, which would be lost.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, (x, letters) in inputs.items():
        if x is None:
            continue
        dims = letters.split()
        want = f'({", ".join(dims)})'
        if x.dim() != len(dims):
            raise ValueError(f'{op}: {name} must be {want}, got shape {tuple(x.shape)}')
        for dim, size in zip(dims, x.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                expected = tuple(sizes.get(d, d) for d in dims)
                raise ValueError(
                    f'{op}: {name} must be {want} = {expected}, got shape {tuple(x.shape)}'
                )
            if size == 0:
                raise ValueError(f'{op}: {name} is empty along {dim}, shape {tuple(x.shape)}')
        if not x.is_floating_point():
            raise ValueError(f'{op}: {name} must have a floating point dtype, got {x.dtype}')
        if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f'{op}: {name} carries a tangent, and the op has no forward-mode derivative; '
                'use backward-mode (torch.autograd.grad, torch.func.vjp)'
            )
        device = device or x.device
        if x.device != device:
            raise ValueError(f'{op}: {name} is on {x.device}, the other inputs on {device}')
    return sizes


def check_dtypes(op: str, tensors: dict[str, Tensor | None], parameters: dict[str, Tensor | None]):
    """Checks that `tensors` share a dtype, and that `parameters` have it or the accumulator's.

    Raises:
        ValueError: another dtype.
    """
    (first, dtype), *_ = ((name, x.dtype) for name, x in tensors.items() if x is not None)
    wide = torch.promote_types(dtype, torch.float32)
    for name, x in (*tensors.items(), *parameters.items()):
        allowed = {dtype, wide} if name in parameters else {dtype}
        if x is not None and x.dtype not in allowed:
            raise ValueError(
                f'{op}: {name} has dtype {x.dtype}, and beside {first} of {dtype} it must have '
                f'{" or ".join(map(str, sorted(allowed, key=str)))}'
            )


def finite_or_nan(op: str, name: str, x: Tensor, wait: bool) -> Tensor:
    """A small tensor that is known to be finite, or whose NaN and infinities are all NaN.

    The latter where its values cannot be seen, while torch compiles, exports or captures, or
    shall not, since that waits for a GPU.

    Args:
        wait: Whether to look at a tensor on a GPU.

    Raises:
        ValueError: a value that is not finite, with its place.
    """
    seen = not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))
    if x.device.type != 'cpu':
        seen = seen and wait and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    finite = x.isfinite()
    if not seen:
        return torch.where(finite, x, torch.nan)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f'{op}: {name} must be finite, got {x[place].item()} at {place} and '
            f'{(~finite).sum().item()} such values in all'
        )
    return x


def widest_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The accumulator's type: float32, or the widest input's where that is wider."""
    dtype = torch.float32
    for x in tensors:
        if x is not None:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


class Chunks:
    """A sequence along dim 1, in chunks of `size` tokens, in the order of a scan.

    With `reverse` the scan starts at the end of the sequence. A chunk is a slice of its steps.
    """

    def __init__(self, length: int, size: int, reverse: bool, dtype: torch.dtype):
        self.length = length
        self.size = size
        self.reverse = reverse
        self.dtype = dtype

    def __len__(self) -> int:
        return -(-self.length // self.size)

    def __getitem__(self, index: int) -> slice:
        start = index * self.size
        if not 0 <= start < self.length:
            raise IndexError(index)
        return slice(start, min(start + self.size, self.length))

    def read(self, x: Tensor, chunk: slice) -> Tensor:
        """(B, T, …) of `x`, in the order of the scan and the accumulator's type."""
        x = x[:, self._tokens(chunk)].to(self.dtype)
        return x.flip(1) if self.reverse else x

    def write(self, x: Tensor, chunk: slice, value: Tensor) -> None:
        """Puts `value` (B, T, …) where `read` would take it from."""
        x[:, self._tokens(chunk)] = value.flip(1) if self.reverse else value

    def _tokens(self, chunk: slice) -> slice:
        if not self.reverse:
            return chunk
        return slice(self.length - chunk.stop, self.length - chunk.start)
