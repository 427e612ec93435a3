"""How a kernel is put to the proof: error against float64, memory around the tensors, and every address it touches.

Triton's interpreter, on which kernels run where there is no GPU, checks neither bounds nor races: a load one element
too far reads what happens to lie there. :func:`guarded` puts NaN there, on any device; :func:`watched_memory` looks at
every address, under the interpreter; and :func:`as_on_a_gpu` takes away what the interpreter gives for nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from minillm.kernels.runtime import interpreted

# ||error|| / ||expected|| that a kernel may have, by the dtype of its tensors.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_SENTINEL = 77  # for dtypes without NaN
_BFLOAT16_NAN = 0x7FC0


class BadAccessError(AssertionError):
    """A kernel touched memory that it was not given, or two of its programs are in each other's way."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; the numerator alone where all of ``expected`` is zero.

    NaN and infinity must stand in the same places: otherwise the error is infinite.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes must be equal, got {tuple(actual.shape)} and {tuple(expected.shape)}")
    one, other = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = other.isfinite()
    if not torch.equal(
        torch.where(finite, 0.0, other).nan_to_num(1e30), torch.where(finite, 0.0, one).nan_to_num(1e30)
    ):
        return float("inf")
    one, other = one[finite], other[finite]
    if not one.isfinite().all():
        return float("inf")
    error, size = float((one - other).norm()), float(other.norm())
    return error / size if size else error


