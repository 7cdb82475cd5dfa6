"""Which URLs a user may name, which hosts the web is, and how a URL is shown.

The rules stand here once. A URL never carries a credential: those are ambient (environment,
profile, role). Fetching from the web goes to public addresses only, so that a URL in somebody's
job file cannot make this machine ask its neighbours, or its cloud's metadata service, for anything.
"""

import os
import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

from pipeline.errors import UserError

ALLOW_PRIVATE = "SEGFORMER3D_ALLOW_PRIVATE_HTTP"
STORE_SCHEMES = frozenset({"file", "s3"})
WEB_SCHEMES = frozenset({"http", "https"})
STORES = "a local path, file:///path or s3://bucket/prefix"
FILES = "a local path, file:///path, s3://bucket/key or https://host/path"

_MASK = "***"
_MAX_SHOWN_CHARS = 40
_BRACKETED_HOST = re.compile(r"(?<=//)\[[0-9A-Fa-f:.%]+\]")
# User and password before an @; the second form is a password that has a slash.
_USER = re.compile(r"(?<=:/)/?[^/\s?#]*@|(?<=://)[^/\s:\[]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@")
# A signed URL is a credential; other addresses' options are not (`camvid:/data?split=val`).
_QUERY = re.compile(r"(https?://[^\s?#]*\?)[^\s#]+", re.IGNORECASE)
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "RAY_AUTH_TOKEN",
)
_LEAST_SECRET_CHARS = 8
# What the internet's IPv6 hosts have; and addresses that carry an IPv4 one in their last 32 bits.
_UNICAST, _NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")


def check_scheme(url: str, allowed: Iterable[str], accepted: str) -> str | None:
    """Refuse chained URLs, and protocols that are not among those allowed.

    Args:
        url: What the user named; without ``://`` it is a local path.
        allowed: Schemes, in lower case.
        accepted: What the message offers instead.

    Returns:
        The scheme, None for a local path.

    Raises:
        UserError: For any other URL.
    """
    if "::" in _BRACKETED_HOST.sub("", url):
        raise UserError(f"chained URLs are not supported: use {accepted}")
    scheme, separator, _ = url.partition("://")
    if not separator:
        return None
    if scheme not in allowed:
        shown = ascii(scheme[:_MAX_SHOWN_CHARS])
        raise UserError(f"unsupported storage scheme {shown}: use {accepted}")
    return scheme


def check_file_url(url: str) -> None:
    """Refuse what cannot be the URL of one file: local, in S3 or on the web.

    Raises:
        UserError: For a chained URL, another protocol, or one with a user or a password.
    """
    scheme = check_scheme(url, STORE_SCHEMES | WEB_SCHEMES, FILES)
    if scheme is not None:
        refuse_credentials(url)
    if scheme in WEB_SCHEMES:
        check_web_url(url)


def check_local(path: str, what: str) -> None:
    """Refuse a URL where only a local path will do.

    Raises:
        UserError: It is a URL.
    """
    if "://" in path:
        raise UserError(f"{what}: a local path is needed, not a URL")


def refuse_credentials(url: str) -> None:
    """Refuse a user name or a password in a URL, without repeating it.

    Raises:
        UserError: There is one.
    """
    scheme, separator, rest = url.partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # A bucket has no colon; a host may have one, before its port.
    has_user = "@" in place or (scheme == "s3" and ":" in place)
    if separator and has_user and scheme != "file":
        raise UserError(
            f"{scheme}://{_MASK}: not a bucket name or host: a URL must not hold a user or a "
            "password, credentials come from the environment, a profile or a role"
        )


def check_endpoint(url: str) -> None:
    """Refuse what cannot be an S3 endpoint. It may be any host: the user's own choice.

    Raises:
        UserError: It is no ``http(s)://host``, or holds a user.
    """
    parts = _split(url)
    if (
        parts is None
        or parts.scheme not in WEB_SCHEMES
        or not parts.hostname
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        message = "the S3 endpoint must look like https://host[:port], without a user or a query"
        raise UserError(message)


def check_web_url(url: str) -> SplitResult:
    """Refuse what cannot be a URL on the web; asks no name server.

    Returns:
        The URL in parts.

    Raises:
        UserError: It has another scheme, no host, a bad port, or a user.
    """
    refuse_credentials(url)
    parts = _split(url)
    if parts is None or parts.scheme not in WEB_SCHEMES or not parts.hostname:
        raise UserError(f"{shown(url)}: not a URL on the web: use https://host/path")
    return parts


def public_addresses(host: str, port: int) -> list[str]:
    """Where a host is, if all of it is public; the caller connects to these, and asks no more.

    However an address is written (``2130706433``, ``0x7f.1``), it is the resolved one that counts.
    The environment variable ``SEGFORMER3D_ALLOW_PRIVATE_HTTP=1`` allows all, for intranets.

    Raises:
        UserError: The host, or one of its addresses, is not public.
        OSError: It has no address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise UserError(f"{shown(host)}: not a host name") from None
    addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
    private = [address for address in addresses if not is_public(address)]
    if private and os.environ.get(ALLOW_PRIVATE) != "1":
        place = host if private[0] == host else f"{shown(host)} ({private[0]})"
        raise UserError(
            f"{place} is no public address: set {ALLOW_PRIVATE}=1 to fetch from your own network"
        )
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and so is any that it stands for."""
    ip = ip_address(address)
    carried = _carried(ip)
    if isinstance(ip, IPv6Address) and not carried and ip not in _UNICAST:
        return False
    return all(item.is_global and not item.is_multicast for item in (ip, *carried))


def redact(text: str) -> str:
    """Text without credentials: users in URLs, queries of web URLs, secrets of the environment."""
    text = _QUERY.sub(rf"\g<1>{_MASK}", _USER.sub(_masked, text))
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= _LEAST_SECRET_CHARS:
            text = text.replace(secret, _MASK)
    return text


def without_query(url: str) -> str:
    """A web URL as it may be recorded: a query may be a signature. Other URLs stay."""
    if url.partition("://")[0] not in WEB_SCHEMES:
        return url
    return re.split(r"[?#]", url, maxsplit=1)[0]


def shown(url: str) -> str:
    """A URL or a host as part of a one-line message."""
    text = redact(without_query(url))
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _masked(match: re.Match[str]) -> str:
    return f"/{_MASK}@" if match[0].startswith("/") else f"{_MASK}@"


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    return None if any(ord(character) <= 0x20 for character in url) else parts


def _carried(ip: IPv4Address | IPv6Address) -> list[IPv4Address]:
    """IPv4 addresses that an IPv6 address leads to."""
    if isinstance(ip, IPv4Address):
        return []
    found = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        found.append(IPv4Address(int(ip) & 0xFFFF_FFFF))
    return [item for item in found if item is not None]
