"""In which order a video's frames are decoded, and which may therefore refer to which."""

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass
class DecodeOrder:
    """Frames by their ticks: each may refer to those decoded before it, since a keyframe."""

    _sent: list[int] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)
    _keyframes: list[int] = field(default_factory=list)
    _out: set[int] = field(default_factory=set)
    _low: int = 0

    def send(self, tick: int, *, is_keyframe: bool) -> None:
        """The next packet."""
        place = len(self._sent)
        if is_keyframe:
            self._keyframes.append(place)
        self._places[tick] = place
        self._sent.append(tick)

    def come(self, tick: int) -> None:
        """Its frame has come out, or never will."""
        place = self._places.get(tick)
        if place is None:
            return
        self._out.add(place)
        group = bisect_right(self._keyframes, place)
        self._low = max(self._low, self._keyframes[group - 1] if group else 0)
        while self._low in self._out:
            self._out.remove(self._low)
            self._low += 1

    def is_settled(self, tick: int) -> bool:
        """Whether all that it may refer to has come out."""
        return self._places.get(tick, 0) <= self._low

    def after(self, tick: int) -> tuple[list[int], int | None]:
        """Ticks that may refer to it, and the keyframe that ends them, if that was sent."""
        place = self._places.get(tick)
        if place is None:
            return [], None
        index = bisect_right(self._keyframes, place)
        if index == len(self._keyframes):
            return self._sent[place + 1 :], None
        end = self._keyframes[index]
        keyframe = self._sent[end]
        stop = self._keyframes[index + 1] if index + 1 < len(self._keyframes) else len(self._sent)
        leading = [later for later in self._sent[end + 1 : stop] if later < keyframe]
        return self._sent[place + 1 : end] + leading, keyframe

    def is_newest_keyframe(self, tick: int) -> bool:
        """Whether no other keyframe was sent since."""
        return bool(self._keyframes) and self._sent[self._keyframes[-1]] == tick
