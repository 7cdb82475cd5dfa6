"""Where everything of a job lies: keys relative to the job's URI.

People and scripts rely on these names; they change only with ``LAYOUT_VERSION``.
"""

import re
from dataclasses import dataclass
from typing import Literal

import xxhash

from pipeline.errors import ErrorKind

# Where in a shard a process died: at a frame's place, in the shard as a whole, or, once its frames
# went one by one, between two of them.
DeathPlace = int | Literal["shard", "between"]
# What a decoding child dies of.
DECODE_DEATHS: tuple[ErrorKind, ...] = ("crash", "timeout")

LAYOUT_VERSION = 1
SHARDS_PER_RANGE = 1000
JOB_KEY = "job.json"
MANIFEST_PREFIX = "manifest/"
LEASE_PREFIX = "lease/"
PNG_PREFIX = "png/"
PNG_CLASS_SUFFIXES = "_labelTrainIds.png", "_color.png"
PNG_DEPTH_SUFFIX = "_depth.png"
PROBE_PREFIX = "probe/"
WEIGHTS_PREFIX = "weights/"
OWN_PREFIXES = (
    "gen-",
    "report/",
    LEASE_PREFIX,
    MANIFEST_PREFIX,
    PNG_PREFIX,
    PROBE_PREFIX,
    WEIGHTS_PREFIX,
)

_MAX_NAME_BYTES = 220
# S3's keys have 1,024 bytes: room for the output's own prefix and a suffix.
_MAX_STEM_BYTES = 800
# How a name ends that we have cut; a literal one that does is cut, too, so no two are one.
_CUT = re.compile(r"~[0-9a-f]{32}\Z")
_SHARD = re.compile(r"/shard-(\d{8,})(?:\.json)?$")
_DEATH = re.compile(r"/shard-(\d{8,})/(?:(shard|between)|frame-(\d{6,}))-[0-9a-f]{32}\.json$")
_DECODE_DEATH = re.compile(
    rf"/shard-\d{{8,}}/decode-(\d{{6,}})-({'|'.join(DECODE_DEATHS)})-[0-9a-f]{{32}}\.json$"
)
_DATA = re.compile(r"/shard-(\d{8})-([0-9a-f]{32})\.parquet$")


@dataclass(frozen=True)
class Generation:
    """Keys of one generation: one plan and all that was made from it.

    Attributes:
        number: 0 for the first plan; each retry, repair or growth adds one.
    """

    number: int = 0

    @property
    def prefix(self) -> str:
        """Folder of the generation, with a trailing slash."""
        return f"gen-{self.number:04d}/"

    @property
    def plan_prefix(self) -> str:
        """Folder of the plan."""
        return f"{self.prefix}plan/"

    @property
    def plan_key(self) -> str:
        """The create-only object that fixes the plan."""
        return f"{self.plan_prefix}plan.json"

    @property
    def success_key(self) -> str:
        """Present once every shard is decided."""
        return f"{self.prefix}_SUCCESS.json"

    @property
    def data_prefix(self) -> str:
        """Folder of the Parquet objects."""
        return f"{self.prefix}data/"

    @property
    def commit_prefix(self) -> str:
        """Folder of the commit records."""
        return f"{self.prefix}commit/"

    @property
    def png_done_prefix(self) -> str:
        """Folder of the markers of shards whose PNGs are written."""
        return f"{self.prefix}png-done/"

    @property
    def attempts_prefix(self) -> str:
        """Folder of the attempts at which the model's process or a decoding child died."""
        return f"{self.prefix}attempts/"

    def shard_attempts_prefix(self, shard_id: int) -> str:
        """Folder of such attempts at one shard."""
        return f"{self.attempts_prefix}shard-{shard_id:08d}/"

    def death_key(self, shard_id: int, place: DeathPlace, attempt: str) -> str:
        """Key of one death of the model's process."""
        at = f"frame-{place:06d}" if isinstance(place, int) else place
        return f"{self.shard_attempts_prefix(shard_id)}{at}-{attempt}.json"

    def decode_death_key(self, shard_id: int, place: int, kind: ErrorKind, attempt: str) -> str:
        """Key of one death of a decoding child, at the input whose first frame has that place."""
        return f"{self.shard_attempts_prefix(shard_id)}decode-{place:06d}-{kind}-{attempt}.json"

    def plan_part_key(self, planner: str, part: int) -> str:
        """Key of one part of a plan; ``planner`` is unique to one planning process."""
        return f"{self.plan_prefix}part-{planner}-{part:05d}.parquet"

    def data_key(self, shard_id: int, attempt: str) -> str:
        """Key of one attempt's Parquet object; never reused."""
        return f"{self.data_prefix}shard-{shard_id:08d}-{attempt}.parquet"

    def range_prefix(self, range_id: int) -> str:
        """Folder of the commit records of one range of shards."""
        return f"{self.commit_prefix}{range_id:05d}/"

    def commit_key(self, shard_id: int) -> str:
        """Key of the one object that makes a shard done."""
        return f"{self.range_prefix(shard_id // SHARDS_PER_RANGE)}shard-{shard_id:08d}.json"

    def png_done_key(self, shard_id: int) -> str:
        """Key of the marker written when a shard's PNGs are complete."""
        folder = f"{self.png_done_prefix}{shard_id // SHARDS_PER_RANGE:05d}/"
        return f"{folder}shard-{shard_id:08d}"


