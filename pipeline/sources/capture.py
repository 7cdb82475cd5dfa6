"""When and where an asset was captured, as far as the asset itself says in UTC and WGS 84.

EXIF 2.32 (CIPA DC-008) for images; ``creation_time`` and an ISO 6709 location for containers. A
local time without an offset is no instant and is left out.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

# Tags of the Exif directory.
_DATE_TIME_ORIGINAL, _OFFSET_TIME_ORIGINAL, _SUBSEC_TIME_ORIGINAL = 0x9003, 0x9011, 0x9291
# Tags of the GPS directory.
_LATITUDE_REF, _LATITUDE, _LONGITUDE_REF, _LONGITUDE = 1, 2, 3, 4
_TIME_STAMP, _DATE_STAMP = 7, 29
_ISO_6709 = re.compile(r"([+-]\d{1,2}(?:\.\d+)?)([+-]\d{1,3}(?:\.\d+)?)")
_OFFSET = re.compile(r"([+-])(\d{2}):?(\d{2})")
# Containers and cameras whose clock was never set say 1904, 1970 or 1980.
_EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
_LOCATION_KEYS = ("location", "location-eng", "com.apple.quicktime.location.ISO6709")
_BAD = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Where and when.

    Attributes:
        captured_at_us: Microseconds since 1970 in UTC; of a video, its first instant.
        latitude: Degrees north.
        longitude: Degrees east.
    """

    captured_at_us: int | None = None
    latitude: float | None = None
    longitude: float | None = None


def capture_of_image(exif: Mapping[int, object], gps: Mapping[int, object]) -> Capture:
    """From the Exif and GPS directories of an image.

    Args:
        exif: Tags of the Exif directory.
        gps: Tags of the GPS directory.
    """
    latitude = _degrees(gps, _LATITUDE, _LATITUDE_REF, "S", 90)
    longitude = _degrees(gps, _LONGITUDE, _LONGITUDE_REF, "W", 180)
    located = latitude is not None and longitude is not None
    return Capture(
        captured_at_us=_exif_instant(exif) or _gps_instant(gps),
        latitude=latitude if located else None,
        longitude=longitude if located else None,
    )


def capture_of_container(metadata: Mapping[str, str]) -> Capture:
    """From the metadata of a video container."""
    place = next((metadata[key] for key in _LOCATION_KEYS if key in metadata), "")
    match = _ISO_6709.match(place)
    latitude, longitude = (float(match[1]), float(match[2])) if match else (None, None)
    if latitude is not None and longitude is not None and not _on_earth(latitude, longitude):
        latitude = longitude = None
    return Capture(
        captured_at_us=_container_instant(metadata.get("creation_time", "")),
        latitude=latitude,
        longitude=longitude,
    )


def _exif_instant(exif: Mapping[int, object]) -> int | None:
    text = str(exif.get(_DATE_TIME_ORIGINAL, ""))
    offset = _OFFSET.fullmatch(str(exif.get(_OFFSET_TIME_ORIGINAL, "")).strip())
    if offset is None:
        return None
    try:
        shift = timedelta(hours=int(offset[2]), minutes=int(offset[3]))
        zone = timezone(-shift if offset[1] == "-" else shift)
        moment = datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S").replace(tzinfo=zone)
        fraction = str(exif.get(_SUBSEC_TIME_ORIGINAL, "")).strip("\0 ")
        if fraction.isdigit():
            moment += timedelta(seconds=float(f"0.{fraction}"))
    except _BAD:
        return None
    return _microseconds(moment)


def _gps_instant(gps: Mapping[int, object]) -> int | None:
    try:
        date = str(gps[_DATE_STAMP]).strip("\0 ")
        hours, minutes, seconds = _three(gps[_TIME_STAMP])
        moment = datetime.strptime(date, "%Y:%m:%d").replace(tzinfo=UTC)
        moment += timedelta(hours=hours, minutes=minutes, seconds=seconds)
    except _BAD:
        return None
    return _microseconds(moment)


def _container_instant(text: str) -> int | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return _microseconds(moment) if moment.tzinfo is not None else None


def _microseconds(moment: datetime) -> int | None:
    if moment < _EARLIEST:
        return None
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _degrees(
    gps: Mapping[int, object], value: int, reference: int, negative: str, limit: float
) -> float | None:
    try:
        degrees, minutes, seconds = _three(gps[value])
        size = degrees + minutes / 60 + seconds / 3600
    except _BAD:
        return None
    if not math.isfinite(size) or not 0 <= size <= limit:
        return None
    return -size if str(gps.get(reference, "")).strip("\0 ") == negative else size


def _three(value: object) -> tuple[float, float, float]:
    """Three rationals of EXIF; raises one of ``_BAD`` for anything else."""
    first, second, third = cast("tuple[Any, Any, Any]", value)
    return float(first), float(second), float(third)


def _on_earth(latitude: float, longitude: float) -> bool:
    return abs(latitude) <= 90 and abs(longitude) <= 180
