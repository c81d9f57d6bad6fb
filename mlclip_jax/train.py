"""Train a method.

    python -m mlclip_jax.train --config=configs/quickstart.py --workdir=runs/mine
    python -m mlclip_jax.train --config=configs/quickstart.py:backbone=clip-mini-rn \
        --workdir=runs/rn --config.optim.learning_rate=3e-4 --config.duration="5 epochs"

The config file's `get_config` gives the settings (what follows the colon is handed to it), and
`--config.a.b=value` changes one. The run continues from the latest checkpoint in the workdir.

Exit codes: 0 trained; 2 nothing could be done, or the loss stopped being finite, with the reason
on stderr.
"""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlclip_jax.errors import UserError, exit_code
from mlclip_jax.fields import plain

USAGE = (
    "usage: mlclip train --config=FILE[:ARGUMENTS] --workdir=FOLDER [--config.KEY=VALUE ...]\n\n"
    "  --config      Python file with get_config(), e.g. configs/quickstart.py\n"
    "  --workdir     gets checkpoints, metrics.jsonl and TensorBoard files; an interrupted run\n"
    "                that is started again there continues exactly\n"
    "  --config.KEY  changes a setting, e.g. --config.optim.learning_rate=3e-4\n"
)


def load_config(text: str) -> Any:
    """The ConfigDict of "FILE" or "FILE:ARGUMENTS".

    Raises:
      UserError: there is no such file, it is no Python, or it gives no settings.
    """
    from ml_collections import ConfigDict

    name, has_argument, argument = text.partition(":")
    path = Path(name)
    if not path.is_file():
        raise UserError(f"there is no config file {path}; configs/ holds examples")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
    except (SyntaxError, UnicodeDecodeError, ImportError) as error:
        raise UserError(
            f"the config file {path} cannot be read: {error}; configs/ holds examples"
        ) from error
    if get_config is None:
        raise UserError(f"{path} defines no get_config(); configs/ holds examples")
    if has_argument and not inspect.signature(get_config).parameters:
        raise UserError(f"get_config() of {path} takes no argument: leave out ':{argument}'")
    config = plain(get_config(argument) if has_argument else get_config())
    if not isinstance(config, Mapping):
        raise UserError(f"get_config() of {path} gives {config!r}, not a dictionary of settings")
    return ConfigDict(_without_none(config))


def _without_none(config: Mapping[str, Any]) -> dict[str, Any]:
    """A None says no more than a missing key, but would fix the type that an override may have."""
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value is not None
    }


def parse_arguments(args: Sequence[str]) -> tuple[Mapping[str, Any], Path]:
    """The configuration, overrides applied, and the working directory.

    Raises:
      UserError: an argument is missing, superfluous or cannot be read.
    """
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    overrides = [arg for arg in args if re.match(r"--?(no)?config\.", arg)]
    rest = [arg for arg in args if arg not in overrides]
    try:
        extra = values(["mlclip train", *rest])[1:]
    except flags.Error as error:
        raise _flag_error(error) from None
    if extra:
        raise UserError(
            f"unexpected argument {extra[0]!r}: settings are given as --config.KEY=VALUE"
        )
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise UserError(f"--{name} is missing; mlclip train --help says more")
    for override in overrides:
        if "=" not in override and not re.match(r"--?noconfig\.", override):
            raise UserError(f"{override} has no value: write {override}=VALUE")
    # New keys are let through here: the dataclasses that receive the settings know all names and
    # say which one was meant.
    argv = ["mlclip train", *overrides]
    config, changed = load_config(values.config), flags.FlagValues()
    for override in overrides:
        _add_parents(config, override.split("=", 1)[0].split(".")[1:-1])
    try:
        config_flags.DEFINE_config_dict(
            "config",
            config,
            flag_values=changed,
            lock_config=False,
            accept_new_attributes=True,
            sys_argv=argv,
        )
        changed(argv)
    except flags.Error as error:
        raise _flag_error(error) from None
    except (AttributeError, KeyError, TypeError) as error:  # a key below one that holds a value
        raise UserError(f"cannot apply {' '.join(overrides)}: {error.args[0]}") from None
    return changed.config, Path(values.workdir)


def _add_parents(config: Any, parents: Sequence[str]) -> None:
    """Makes room for a key whose group the file leaves at its defaults."""
    for parent in parents:
        if not hasattr(config, "keys"):
            return
        if parent not in config:
            config[parent] = {}
        config = config[parent]


def _flag_error(error: Exception) -> UserError:
    return UserError(" ".join(str(error).split()))


def main(args: Sequence[str] | None = None) -> int:
    """Trains with these arguments (default: those of the process); the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    if {"-h", "--help", "-help"} & set(args):
        print(USAGE, end="")
        return 0

    def run() -> None:
        from mlclip_jax.training.config import parse_config

        config, workdir = parse_arguments(args)
        config = parse_config(config)
        from mlclip_jax.training.loop import fit

        try:
            result = fit(config, workdir)
        except KeyboardInterrupt:
            hint = f"the same command goes on from the last checkpoint in {workdir}"
            print(hint, file=sys.stderr)
            raise
        print(f"trained {result.step} steps; checkpoints and metrics are in {result.workdir}")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
