"""What several training processes do together, through torch.distributed; alone, it is free.

All ranks seed torch alike at each step, so `rows_of_this_rank` gives the same draws to the same
samples however many ranks share a batch: rank r holds the samples r, r + world, r + 2 world, ...
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


_alone = False


def world_size() -> int:
    """Number of training processes."""
    return distributed.get_world_size() if _is_on() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _is_on() else 0


@contextmanager
def joined_by_environment(device: str | None = None) -> Iterator[torch.device]:
    """Join the other processes that torchrun's variables name (RANK, WORLD_SIZE, MASTER_ADDR).

    Without these variables, or where the processes are joined already, nothing is joined.

    Args:
        device: As torch names it; by default the GPU of this process (LOCAL_RANK), if there is
            one.

    Yields:
        The device.
    """
    if device is None and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        device = f"cuda:{local}"
    chosen = torch.device(device or "cpu")
    ours = not _is_on() and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if ours:
            distributed.destroy_process_group()


@contextmanager
def joined_by_file(path: Path, rank: int, num_ranks: int, *, on_gpus: bool) -> Iterator[None]:
    """Join the other processes of this machine, which meet in a file.

    Nothing listens beyond what the backend itself does; a store of torch's behind an address would
    listen on every interface, to anybody.

    Args:
        path: The file, which nobody has used before.
        rank: Number of this process, from 0.
        num_ranks: How many there are.
        on_gpus: Whether their tensors travel between GPUs.
    """
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=path.absolute().as_uri(),
        rank=rank,
        world_size=num_ranks,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Do without the other ranks for a while: nothing here waits for them."""
    global _alone  # noqa: PLW0603  a state of the process, as torch.distributed's own
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def all_sum(x: Tensor) -> Tensor:
    """Sum `x` over all ranks; its gradient is summed likewise."""
    if world_size() == 1:
        return x
    total: Tensor = _AllSum.apply(x)  # type: ignore[no-untyped-call]
    return total


def all_max(x: Tensor) -> Tensor:
    """Give the elementwise largest `x` of all ranks, without a gradient."""
    largest = x.detach()
    if world_size() > 1:
        largest = largest.clone()
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest


def any_of(wishes: Sequence[bool], device: torch.device) -> list[bool]:
    """Give, wish by wish, whether any rank has it.

    Args:
        wishes: As many on each rank.
        device: Where the ranks' tensors travel.
    """
    if world_size() == 1:
        return list(wishes)
    return [bool(x) for x in all_max(torch.tensor(wishes, device=device).float()).tolist()]


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum the gradients over all ranks in one message.

    One that some ranks lack counts as zero there; one that all lack stays missing, so that the
    optimiser passes it over as it does alone.
    """
    if world_size() == 1:
        return
    pieces = [(torch.zeros_like(p) if p.grad is None else p.grad) for p in parameters]
    present = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    flat = torch.cat([*(piece.reshape(-1).float() for piece in pieces), present.float()])
    distributed.all_reduce(flat)
    sizes = [*(p.numel() for p in parameters), len(parameters)]
    *sums, counts = torch.split(flat, sizes)
    for parameter, total, count in zip(parameters, sums, counts.tolist(), strict=True):
        if count:
            parameter.grad = total.view_as(parameter).to(parameter)


def gather(item: Any) -> list[Any]:
    """Collect one picklable item of each rank, in their order, on every rank."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    distributed.all_gather_object(items, item)
    return items


def rows_of_this_rank(batch: int, *shape: int) -> Tensor:
    """Draw uniform numbers (batch, *shape) in [0, 1), the same per sample for any world size."""
    draws = torch.rand(batch * world_size(), *shape)
    return draws[rank() :: world_size()]


def _is_on() -> bool:
    return not _alone and distributed.is_available() and distributed.is_initialized()


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total
