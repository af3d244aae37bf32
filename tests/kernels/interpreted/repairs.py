"""What Triton 3.6's interpreter gets wrong or does not look at, put right: see :func:`install`."""

import contextlib
import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before a kernel is imported

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

WRITTEN = {"next_ptr", "logits_ptr", "buffer_ptr", "grad_h_ptr", "sums_ptr", "x_copy_ptr", "h_copy_ptr"}
_TF32_DROPPED = 13  # of fp32's 23 bits


class OutOfBounds(Exception):
    """A pointer outside every tensor of the launch, or a store into one that a kernel may only read."""


class _Memory:
    """Ranges of addresses of the launch under way: [first byte, end)."""

    readable: list[tuple[int, int]] = []
    writable: list[tuple[int, int]] = []

    @classmethod
    def check(cls, pointers: np.ndarray, mask: np.ndarray, itemsize: int, ranges: list[tuple[int, int]]) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.uint64)
        inside = np.zeros(used.shape, dtype=bool)
        for start, end in ranges:
            inside |= (used >= start) & (used + itemsize <= end)
        if not inside.all():
            raise OutOfBounds(f"{(~inside).sum()} of {inside.size} pointers lie outside every tensor")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> the 16 bits of bf16, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The 16 bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 rounded to the ten bits that a tensor core reads of it."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(1 << (_TF32_DROPPED - 1))
    return ((bits + half) & np.uint32(0xFFFFFFFF << _TF32_DROPPED & 0xFFFFFFFF)).view(np.float32)


def _operand(handle: TensorHandle, precision) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return from_bf16(handle.data)
    if handle.dtype.scalar == tl.float32 and "IEEE" not in str(precision).upper():
        return to_tf32(handle.data)
    return handle.data.astype(np.float32)


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_operand(a, input_precision), _operand(b, input_precision), dtype=np.float32)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == target:
        return src
    values = from_bf16(src.data) if source == tl.bfloat16 else src.data
    if target == tl.bfloat16:
        return TensorHandle(to_bf16(values.astype(np.float32)), target)
    return TensorHandle(values.astype(interpreter._get_np_dtype(dst_type)), target)


def _bounded(load, store):
    def checked_load(self, ptrs, mask, *rest):
        size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        _Memory.check(ptrs.data, mask.data, size, _Memory.readable)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        _Memory.check(ptrs.data, mask.data, size, _Memory.writable)
        return store(self, ptrs, value, mask, *rest)

    return checked_load, checked_store


def _ranges(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]


@contextlib.contextmanager
def _launch(names: list[str], arguments: dict):
    tensors = {name: arguments[name] for name in names if isinstance(arguments.get(name), torch.Tensor)}
    written = [tensor for name, tensor in tensors.items() if name in WRITTEN]
    for tensor in written:
        tensor.fill_(float("nan"))  # what a kernel leaves out stays one
    _Memory.readable, _Memory.writable = _ranges(list(tensors.values())), _ranges(written)
    try:
        yield
    finally:
        _Memory.readable = _Memory.writable = []


def install() -> None:
    """bf16 products and casts, tf32 rounding, exact bounds of every pointer, outputs that start as NaN.

    As it comes, the interpreter multiplies bf16 operands as integers, cuts fp32 off to bf16 in the place of rounding
    it, computes tf32 products exactly and reads and writes wherever a pointer points.
    """
    builder = InterpreterBuilder
    builder.create_dot = _create_dot
    builder.cast_impl = _cast
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", _cast)
    builder.create_int_cast = lambda self, src, dst_type, is_signed: _cast(self, src, dst_type)
    builder.create_fp_to_fp = lambda self, src, dst_type, rounding_mode: _cast(self, src, dst_type)
    builder.create_masked_load, builder.create_masked_store = _bounded(
        builder.create_masked_load, builder.create_masked_store
    )
    call = interpreter.GridExecutor.__call__

    def run(self, *args, **kwargs):
        with _launch(self.arg_names, dict(zip(self.arg_names, args, strict=False)) | kwargs):
            return call(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = run
