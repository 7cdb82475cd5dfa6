"""Where a run's time goes: seconds in each stage, and which of them holds the others up."""

from dataclasses import dataclass

from pipeline.tables import ShardReceipt


@dataclass(kw_only=True)
class StageTimes:
    """Seconds that a run's shards spent in each stage, added up over all its processes.

    Attributes:
        decode_s: In decoding.
        annotate_s: In the models.
        publish_s: In encoding, writing and committing.
    """

    decode_s: float = 0.0
    annotate_s: float = 0.0
    publish_s: float = 0.0

    def add(self, receipt: ShardReceipt) -> None:
        """Count one shard."""
        self.decode_s += receipt.decode_s
        self.annotate_s += receipt.annotate_s
        self.publish_s += receipt.publish_s

    def busy(self, wall_s: float, *, num_actors: int, num_io_tasks: int) -> dict[str, float]:
        """Share of the time that each stage's processes were at work, the busiest first.

        Args:
            wall_s: How long the stages ran.
            num_actors: Models.
            num_io_tasks: Decode tasks at a time; publish tasks likewise.
        """
        shares = {
            "model": self.annotate_s / (num_actors * max(wall_s, 1e-9)),
            "decode": self.decode_s / (num_io_tasks * max(wall_s, 1e-9)),
            "publish": self.publish_s / (num_io_tasks * max(wall_s, 1e-9)),
        }
        # When the first shard began is only known about: full is full.
        busiest_first = sorted(shares.items(), key=lambda item: -item[1])
        return {name: min(share, 1.0) for name, share in busiest_first}


def busy_line(shares: dict[str, float]) -> str:
    """One line for a person; the first stage is the one to add hardware to."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"Busy: {parts}; the {next(iter(shares))} stage limits this run."
