"""Plan some frames of a job anew: the generation of a retry or of a repair."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from jobs.generations import UNOPENABLE, Frames
from jobs.plan import Plan, Planner, PlanPart, Reason
from jobs.spec import JobSpec
from pipeline.errors import ErrorKind, StorageError
from pipeline.records import Asset, Slice
from pipeline.sources.assets import AssetProbe
from pipeline.sources.listing import asset_kind
from pipeline.sources.slicing import slice_asset
from pipeline.storage import unescape_path

_GONE: tuple[ErrorKind, str] = ("count_mismatch", "the file no longer holds this frame")


class Replanner(Planner):
    """Plans exactly the wanted frames, of the files as they are now.

    What could not be opened before and can be now gives all its frames; what cannot be opened any
    more gives the wanted frames, with the reason as their error.

    Args:
        spec: The job.
        wanted: The frames, by asset; -1 stands for an asset that could not be opened.
        reason: Why.
        only: Of a retry, the kinds that were asked for.
        replaced: Of a repair, ``(generation, shard_id)`` of what nobody shall read any more.
    """

    def __init__(
        self,
        spec: JobSpec,
        wanted: Frames,
        *,
        reason: Reason,
        only: Sequence[str] = (),
        replaced: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._wanted = wanted
        self._reason: Reason = reason
        self._only, self._replaced = tuple(only), tuple(replaced)
        super().__init__(spec)

    def plan(self, parts: Sequence[PlanPart] = ()) -> Plan:
        """What was planned, and why."""
        return replace(
            super().plan(parts), reason=self._reason, only=self._only, replaced=self._replaced
        )

    def _list(self) -> tuple[list[Asset], int]:
        paths = sorted(self._wanted, key=str.encode)
        return [self._asset(path) for path in paths], 0

    def _asset(self, path: str) -> Asset:
        """The file as it is now; of one that is gone, or may not be read, its probe says so."""
        key = unescape_path(path)
        size_bytes, etag = 0, ""
        try:
            info = self.store.head(key)
            if info is not None:
                size_bytes = info.size_bytes
                etag = info.etag or self.store.fingerprint(key)
        except StorageError:
            pass
        kind = asset_kind(key) or "image"
        return Asset(path=path, kind=kind, size_bytes=size_bytes, etag=etag)

    def _parts(self, probe: AssetProbe, target_frames: int) -> list[Slice]:
        wanted = self._wanted[probe.asset.path]
        if UNOPENABLE in wanted:
            return super()._parts(probe, target_frames)
        # Of all frames: what is wanted was sampled before, of the file as it was then.
        parts = slice_asset(probe, target_frames=target_frames)
        return list(_only_wanted(parts, wanted, target_frames))


def _only_wanted(
    parts: Sequence[Slice], wanted: frozenset[int], target_frames: int
) -> Iterator[Slice]:
    """The wanted frames of an asset's slices, each exactly once."""
    left = set(wanted)
    failed = next((part for part in parts if part.frame_index == (UNOPENABLE,)), None)
    for part in parts:
        places = [place for place, index in enumerate(part.frame_index) if index in left]
        if places:
            yield part.take(places)
            left.difference_update(part.frame_index)
    kind, message = (failed.error_kind, failed.error) if failed is not None else _GONE
    like = replace(parts[0], pts=(), pts_s=(), seek_pts=None, error_kind=kind, error=message)
    for indices in _runs(sorted(left), target_frames):
        yield replace(like, frame_index=indices)


def _runs(indices: Sequence[int], length: int) -> Iterable[tuple[int, ...]]:
    return (tuple(indices[start : start + length]) for start in range(0, len(indices), length))
