"""Makes Triton's interpreter right where it is not: bfloat16, and NumPy 2.4 under triton 3.6.

Kernels run on CPU tensors when ``TRITON_INTERPRET=1`` is set before triton is imported. The interpreter keeps bfloat16
as 16 bits without meaning: products and sums of them are garbage, conversion truncates, and 3.6 has no constants.
``install`` replaces those parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _float32(handle: Any, bfloat16: Any) -> Any:
    """The numbers of a handle, those of bfloat16 as float32."""
    if handle.dtype.scalar == bfloat16 and handle.data.dtype == np.uint16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _bits(values: Any) -> Any:
    """Bits of bfloat16, rounded to nearest, ties to even."""
    wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((wide + ((wide >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter of this process, once."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "is_right", False):
        return
    builder.is_right = True
    handle: Any = interpreter.TensorHandle
    bfloat16 = tl.bfloat16
    patch, dot, binary, cast, convert = (
        interpreter._patch_lang_tensor,
        builder.create_dot,
        builder.binary_op,
        builder.cast_impl,
        builder.create_fp_to_fp,
    )

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        # NumPy 2.4 makes no int of an array with one element, which triton 3.6 asks for in range().
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        if bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            product = np.matmul(_float32(a, bfloat16), _float32(b, bfloat16), dtype=np.float32)
            return handle(product + d.data, d.dtype.scalar)
        return dot(self, a, b, d, precision, imprecise)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if a.dtype.scalar != bfloat16:
            return binary(self, a, b, op)
        out = op(_float32(a, bfloat16), _float32(b, bfloat16))
        return handle(out, tl.int1) if out.dtype == np.bool_ else handle(_bits(out), bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        here, there = source.dtype.scalar, target.scalar
        if here == bfloat16 and there != bfloat16:
            return handle(_float32(source, bfloat16).astype(interpreter._get_np_dtype(target)), there)
        if there == bfloat16 and here != bfloat16:
            return handle(_bits(source.data.astype(np.float32)), there)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    if not hasattr(builder, "get_bf16"):  # triton 3.6 has no constants of bfloat16
        builder.get_bf16 = lambda self, value: handle(_bits(np.array([value])), bfloat16)
    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.binary_op = create_dot, binary_op
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
