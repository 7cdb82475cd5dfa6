"""From the probe of one asset to the slices that shards are made of. Pure and deterministic."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from pipeline.errors import ErrorKind
from pipeline.records import Slice
from pipeline.sources.assets import AssetProbe

MAX_MISSING_ENTRIES = 100_000
SMALL_SLICE_FRAMES = 16
# Where time stamps repeat, as in recordings put behind one another, or frames hang on a palette at
# the beginning, a slice's frames are found by reading the video from there: that shall not take
# more frames in all than this.
_MAX_READ_FRAMES = 1_000_000
_REPEATED = "the frame has the time stamp of another, in a video too long to tell them apart"
_PALETTE = "the frame needs the palette at the beginning of a video too long to read it from there"
# Of other kinds nobody knows how many are missing.
_COUNTED: tuple[ErrorKind, ...] = ("count_mismatch", "unsupported")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video are wanted; all of them by default.

    Attributes:
        every_nth: Every n-th frame in presentation order, from the first.
        frames_per_second: Instead, by time: for each tick ``k / frames_per_second`` since the
            first frame, the first frame at or after it.
    """

    every_nth: int = 1
    frames_per_second: float | None = None

    def __post_init__(self) -> None:
        """Reject impossible rates.

        Raises:
            ValueError: If a rate is not positive, or both are given.
        """
        if self.every_nth < 1:
            message = f"every_nth must be at least 1, got {self.every_nth}"
            raise ValueError(message)
        if self.frames_per_second is None:
            return
        if not 0 < self.frames_per_second < float("inf"):
            message = f"frames_per_second must be positive, got {self.frames_per_second}"
            raise ValueError(message)
        if self.every_nth != 1:
            message = "give every_nth or frames_per_second, not both"
            raise ValueError(message)


def sample_frames(pts: Sequence[int], time_base: Fraction, sampling: Sampling) -> list[int]:
    """Ranks of the wanted frames among sorted time stamps.

    Containers round times to their ticks, so a frame less than half a tick early is in time.
    """
    if sampling.frames_per_second is None:
        return list(range(0, len(pts), sampling.every_nth))
    step = 1 / (Fraction(sampling.frames_per_second) * time_base)
    half = Fraction(1, 2)
    ranks: list[int] = []
    rank = 0
    while rank < len(pts):
        ranks.append(rank)
        next_instant = ceil((pts[rank] - pts[0] + half) / step) * step
        rank = max(rank + 1, bisect_right(pts, pts[0] + next_instant - half))
    return ranks


def slice_asset(
    probe: AssetProbe,
    *,
    sampling: Sampling | None = None,
    target_frames: int = 64,
    num_small: int = 0,
    num_small_last: int = 0,
) -> list[Slice]:
    """Slices of one asset, in presentation order.

    A video is cut at the first keyframe at or after ``target_frames`` sampled frames, in the
    middle of a group of pictures at twice as many, and where time stamps begin or end to repeat:
    there it is read from its beginning (``seek_pts`` None), as a video with a palette always is.
    An image, or an asset that cannot be opened, gives one slice. Frames that are known to be
    missing come last, as slices with an error.

    Args:
        probe: What is known of the asset.
        sampling: Which frames of a video are wanted.
        target_frames: Sampled frames per slice to aim at.
        num_small: So many of the first frames go into slices of ``SMALL_SLICE_FRAMES`` instead, if
            that is less.
        num_small_last: And so many of the last.

    Raises:
        ValueError: If ``target_frames`` is not positive.
    """
    if target_frames < 1:
        message = f"target_frames must be at least 1, got {target_frames}"
        raise ValueError(message)
    sampling = sampling or Sampling()
    if probe.error_kind is not None:
        return [_failed(probe, (-1,), probe.error_kind, probe.error)]
    if probe.asset.kind == "image":
        return [_slice(probe)]
    ranks = sample_frames(probe.pts, probe.time_base, sampling)
    cuts = _cuts(probe, ranks, target_frames, (num_small, len(ranks) - num_small_last))
    runs = [ranks[start:end] for start, end in cuts]
    num_read = sum(_is_read_whole(probe, run[0]) for run in runs) * len(probe.pts)
    reason = _PALETTE if probe.needs_start else _REPEATED
    slices = [
        _failed(probe, tuple(run), "unsupported", reason)
        if num_read > _MAX_READ_FRAMES and _is_read_whole(probe, run[0])
        else _video_slice(probe, run)
        for run in runs
    ]
    return slices + _missing(probe, ranks, sampling, target_frames)


