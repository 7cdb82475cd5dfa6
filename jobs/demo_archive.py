"""A small made-up dashcam archive of synthetic drives, to try a job without any data.

`make_demo_archive(root)` writes H.264 clips to `root/clips` and JPEG pictures to `root/stills`.
Each file appears complete or not at all, and a file that is there already is kept.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Final

import av
import cv2
from av.video.stream import VideoStream

from segformer3d.scenes import make_drive, render

FRAME_RATE_FPS: Final = 12
KEYFRAME_INTERVAL: Final = 12
JPEG_QUALITY: Final = 92

_NUM_B_FRAMES: Final = 2
# Fixed B-frames and keyframes, so that every archive has frames whose order of decoding is not
# their order of presentation, and shards that can start inside a clip. No mbtree: with it x264 now
# and then made another file of the same frames (a quarter of 30 runs, on one thread as well).
_X264: Final = (
    f"keyint={KEYFRAME_INTERVAL}:min-keyint={KEYFRAME_INTERVAL}:scenecut=0:open-gop=0"
    f":bframes={_NUM_B_FRAMES}:b-adapt=0:mbtree=0"
)
# The second clip is Matroska: its timestamps are milliseconds, its container has no frame count.
_MATROSKA_CLIP: Final = 1


def make_demo_archive(
    root: Path,
    *,
    seed: int = 0,
    num_clips: int = 3,
    frames_per_clip: int = 24,
    num_images: int = 12,
    size: tuple[int, int] = (640, 360),
) -> list[Path]:
    """Writes clips and stills of synthetic drives, each file from a drive of its own.

    A file that exists is kept as it is, whatever the other arguments: use an empty folder for
    another seed or size. Clips have 12 frames per second, B-frames and a keyframe every 12 frames.

    Args:
        root: The archive's folder; made where it is missing.
        seed: Seed of the first drive; the files' drives count up from it.
        num_clips: Videos; the second is a Matroska file, the others are MP4.
        frames_per_clip: Frames of each video.
        num_images: JPEG pictures.
        size: (width_px, height_px) of all of them, both even.

    Returns:
        The files' paths, sorted.

    Raises:
        ValueError: A side is odd, which 4:2:0 video cannot have, or a count is out of range.
    """
    if size[0] % 2 or size[1] % 2 or min(size) < 2:
        raise ValueError(f"size must be even, at least 2x2, not {size[0]}x{size[1]}")
    if frames_per_clip < 1 or num_clips < 0 or num_images < 0:
        raise ValueError("frames_per_clip must be at least 1, num_clips and num_images 0")
    clips = [root / "clips" / _clip_name(index) for index in range(num_clips)]
    stills = [root / "stills" / f"still-{index:03}.jpg" for index in range(num_images)]
    for index, path in enumerate(clips):
        _write_once(path, partial(_encode_clip, seed + index, index, frames_per_clip, size))
    for index, path in enumerate(stills):
        _write_once(path, partial(_encode_still, seed + num_clips + index, index, size))
    return sorted(clips + stills)


def _clip_name(index: int) -> str:
    return f"drive-{index:02}.{'mkv' if index == _MATROSKA_CLIP else 'mp4'}"


def _write_once(path: Path, encode: Callable[[], bytes]) -> None:
    """Writes `encode()` to `path` unless it exists, through a hidden sibling and a rename."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = encode()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        raise


def _encode_clip(seed: int, index: int, num_frames: int, size: tuple[int, int]) -> bytes:
    """Returns a video file of `num_frames` consecutive frames of one drive."""
    drive = make_drive(seed)
    file = BytesIO()
    container_format = "matroska" if index == _MATROSKA_CLIP else "mp4"
    # Bit-exact: no random ids and no library version in the file, so a seed gives the same bytes.
    options = {"fflags": "+bitexact"}
    with av.open(file, "w", format=container_format, container_options=options) as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE_FPS)
        _set_up(stream, size)
        for frame_index in range(num_frames):
            scene = render(drive, frame_index / FRAME_RATE_FPS, *size)
            frame = av.VideoFrame.from_ndarray(scene.frame, format="rgb24").reformat(
                format="yuv420p"
            )
            frame.pts = frame_index
            frame.time_base = Fraction(1, FRAME_RATE_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def _set_up(stream: VideoStream, size: tuple[int, int]) -> None:
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, FRAME_RATE_FPS)
    stream.codec_context.options = {"preset": "fast", "crf": "23", "x264-params": _X264}


def _encode_still(seed: int, index: int, size: tuple[int, int]) -> bytes:
    """Returns a JPEG file of one moment of a drive."""
    scene = render(make_drive(seed), 2.0 * index, *size)
    picture = cv2.cvtColor(scene.frame, cv2.COLOR_RGB2BGR)
    is_encoded, payload = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not is_encoded:
        raise RuntimeError(f"cannot encode a JPEG of {size[0]}x{size[1]}")
    return bytes(payload)
