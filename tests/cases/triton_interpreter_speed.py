"""The bookkeeping of Triton's interpreter, remembered instead of repeated, for tests.

Most of an interpreted kernel's time goes to the types of its values: a block's shape is validated, spelled out and
wrapped anew for every operation, and a constant is made twice. None of it depends on data, so it is kept by shape, type
and value. What kernels compute is untouched: the same numpy calls on the same arrays.

This replaces private parts of Triton, as triton_interpreter.py does: test_triton_interpreter.py says whether it fits.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def remember() -> None:
    """Keep what is known of types, shapes and constants. To be called once, after any other repair."""
    _numpy_types()
    _equal_types()
    _calls()
    _plain_values()
    _shapes()
    _constants()


def _numpy_types() -> None:
    numpy_type = interpreter._get_np_dtype

    def get(of: Any) -> Any:
        found = of.__dict__.get("_numpy_type")
        if found is None:
            found = of._numpy_type = numpy_type(of)
        return found

    interpreter._get_np_dtype = get


def _equal_types() -> None:
    """A type equals itself without a look at its name."""
    equal, dtype = core.dtype.__eq__, core.dtype

    def equals(self: Any, other: Any) -> Any:
        if self is other:
            return True
        return self.name == other.name if type(self) is type(other) is dtype else equal(self, other)

    core.dtype.__eq__ = equals


def _calls() -> None:
    """A builtin is called at once, not by way of what demands the argument that the interpreter always gives."""
    demanding = core.builtin(lambda: None).__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is demanding:
            member = member.__wrapped__

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, call)

    semantic = interpreter.interpreter_semantic
    interpreter._patch_attr = patch_attr


def _plain_values() -> None:
    """Whether a value is a constexpr, or holds some, is asked of numbers and tensors above all, which never do."""
    unwrap, constexpr = core._unwrap_if_constexpr, core.constexpr
    plain = frozenset({int, float, bool, str, NoneType, core.tensor, core.dtype, core.block_type})

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is constexpr else unwrap(value)

    core._unwrap_if_constexpr = unwrap_if_constexpr


def _shapes() -> None:
    """Every shape is one object, validated once, its constexprs made once; a type's name is spelled out when read."""
    kept: dict[tuple[int, ...], Any] = {}
    validated, tuples_equal = core.block_type.__init__, core.tuple.__eq__
    broadcast = TritonSemantic.broadcast_impl_value

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        if "_kept" not in getattr(shape, "__dict__", ()):
            key = tuple(map(core._unwrap_if_constexpr, core._unwrap_if_constexpr(shape)))
            if key not in kept:
                validated(self, element_ty, shape)
                constexprs = core.tuple([core.constexpr(size) for size in key])
                self.shape._kept = self.numel, constexprs, core.constexpr(self.numel)
                kept[key] = self.shape
            shape = kept[key]
        self.shape, self.numel = shape, shape._kept[0]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.shape._kept[1:] if type.is_block() else (scalar_shape, scalar_numel)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape is other.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    scalar_shape, scalar_numel = core.tuple([]), core.constexpr(1)
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    # Its setter ignores: the original __init__ sets the name.
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, value: None)
    core.tuple.__eq__ = lambda self, other: core.constexpr(True) if self is other else tuples_equal(self, other)
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _constants() -> None:
    """A number as a tensor: the array is kept, its handle is each caller's own."""
    constant, kept = TritonSemantic.scalar_constant, dict[tuple[type, Any, str], Any]()

    def scalar_constant(self: Any, value: Any, dtype: Any) -> Any:
        if dtype is None or type(value) not in (int, float, bool):
            return constant(self, value, dtype)
        key = type(value), value, dtype.name
        if key not in kept:
            kept[key] = constant(self, value, dtype).handle
        return self.tensor(interpreter.TensorHandle(kept[key].data, kept[key].dtype), dtype)

    TritonSemantic.scalar_constant = scalar_constant
