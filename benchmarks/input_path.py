"""The input path: images/s of preparing one image on one core, and of whole batches.

    python benchmarks/input_path.py --out benchmarks/results/input_path_cpu.json

Synthetic JPEGs of COCO's size (640x480, about 130 kB) become uint8 pixels. "prepare" is one thread
and one image at a time: exact decoding and the JPEG decoder's own scaling, as evaluation and
training have them. "batches" runs from files to shuffled batches on the host with so many worker
processes. It compares the library's random resized crop with a PyTorch DataLoader's (where torch is
installed), which decodes each image whole, crops and resizes it in Pillow, mirrors half of the
images and normalises them to float32: the usual way. "torch, uint8" leaves the last two to the
device, as the library does.

Cases are measured in turn. "prepare" counts processor time, which other programs do not take; a
stream is timed by the clock, while nothing is done but wait for batches, from where those that were
prepared ahead have been used up.
Without workers the library prepares batches in threads, and a DataLoader while it is asked.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import timing
from PIL import Image

from mlclip_jax.data.augment import RECIPES, Augment, example_rng, recipe
from mlclip_jax.data.pipeline import train_batches
from mlclip_jax.data.transforms import Preprocess

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
WORKERS = (0, 1, 2)


def make_photo(seed: int) -> bytes:
    """A JPEG of 640x480 with structure at all scales, as photographs have: about 130 kB."""
    rng = np.random.default_rng(seed)
    pixels = np.full((480, 640, 3), 127.0)
    for cell in (4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, 9 * math.sqrt(cell / 4), (480 // cell + 1, 640 // cell + 1, 3))
        channels = [
            Image.fromarray(coarse[..., c].astype(np.float32)).resize((640, 480)) for c in range(3)
        ]
        pixels += np.stack([np.asarray(channel) for channel in channels], -1)
    pixels += rng.normal(0, 10.5, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


class Files:
    """The library's source of image files."""

    def __init__(self, paths: list[Path], augment: Augment) -> None:
        self.paths, self.augment = paths, augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.augmented(i, None)

    def augmented(self, i: int, rng: np.random.Generator | None) -> dict[str, Any]:
        image = self.augment(self.paths[i], rng)
        return {"image": image, "targets": np.zeros(80, np.int8), "index": i}

    def class_counts(self) -> np.ndarray:
        return np.zeros(80, np.int64)


