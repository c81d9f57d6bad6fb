"""Converts the authors' released checkpoints into working directories of this library.

    python scripts/convert_released.py hspnet model-highest.ckpt \
        --config=configs/hspnet/coco.py --workdir=runs/hspnet-coco-released
    python scripts/convert_released.py mkt first_stage.pth second_stage.pth \
        --config=configs/mkt/benchmark.py:recipe=released --workdir=runs/mkt-nus-released

Knows the files of CoOp, DualCoOp, HSPNet, LMPT and MKT as their code saves them: PyTorch's (with
the parity extra; weights only, nothing is unpickled) and safetensors. The result is evaluated and
served like any run; training cannot go on from it, as no release has the optimizer's state in our
form. A setting is changed with --config.KEY=VALUE, as in training.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from released import coop, dual_coop, hspnet, lmpt, mkt
from released.base import Release
from released.files import open_released

from mlclip_jax.clip.arrays import NamedArrays, check_shapes
from mlclip_jax.clip.layouts import Row, Transform
from mlclip_jax.clip.tokenizer import Tokenizer
from mlclip_jax.data import registry
from mlclip_jax.errors import UserError, exit_code
from mlclip_jax.labels.space import LabelSpace
from mlclip_jax.methods.base import Method
from mlclip_jax.train import parse_arguments
from mlclip_jax.training.build import (
    Backbone,
    build_method,
    check_settings,
    load_backbone,
    name_features,
    with_absolute_paths,
)
from mlclip_jax.training.checkpoint import BACKBONE_PREFIX, FOLDER, Checkpoints, describe
from mlclip_jax.training.config import TrainConfig, parse_config
from mlclip_jax.training.step import Leaves, take_apart

#: By method; a further one is a module in `released`.
RELEASES = {m.RELEASE.method: m.RELEASE for m in (coop, dual_coop, hspnet, lmpt, mkt)}
#: Names of an array in the file, and the way from there to our leaf and back.
Place = tuple[tuple[str, ...], Transform]


def read_leaves(
    release: Release,
    arrays: NamedArrays,
    method: Method,
    space: LabelSpace,
    tokenizer: Tokenizer,
    source: str,
) -> tuple[Leaves, list[str]]:
    """Our leaves from a release's arrays, and the labels and groups that it prompts otherwise.

    Args:
        release: how the arrays are named.
        arrays: of the file.
        method: built on the backbone, with the release's settings.
        space: the labels.
        tokenizer: of the backbone.
        source: what messages call the file.

    Raises:
        UserError: names or shapes differ (every difference is listed), or the release was trained
            from another backbone.
    """
    parts = take_apart(method)
    leaves = {**parts.trainable, **parts.frozen}
    learned, frozen = (
        _places(rows, leaves) for rows in release.rows(method, tokenizer, leaves.keys())
    )
    unfilled = {p for p in leaves if not p.startswith(BACKBONE_PREFIX)} - learned.keys()
    if unfilled:
        raise ValueError(f"no array of the release is known for {', '.join(sorted(unfilled))}")
    as_built = {
        path: leaves[path]
        for path, (names, _) in learned.items()
        if release.starts_as_built(names, arrays.shapes.keys())
    }
    learned = {path: place for path, place in learned.items() if path not in as_built}

    # ---- Names and shapes ------------------------------------------------------------------------
    prompts = release.prompts(method, space, tokenizer)
    start = np.asarray(method.clip.text.token_embedding[tokenizer.sot])
    optional = {
        **_shapes(frozen, leaves),
        **{name: array.shape for name, (_, array) in prompts.items()},
        **dict.fromkeys(release.starts, (len(space), 1, *start.shape)),
    }
    expected = _shapes(learned, leaves)
    unused = set(release.unused) - expected.keys()
    held = {name: shape for name, shape in arrays.shapes.items() if name not in unused}
    expected |= {n: s for n, s in optional.items() if n in held}
    check_shapes(expected, held, source)

    # ---- Values ----------------------------------------------------------------------------------
    def load(place: Place) -> np.ndarray:
        names, transform = place
        return transform.load([np.asarray(arrays.read(name), np.float32) for name in names])

    other = [
        name
        for path, place in frozen.items()
        for name in place[0]
        if name in held and not _same(load(place), leaves[path]).all()
    ]
    other += [n for n in release.starts if n in held and not _same(arrays.read(n), start).all()]
    if other:
        raise UserError(
            f"{source} was trained from another CLIP than the config's backbone: {len(other)} "
            f"arrays that training leaves alone differ ({', '.join(sorted(other)[:3])}, ...); "
            f"{release.mend}"
        )
    differing = [
        row
        for name, (rows, array) in prompts.items()
        if name in held
        for row, same in zip(rows, _same(arrays.read(name), array), strict=True)
        if not same.all()
    ]
    found = {path: load(place) for path, place in learned.items()}
    return as_built | found, list(dict.fromkeys(differing))


def _same(a: np.ndarray, b: Any) -> np.ndarray:
    """Elementwise equality of weights whose storage or moving average may have rounded them."""
    return np.isclose(np.asarray(a, np.float32), np.asarray(b), rtol=2**-8, atol=1e-6)


def _places(rows: Sequence[Row], paths: Iterable[str]) -> dict[str, Place]:
    """Names and transform of each path that one of the rows is about."""
    return {
        path: (names, row.transform)
        for path in paths
        for row in rows
        if (names := row.names_at(path)) is not None
    }


def _shapes(places: Mapping[str, Place], leaves: Leaves) -> dict[str, tuple[int, ...]]:
    """Name -> shape that the file's arrays must have for our leaves."""
    return {
        name: part.shape
        for path, (names, transform) in places.items()
        for name, part in zip(names, transform.save(np.asarray(leaves[path])), strict=True)
    }


