"""Tag images from the command line: one JSON line for each, in order.

    python -m mlclip_jax.tag photos/ --workdir=runs/mine
    python -m mlclip_jax.tag photos/ --classifier=model/
    python -m mlclip_jax.tag a.jpg b.png --clip=ViT-B/32 --labels=my_labels.txt --top_k=3
    python -m mlclip_jax.tag photos/ --workdir=runs/mine --explain=pictures/

Exit codes: 0 all images tagged; 1 some could not be read (their lines say "error"); 2 nothing could
be done, with the reason on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mlclip_jax.errors import UserError, exit_code

if TYPE_CHECKING:
    from mlclip_jax.serving.tagger import Tagger

#: What counts as an image inside a folder, whatever the case of its letters.
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
    }
)
# Annotations of a folder of images (`data.raw.custom`).
_LABEL_FILES = frozenset({"labels.csv", "labels.jsonl", "labels.txt"})

_MOST_MAPS = 11  # of an image: two rows of a picture


def find_images(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """The image files that arguments name, and how many files in folders are none (nor labels).

    A file is taken whatever its name; a folder gives the files below it that have a suffix of
    `IMAGE_SUFFIXES`, sorted by path, hidden ones left out. Links to folders are not followed.

    Raises:
        UserError: an argument does not exist, or the folders hold no image.
    """
    found: list[Path] = []
    others = 0
    for path in paths:
        if path.is_dir():
            files = [
                Path(folder, name)
                for folder, folders, names in os.walk(path)
                if _forget_hidden(folders)
                for name in names
                if not name.startswith(".") and name not in _LABEL_FILES
            ]
            images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            others += len(files) - len(images)
            found += sorted(images, key=lambda file: file.parts)
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"there is no file or folder {path}; check the path")
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"no image files in {', '.join(map(str, paths))} (looked for {known})")
    return found, others


def _forget_hidden(folders: list[str]) -> bool:
    """Keeps `os.walk` out of hidden folders; always true."""
    folders[:] = [folder for folder in folders if not folder.startswith(".")]
    return True


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mlclip tag",
        description="Tag images with a trained method (--workdir), a classifier made of one "
        "(--classifier) or zero-shot (--clip and --labels). Writes a JSON object a line for each "
        "image, in order.",
        epilog="Scores of a trained method are sigmoids, each label for itself; those of MKT and "
        "CLIP-FT compare the labels that are given, of which there have to be two or more, and "
        "rank them (MKT's plain sums, score='sum', are of any size, each label for itself). "
        "Zero-shot scores are shares of a softmax over the given labels: they rank, and add up to "
        "1; 'cosine' is the similarity itself.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--workdir", type=Path, help="folder of a training run")
    parser.add_argument(
        "--checkpoint", choices=("latest", "best"), help="which of the run (default: best)"
    )
    parser.add_argument(
        "--weights", choices=("auto", "raw", "ema"), help="of the run (default: ema where kept)"
    )
    parser.add_argument("--classifier", type=Path, help="folder that mlclip export wrote")
    parser.add_argument("--clip", help="zero-shot: name of a CLIP, folder, or hub id")
    parser.add_argument(
        "--labels", type=Path,
        help="text file with one label a line; with --workdir: other labels than it was trained "
        "for, where its method allows",
    )  # fmt: skip
    parser.add_argument(
        "--taxonomy",
        help="groups of the --labels for methods that need them: 'cluster', 'cluster(5)' or a YAML "
        "file (group: [labels])",
    )
    parser.add_argument(
        "--template",
        action="append",
        help='zero-shot prompt such as "a photo of a {}."; repeatable',
    )
    parser.add_argument("--output", type=Path, help="file to write instead of stdout")
    parser.add_argument("--top_k", type=int, help="labels for each image (default: 5)")
    parser.add_argument("--threshold", type=float, help="least score, instead of or with --top_k")
    parser.add_argument(
        "--explain", type=Path, metavar="FOLDER",
        help="write a picture of each image here: where the scores of its highest labels come from",
    )  # fmt: skip
    kinds = ("contrast", "patches", "grad_cam")
    parser.add_argument("--map", choices=kinds, help="what is shown (default: contrast)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=8, help="threads that decode images")
    options = parser.parse_args(args)
    if [options.workdir, options.classifier, options.clip].count(None) != 2:
        parser.error("give one of --workdir, --classifier and --clip")
    if options.clip is not None and options.labels is None:
        parser.error("--clip needs --labels, a text file with one label a line")
    if options.classifier is not None and options.labels is not None:
        parser.error("--labels: a classifier has its own labels, which cannot change")
    if options.taxonomy is not None and (options.workdir is None or options.labels is None):
        parser.error("--taxonomy belongs to --workdir with --labels")
    if options.clip is None and options.template:
        parser.error("--template belongs to --clip; a trained method has its own prompts")
    if options.workdir is None and (options.checkpoint or options.weights):
        parser.error("--checkpoint and --weights belong to --workdir")
    if options.map is not None and options.explain is None:
        parser.error("--map belongs to --explain")
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def _tagger(options: argparse.Namespace) -> Tagger:
    from mlclip_jax.labels.space import LabelSpace

    space = None if options.labels is None else LabelSpace.from_file(options.labels)
    from mlclip_jax.serving.tagger import DEFAULT_TEMPLATE, Tagger
    from mlclip_jax.training.loop import use_compilation_cache

    use_compilation_cache()
    if options.clip is not None:
        return Tagger.from_clip(
            options.clip,
            space,
            templates=options.template or DEFAULT_TEMPLATE,
            batch_size=options.batch_size,
        )
    if options.classifier is not None:
        return Tagger.from_classifier(options.classifier, batch_size=options.batch_size)
    return Tagger.from_workdir(
        options.workdir,
        labels=space,
        taxonomy=options.taxonomy or "own",
        checkpoint=options.checkpoint or "best",
        weights=options.weights or "auto",
        batch_size=options.batch_size,
    )


def run(options: argparse.Namespace) -> int:
    """Tag everything; the exit code."""
    files, others = find_images(options.images)
    if others:
        several = f"{others} files that are no images by their"
        what = "1 file that is no image by its" if others == 1 else several
        print(f"passing over {what} suffix", file=sys.stderr)
    if options.output is not None and not options.output.parent.is_dir():
        raise UserError(f"there is no folder {options.output.parent} to write --output into")
    pictures = None
    if options.explain is not None:
        from mlclip_jax.serving.explanations import Folder

        pictures = Folder(options.explain)
    tagger = _tagger(options)
    top_k = 5 if options.top_k is None and options.threshold is None else options.top_k
    results = tagger.stream(
        files, top_k=top_k, threshold=options.threshold, workers=options.workers
    )
    to_file = options.output is not None
    if sys.stderr.isatty() and (to_file or not sys.stdout.isatty()):
        from tqdm import tqdm

        results = tqdm(results, total=len(files), unit="image", file=sys.stderr)
    start, failed = time.perf_counter(), []
    with options.output.open("w", encoding="utf-8") if to_file else nullcontext(sys.stdout) as out:
        for file, tags in results:
            line: dict[str, object] = {"file": str(file)}
            if isinstance(tags, UserError):
                if len(files) == 1:
                    raise tags
                failed.append(tags)
                line["error"] = str(tags)
            else:
                line["labels"] = tags
                if pictures is not None:
                    (found,) = tagger.explain(
                        [file],
                        kind=options.map or "contrast",
                        top_k=min(top_k or _MOST_MAPS, _MOST_MAPS),
                        threshold=options.threshold,
                    )
                    line["picture"] = str(pictures.save(found, file.stem))
            print(_json(line), file=out, flush=not to_file)
    rate = len(files) / (time.perf_counter() - start)
    summary = f"tagged {len(files) - len(failed)} of {len(files)} images ({rate:.1f} images/s)"
    print(f"{summary}; {tagger.score_kind} scores", file=sys.stderr)
    for error in failed:
        print(f"failed: {error}", file=sys.stderr)
    return 1 if failed else 0


def _json(line: dict[str, object]) -> str:
    """One line of JSON, readable in any script; file names that are no UTF-8 are escaped."""
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


def main(args: Sequence[str] | None = None) -> int:
    """The command with its arguments (default: those of the process); the exit code."""
    options = _arguments(args)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
