"""Where metrics go: a JSON-lines file always, TensorBoard where it is installed, the terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS_FILE = "metrics.jsonl"


def _finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null."""
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, in order; an unfinished last line is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricWriter:
    """Appends rows to `<workdir>/metrics.jsonl`, and scalars to TensorBoard where it is installed.

    A row has "step", "stage", "epoch", "split" ("train" or an evaluation split), for evaluations
    "weights" ("raw" or "ema"), and the values.

    Args:
      workdir: directory of the run; created.
      step: step at which the run starts or continues: later rows, of an interrupted run, go.
      enabled: False writes nothing (processes other than the first).
    """

    def __init__(self, workdir: str | Path, *, step: int, enabled: bool = True) -> None:
        self._file: TextIO | None = None
        self._board: Any = None
        if not enabled:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / METRICS_FILE
        kept = [row for row in read_rows(path) if row["step"] <= step] if step else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)
        self._file = path.open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes one row and flushes it."""
        if self._file is None:
            return
        self._file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        if self._board is not None:
            weights = "_ema" if row.get("weights") == "ema" else ""
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{row['split']}{weights}/{name}", value, row["step"])

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class ProgressBar:
    """Steps, loss, images/s and remaining time: a bar on a terminal, else a line per report.

    Args:
      name: label of the stage.
      start: steps done already.
      total: steps of the stage.
      stream: where it is drawn.
      enabled: False draws nothing.
    """

    def __init__(
        self,
        name: str,
        *,
        start: int,
        total: int,
        stream: TextIO | None = None,
        enabled: bool = True,
    ) -> None:
        self._name, self._start, self._total = name, start, total
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._bar = enabled, None
        self._begin: float | None = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=name, initial=start, total=total, file=self._stream, unit="step")

    def step(self) -> None:
        """One more step was started."""
        if self._begin is None:  # not earlier: compiling says nothing about the steps to come
            self._begin = time.monotonic()
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, *, loss: float, images_per_second: float) -> None:
        """Shows the figures of the last interval, which ended with `step` of the stage."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")
        elif self._enabled:
            elapsed = 0.0 if self._begin is None else time.monotonic() - self._begin
            left = elapsed / max(step - self._start, 1) * (self._total - step)
            self.say(
                f"{self._name} {step}/{self._total}: loss {loss:.4f}, "
                f"{images_per_second:.0f} images/s, {_clock(left)} left"
            )

    def say(self, line: str) -> None:
        """A line of its own that does not break the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
