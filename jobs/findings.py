"""What `verify` found of a job."""

from dataclasses import dataclass, field

MOST_NAMED = 1000


@dataclass
class Findings:
    """What ``verify`` found.

    Attributes:
        url: The job's URI.
        num_shards: Shards of all generations, but for those that a repair replaced.
        num_decided: Those with a commit record.
        num_frames: Planned frames of the decided shards.
        num_rows: Rows found for them.
        undecided: Ids of those without one, by generation; no fault while the job is unfinished.
        orphans: Data objects that no record names; harmless, a resume collects them.
        replaced: Shards that a repair replaced; nobody reads them any more.
        broken: ``(generation, shard_id)`` of what a repair has to do anew.
        num_without_pngs: Decided shards whose PNGs a driver has yet to make; no fault either.
        is_finished: Whether a driver has said that the newest generation is.
        bad_pngs: Keys of PNGs that are missing or show other things than the data, with the
            ``(generation, shard_id)`` that they are made from.
        faults: One line each; the first thousand.
        num_faults: All of them.
        unread: Those of the faults that may only be the store's: an object could not be read.
    """

    url: str
    num_shards: int = 0
    num_decided: int = 0
    num_frames: int = 0
    num_rows: int = 0
    undecided: dict[int, list[int]] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    replaced: int = 0
    broken: set[tuple[int, int]] = field(default_factory=set)
    num_without_pngs: int = 0
    is_finished: bool = False
    bad_pngs: dict[str, tuple[int, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    unread: list[str] = field(default_factory=list)

    def fault(self, message: str, *, unread: bool = False) -> None:
        """Note one; ``unread`` if an object could not be read, which says nothing of it."""
        self.num_faults += 1
        if len(self.faults) < MOST_NAMED:
            self.faults.append(message)
        if unread and len(self.unread) < MOST_NAMED:
            self.unread.append(message)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong with what is there."""
        return self.num_faults == 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing either."""
        is_whole = not self.undecided and not self.num_without_pngs and self.is_finished
        return self.is_sound and is_whole

    def text(self) -> str:
        """A few lines for a person."""
        verdict = "sound and complete" if self.is_complete else "sound, unfinished"
        lines = [
            f"{self.url}: {verdict if self.is_sound else 'NOT SOUND'}",
            f"{self.num_decided} of {self.num_shards} shards decided, {self.num_rows} rows of"
            f" {self.num_frames} planned in them, {len(self.orphans)} orphans",
        ]
        if self.replaced:
            lines.append(f"{self.replaced} shards were broken once and are replaced")
        if self.num_without_pngs:
            lines.append(f"the PNGs of {self.num_without_pngs} shards are not made yet")
        elif not self.undecided and not self.is_finished:
            lines.append("no driver has finished it yet, which takes a `segformer3d resume`")
        lines += self.faults
        if self.num_faults > len(self.faults):
            lines.append(f"and {self.num_faults - len(self.faults)} more")
        return "\n".join(lines)
