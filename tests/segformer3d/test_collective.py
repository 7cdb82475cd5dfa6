"""What ranks do together, in two real processes; and that it costs nothing alone."""

import pytest
import torch

from segformer3d import collective
from segformer3d.layers import BatchNorm, ChannelDropout, DropPath
from tests.segformer3d.training_parts import spawn_ranks


def _part(x, rank):
    return x[rank::2].clone()


def in_each_rank(rank, folder):
    """Everything at once: starting two processes takes seconds."""
    assert (collective.rank(), collective.world_size()) == (rank, 2)
    x = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    total = collective.all_sum(x)
    assert total.tolist() == [3, 4]
    (total * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad.tolist() == [2, 20]
    assert collective.all_max(torch.tensor([rank, -rank])).tolist() == [1, 0]
    assert collective.any_of([rank == 1, False], torch.device("cpu")) == [True, False]
    assert collective.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    _gradients(rank)
    with collective.alone():
        assert (collective.rank(), collective.world_size()) == (0, 1)
        assert collective.all_sum(torch.tensor(5.0)) == 5
    _layers(rank, folder)


def _gradients(rank):
    shared, one_sided, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    shared.grad = torch.full((2,), 1.0 + rank)
    if rank == 1:
        one_sided.grad = torch.full((2,), 7.0)
    collective.sum_gradients([shared, one_sided, unused])
    assert shared.grad.tolist() == [3, 3]
    assert one_sided.grad.tolist() == [7, 7]
    assert unused.grad is None


def _layers(rank, folder):
    x = torch.load(folder / "x.pt")
    torch.manual_seed(3)
    dropped = torch.stack([DropPath(0.5)(_part(x, rank)), ChannelDropout(0.5)(_part(x, rank))])
    norm = BatchNorm(x.shape[1])
    part = _part(x, rank).requires_grad_()
    out = norm(part)
    out.square().sum().backward()
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    found = (dropped, out.detach(), part.grad, state)
    torch.save(found, folder / f"{rank}.pt")


def test_two_ranks_are_one(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 6, 5, 5)
    torch.save(x, tmp_path / "x.pt")
    spawn_ranks(in_each_rank, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.manual_seed(3)
    dropped = torch.stack([DropPath(0.5)(x), ChannelDropout(0.5)(x)])
    norm = BatchNorm(6)
    whole = x.clone().requires_grad_()
    out = norm(whole)
    out.square().sum().backward()
    for rank, (their_dropped, their_out, their_grad, state) in enumerate(parts):
        assert torch.equal(their_dropped, dropped[:, rank::2])
        torch.testing.assert_close(their_out, out[rank::2].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(their_grad, whole.grad[rank::2], atol=1e-4, rtol=1e-4)
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(state[name], value)


def test_alone_nothing_is_asked():
    x = torch.tensor([1.0, 2.0])
    assert collective.all_sum(x) is x
    assert torch.equal(collective.all_max(x), x)
    assert collective.gather(3) == [3]
    assert collective.any_of([True, False], torch.device("cpu")) == [True, False]
    parameter = torch.nn.Parameter(x)
    collective.sum_gradients([parameter])
    assert parameter.grad is None


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_without_other_processes_nothing_is_joined(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with collective.joined_by_environment("cpu") as device:
        assert device == torch.device("cpu")
        assert collective.world_size() == 1
