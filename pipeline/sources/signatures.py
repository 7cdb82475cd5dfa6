"""What a file is by its first bytes, where its name says otherwise or nothing here reads it."""

import re

# The longest that any signature looks at, which is a transport stream's third packet.
HEAD_BYTES = 512

_Signatures = tuple[tuple[re.Pattern[bytes], str], ...]


def _signatures(*pairs: tuple[bytes, str]) -> _Signatures:
    return tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in pairs)


_IMAGES = _signatures(
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"GIF8[79]a", "GIF"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"BM....\0\0\0\0", "BMP"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"#\?R(ADIANC|GB)E", "Radiance HDR"),
)
_UNREAD_IMAGES = _signatures(
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"II\xbc", "JPEG XR"),
    (rb"8BPS", "Photoshop's format"),
    (rb"%PDF-", "PDF"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"v/1\x01", "OpenEXR"),
    (rb"DDS ", "DDS"),
    (rb"BLP[12]", "BLP"),
    (rb"qoif", "QOI"),
    (rb"icns", "ICNS"),
    (rb"\0\0[\x01\x02]\0[\x01-\xff]\0..[^\0]?\0", "ICO"),
    (rb"\x0a[\0\x02-\x05][\0\x01][\x01\x02\x04\x08]", "PCX"),
    (rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]", "SGI"),
    (rb"SIMPLE  =", "FITS"),
    (rb"FUJIFILMCCD-RAW|IIRO|IIRS|MMOR|IIU\0|FOVb", "a camera's raw format"),
)
_VIDEOS = _signatures(
    (rb"\x1a\x45\xdf\xa3", "Matroska or WebM"),
    (rb"RIFF....AVI ", "AVI"),
    (rb"(\x47.{187}){2}\x47|.{4}(\x47.{191}){2}\x47", "an MPEG transport stream"),
)
_UNREAD_VIDEOS = _signatures(
    (rb"FLV\x01", "Flash video"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media"),
    (rb"OggS", "Ogg"),
    (rb"\0\0\x01\xba", "an MPEG program stream"),
    (rb"\x06\x0e\x2b\x34", "MXF"),
    (rb"\.RMF", "RealMedia"),
    (rb"YUV4MPEG2 ", "YUV4MPEG"),
    (rb"DKIF", "IVF"),
    (rb"#EXTM3U", "a playlist"),
)
_COMPRESSED = _signatures(
    (rb"\x1f\x8b\x08", "gzip"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)", "bzip2"),
    (rb"\xfd7zXZ\0", "xz"),
    (rb"\x04\x22\x4d\x18", "lz4"),
    (rb"LZIP", "lzip"),
    (rb"\x1f\x9d", "compress"),
    (rb"PK\x03\x04", "zip"),
    (rb"7z\xbc\xaf\x27\x1c", "7z"),
)
_TGA_END = b"TRUEVISION-XFILE.\0"


def no_image(data: bytes) -> str | None:
    """What a whole file is that stands under an image's name, if it is known and not read there."""
    if data.endswith(_TGA_END):
        return "TGA"
    return _name(data, _UNREAD_IMAGES + _VIDEOS + _UNREAD_VIDEOS) or compression(data)


def no_video(head: bytes) -> str | None:
    """What a file with these first bytes is that stands under a video's name, likewise."""
    return _name(head, _IMAGES + _UNREAD_IMAGES + _UNREAD_VIDEOS) or compression(head)


def compression(head: bytes) -> str | None:
    """How a file with these first bytes is compressed, if it is."""
    name = _name(head, _COMPRESSED)
    return None if name is None else f"data compressed by {name}"


def _name(head: bytes, signatures: _Signatures) -> str | None:
    return next((name for pattern, name in signatures if pattern.match(head)), None)
