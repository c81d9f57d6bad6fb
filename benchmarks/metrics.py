"""Mean average precision against scikit-learn's loop over classes, and memory at full size.

    python benchmarks/metrics.py --out benchmarks/results/metrics_cpu.json

Speed: 41,620 images x 601 classes, the size of the Open Images test set with boxed labels; 3 % of
the labels are positive. scikit-learn scores a share of the classes (its time is linear in them),
in turn with ours in one run. Memory: 125,456 x 7,586, the largest evaluation of the papers here
(Open Images, seen and unseen labels): 4.5 GiB of inputs, and what each metric needs above them.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timing

from mlclip_jax.evaluation import metrics
from mlclip_jax.evaluation.protocol import PROTOCOLS
from mlclip_jax.labels.space import LabelSpace


def make_problem(images: int, classes: int, positive: float = 0.03) -> tuple[np.ndarray, ...]:
    """Scores float32 and targets int8 `[n c]` in {1, 0, -1}; positives score higher on average."""
    rng = np.random.default_rng(0)
    scores = np.empty((images, classes), np.float32)
    targets = np.empty((images, classes), np.int8)
    for start in range(0, images, 1024):
        rows = slice(start, start + 1024)
        rng.standard_normal(out=scores[rows], dtype=np.float32)
        chance = rng.random(scores[rows].shape, dtype=np.float32)
        targets[rows] = np.where(chance < positive, 1, -(chance < 0.5).astype(np.int8))
        scores[rows] += targets[rows] > 0
    return scores, targets


def scikit_learn(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """AP of every class `[c]` by scikit-learn."""
    from sklearn.metrics import average_precision_score

    pairs = zip(targets.T, scores.T, strict=True)
    return np.array([average_precision_score(target > 0, score) for target, score in pairs])


def speed(images: int, classes: int, share: int, repeats: int) -> dict[str, Any]:
    """Times by name, ratios, and how far the figures are apart."""
    scores, targets = make_problem(images, classes)
    part = scores[:, :share], targets[:, :share]
    ours = metrics.average_precision(*part, assume_negative=True, ties="grouped")
    gap = float(np.abs(ours - scikit_learn(*part)).max())
    timings = timing.measure(
        {
            "scikit-learn, a share of the classes": lambda: scikit_learn(*part),
            "stable ties": lambda: metrics.average_precision(scores, targets, assume_negative=True),
            "ties of scikit-learn": lambda: metrics.average_precision(
                scores, targets, assume_negative=True, ties="grouped"
            ),
        },
        warmup=1,
        repeats=repeats,
    )
    reference = timings["scikit-learn, a share of the classes"].median_s / share
    rows = []
    for name, took in timings.items():
        count = share if "share" in name else classes
        each = took.median_s / count
        faster = reference / each
        rows.append({"name": name, "classes": count, "time": took, "ms_per_class": 1e3 * each,
                     "times_faster_per_class": faster})  # fmt: skip
        print(f"{name:<38} {1e3 * each:8.3f} ms a class {faster:7.1f}x")
    print(f"largest difference of an AP from scikit-learn's: {gap:.1e}")
    return {"images": images, "classes": classes, "rows": rows, "max_difference": gap}


def memory(images: int, classes: int) -> list[dict[str, Any]]:
    """Seconds of each metric, and the peak of resident memory above the inputs up to its end."""
    scores, targets = make_problem(images, classes)
    unseen = tuple(range(classes - max(20, classes // 19), classes))
    space = LabelSpace(tuple(map(str, range(classes))), subsets={"unseen": unseen})
    cases: dict[str, Callable[[], Any]] = {
        "average_precision": lambda: metrics.average_precision(scores, targets),
        "average_precision, grouped": lambda: metrics.average_precision(
            scores, targets, ties="grouped"
        ),
        "precision_recall_f1, top-20": lambda: metrics.precision_recall_f1(scores, targets, k=20),
        "precision_recall_f1, threshold": lambda: metrics.precision_recall_f1(
            scores, targets, threshold=1.0
        ),
        "open_images_zsl": lambda: PROTOCOLS["open_images_zsl"].measure(scores, targets, space),
        "long_tail": lambda: PROTOCOLS["long_tail"].measure(
            scores, targets, space, train_counts=np.arange(classes)
        ),
    }
    rows, inputs = [], _resident()
    print(f"inputs: {(scores.nbytes + targets.nbytes) / 2**30:.2f} GiB")
    for name, run in cases.items():
        start = time.perf_counter()
        run()
        seconds, above = time.perf_counter() - start, _peak() - inputs
        rows.append({"name": name, "seconds": seconds, "peak_above_inputs_gib": above})
        print(f"{name:<38} {seconds:8.1f} s, peak so far {above:.3f} GiB above the inputs")
    return rows


def _resident() -> float:
    """Resident memory of this process now, in GiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def _peak() -> float:
    """Highest resident memory of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=41_620)
    parser.add_argument("--classes", type=int, default=601)
    parser.add_argument("--share", type=int, default=60, help="classes that scikit-learn scores")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory", type=int, nargs=2, default=(125_456, 7_586), metavar=("IMAGES", "CLASSES"),
        help="size of the memory measurement; 0 0: none",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    results: dict[str, Any] = {}
    if all(args.memory):  # first: the peak must not be another measurement's
        results["memory"] = {
            "images": args.memory[0], "classes": args.memory[1], "rows": memory(*args.memory)
        }  # fmt: skip
    results["speed"] = speed(args.images, args.classes, args.share, args.repeats)
    if args.out:
        timing.save(args.out, results)


if __name__ == "__main__":
    main()
