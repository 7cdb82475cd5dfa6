"""How long the slow suite may take, and what each of its tests may take of that.

A slow test has a number of rounds to do, the number that its promise speaks of, and a share of
``CHAOS_MINUTES``. It ends when either is used up, and says how many rounds it did.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CHAOS_MINUTES = float(os.environ.get("CHAOS_MINUTES", "100"))
# For what comes before the first round, and for a round that has begun.
_SLACK_S = 1800.0


def never() -> bool:
    """The clock of what has all the time it needs."""
    return False


@dataclass(frozen=True)
class Share:
    """What a test may take.

    Attributes:
        minutes: Of 100 that the suite takes; more or less by ``CHAOS_MINUTES``.
    """

    minutes: float

    @property
    def seconds(self) -> float:
        """The share."""
        return self.minutes / 100 * CHAOS_MINUTES * 60

    @property
    def timeout_s(self) -> float:
        """When such a test is taken to hang."""
        return self.seconds + _SLACK_S

    def clock(self) -> Callable[[], bool]:
        """Begin now; what comes back tells whether the share is spent."""
        end = time.monotonic() + self.seconds
        return lambda: time.monotonic() >= end

    def rounds(self, count: int, first: int = 0) -> Iterator[int]:
        """Numbers from ``first`` to below ``count`` until the share is spent, one at least."""
        is_over = self.clock()
        for number in range(first, count):
            if number > first and is_over():
                return
            yield number
