"""Tiny data sets and recipes for tests of training."""

from dataclasses import dataclass

import numpy as np

from segformer3d.datasets import Sample
from segformer3d.labels import CAMVID_GROUPS
from segformer3d.recipe import Recipe

TINY = "mit:16,32,80,128:1,1,1,1"
SIDE = 64


@dataclass(frozen=True)
class Numbered:
    """Samples that say which they are: the image's first pixel holds the index."""

    length: int
    groups: tuple[int, ...] = tuple(range(19))
    depth_kind: str = "metric"
    has_classes: bool = True
    side: int = SIDE

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (self.side, self.side, 3), np.uint8)
        image[0, 0] = index
        ids = rng.integers(0, 19, (self.side // 8, self.side // 8)).astype(np.uint8)
        if self.groups == CAMVID_GROUPS:
            ids = np.asarray(CAMVID_GROUPS, np.uint8)[ids]
        ids = np.kron(ids, np.ones((8, 8), np.uint8))
        depth = rng.uniform(1, 50, ids.shape).astype(np.float32)
        return Sample(
            str(index),
            image,
            ids if self.has_classes else None,
            depth if self.depth_kind != "none" else None,
        )


def open_numbered(address):
    """`tiny:N`, `coarse:N` (classes only, CamVid's groups), `depth:N` (depth only)."""
    kind, _, count = address.partition(":")
    kinds = {
        "tiny": {},
        "coarse": {"groups": CAMVID_GROUPS, "depth_kind": "none"},
        "depth": {"has_classes": False},
    }
    return Numbered(int(count), **kinds[kind])


def make_recipe(**fields):
    """A recipe of a few steps over tiny samples."""
    base = {
        "model": {"variant": TINY, "head_width": 16, "depth_activation": "exp"},
        "short_side_px": SIDE,
        "data": [{"dataset": "tiny:6"}],
        "phases": [{"steps": 4, "crop_px": [SIDE, SIDE], "batch": 4}],
        "optimizer": {"rate": 1e-3},
    }
    return Recipe.model_validate(base | fields)


def write_origin(root, *, count=6, height=32, width=64):
    """The origin's layout, both splits; one frame lacks depth, one lacks classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("images", "seg_labels", "depth_labels"):
            (root / name / split).mkdir(parents=True)
        for index in range(count):
            file = f"{split}/{index}.npy"
            np.save(root / "images" / file, rng.random((height, width, 3)).astype(np.float32))
            if index != 1:
                ids = rng.integers(-1, 19, (height, width)).astype(np.int64)
                np.save(root / "seg_labels" / file, ids)
            if index != 2:
                depth = rng.random((height, width, 1)).astype(np.float32)
                np.save(root / "depth_labels" / file, depth)


def spawn_ranks(function, folder, *arguments, world=2):
    """Run `function(rank, folder, *arguments)` in processes joined by gloo."""
    from torch import multiprocessing

    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_rank, (world, function, folder, arguments), nprocs=world)


def _rank(rank, world, function, folder, arguments):
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        function(rank, folder, *arguments)
    finally:
        distributed.destroy_process_group()


def train_and_tell(rank, folder, recipe):
    """Train with the tiny samples; keep what the first rank ends with."""
    import torch

    from segformer3d.training import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(recipe, folder, device="cpu", open_source=open_numbered)
    losses = []
    trainer.run(max_steps=1)
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.run(report=lambda _step, values: losses.append(dict(values)))
    torch.manual_seed(0)
    outputs = trainer.average.model(torch.randn(1, 3, SIDE, SIDE))
    if rank == 0:
        found = (gradients, losses, outputs.logits, outputs.depth, trainer.metrics)
        torch.save(found, folder / "found.pt")
