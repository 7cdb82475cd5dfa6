"""How fast scenes are made, by a new drive for each and by several frames of one drive.

    python benchmarks/scenes.py [DRIVES]

Prints milliseconds a scene at 640x360 on one core, medians; the two are interleaved.
"""

import statistics
import sys
import time

import cv2

from segformer3d.scenes import make_drive, render

WIDTH_PX, HEIGHT_PX = 640, 360
FRAMES = 4


def main() -> None:
    """Measure and print."""
    cv2.setNumThreads(1)
    drives = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    first_ms, next_ms = [], []
    for seed in range(drives):
        drive = make_drive(seed)
        for frame in range(FRAMES):
            started = time.perf_counter()
            render(drive, 5.0 * frame, WIDTH_PX, HEIGHT_PX)
            spent_ms = 1000 * (time.perf_counter() - started)
            (next_ms if frame else first_ms).append(spent_ms)
    first, following = statistics.median(first_ms), statistics.median(next_ms)
    mean = (first + (FRAMES - 1) * following) / FRAMES
    print(f"first frame of a drive   {first:6.0f} ms")
    print(f"each further frame       {following:6.0f} ms")
    print(f"{FRAMES} frames a drive         {mean:6.0f} ms a scene, {1000 / mean:.1f} scenes/s")


if __name__ == "__main__":
    main()
