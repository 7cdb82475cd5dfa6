"""Real media for tests, made here: images in their variants, and videos by PyAV's encoders."""

import io
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]


def picture(width: int = 96, height: int = 64, seed: int = 0) -> UInt8Array:
    """A smooth random RGB picture without symmetries, with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def encode_image(
    pixels: UInt8Array, format: str, *, mode: str | None = None, orientation: int | None = None
) -> bytes:
    """Encode by Pillow, in a Pillow mode, with an EXIF orientation."""
    image = Image.fromarray(pixels)
    if mode is not None:
        image = image.convert(mode)
    options: dict[str, object] = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if format in ("WEBP", "AVIF"):
        options |= {"quality": 95}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encode_cv2(pixels: UInt8Array, extension: str) -> bytes:
    """Encode RGB by OpenCV, for formats that Pillow lacks; ``.hdr`` gets floats."""
    bgr = pixels[..., ::-1]
    if extension in (".hdr", ".pic"):
        bgr = bgr.astype(np.float32) / 255
    if extension in (".pgm", ".pbm"):
        bgr = bgr[..., 0]
    # JPEG by another name.
    extension = ".jpg" if extension == ".jfif" else extension
    done, data = cv2.imencode(extension, np.ascontiguousarray(bgr))
    assert done
    return data.tobytes()


def scene(num_frames: int, width: int = 96, height: int = 64) -> list[UInt8Array]:
    """Frames that all differ: a camera that pans over a picture."""
    wide = picture(width * 2, height * 2, seed=num_frames)
    frames = []
    for index in range(num_frames):
        x, y = (2 * index) % width, index % height
        frame = wide[y : y + height, x : x + width].copy()
        frame[:8, :8] = (index * 37) % 256
        frames.append(frame)
    return frames


def write_video(
    path: Path,
    *,
    num_frames: int = 40,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    gop: int = 10,
    b_frames: int = 2,
    ticks: Sequence[int] | None = None,
    ticks_per_second: int = 30,
    rotation_deg: int | None = None,
    pix_fmt: str = "yuv420p",
    format: str | None = None,
    container_options: dict[str, str] | None = None,
    x264_params: str = "",
    codec_options: dict[str, str] | None = None,
    audio_s: float = 0.0,
) -> Path:
    """Encode a scene; ``ticks`` are the presentation times, by default one tick per frame."""
    time_base = Fraction(1, ticks_per_second)
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        stream.options = codec_options or _codec_options(codec, gop, b_frames, x264_params)
        if rotation_deg is not None:
            stream.set_display_rotation(rotation_deg)
        sound = container.add_stream("aac", rate=8000) if audio_s else None
        for index, pixels in enumerate(scene(num_frames, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = index if ticks is None else ticks[index]
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_silence(container, sound, audio_s)
    return path


def _codec_options(codec: str, gop: int, b_frames: int, x264_params: str) -> dict[str, str]:
    if codec == "libx265":
        params = f"keyint={gop}:min-keyint={gop}:bframes={b_frames}:pools=1:log-level=none"
        return {"x265-params": f"{params}:{x264_params}".rstrip(":"), "preset": "ultrafast"}
    if codec == "libx264":
        # mbtree would give now and then another file from the same frames.
        params = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:b-adapt=0:mbtree=0"
        return {"x264-params": f"{params}:{x264_params}".rstrip(":"), "preset": "fast"}
    return {"g": str(gop)}


def _mux_silence(container, sound, audio_s: float) -> None:
    for start in range(0, int(audio_s * 8000), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, start
        container.mux(sound.encode(frame))
    container.mux(sound.encode())


def read_sequentially(path: Path) -> list[tuple[int, UInt8Array]]:
    """What a plain decode from the beginning gives: presentation times and RGB, upright or not."""
    with av.open(str(path)) as container:
        return [
            (frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


def packet_places(path: Path) -> list[tuple[int, int, int, bool]]:
    """``(pts, offset, size, is_keyframe)`` of the video's packets, in file order."""
    with av.open(str(path)) as container:
        return [
            (packet.pts, packet.pos, packet.size, packet.is_keyframe)
            for packet in container.demux(video=0)
            if packet.size
        ]


def damage(path: Path, offset: int, length: int, seed: int = 0) -> None:
    """Overwrite bytes of a file with noise."""
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = np.random.default_rng(seed).bytes(length)
    path.write_bytes(data)


def tar_of(files: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An uncompressed tar of regular files, in this order; names may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return buffer.getvalue()


def write_palette_video(
    path: Path, codec: str, *, num_frames: int = 12, gop: int = 4, changes: bool = False
) -> Path:
    """A scene of 8 bits a pixel, whose palette is the first frame's, or ``changes`` with each."""
    frames = [Image.fromarray(pixels) for pixels in scene(num_frames)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "pal8"
        stream.options = {"g": str(gop)}
        first = frames[0].quantize(200)
        for index, frame in enumerate(frames):
            image = frame.quantize(200) if changes else frame.quantize(palette=first)
            colours = np.full((256, 4), 255, np.uint8)
            colours[:200, 1:] = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[:200]
            encoded = av.VideoFrame.from_ndarray((np.asarray(image), colours), format="pal8")
            encoded.pts, encoded.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(encoded))
        container.mux(stream.encode())
    return path
