"""Put on the path of a job's processes, it makes some frames the death of who predicts them.

``DEADLY`` says how: ``segfault`` for good, or ``device``, which loses the device at the first try.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from pathlib import Path

FATAL = 250


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "segformer3d.predictor":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def execute_and_poison(module):
            execute(module)
            _poison(module.Predictor)

        spec.loader.exec_module = execute_and_poison
        return spec


def _poison(predictor):
    start = predictor.start

    def die_or_start(self, frames, **options):
        if (frames.min(axis=(1, 2, 3)) >= FATAL).any():
            _die()
        return start(self, frames, **options)

    predictor.start = die_or_start


def _die():
    with Path(os.environ["DEADLY_COUNT"]).open("a") as file:
        file.write("x")
    if os.environ["DEADLY"] == "segfault":
        # To this very thread, as a fault of its own: another could let this one go on meanwhile.
        signal.raise_signal(signal.SIGSEGV)
    if Path(os.environ["DEADLY_COUNT"]).read_text() == "x":
        import torch

        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


if os.environ.get("DEADLY"):
    sys.meta_path.insert(0, _Finder())
