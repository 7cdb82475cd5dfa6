"""A whole job beside what one would write with Ray Data, `transformers` or Daft.

    python benchmarks/peers.py [--frames 48 144] [--cpus 2] [--rounds 1]

All annotate the same archive of JPEGs on the same cores with a MiT-B0: class ids at full size and
depth on the network's grid, as PNGs in Parquet. The peers run the same weights through the plain
modules, with the resizing and the argmax in torch and Pillow's PNG encoder; `transformers` has one
head and random weights of the same sizes, and writes PNG files. Each runs archives of two lengths:
the further frames over the further time is the rate, which leaves starting up out.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.job import make_archive
from benchmarks.model import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

BATCH = 8
OURS = "ours"


class Eager:
    """The network as its modules are, from frames to PNG bytes."""

    def __init__(self) -> None:
        import torch

        from segformer3d.weights import model_from_bytes
        from segformer3d.weights_file import bundled_weights

        torch.set_num_threads(1)
        self.torch = torch
        self.model, info = model_from_bytes(bundled_weights())
        self.model.eval()
        self.codec = info.depth_codec
        self.mean = torch.tensor(info.preprocessing.mean).view(3, 1, 1)
        self.std = torch.tensor(info.preprocessing.std).view(3, 1, 1)

    def annotate(self, frames: NDArray[np.uint8]) -> tuple[list[bytes], list[bytes]]:
        """Class ids and depth codes of frames uint8 (B, H, W, 3), as PNGs."""
        with self.torch.inference_mode():
            x = self.torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float() / 255
            outputs = self.model((x - self.mean) / self.std)
            logits = self.torch.nn.functional.interpolate(
                outputs.logits, size=frames.shape[1:3], mode="bilinear", align_corners=False
            )
            class_ids = logits.argmax(1).to(self.torch.uint8).numpy()
            depth = outputs.depth[:, 0].numpy()
        assert self.codec is not None
        codes = self.codec.encode(depth)
        return [_pillow_png(item) for item in class_ids], [_pillow_png(item) for item in codes]


def _pillow_png(array: NDArray[Any]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def run_ours(archive: Path, output: Path, cpus: int, graph: str = "staged") -> None:
    """`segformer3d run`, in this process."""
    from jobs.runner import run_job
    from jobs.spec import check_spec

    fields = {
        "input": {"url": str(archive)},
        "output": {"url": str(output)},
        # As the peers; by default it would be that of the weights' training.
        "geometry": {"short_side_px": 512},
        "shard": {"frames": 16},
        "ray": {"num_cpus": cpus, "graph": graph},
    }
    run_job(check_spec(fields, "the benchmark"))


def run_ray_data(archive: Path, output: Path, cpus: int) -> None:
    """The script that Ray Data's documentation would have one write."""
    import ray

    class Annotate(Eager):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            class_ids, depth = self.annotate(np.stack(list(batch["image"])))
            return {"path": batch["path"], "class_ids": class_ids, "depth": depth}

    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    (
        ray.data.read_images(str(archive), include_paths=True, mode="RGB")
        # Half a CPU for each: actors on all of them would starve what reads for them.
        .map_batches(Annotate, batch_size=BATCH, num_cpus=0.5, concurrency=cpus)
        .write_parquet(str(output))
    )
    ray.shutdown()


def run_daft(archive: Path, output: Path, cpus: int) -> None:
    """Daft with the same model as a class of user-defined functions."""
    import daft
    from daft import DataType

    fields = {"class_ids": DataType.binary(), "depth": DataType.binary()}

    @daft.cls(max_concurrency=cpus, use_process=cpus > 1)  # type: ignore[untyped-decorator]
    class Annotate:
        def __init__(self) -> None:
            self.eager = Eager()

        @daft.method.batch(return_dtype=DataType.struct(fields), batch_size=BATCH)  # type: ignore[untyped-decorator]
        def annotate(self, images: Any) -> list[dict[str, bytes]]:
            frames = np.stack([np.asarray(image) for image in images.to_pylist()])
            pairs = zip(*self.eager.annotate(frames), strict=True)
            return [{"class_ids": ids, "depth": depth} for ids, depth in pairs]

    column = daft.col("path")
    image = column.download().decode_image(mode="RGB")
    table = daft.from_glob_path(f"{archive}/*.jpg").select(column)
    table.with_column("said", Annotate().annotate(image)).write_parquet(str(output))


