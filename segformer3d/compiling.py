"""Numba as the compiled loops of this project use it: lazily, cached, without Python's lock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numba
from llvmlite import binding as llvm
from llvmlite import ir
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_R = TypeVar("_R")


def compiled(function: Callable[_P, _R], *, reassociate: bool = False) -> Callable[_P, _R]:
    """Compile a function when it is first called; it then runs without Python's lock.

    Args:
        function: A loop over arrays.
        reassociate: Whether sums may be taken in another order, which lets them vectorise. Not
            for what depends on the order of its roundings.
    """
    options = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"contract", "reassoc"} if reassociate else {"contract"},
    }
    try:
        result: Callable[_P, _R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache folder may be written
        result = numba.njit(**options)(function)
    return result


@intrinsic
def bits_as_float(_: Any, bits: Any) -> Any:
    """Read the bits of an int32 as a float32."""

    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return numba.float32(numba.int32), emit


@intrinsic
def float_as_bits(_: Any, value: Any) -> Any:
    """Read the bits of a float32 as an int32."""

    def emit(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return numba.int32(numba.float32), emit


def _prefer_whole_vectors() -> None:
    """Let LLVM use 512 bits where there are; whoever has set Numba's features keeps them.

    It halves vectors since they once cost clock. Beside matrix products of 512 bits that only
    loses: these loops take 1.4 times as long.
    """
    features = llvm.get_host_cpu_features()
    if numba.config.CPU_FEATURES is None and features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


_prefer_whole_vectors()