def _cuts(
    probe: AssetProbe, ranks: Sequence[int], target_frames: int, large: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Where slices start and end; those that start outside ``large`` are small."""
    start = 0
    small_frames = min(target_frames, SMALL_SLICE_FRAMES)
    for position in range(1, len(ranks)):
        length = position - start
        target = target_frames if large[0] <= start < large[1] else small_frames
        if _is_read_whole(probe, ranks[position]) != _is_read_whole(probe, ranks[position - 1]):
            yield start, position
            start = position
            continue
        if length < target:
            continue
        before, here = probe.pts[ranks[position - 1]], probe.pts[ranks[position]]
        keyframes = probe.keyframe_pts
        crosses_keyframe = bisect_right(keyframes, here) > bisect_right(keyframes, before)
        if crosses_keyframe or length >= 2 * target:
            yield start, position
            start = position
    if ranks:
        yield start, len(ranks)


def _is_read_whole(probe: AssetProbe, rank: int) -> bool:
    """Whether a frame is found from the beginning only, as one is that shares its tick."""
    if probe.needs_start:
        return True
    return probe.pts[rank] in (*probe.pts[max(0, rank - 1) : rank], *probe.pts[rank + 1 : rank + 2])


def _video_slice(probe: AssetProbe, ranks: Sequence[int]) -> Slice:
    pts = tuple(probe.pts[rank] for rank in ranks)
    before = bisect_right(probe.keyframe_pts, pts[0])
    seek_pts = probe.keyframe_pts[before - 1] if before else probe.pts[0]
    return _slice(
        probe,
        frame_index=tuple(ranks),
        pts=pts,
        pts_s=tuple(float(tick * probe.time_base) for tick in pts),
        seek_pts=None if _is_read_whole(probe, ranks[0]) else seek_pts,
    )


def _missing(
    probe: AssetProbe, ranks: Sequence[int], sampling: Sampling, target_frames: int
) -> list[Slice]:
    if not probe.num_missing:
        return []
    first = len(probe.pts)
    kind = probe.missing_kind or "count_mismatch"
    if probe.num_missing > MAX_MISSING_ENTRIES:
        return [_failed(probe, (first,), kind, probe.missing_error)]
    step = sampling.every_nth
    if sampling.frames_per_second is not None and ranks:
        step = max(1, round(first / len(ranks)))
    aligned = -(-first // step) * step
    wanted = tuple(range(aligned, first + probe.num_missing, step))
    if not wanted and kind not in _COUNTED:
        wanted = (first,)
    return [
        _failed(probe, wanted[start : start + target_frames], kind, probe.missing_error)
        for start in range(0, len(wanted), target_frames)
    ]


def _failed(
    probe: AssetProbe, frame_index: tuple[int, ...], kind: ErrorKind, message: str | None
) -> Slice:
    return _slice(probe, frame_index=frame_index, error_kind=kind, error=message)


def _slice(
    probe: AssetProbe,
    *,
    frame_index: tuple[int, ...] = (0,),
    pts: tuple[int, ...] = (),
    pts_s: tuple[float, ...] = (),
    seek_pts: int | None = None,
    error_kind: ErrorKind | None = None,
    error: str | None = None,
) -> Slice:
    asset = probe.asset
    return Slice(
        asset=asset.path,
        kind=asset.kind,
        size_bytes=asset.size_bytes,
        etag=asset.etag,
        width=probe.width,
        height=probe.height,
        frame_index=frame_index,
        pts=pts,
        pts_s=pts_s,
        seek_pts=seek_pts,
        captured_at_us=probe.capture.captured_at_us,
        latitude=probe.capture.latitude,
        longitude=probe.capture.longitude,
        error_kind=error_kind,
        error=error,
        container=asset.container,
        offset=asset.offset,
    )
