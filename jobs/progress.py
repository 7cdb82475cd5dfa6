"""Progress where a person looks: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Never, Self, TypeVar

import click
from tqdm import tqdm

from pipeline.errors import JobError, without_controls
from pipeline.urls import redact

_LINE_EVERY_S = 10.0
_QUIET_FIRST_S = 2.0
_TICK_S = 0.5
_STALLED_S = 300.0

T = TypeVar("T")


class Progress:
    """A counter with rate and time left; what is over within two seconds is not told.

    Args:
        what: What is counted, for the line's head.
        total: How many there will be; None if nobody knows.
        done: How many are already done.
        unit: What one is called.
        if_stalled: What to say when nothing has been counted for five minutes, each time.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "frames",
        if_stalled: str | None = None,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._first = done
        self.notes: dict[str, object] = {}
        self._started = time.monotonic()
        self._said = self._started - _LINE_EVERY_S + _QUIET_FIRST_S
        self._if_stalled, self._advanced = if_stalled, self._started
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._ticker.join()
        if self._bar is not None:
            with _heard_or_not():
                self._draw(self._bar)
                self._bar.close()
        elif time.monotonic() - self._started > _QUIET_FIRST_S:
            self._line()

    @property
    def rate(self) -> float:
        """Done per second since the start."""
        return (self.done - self._first) / max(1e-9, time.monotonic() - self._started)

    def advance(self, count: int, **notes: object) -> None:
        """Count; what is shown follows."""
        self.done += count
        self.notes |= notes
        self._advanced = time.monotonic()

    def _tick(self) -> None:
        """Show life between two counts: a shard may take a minute."""
        while not self._over.wait(_TICK_S):
            with _heard_or_not():
                if self._bar is not None:
                    self._draw(self._bar)
                elif time.monotonic() - self._said >= _LINE_EVERY_S:
                    self._begin()
            if self._if_stalled and time.monotonic() - self._advanced >= _STALLED_S:
                self._advanced = time.monotonic()
                say(self._if_stalled)

    def _begin(self) -> None:
        """A bar on a terminal, elsewhere the next line."""
        if not sys.stderr.isatty():
            self._line()
            return
        self._bar = tqdm(
            desc=self.what,
            total=self.total,
            initial=self._first,
            unit=f" {self.unit}",
            dynamic_ncols=True,
        )
        # Rates are of the whole time, not of what is left of it.
        self._bar.start_t -= time.monotonic() - self._started
        self._bar.last_print_t = self._bar.start_t
        self._draw(self._bar)

    def _draw(self, bar: "tqdm[Never]") -> None:
        bar.set_postfix(self.notes, refresh=False)
        bar.update(self.done - bar.n)
        bar.refresh()

    def _line(self) -> None:
        self._said = time.monotonic()
        parts = [f"{self.what}: {self.done}"]
        if self.total is not None:
            parts[0] += f" of {self.total} {self.unit}"
            parts.append(f"{100 * self.done / max(1, self.total):.0f}%")
        else:
            parts[0] += f" {self.unit}"
        parts.append(f"{self.rate:.1f}/s")
        if self.total is not None and self.rate > 0:
            parts.append(f"{max(0, self.total - self.done) / self.rate:.0f} s left")
        parts.extend(f"{name} {value}" for name, value in self.notes.items())
        say(", ".join(parts))


def track(items: Iterable[T], what: str, *, total: int | None = None, unit: str) -> Iterator[T]:
    """Pass items through, counting."""
    with Progress(what, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


def tell(result: str | bytes) -> None:
    """Print a result on standard output.

    Raises:
        BrokenPipeError: Nobody reads it any more.
        JobError: It cannot be written for another reason, as on a full disk.
    """
    try:
        click.echo(result)
    except BrokenPipeError:
        raise
    except OSError as error:
        message = f"standard output cannot be written: {error.strerror}"
        raise JobError(message) from None


def say(message: str) -> None:
    """One line for a person; results go to standard output, this does not."""
    with _heard_or_not():
        tqdm.write(redact(without_controls(message)), file=sys.stderr)
        sys.stderr.flush()


@contextlib.contextmanager
def _heard_or_not() -> Iterator[None]:
    """Go on silently where a disk is full or a reader gone: no reason to end a job."""
    try:
        yield
    except OSError:
        hush()


def hush() -> None:
    """Send whatever is still to be said nowhere: standard error is closed, or takes no more."""
    sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the end
