"""The PNG tree of a job beside its data: what `verify` finds of it."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from jobs.generations import frames_of
from pipeline.layout import PNG_PREFIX, Generation
from pipeline.records import ShardSpec
from pipeline.sinks.png import compare_png_tree, png_keys
from pipeline.sources.listing import is_hidden
from pipeline.storage import Store


@dataclass
class PngTree:
    """Compares PNGs, generation by generation, oldest first.

    Attributes:
        store: The job's store.
        bad: Keys of PNGs that are missing or show other things than the data, with the
            ``(generation, shard_id)`` that they are made from.
        num_compared: Shards whose PNGs were all looked at.
    """

    store: Store
    bad: dict[str, tuple[int, int]]
    num_compared: int = 0
    # Hashes of all keys that were looked at: 8 bytes for each of what may be millions.
    _seen: "array[int]" = field(default_factory=lambda: array("Q"))

    def void(self, spec: ShardSpec) -> None:
        """Forget what older generations say of the frames of a shard: that counts no more.

        Nor does it while the shard's own PNGs are not made: then they may be half of each.
        """
        if not self.bad:
            return
        for asset, index in frames_of([spec]):
            for key in png_keys(asset, index):
                self.bad.pop(key, None)

    def compare(self, generation: Generation, shard_id: int, data: bytes) -> None:
        """Compare the PNGs of a shard with its data.

        Raises:
            StorageError: One cannot be read.
        """
        for key, is_right in compare_png_tree(self.store, data, anew=generation.number > 0):
            self._seen.append(_hash(key))
            if not is_right:
                self.bad[key] = generation.number, shard_id
        self.num_compared += 1

    def foreign(self) -> Iterator[str]:
        """Keys below the tree that no shard of those compared gives; not of hidden files.

        Raises:
            StorageError: The tree cannot be listed.
        """
        seen = np.unique(np.frombuffer(self._seen, np.uint64))
        for item in self.store.list(PNG_PREFIX):
            if is_hidden(item.key):
                # A desktop leaves such; nobody takes them for pictures.
                continue
            wanted = np.uint64(_hash(item.key))
            place = np.searchsorted(seen, wanted)
            if place == len(seen) or seen[place] != wanted:
                yield item.key


def _hash(key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogateescape"))
