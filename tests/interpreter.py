"""Makes Triton's interpreter right where it is not, bfloat16 and NumPy 2.4 under triton 3.6, and quicker.

Kernels run on CPU tensors when ``TRITON_INTERPRET=1`` is set before triton is imported. The interpreter keeps bfloat16
as 16 bits without meaning: products and sums of them are garbage, conversion truncates, and 3.6 has no constants.
``install`` replaces those parts. And it looks through the whole language for what it replaces at each call of a device
function, which takes longer than the function: ``_patch_once_a_launch``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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


def _by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's dtype of Triton's, which is asked for at each operation, out of a table that is made once."""
    known: dict[str, Any] = {}

    def found(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(dtype)
        return known[name]

    return found


def _patch_once_a_launch(interpreter: Any, language: Any) -> Callable[[Any], Any]:
    """``_patch_lang`` of the interpreter, for which a device function of a launch finds nothing left to do.

    What a launch has replaced holds for all that it calls. A module of the language that only a called function sees,
    as Triton's own do, is replaced then, and put back with the others.
    """
    patch: Callable[[Any], Any] = interpreter._patch_lang
    modules = (language, language.core)
    replaced: set[Any] = set()

    class Scope(interpreter._LangPatchScope):  # type: ignore[misc]  # triton has no types
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    scope = Scope()

    @functools.cache
    def seen_by(fn: Any) -> frozenset[Any]:
        return frozenset(value for value in fn.__globals__.values() if inspect.ismodule(value) and value in modules)

    def patched(fn: Any) -> Any:
        if not replaced or not seen_by(fn) <= replaced:
            scope._changes += patch(fn)._changes
            replaced.update(seen_by(fn))
        return scope

    return patched


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
    interpreter._patch_lang = _patch_once_a_launch(interpreter, tl)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder.create_dot, builder.binary_op = create_dot, binary_op
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