def lease_key(number: int) -> str:
    """Key of a driver's lease, create-only."""
    return f"{LEASE_PREFIX}lease-{number:08d}.json"


def heartbeat_key(number: int) -> str:
    """Key of the sign of life of the driver that holds lease ``number``."""
    return f"{LEASE_PREFIX}heartbeat-{number:08d}.json"


def cancel_key(number: int) -> str:
    """Key of the request that the driver with lease ``number`` drain and stop."""
    return f"{LEASE_PREFIX}cancel-{number:08d}.json"


def shard_of(key: str) -> int | None:
    """Shard id in the name of a commit record or marker; None for any other key."""
    match = _SHARD.search(key)
    return int(match.group(1)) if match else None


def attempt_of(key: str) -> tuple[int, str] | None:
    """``(shard_id, attempt)`` in the name of a data object; None for any other key."""
    match = _DATA.search(key)
    return (int(match.group(1)), match.group(2)) if match else None


def death_of(key: str) -> tuple[int, DeathPlace] | None:
    """Shard and place in the name of a death of the model's process; None for any other key."""
    match = _DEATH.search(key)
    if match is None:
        return None
    whole: DeathPlace = "between" if match[2] == "between" else "shard"
    return int(match[1]), whole if match[3] is None else int(match[3])


def decode_death_of(key: str) -> tuple[int, ErrorKind] | None:
    """Place and kind in the name of a decoding child's death; None for any other key."""
    match = _DECODE_DEATH.search(key)
    if match is None:
        return None
    return int(match[1]), next(kind for kind in DECODE_DEATHS if kind == match[2])


def png_stem(asset: str, frame_index: int, *, is_video: bool) -> str:
    """Key of a frame's PNGs without their suffix.

    A video's frames lie in a folder of its name; an image keeps its own name, extension included,
    so ``a.jpg`` and ``a.png`` do not meet; nor does a folder ``a.jpg_depth.png`` meet a picture.
    Names and paths that are too long end with ``~`` and a hash.
    """
    if asset.startswith("/"):  # as S3 keys may
        asset = f"%2F{asset[1:]}"
    *folders, name = asset.split("/")
    if is_video:
        folders, name = [*folders, name], f"{frame_index:06d}"
    stem = f"{PNG_PREFIX}{'/'.join([*map(_folder, folders), _fitting(name)])}"
    if len(stem.encode()) <= _MAX_STEM_BYTES:
        return stem
    # A folder of its own right below, or a name there: by the whole asset's hash.
    stem = f"{PNG_PREFIX}{_cut(folders[-1] if is_video else name, asset)}"
    return f"{stem}/{name}" if is_video else stem


def _folder(name: str) -> str:
    # A folder called like one of our PNGs could be where that has to go.
    is_ours = name.endswith((*PNG_CLASS_SUFFIXES, PNG_DEPTH_SUFFIX))
    return _fitting(f"{name.removesuffix('.png')}%2Epng" if is_ours else name)


def _fitting(name: str) -> str:
    """A name that stays in its folder, and fits a file system (255 bytes) with a suffix added."""
    if name in {".", ".."}:
        return "%2E" * len(name)
    if len(name.encode()) <= _MAX_NAME_BYTES and not _CUT.search(name):
        return name
    return _cut(name, name)


def _cut(name: str, of: str) -> str:
    """The beginning of a name and the hash of what it stands for."""
    head = name.encode()[: _MAX_NAME_BYTES - 33].decode(errors="ignore")
    return f"{head}~{xxhash.xxh3_128_hexdigest(of.encode())}"
