"""Names: URLs and their joins, globs, and the escaped form that asset paths take in our tables."""

import re
from collections.abc import Callable
from fnmatch import translate
from re import Pattern
from urllib.parse import quote

from pipeline.errors import InputError

_MAGIC = re.compile(r"[*?\[]")
_WILDCARD = re.compile(r"(\*+|\?|\[!?+.[^\]]*\])", re.DOTALL)
_QUOTED = re.compile(r"\[([*?\[])\]")
_ESCAPED = re.compile(r"[%\x00-\x1f\x7f-\x9f\udc80-\udcff]|(?<=/)/")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\udc80-\udcff]")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})")


def join_url(url: str, *parts: str) -> str:
    """``url`` with path parts appended; the parts are raw keys, also below a ``file://`` URL."""
    if url.startswith("file://"):
        parts = tuple(quote(part, errors="surrogateescape") for part in parts)
    return "/".join([url.rstrip("/"), *parts])


def split_glob(
    url: str, is_name: Callable[[str], bool] = lambda _: False
) -> tuple[str, str | None]:
    """Split a URL before its first path segment with a wildcard (``*``, ``?`` or ``[``).

    Args:
        url: The URL.
        is_name: Says of the URL up to such a segment whether the segment is a plain name after all.

    Returns:
        The folder and the pattern below it, for ``compile_glob``; the pattern is None if the URL
        has no wildcard, and the first part may then name a folder or a single file.
    """
    scheme, separator, path = url.rpartition("://")
    magic = _MAGIC.search(path)
    while magic is not None:
        end = path.find("/", magic.start())
        if end < 0 or not is_name(scheme + separator + path[:end]):
            break
        magic = _MAGIC.search(path, end)
    if magic is None:
        return url, None
    cut = path.rfind("/", 0, magic.start()) + 1
    root = path[:cut].rstrip("/") or ("/" if path.startswith("/") else "")
    return (scheme + separator + root) or ".", path[cut:]


def compile_glob(pattern: str) -> Pattern[str]:
    """A pattern whose ``fullmatch`` says whether a key matches.

    ``*`` and ``?`` stay within a segment, ``**`` as a whole segment spans any number of them
    (none included), ``[...]`` and ``[!...]`` are character sets.
    """
    # Two of them in a row say no more than one.
    segments: list[str] = []
    for segment in pattern.split("/"):
        if segments[-1:] != ["**"] or segment != "**":
            segments.append(segment)
    last = len(segments) - 1
    expression = ""
    for index, segment in enumerate(segments):
        if segment == "**":
            expression += ".*" if index == last else "(?:[^/]+/)*"
        else:
            expression += _translate(segment) + ("" if index == last else "/")
    return re.compile(expression, re.DOTALL)


def literal_glob(segment: str) -> str | None:
    """The only name that a segment of a pattern matches; None if it has a true wildcard."""
    name = _QUOTED.sub(r"\1", segment)
    return None if _MAGIC.search(_QUOTED.sub("", segment)) else name


def _translate(segment: str) -> str:
    """What lies between two stars has one length, so its first place is as good as any later one.

    Hence atomic groups, without which names would be tried in exponentially many ways.
    """
    between = [""]
    for index, part in enumerate(_WILDCARD.split(segment)):
        if index % 2 and part[0] == "*":
            between.append("")
        else:
            between[-1] += _wildcard(part) if index % 2 else re.escape(part)
    first, *others = between
    if not others:
        return first
    middle = "".join(f"(?>[^/]*?{part})" for part in others[:-1] if part)
    return f"{first}{middle}[^/]*{others[-1]}"


def _wildcard(part: str) -> str:
    if part == "?":
        return "[^/]"
    # Of "(?s:[...])\\Z" the set itself.
    return "(?!/)" + translate(part)[4:-3]


def escape_path(raw: str | bytes) -> str:
    """A key or a file name as clean UTF-8, reversible by ``unescape_path``.

    Percent-escaped are ``%``, control characters, bytes that are not UTF-8 (``surrogateescape``
    in a str) and a slash that follows a slash, so that no two keys share a file. A backslash is
    an ordinary character on Linux and on S3 and stays.
    """
    try:
        data = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InputError("unsupported", f"not a file name: {raw!r}") from error
    text = data.decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(_percent, text)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogateescape"))


def printable(key: str) -> str:
    """A key as part of a one-line message."""
    return _UNPRINTABLE.sub(_percent, key)


def unescape_path(path: str) -> str:
    """Inverse of ``escape_path``; bytes that are not UTF-8 come back as ``surrogateescape``."""
    if _BAD_PERCENT.search(path):
        raise InputError("unsupported", f"malformed percent escape in {path!r}")
    data = _PERCENT.sub(lambda match: bytes([int(match[1], 16)]), path.encode())
    return data.decode("utf-8", "surrogateescape")


def safe_relative(path: str) -> str:
    """``path`` itself, if it names something strictly below the folder that it is joined to.

    Raises:
        InputError: ``unsupported``, for an absolute path, an empty one, or one with an empty,
            ``.`` or ``..`` segment or a NUL.
    """
    if "\0" in path or any(segment in {"", ".", ".."} for segment in path.split("/")):
        raise InputError("unsupported", f"not a plain relative path: {path!r}")
    return path
