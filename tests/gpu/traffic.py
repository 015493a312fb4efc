"""The bytes that Triton kernels ask memory for, counted in Triton's interpreter at every load and store.

A program's load counts once, however many of its threads make it. What is masked does not count, and what is asked for
again counts again, as there is no cache.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Traffic(NamedTuple):
    read: int  # of the arguments
    written: int  # of the results
    read_again: int  # of the results


class Counter:
    """Counts from its creation on. ``TRITON_INTERPRET=1`` must be set before Triton is imported."""

    def __init__(self) -> None:
        import triton.runtime.interpreter as interpreter

        self._read: dict[int, int] = {}  # by the first byte of a storage
        self._written: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no storage takes the place of another
        self._starts, self._ends = np.zeros(0, np.int64), np.zeros(0, np.int64)
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        begin, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

        def counted_begin(executor, arguments, options):
            arguments, options = begin(executor, arguments, options)
            self._know([x for x in tree_leaves(arguments) if hasattr(x, "untyped_storage")])
            return arguments, options

        def counted_load(builder, pointers, mask, *rest, **options):
            self._add(self._read, pointers, mask)
            return load(builder, pointers, mask, *rest, **options)

        def counted_store(builder, pointers, value, mask, *rest, **options):
            self._add(self._written, pointers, mask)
            return store(builder, pointers, value, mask, *rest, **options)

        executor._init_args_hst = counted_begin
        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store

    def of(self, call: Callable[[], object], arguments: Iterable[Tensor]) -> Traffic:
        """The bytes that one call of an operator asks for."""
        self._read.clear(), self._written.clear(), self._alive.clear()
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        given = {x.untyped_storage().data_ptr() for x in arguments}
        made = {x.untyped_storage().data_ptr() for x in results}
        return Traffic(*(
            sum(counts.get(start, 0) for start in starts)
            for counts, starts in ((self._read, given), (self._written, made), (self._read, made))
        ))  # fmt: skip

    def _know(self, tensors: list[Tensor]) -> None:
        self._alive += tensors
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        self._starts = np.array(sorted(storages), np.int64)
        self._ends = np.array([start + storages[start] for start in sorted(storages)], np.int64)

    def _add(self, counts: dict[int, int], pointers, mask) -> None:
        at = np.asarray(pointers.data).astype(np.int64)
        at = at[np.broadcast_to(np.asarray(mask.data).astype(bool), at.shape)].ravel()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        found = np.searchsorted(self._starts, at, "right") - 1
        for i, accesses in enumerate(np.bincount(found, minlength=len(self._starts))):
            if accesses:
                start = int(self._starts[i])
                counts[start] = counts.get(start, 0) + int(accesses) * size
