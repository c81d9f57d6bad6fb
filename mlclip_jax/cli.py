"""The console script `mlclip <command>`: each command's module is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mlclip_jax import __version__

#: Command -> what it does; the command's module is `mlclip_jax.<command>` with `main(args)`.
COMMANDS = {
    "prepare": "make data ready:       mlclip prepare coco2014 --raw=coco --data_dir=data",
    "train": "train a method:        mlclip train --config=configs/quickstart.py --workdir=runs/a",
    "evaluate": "score a trained one:   mlclip evaluate --workdir=runs/a --split=test",
    "export": "write a classifier:    mlclip export --workdir=runs/a --output=model/",
    "tag": "tag your own images:   mlclip tag photos/ --workdir=runs/a",
}


def usage() -> str:
    """The text of `mlclip --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return (
        "usage: mlclip COMMAND ...\n\n"
        "Multi-label image recognition with CLIP in JAX.\n\n"
        f"commands:\n{lines}\n\n"
        "mlclip COMMAND --help says more; mlclip --version prints the version."
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run a command with its arguments (default: those of the process); the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    name, *rest = args
    if name in ("-V", "--version"):
        print(f"mlclip {__version__}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"error: there is no command {name!r}; the commands are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(f"mlclip_jax.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
