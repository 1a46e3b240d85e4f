"""Repairs of Triton's interpreter (TRITON_INTERPRET=1, triton 3.6.0, 3.7.1 and 3.9.0), for tests.

The interpreter keeps bfloat16 as unsigned 16-bit integers and hands these to numpy: products, sums, comparisons and
conversions of bfloat16 come out wrong without a word. `install` makes it convert to float32, compute, and round to
nearest even, as the hardware does. Two repairs are for speed: it patches the whole language anew at every call of a
nested function, and checks every integer operation for overflow.

This replaces private parts of Triton: test_triton_interpreter.py says whether it still fits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import triton
import triton.language as tl
import triton_interpreter_speed
from numpy.typing import NDArray
from triton.runtime import interpreter

_installed = False


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32."""
    return np.asarray(bits, dtype=np.uint16).astype(np.uint32).__lshift__(16).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[np.uint16]:
    """float32 (or another type, converted to it first) rounded to bfloat16 bits, to nearest even."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(values.shape)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def install() -> None:
    """Repair the interpreter. Calling it again changes nothing.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET.
    """
    global _installed
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    if _installed:
        return
    _installed = True
    _repair_casts()
    _repair_arithmetic()
    _repair_dot()
    _repair_reductions()
    _repair_bounds()
    _repair_masks()
    _patch_once_per_launch()
    triton_interpreter_speed.remember()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _wide(handle: Any) -> Any:
    """A bfloat16 handle as float32; others as they are."""
    return interpreter.TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _repair_casts() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        source = _wide(source)
        if to.scalar == tl.bfloat16:
            return handle(narrow(source.data), tl.bfloat16)
        return source if source.dtype.scalar == to.scalar else cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        if _is_bf16(source) or to.scalar == tl.bfloat16:
            return cast_impl(self, source, to)
        return convert(self, source, to, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_arithmetic() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    binary, unary, ternary, fma = builder.binary_op, builder.unary_op, builder.ternary_op, builder.create_fma
    # Bits are meant here, or moved unchanged.
    as_bits = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift, np.where)

    def result(data: Any) -> Any:
        return handle(data, tl.int1) if data.dtype == np.bool_ else handle(narrow(data), tl.bfloat16)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if op not in as_bits and (_is_bf16(left) or _is_bf16(right)):
            return result(op(_wide(left).data, _wide(right).data))
        return binary(self, left, right, op)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        return result(op(_wide(value).data)) if _is_bf16(value) else unary(self, value, op)

    def ternary_op(self: Any, first: Any, second: Any, third: Any, op: Any) -> Any:
        if op not in as_bits and _is_bf16(third):
            return result(op(*(_wide(value).data for value in (first, second, third))))
        return ternary(self, first, second, third, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bf16(z):
            return result(_wide(x).data * _wide(y).data + _wide(z).data)
        if z.data.dtype == np.float32:  # fused: the product is exact in float64, the sum nearly always
            return handle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), tl.float32)
        return fma(self, x, y, z)

    def create_rsqrt(self: Any, value: Any) -> Any:
        return self.unary_op(value, lambda data: 1 / np.sqrt(data))

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_rsqrt = create_fma, create_rsqrt


def _repair_dot() -> None:
    """bfloat16 products; and float16 products in float32 (numpy's own are many times slower than the cast)."""
    builder = interpreter.InterpreterBuilder

    def operand(value: Any) -> NDArray[Any]:
        if _is_bf16(value):
            return widen(value.data)
        scalar = value.dtype.scalar
        if scalar.primitive_bitwidth == 8 and scalar.is_floating():
            return interpreter._convert_float(value.data, scalar, tl.float16, None).view(np.float16).astype(np.float32)
        return value.data.astype(np.float32) if value.data.dtype == np.float16 else value.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(operand(a), operand(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def _repair_reductions() -> None:
    """Reductions and scans of bfloat16 are refused: kernels reduce in float32."""
    for kind in (interpreter.ReduceOps, interpreter.ScanOps):
        apply = kind.apply_impl

        def checked(self: Any, values: Any, apply: Any = apply) -> Any:
            first = values[0] if isinstance(values, (tuple, list)) else values
            if first.dtype.scalar == tl.bfloat16:
                raise TypeError("a reduction of bfloat16 is not repaired in the interpreter: reduce in float32")
            return apply(self, values)

        kind.apply_impl = checked


def _repair_bounds() -> None:
    """A loop's bound is an array of one number, which numpy 2.4 no longer makes an int of (triton 3.6 asks it to)."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_tensor


def _repair_masks() -> None:
    """A comparison of scalars, spread over a block, carries the type of what was compared: masks are made boolean again
    (triton 3.9 takes no others)."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return mask if mask.data.dtype == np.bool_ else handle(mask.data.astype(np.bool_), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        return load(self, pointers, boolean(mask), *others)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        return store(self, pointers, value, boolean(mask), *others)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def _patch_once_per_launch() -> None:
    """Patch the language for each module once per launch, not at every call of a nested function."""
    launch, done = interpreter.GridExecutor.__call__, set[int]()

    def call_nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in done:
            done.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def call_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        done.add(id(self.fn.__globals__))
        with np.errstate(all="ignore"):  # a GPU says nothing about infinities
            return launch(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_nested
    interpreter.GridExecutor.__call__ = call_kernel
