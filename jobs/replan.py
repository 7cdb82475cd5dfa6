"""Plan some frames of a job anew: the generation of a retry or of a repair."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from jobs.generations import UNOPENABLE, Frames
from jobs.plan import Plan, PlanPart, Reason
from jobs.planner import Planner, faults_of_tar
from jobs.spec import JobSpec
from pipeline.errors import ErrorKind, StorageError
from pipeline.records import Asset, Slice
from pipeline.sources.assets import AssetProbe
from pipeline.sources.listing import asset_kind, is_tar
from pipeline.sources.slicing import slice_asset
from pipeline.storage import escape_path, unescape_path

_GONE: tuple[ErrorKind, str] = ("count_mismatch", "the file no longer holds this frame")

_NO_MEMBER: tuple[ErrorKind, str] = ("not_found", "the tar no longer holds this file")


class Replanner(Planner):
    """Plans exactly the wanted frames, of the files as they are now.

    What could not be opened before and can be now gives all its frames, and a tar what was not
    planned before; what cannot be opened any more gives the wanted frames, with the reason as
    their error.

    Args:
        spec: The job.
        wanted: The frames, by asset; -1 stands for an asset that could not be opened.
        reason: Why.
        only: Of a retry, the kinds that were asked for.
        replaced: Of a repair, ``(generation, shard_id)`` of what nobody shall read any more.
        held: Gives every asset that was planned before; asked if a tar itself is wanted.
    """

    def __init__(
        self,
        spec: JobSpec,
        wanted: Frames,
        *,
        reason: Reason,
        only: Sequence[str] = (),
        replaced: Sequence[tuple[int, int]] = (),
        held: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._wanted = wanted
        self._held = held
        self._inside: dict[str, set[str]] = {}  # wanted members, by tar
        self._reason: Reason = reason
        self._only, self._replaced = tuple(only), tuple(replaced)
        super().__init__(spec)

    def plan(self, parts: Sequence[PlanPart] = ()) -> Plan:
        """What was planned, and why."""
        return replace(
            super().plan(parts),
            reason=self._reason,
            only=self._only,
            replaced=self._replaced,
            reopened=tuple(sorted(self._wanted.keys() & self._inside.keys())),
        )

    def _list(self) -> tuple[list[Asset], int]:
        files = set()
        for path in self._wanted:
            tar = self._tar_of(path)
            if tar is not None:
                members = self._inside.setdefault(tar, set())
                members.update({path} - {tar})
            files.add(tar or path)
        return [self._asset(path) for path in sorted(files, key=str.encode)], 0

    def _tar_of(self, path: str) -> str | None:
        """The tar that an asset is, or lies in."""
        key = unescape_path(path)
        if is_tar(key):
            return path
        ends = [place for place, char in enumerate(key) if char == "/" and is_tar(key[:place])]
        tars = (escape_path(key[:end]) for end in ends)
        return next((tar for tar in tars if tar in self._inside or self._is_there(tar)), None)

    def _is_there(self, path: str) -> bool:
        try:
            return self.store.exists(unescape_path(path))
        except StorageError:
            return False

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
        kind = "tar" if path in self._inside else asset_kind(key) or "image"
        return Asset(path=path, kind=kind, size_bytes=size_bytes, etag=etag)

    def _contents(self, tar: AssetProbe) -> tuple[list[Asset], list[AssetProbe]]:
        path = tar.asset.path
        inside, is_wanted = self._inside[path], path in self._wanted
        news = {item.path for item in super()._contents(tar)[0]} if is_wanted else set()
        if news:
            news.difference_update(self._held())
        members = [item for item in tar.members if item.path in inside or item.path in news]
        faults = faults_of_tar(tar)
        failed = faults if is_wanted else []
        # What is sought may stand behind the damage.
        kind, message = (faults[0].error_kind, faults[0].error) if faults else _NO_MEMBER
        for lost in sorted(inside.difference(item.path for item in tar.members), key=str.encode):
            asset = Asset(path=lost, kind=asset_kind(lost) or "image", size_bytes=0, etag="")
            failed = [*failed, AssetProbe(asset=asset, error_kind=kind, error=message)]
        return members, failed

    def _parts(self, probe: AssetProbe, target_frames: int, num_last: int) -> list[Slice]:
        wanted = self._wanted.get(probe.asset.path)
        # A tar that is read anew has members that nobody asked for by name.
        if wanted is None or UNOPENABLE in wanted:
            return super()._parts(probe, target_frames, num_last)
        # Of all frames: what is wanted was sampled before, of the file as it was then.
        parts = slice_asset(
            probe,
            target_frames=target_frames,
            num_small=self._num_small_left,
            num_small_last=num_last,
        )
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
