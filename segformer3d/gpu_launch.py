"""How kernels are launched, or only compiled: many at the same time, before the first is needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import triton

if TYPE_CHECKING:
    from collections.abc import Callable

THREADS_MAX = 16

# What was launched, of those that are compiled only; None while kernels run.
_only_compiled: ContextVar[list[Any] | None] = ContextVar("only_compiled", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel of Triton's, which it compiles if it has to (half a second or more).

    Args:
        kernel: A function of `triton.jit`.
        grid: Programs along each of up to three axes.
        *args: What the kernel takes.
        **options: Its constants, and warps and stages.
    """
    only_compiled = _only_compiled.get()
    kernel.run(*args, grid=grid, warmup=only_compiled is not None, **options)
    if only_compiled is not None:
        only_compiled.append(kernel)


def compile_together(run: Callable[[], None]) -> None:
    """Compile what a function launches, at the same time in as many threads as CPUs; run none.

    What cannot be compiled is tried again, and raises, when it is launched after that.
    """
    kernels: list[Any] = []

    def compile_all() -> None:
        _only_compiled.set(kernels)
        threads = min(os.cpu_count() or 1, THREADS_MAX)
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            run()

    try:
        # Triton's mode would outlive an interrupt in this thread's own context.
        copy_context().run(compile_all)
    finally:
        for kernel in kernels:
            _forget_failures(kernel)


def _forget_failures(kernel: Any) -> None:
    """Or each launch would raise the same error again, which holds on to what it saw."""
    for made, *_ in getattr(kernel, "device_caches", {}).values():
        # Triton has put compiled kernels in the places of the others.
        for key in [key for key, value in made.items() if hasattr(value, "future")]:
            del made[key]
