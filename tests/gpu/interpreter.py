"""Triton's interpreter, corrected where it is silently wrong or lets faults pass (Triton 3.8.0).

* bfloat16 is held as raw bits: casts round to nearest even, arithmetic is done in float32 and rounded.
* ``tl.dot`` with ``input_precision="tf32"`` drops the low 13 bits of its operands, as the tensor core does.
* A masked load without ``other`` returns NaN, or a large integer, where it is masked.
* A load or store outside every tensor of the launch raises ``IndexError``.
* The programs of a launch run in a shuffled order.

``correct()`` is called once, after ``TRITON_INTERPRET=1`` is set and before a kernel is defined.
"""

import random

import numpy as np


def correct(seed: int = 0) -> None:
    import triton.runtime.interpreter as interpreter

    _patch_language_once(interpreter)
    _round_bfloat16(interpreter)
    _truncate_tf32(interpreter)
    _check_bounds(interpreter)
    _shuffle_programs(interpreter, random.Random(seed))


def _patch_language_once(interpreter) -> None:
    """A call of one device function by another patches the language again, which is slow and leaks; do it outermost."""
    import triton.language as tl

    original, open_scopes = interpreter._patch_lang, []

    def seeing_both_modules():
        pass

    class Scope:
        def __init__(self, outermost=None):
            self.outermost = outermost

        def restore(self):
            if self.outermost is not None:
                open_scopes.clear()
                self.outermost.restore()

    def patch(function):
        if open_scopes:
            return Scope()
        open_scopes.append(True)
        both = type(seeing_both_modules)(seeing_both_modules.__code__, {"tl": tl, "core": tl.core})
        return Scope(original(both))

    interpreter._patch_lang = patch


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, to nearest even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def _round_bfloat16(interpreter) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original_cast, original_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def is_bfloat16(x):
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def cast(self, source, to):
        of, to_scalar = source.dtype.scalar, to.scalar
        if of == tl.bfloat16 and to_scalar != tl.bfloat16:
            return handle(widened(source.data).astype(interpreter._get_np_dtype(to)), to_scalar)
        if to_scalar == tl.bfloat16 and of != tl.bfloat16:
            return handle(rounded(source.data.astype(np.float32)), to_scalar)
        return original_cast(self, source, to)

    casts = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc")
    builder.cast_impl = cast
    for name in casts:
        setattr(builder, f"create_{name}", lambda self, source, to: self.cast_impl(source, to))

    def fp_to_fp(self, source, to, rounding):
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return self.cast_impl(source, to)
        return original_fp_to_fp(self, source, to, rounding)

    builder.create_fp_to_fp = fp_to_fp

    def in_float32(original):
        def compute(self, *operands):
            if not any(map(is_bfloat16, operands)):
                return original(self, *operands)
            wide = (handle(widened(x.data), tl.float32) if is_bfloat16(x) else x for x in operands)
            result = original(self, *wide)
            return handle(rounded(result.data), tl.bfloat16) if result.dtype.scalar == tl.float32 else result

        return compute

    kinds = ("f", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "erf", "max", "min", "clamp", "precise")
    for name in dir(builder):
        is_cast = name in ("create_fp_to_fp", *(f"create_{cast}" for cast in casts))
        if name.startswith(tuple(f"create_{kind}" for kind in kinds)) and not is_cast:
            setattr(builder, name, in_float32(getattr(builder, name)))


def _truncate_tf32(interpreter) -> None:
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def dot(self, a, b, accumulator, precision, max_num_imprecise_acc):
        def operand(x):
            if x.dtype.scalar == tl.bfloat16:
                return handle(widened(x.data), tl.float32)
            if x.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
                bits = np.ascontiguousarray(x.data, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
                return handle(bits.view(np.float32), tl.float32)
            return x

        return original(self, operand(a), operand(b), accumulator, precision, max_num_imprecise_acc)

    builder.create_dot = dot


def _check_bounds(interpreter) -> None:
    import triton.language as tl

    builder, handle, executor = (
        interpreter.InterpreterBuilder,
        interpreter.TensorHandle,
        interpreter.GridExecutor,
    )
    allowed: list[tuple[np.uint64, np.uint64]] = []  # the storages of the launch, first byte and one past the last
    start, load, store, rmw = (
        executor._init_args_hst,
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_atomic_rmw,
    )

    def tensors(x):
        if hasattr(x, "untyped_storage"):
            yield x
        elif isinstance(x, (tuple, list)):
            for y in x:
                yield from tensors(y)

    def begin(self, arguments, options):
        arguments, options = start(self, arguments, options)
        allowed.clear()
        for tensor in tensors((*arguments, *options.values())):
            first = tensor.untyped_storage().data_ptr()
            allowed.append((np.uint64(first), np.uint64(first + tensor.untyped_storage().nbytes())))
        return arguments, options

    def check(pointers, mask, what):
        at = np.asarray(pointers.data)
        at = at[np.broadcast_to(np.asarray(mask.data), at.shape)] if mask is not None else at.ravel()
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = np.zeros(at.shape, bool)
        for first, end in allowed:
            inside |= (at >= first) & (at + size <= end)
        if not inside.all():
            raise IndexError(f"{what} outside every tensor of the launch: {np.sum(~inside)} of {at.size} entries")

    def checked_load(self, pointers, mask, other, *rest, **options):
        check(pointers, mask, "load")
        if other is None:
            kind = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(kind)
            if dtype.kind == "f":
                hidden = np.array(np.nan, dtype)
            else:
                hidden = np.array(
                    0x7FC0 if kind == tl.bfloat16 else np.iinfo(dtype).max // 2 if dtype.kind in "iu" else 1
                )
            other = handle(np.full(np.asarray(pointers.data).shape, hidden, dtype), kind)
        return load(self, pointers, mask, other, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **options)

    def checked_rmw(self, operation, pointers, value, mask, *rest):
        check(pointers, mask, "atomic")
        return rmw(self, operation, pointers, value, mask, *rest)

    executor._init_args_hst = begin
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw = checked_rmw


def _shuffle_programs(interpreter, generator: random.Random) -> None:
    builder = interpreter.InterpreterBuilder
    original, order = builder.set_grid_idx, []

    def shuffled(self, x, y, z):
        _, rows, columns = self.grid_dim
        programs = int(np.prod(self.grid_dim))
        i = (x * rows + y) * columns + z
        if i == 0:
            order[:] = generator.sample(range(programs), programs)
        i = order[i]
        original(self, i // columns // rows, i // columns % rows, i % columns)

    builder.set_grid_idx = shuffled