def usual_crop(content: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Whole decoding, then a random part cropped and resized: uint8 [size size 3]."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    while True:
        area, shape = rng.uniform(0.08, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(image.width * image.height * area * shape))
        h = round(math.sqrt(image.width * image.height * area / shape))
        if w <= image.width and h <= image.height:
            break
    x, y = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
    part = image.crop((x, y, x + w, y + h))
    return np.array(part.resize((size, size), Image.Resampling.BICUBIC))


class UsualDataset:
    """What a PyTorch DataLoader reads: (image, targets)."""

    def __init__(self, paths: list[Path], size: int, as_float: bool) -> None:
        self.paths, self.size, self.as_float = paths, size, as_float

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng()
        image = usual_crop(self.paths[i].read_bytes(), self.size, rng)
        if self.as_float:
            image = image[:, ::-1] if rng.random() < 0.5 else image
            image = ((image / np.float32(255) - MEAN) / STD).transpose(2, 0, 1)
        return np.ascontiguousarray(image), np.zeros(80, np.int8)


def torch_batches(
    paths: list[Path], size: int, batch: int, workers: int, as_float: bool
) -> Iterator[Any]:
    """Endless shuffled batches of a PyTorch DataLoader."""
    import torch

    loader = torch.utils.data.DataLoader(
        UsualDataset(paths, size, as_float),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
    )
    while True:
        yield from loader


def prepare_cases(contents: list[bytes], size: int) -> dict[str, Callable[[], Any]]:
    """Preparing all images once, by what is done."""

    def every(prepare: Callable[[bytes, int], Any]) -> Callable[[], Any]:
        def run() -> None:
            for i, content in enumerate(contents):
                prepare(content, i)

        return run

    cases = {
        "usual random resized crop": every(
            lambda content, i: usual_crop(content, size, example_rng(0, 0, i))
        )
    }
    for mode in ("clip", "squash"):
        for fast in (False, True):
            prepare = Preprocess(size, mode, fast_decode=fast)
            name = f"{mode}, {'scaled' if fast else 'exact'}"
            cases[name] = every(lambda content, i, f=prepare: f(content))
    for name in (n for n in RECIPES if n not in ("none", "flip")):  # these leave pixels alone
        for fast in (False, True):
            mode = "squash" if name == "cutout_randaugment" else "clip"
            change = Augment(Preprocess(size, mode, fast_decode=fast), recipe(name))
            cases[f"{name}, {'scaled' if fast else 'exact'}"] = every(
                lambda content, i, f=change: f(content, example_rng(0, 0, i))
            )
    return cases


def stream_cases(
    paths: list[Path], size: int, batch: int
) -> dict[str, Callable[[], Iterator[Any]]]:
    """Streams of batches by name and number of workers."""
    cases: dict[str, Callable[[], Iterator[Any]]] = {}
    try:
        import torch  # noqa: F401

        kinds: tuple[tuple[str, bool], ...] = (("torch", True), ("torch, uint8", False))
    except ImportError:
        kinds = ()
    for workers in WORKERS:
        for name, as_float in kinds:
            cases[f"{name}, {workers} workers"] = lambda w=workers, f=as_float: torch_batches(
                paths, size, batch, w, f
            )
        for name, fast in (("mlclip_jax, exact", False), ("mlclip_jax, scaled", True)):
            source = Files(paths, Augment(Preprocess(size, fast_decode=fast), recipe("flip_rrc")))
            cases[f"{name}, {workers} workers"] = lambda w=workers, s=source: train_batches(
                s, batch, seed=0, num_workers=w
            )
    return cases


def seconds_of_work(cases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Processor seconds of each case, in turn, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats + 1):
        for name, run in cases.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


def stream_rate(
    open_stream: Callable[[], Iterator[Any]], batch: int, ahead: int, batches: int
) -> float:
    """Images/s over so many batches after the first `ahead`."""
    with closing(open_stream()) as stream:
        for _ in range(ahead):
            next(stream)
        start = time.perf_counter()
        for _ in range(batches):
            next(stream)
        return batch * batches / (time.perf_counter() - start)


def compare_streams(measured: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of images/s by case, with their ratios to PyTorch's at as many workers; printed too."""
    print(f"\n{'batches':<34} {'images/s':>9} {'spread':>7} {'ratio':>7} {'to uint8':>9}")
    rows = []
    for name, values in measured.items():
        workers = name.split(", ")[-1]
        row = {"case": name, "images_per_s": statistics.median(values), "all_images_per_s": values}
        for key, peer in (
            ("ratio", f"torch, {workers}"),
            ("uint8_ratio", f"torch, uint8, {workers}"),
        ):
            known = peer in measured
            row[key] = row["images_per_s"] / statistics.median(measured[peer]) if known else None
        ratio, to_uint8 = (row[key] or math.nan for key in ("ratio", "uint8_ratio"))
        shown = f"{row['images_per_s']:>9.0f} {max(values) - min(values):>7.0f}"
        print(f"{name:<34} {shown} {ratio:>7.2f} {to_uint8:>9.2f}")
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=256, help="different files")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--ahead", type=int, default=24, help="untimed batches of each stream")
    parser.add_argument("--batches", type=int, default=30, help="timed batches of each stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    contents = [make_photo(i) for i in range(args.images)]
    kilobytes = statistics.mean(map(len, contents)) / 1000
    print(f"{args.images} JPEGs of 640x480, {kilobytes:.0f} kB on average, to {args.size} pixels\n")

    some = contents[:32]
    prepared = seconds_of_work(prepare_cases(some, args.size), args.repeats)
    usual = statistics.median(prepared["usual random resized crop"])
    print(f"{'prepare, one core':<34} {'images/s':>9} {'spread':>7} {'ratio':>7}")
    rows = []
    for name, seconds in prepared.items():
        rates = [len(some) / value for value in seconds]
        rate, ratio = statistics.median(rates), usual / statistics.median(seconds)
        rows.append({"case": name, "images_per_s": rate, "all_images_per_s": rates, "ratio": ratio})
        print(f"{name:<34} {rate:>9.0f} {max(rates) - min(rates):>7.0f} {ratio:>7.2f}")

    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i:06}.jpg" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        cases = stream_cases(paths, args.size, args.batch_size)
        measured: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.repeats):
            for name, open_stream in cases.items():
                measured[name].append(
                    stream_rate(open_stream, args.batch_size, args.ahead, args.batches)
                )
    streams = compare_streams(measured)
    if args.out:
        setting = {
            "size": args.size,
            "file_kilobytes": kilobytes,
            "batch_size": args.batch_size,
            "ahead": args.ahead,
            "batches": args.batches,
        }
        timing.save(args.out, {"setting": setting, "prepare": rows, "batches": streams})


if __name__ == "__main__":
    main()
