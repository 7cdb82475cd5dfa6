"""How kernels are launched, or only compiled: many at the same time, before the first is needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import triton

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS_MAX = 16

_only_compiles: ContextVar[bool] = ContextVar("only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel of Triton's, which it compiles if it has to (half a second or more).

    Args:
        kernel: A function of `triton.jit`.
        grid: Programs along each of up to three axes.
        *args: What the kernel takes.
        **options: Its constants, and warps and stages.
    """
    kernel.run(*args, grid=grid, warmup=_only_compiles.get(), **options)


@contextmanager
def compiling_together() -> Iterator[None]:
    """Within it kernels are compiled and not run; it ends when all are, in as many threads as CPUs.

    What cannot be compiled raises when it is launched after that.
    """
    threads = min(os.cpu_count() or 1, THREADS_MAX)
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _only_compiles.set(True)
        try:
            yield
        finally:
            _only_compiles.reset(token)