def guarded(tensor: Tensor, *, gap: int = 3, margin: int = 64) -> Tensor:
    """The same numbers in the middle of a larger buffer of NaN (integers: of 77; booleans: of True).

    Between two rows stand ``gap`` guards (0: rows follow each other), before the first and after the last ``margin``
    ones: what is loaded from outside by mistake spoils the result. The last dimension keeps stride 1, the
    others are strided. Require gradients of the result, not of the tensor given.
    """
    shape = tensor.shape if tensor.dim() else torch.Size([1])
    width = shape[-1] + gap
    n_rows = max(1, tensor.numel() // max(1, shape[-1]))
    fill = float("nan") if tensor.is_floating_point() else True if tensor.dtype is torch.bool else _SENTINEL
    buffer = torch.full((2 * margin + n_rows * width,), fill, dtype=tensor.dtype, device=tensor.device)
    strides, step = [1], width
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= size
    view = buffer.as_strided(tensor.shape, strides[len(strides) - tensor.dim() :], margin)
    view.copy_(tensor)
    return view


def assert_untouched(tensor: Tensor) -> None:
    """Raise BadAccessError if something beside the elements of a :func:`guarded` tensor was written."""
    buffer = tensor.detach().new_empty(0).set_(tensor.untyped_storage())
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    guards = buffer[outside]
    intact = (
        guards.isnan() if guards.is_floating_point() else guards == (1 if guards.dtype is torch.bool else _SENTINEL)
    )
    if not intact.all():
        raise BadAccessError(
            f"{int((~intact).sum())} numbers beside a tensor of shape {tuple(tensor.shape)} were overwritten"
        )


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Interpreted kernels without two kindnesses that no GPU shows, and as silent; compiled ones are left as they are.

    Where a load without ``other=`` is masked, the interpreter gives zeros; here NaN, as the value is undefined. And it
    multiplies float32 in full precision whatever ``input_precision`` says; here "tf32", which is the default, rounds
    the factors to 10 bits after the point. NumPy's warnings of overflow and NaN are off.
    """
    import triton.runtime.interpreter as interpreter

    if not interpreted():
        yield
        return
    builder = interpreter.interpreter_builder
    load, dot = builder.create_masked_load, builder.create_dot

    def load_or_nan(ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        loaded = load(ptrs, mask, other, *rest)
        if other is None and loaded.dtype.scalar.is_floating():
            bits = _BFLOAT16_NAN if loaded.dtype.scalar.is_bf16() else np.nan  # bfloat16 is held as its bits
            loaded.data = np.where(mask.data, loaded.data, np.array(bits, loaded.data.dtype))
        return loaded

    def rounded(factor: Any) -> Any:
        if factor.data.dtype != np.float32:
            return factor
        bits = np.ascontiguousarray(factor.data).view(np.uint32) + np.uint32(0x1000)
        return type(factor)((bits & np.uint32(0xFFFFE000)).view(np.float32), factor.dtype)

    def rounded_dot(a: Any, b: Any, sums: Any, precision: Any, *rest: Any) -> Any:
        if precision.name == "TF32":
            a, b = rounded(a), rounded(b)
        return dot(a, b, sums, precision, *rest)

    with (
        mock.patch.object(builder, "create_masked_load", load_or_nan),
        mock.patch.object(builder, "create_dot", rounded_dot),
        np.errstate(all="ignore"),
    ):
        yield


@contextmanager
def watched_memory(*, races: bool = True) -> Iterator[None]:
    """Look at every address that interpreted kernels touch in this block: :class:`BadAccessError` for a wrong one.

    Wrong is: an address that is no element of any tensor the kernel was given (checked before it is touched). And with
    ``races`` an address that one program writes and another reads or writes too, which on a GPU run at the same
    time; atomic operations are let through. Where kernels are compiled it watches nothing.

    Kernels run :func:`as_on_a_gpu` in here.
    """
    import triton.runtime.interpreter as interpreter

    if not interpreted():
        yield
        return
    with as_on_a_gpu(), _watched(interpreter, races):
        yield


@contextmanager
def _watched(interpreter: Any, races: bool) -> Iterator[None]:
    builder, run, watch = interpreter.interpreter_builder, interpreter.InterpretedFunction.run, _Watch()
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.start([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        try:
            result = run(self, *args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, BadAccessError):
                cause = cause.__cause__
            raise (cause or error) from None
        if races:
            watch.find_races(self.__name__)
        return result

    def watched_load(ptrs: Any, mask: Any, *rest: Any) -> Any:
        watch.touch(ptrs.data, mask.data, builder.grid_idx, "load")
        return load(ptrs, mask, *rest)

    def watched_store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.touch(ptrs.data, mask.data, builder.grid_idx, "store")
        return store(ptrs, value, mask, *rest)

    def watched_atomic(kind: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.touch(ptr.data, mask.data, builder.grid_idx, "atomic")
        return atomic(kind, ptr, value, mask, *rest)

    with (
        mock.patch.object(interpreter.InterpretedFunction, "run", watched_run),
        mock.patch.object(builder, "create_masked_load", watched_load),
        mock.patch.object(builder, "create_masked_store", watched_store),
        mock.patch.object(builder, "create_atomic_rmw", watched_atomic),
    ):
        yield


class _Watch:
    """The addresses of one launch: those it may touch, and those it did."""

    def start(self, tensors: Sequence[Tensor]) -> None:
        addresses = [np.zeros(0, np.uint64)]
        for tensor in tensors:
            offsets = torch.zeros((), dtype=torch.int64)
            for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
                offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
            addresses.append((tensor.data_ptr() + tensor.element_size() * offsets.flatten()).numpy().astype(np.uint64))
        self.allowed = np.unique(np.concatenate(addresses))
        self.touched: list[tuple[str, tuple[int, int, int], Any]] = []

    def touch(self, addresses: Any, mask: Any, program: tuple[int, int, int], kind: str) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask)
        live = np.unique(addresses[mask.astype(bool)].astype(np.uint64))
        outside = ~np.isin(live, self.allowed, assume_unique=True)
        if outside.any():
            raise BadAccessError(
                f"program {program}: a {kind} touches {int(outside.sum())} addresses outside of every tensor"
            )
        self.touched.append((kind, program, live))

    def find_races(self, kernel: str) -> None:
        """A stored address that any other program touched."""
        stores: dict[int, tuple[int, int, int]] = {}
        for kind, program, addresses in self.touched:
            if kind != "store":
                continue
            for address in addresses.tolist():
                if stores.setdefault(address, program) != program:
                    raise BadAccessError(
                        f"{kernel}: programs {stores[address]} and {program} store to the same address"
                    )
        written = np.array(sorted(stores), np.uint64)
        for kind, program, addresses in self.touched:
            if kind != "store":
                for address in np.intersect1d(addresses, written, assume_unique=True).tolist():
                    if stores[address] != program:
                        raise BadAccessError(f"{kernel}: program {program} reads what program {stores[address]} stores")
