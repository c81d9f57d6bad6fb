"""Make the original download of a corpus ready for training: records that are read by number.

    python -m mlclip_jax.prepare coco2014 --raw=downloads/coco --data_dir=data
    python -m mlclip_jax.prepare custom --raw=photos --data_dir=data
    python -m mlclip_jax.prepare voc --parts=train2012 --tfds=tensorflow_datasets/voc/2012/5.0.0 ...

All images are opened on the way. A run that was interrupted is continued by the same command; one
that is done does nothing. Published lists among the raw files are copied. Then set data.data_dir
to the same folder. The raw folder itself can be given there too: preparing makes reading faster
and finds damaged images before training does.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlclip_jax.data.raw import NEEDED
from mlclip_jax.errors import UserError, exit_code

if TYPE_CHECKING:
    from mlclip_jax.data.builders import Prepared


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlclip prepare",
        description="Make the original download of a corpus ready for training.",
    )
    parser.add_argument(
        "corpus", help=f"one of {', '.join(NEEDED)}; with a year or size, such as coco2014 or "
        "imagenet21k, only those parts of it",
    )  # fmt: skip
    parser.add_argument("--raw", type=Path, help="folder of the download, as its archives unpack")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder that gets one for each corpus"
    )
    parser.add_argument(
        "--parts", default="", help="such as train2014,val2014 (default: those that are there)"
    )
    parser.add_argument(
        "--allow_missing", action="store_true",
        help="leave out images that are missing or cannot be read; they are listed in a file",
    )  # fmt: skip
    parser.add_argument(
        "--tfds", type=Path, help="in place of --raw: folder of a data set that TFDS's own builder "
        "(coco, voc, imagenet2012) prepared as ArrayRecord; it is linked, not copied",
    )  # fmt: skip
    return parser.parse_args(args)


def run(options: argparse.Namespace) -> int:
    """Prepare all parts; the exit code."""
    from mlclip_jax.data.raw.common import check_part

    corpus, parts = _corpus(options.corpus)
    target = options.data_dir / corpus
    if options.tfds is None:
        if options.raw is None:
            raise UserError("--raw is needed, the folder of the download")
        if not options.raw.is_dir():
            raise UserError(f"there is no folder {options.raw}: give the download with --raw")
        if target.resolve() == options.raw.resolve():
            raise UserError(
                f"the prepared data would be put among the raw files, in {target}: choose another "
                "--data_dir"
            )
        if not options.parts:
            parts = _present(options.raw, corpus, parts)
    elif not options.parts:
        raise UserError(f"--tfds needs --parts: which part it is of {', '.join(parts)}")
    chosen = [part.strip() for part in options.parts.split(",")] if options.parts else parts
    for part in chosen:
        check_part(corpus, part, importlib.import_module(f"mlclip_jax.data.raw.{corpus}").PARTS)
    for part in chosen:
        done = _prepare(options, corpus, part)
        print(f"{corpus}/{part}: {_told(done)}")
    if options.raw is not None:
        from mlclip_jax.data import builders

        for name in builders.copy_lists(corpus, options.raw, options.data_dir):
            print(f"{corpus}: copied the list {name}")
    print(f"ready: set data.data_dir={options.data_dir}")
    return 0


def _corpus(name: str) -> tuple[str, list[str]]:
    """The corpus that a name begins with, and its usual parts, of the year or size after it."""
    for corpus, parts in NEEDED.items():
        rest = name.removeprefix(corpus)
        found = [part for part in parts if not rest or rest in re.findall(r"\d+k?", part)]
        if name.startswith(corpus) and found:
            return corpus, found
    from mlclip_jax.spec import unknown

    raise unknown("corpus", name, NEEDED)


def _present(raw: Path, corpus: str, parts: Sequence[str]) -> list[str]:
    """The parts whose annotations are there; says which are not."""
    needed = NEEDED[corpus]
    annotated = [part for part in parts if any(raw.glob(needed[part]))]
    found = _custom_parts(raw, parts) if corpus == "custom" else annotated
    if not found:
        raise UserError(f"{raw} has no {' or '.join(dict.fromkeys(needed[p] for p in parts))}: is "
                        f"it the folder of {corpus}, and is everything unpacked?")  # fmt: skip
    for part in parts:
        if part not in found:
            why = "" if part in annotated else f" (no {needed[part]})"
            print(f"{corpus}/{part}: not there{why}")
    return found


def _custom_parts(raw: Path, parts: Sequence[str]) -> list[str]:
    """The parts that the user's file has images of."""
    from mlclip_jax.data.raw import custom

    found, problem = [], None
    for part in parts:
        try:
            custom.read(raw, part)
        except UserError as error:  # the same for all parts, or no images of this one
            problem = problem or error
        else:
            found.append(part)
    if not found:
        raise problem
    return found


def _prepare(options: argparse.Namespace, corpus: str, part: str) -> Prepared:
    """One part, with a progress bar."""
    from tqdm import tqdm

    from mlclip_jax.data import builders, foreign
    from mlclip_jax.data.raw.common import differences

    name = f"{corpus}/{part}"
    seconds = 0.5 if sys.stderr.isatty() else 30  # between two lines of a log
    progress = partial(
        tqdm, desc=name, unit="image", file=sys.stderr, mininterval=seconds,
        delay=0.1,  # no bar before there is something to count
    )  # fmt: skip
    if options.tfds is not None:
        with progress() as bar:
            return foreign.link(
                corpus, part, options.tfds, options.data_dir, raw=options.raw, tick=bar.update
            )
    module = importlib.import_module(f"mlclip_jax.data.raw.{corpus}")
    manifest = module.read(options.raw, part)
    print(f"{name}: {len(manifest):,} images, {len(manifest.space):,} labels")
    for difference in differences(manifest, module.EXPECTED.get(part, {})):
        print(f"note: {difference}")
    with progress(total=len(manifest)) as bar:
        return builders.prepare(
            corpus, part, manifest, options.raw, options.data_dir,
            allow_missing=options.allow_missing, tick=bar.update,
        )  # fmt: skip


def _told(done: Prepared) -> str:
    """What was done, in words."""
    left_out = f" without {done.left_out:,} missing or unreadable ones" if done.left_out else ""
    text = f"{done.images:,} images{left_out} in {done.folder}"
    if done.written:
        return text
    again = " (remove that folder to try these again)" if done.left_out else ""
    return f"prepared before, nothing to do: {text}{again}"


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