def run_transformers(archive: Path, output: Path, cpus: int) -> None:
    """Its pipeline in a loop, with a PNG writer."""
    import torch
    from PIL import Image
    from transformers import (
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SegformerImageProcessor,
        pipeline,
    )

    torch.set_num_threads(cpus)
    config = SegformerConfig(num_labels=19, decoder_hidden_size=128)
    model = SegformerForSemanticSegmentation(config).eval()
    processor = SegformerImageProcessor(do_resize=False)
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    output.mkdir()
    for path in sorted(archive.iterdir()):
        said = segment(str(path), subtask="semantic")
        class_ids = np.full(said[0]["mask"].size[::-1], 255, np.uint8)
        for item in said:
            class_ids[np.asarray(item["mask"]) > 0] = model.config.label2id[item["label"]]
        Image.fromarray(class_ids).save(output / f"{path.stem}.png")


CONTESTANTS: dict[str, tuple[Callable[[Path, Path, int], None], str]] = {
    OURS: (run_ours, "ray"),
    "ours, fused": (partial(run_ours, graph="fused"), "ray"),
    "Ray Data, as documented": (run_ray_data, "ray"),
    "transformers pipeline": (run_transformers, "transformers"),
    "Daft": (run_daft, "daft"),
}


def main() -> None:
    """Measure and print, or run one contestant once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, nargs=2, default=[48, 144])
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "ARCHIVE", "OUTPUT"), help="run only it")
    given = parser.parse_args()
    if given.one:
        name, archive, output = given.one
        CONTESTANTS[name][0](Path(archive), Path(output), given.cpus)
        return
    rates = measure(given)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    if given.json:
        print(json.dumps({"machine": machine(), "frames_per_s": medians}, indent=2))
    else:
        print("\n".join(table(medians, given)))


def measure(given: argparse.Namespace) -> dict[str, list[float]]:
    """Frames a second of every contestant that is installed, round by round."""
    there = [name for name, (_, module) in CONTESTANTS.items() if importlib.util.find_spec(module)]
    rates: dict[str, list[float]] = {name: [] for name in there}
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        archives = [Path(folder) / f"archive-{count}" for count in given.frames]
        for archive, count in zip(archives, given.frames, strict=True):
            make_archive(archive, count)
        for turn in range(given.rounds):
            for name in there[turn % len(there) :] + there[: turn % len(there)]:
                print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
                outputs = [Path(folder) / f"{turn}-{name[:8].strip()}-{place}" for place in (0, 1)]
                seconds = [
                    _timed(name, archive, output, given.cpus)
                    for archive, output in zip(archives, outputs, strict=True)
                ]
                further = given.frames[1] - given.frames[0]
                rates[name].append(further / (seconds[1] - seconds[0]))
    return rates


def _timed(name: str, archive: Path, output: Path, cpus: int) -> float:
    command = [sys.executable, "-m", "benchmarks.peers", "--cpus", str(cpus)]
    command += ["--one", name, str(archive), str(output)]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr.decode()[-2000:]}")
    return time.perf_counter() - started


def table(medians: dict[str, float], given: argparse.Namespace) -> Iterator[str]:
    """Markdown."""
    yield f"{time.strftime('%Y-%m-%d')}, {machine()}"
    yield f"{given.cpus} cores, archives of {given.frames[0]} and {given.frames[1]} frames"
    yield ""
    yield "| whole job | frames/s | ratio to ours |"
    yield "|---|---|---|"
    for name, rate in medians.items():
        yield f"| {name} | {rate:.2f} | {medians[OURS] / rate:.2f} |"


if __name__ == "__main__":
    main()