def convert(
    release: Release,
    paths: Sequence[Path],
    config: TrainConfig,
    workdir: Path,
    *,
    weights: str | None = None,
) -> None:
    """Writes a checkpoint with a release's weights into `workdir`.

    Args:
        release: whose files they are.
        paths: the files.
        config: of the run that it stands for; its last stage names the method.
        workdir: without a checkpoint yet.
        weights: "raw" or "ema" where a file has both.

    Raises:
        UserError: the files, the configuration and the backbone do not fit, or there is a
            checkpoint already.
    """
    check_settings(config)
    config = with_absolute_paths(config)
    stage = config.stages[-1]
    if stage.method["name"] != release.method:
        raise UserError(
            f"the config's method is {stage.method['name']!r} and the file is of "
            f"{release.method!r}: give a config of that method"
        )
    if any((workdir / FOLDER).glob("[0-9]*")):
        raise UserError(f"{workdir} holds a checkpoint already: choose another workdir")
    arrays = release.join([open_released(path, weights) for path in paths])
    source = " and ".join(map(str, paths))

    backbone = load_backbone(config.backbone, seed=config.seed)
    space = registry.label_space(config.data, name_features=name_features(backbone))
    method = build_method(stage, backbone, space, seed=config.seed)
    if wrong := release.wrong_settings(arrays.shapes, method):
        values = ", ".join(f"method.{key}={value!r}" for key, value in wrong.items())
        raise UserError(f"the config is not the release's: set {values}")
    method.label_inputs(space, backbone.tokenizer)  # labels that do not suit are an error now
    leaves, differing = read_leaves(release, arrays, method, space, backbone.tokenizer, source)

    _save(leaves, method, space, backbone, config, paths, workdir)
    print(f"converted {source} into {workdir}; {release.remark}")
    if differing:
        print(
            f"the prompts of {len(differing)} labels or groups differ from the checkpoint's, and "
            f"so will scores: {', '.join(differing)}"
        )
    print(f"score it: python -m mlclip_jax.evaluate --workdir={workdir}")


def _save(
    leaves: Leaves,
    method: Method,
    space: LabelSpace,
    backbone: Backbone,
    config: TrainConfig,
    paths: Sequence[Path],
    workdir: Path,
) -> None:
    """The checkpoint of step 0: as of a run, without the optimizer's state."""
    trainable = take_apart(method).trainable
    arrays = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    state = {
        "step": jnp.zeros((), jnp.int32),
        "trainable": {name: leaf for name, leaf in arrays.items() if name in trainable},
        "opt_state": {},
        "batch_stats": {},
        "ema": {},
        "key": jax.random.key_data(jax.random.key(config.seed)),
    }
    frozen = {name: leaf for name, leaf in arrays.items() if name not in trainable}
    meta = {
        "step": 0,
        "stage": len(config.stages) - 1,
        "stage_name": config.stages[-1].name,
        "step_in_stage": 0,
        "interval": {"count": 0, "sums": {}},
        "trained_before": sorted(name for name in leaves if name.startswith(BACKBONE_PREFIX)),
        "ema": False,
        "metrics": {},
        **describe(config, space, backbone.digest),
    }
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    names = [path.name for path in paths]
    meta["converted"] = {"file": " and ".join(names), "digest": " ".join(digests)}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(0, state, frozen, meta, None)


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s RELEASE CHECKPOINT... --config=FILE[:ARGUMENTS] --workdir=FOLDER "
        "[--raw | --ema] [--config.KEY=VALUE ...]",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("release", choices=tuple(RELEASES))
    parser.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="checkpoint",
        help="the authors' file, or its .safetensors form; of MKT one for each stage",
    )  # fmt: skip
    chosen = parser.add_mutually_exclusive_group()
    for weights, words in (("raw", "raw"), ("ema", "averaged")):
        chosen.add_argument(
            f"--{weights}", dest="weights", action="store_const", const=weights,
            help=f"take the {words} weights of a file that has both",
        )  # fmt: skip
    options, rest = parser.parse_known_args(args)

    def run() -> None:
        config, workdir = parse_arguments(rest)
        release = RELEASES[options.release]
        paths, config = options.checkpoints, parse_config(config)
        convert(release, paths, config, workdir, weights=options.weights)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
