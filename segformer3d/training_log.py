"""A training's logs: one CSV, TensorBoard events where it is installed, and curves as a PNG."""

from __future__ import annotations

import csv
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from segformer3d.files import temporary_beside

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CSV_NAME = "log.csv"
CURVES_NAME = "curves.png"
EVENTS_NAME = "tensorboard"
HEADER = ("step", "name", "value")


class TrainingLog:
    """Writes `log.csv` (step, name, value), TensorBoard events and `curves.png`.

    A training that goes on from a checkpoint repeats the steps after it: what the log had of them
    is dropped.
    """

    def __init__(self, folder: Path, *, after_step: int = 0, active: bool = True) -> None:
        """Open the log; an inactive one does nothing.

        Args:
            folder: Where it lies; made if it is not there.
            after_step: Step of the checkpoint that the training goes on from.
            active: Whether this process keeps it; of several, one does.
        """
        self._path = folder / CSV_NAME
        self._curves = folder / CURVES_NAME
        self._active = active
        self._events: Any = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._forget_after(after_step)
        if find_spec("tensorboard") is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard.writer import SummaryWriter

                self._events = SummaryWriter(str(folder / EVENTS_NAME), purge_step=after_step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        self.draw()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step."""
        if not self._active:
            return
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, value) for name, value in values.items())
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name.replace(".", "/"), value, step)
            self._events.flush()

    def rows(self) -> list[tuple[int, str, float]]:
        """Give all lines so far; one that a kill cut short is left out."""
        if not self._path.exists():
            return []
        rows = []
        with self._path.open(newline="") as file:
            for fields in csv.reader(file):
                try:
                    step, name, value = fields
                    rows.append((int(step), name, float(value)))
                except ValueError:
                    continue
        return rows

    def draw(self) -> None:
        """Draw every value over the steps, if matplotlib is installed."""
        rows = self.rows() if self._active else []
        if not rows or find_spec("matplotlib") is None:
            return
        from matplotlib.figure import Figure

        names = list(dict.fromkeys(name for _, name, _ in rows))
        columns = min(4, len(names))
        lines = -(-len(names) // columns)
        figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
        for index, name in enumerate(names, start=1):
            axes = figure.add_subplot(lines, columns, index)
            points = [(step, value) for step, other, value in rows if other == name]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, linewidth=1, marker="." if len(points) < 20 else None)
            axes.set_title(name, fontsize=9)
            axes.grid(alpha=0.3)
        temporary = temporary_beside(self._curves)
        figure.savefig(temporary, dpi=90, format="png")
        temporary.replace(self._curves)

    def _forget_after(self, step: int) -> None:
        kept = [row for row in self.rows() if row[0] <= step]
        temporary = temporary_beside(self._path)
        with temporary.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *kept])
        temporary.replace(self._path)
