"""The diary of a training run: its numbers as a table, curves and pictures that show how it learns."""

from __future__ import annotations

import csv
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd
from matplotlib.image import imread

from tomocpt_stream.diary_pictures import draw_curves, draw_look
from tomocpt_stream.whole import whole

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from tomocpt_stream.diary_pictures import Look

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "weighted",
    "gradient",
    "norm",
    "learning_rate",
    "validation",
    "seconds",
    "waited",
)
"""The columns of curves.csv; empty where a step does not say."""

_LOGGER = logging.getLogger(__name__)
_SCALARS = {
    "loss/training": "loss",
    "loss/weighted": "weighted",
    "loss/gradient": "gradient",
    "loss/validation": "validation",
    "run/learning_rate": "learning_rate",
    "run/gradient_norm": "norm",
}
_REDRAWN = 500  # steps after which curves without validation are drawn again


class Step(Protocol):
    """A step that is done, as the training loop tells of it; further columns are taken where it has them."""

    @property
    def step(self) -> int:
        """Steps done, those of earlier parts of the run included."""
        ...

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        ...

    @property
    def validation(self) -> float | None:
        """The validation loss, where this step has one."""
        ...


class Diary:
    """Writes down a run in `folder`: curves.csv, curves.png, looks/step_000400.png, TensorBoard's events.

    The table gets a row a step. The curves are drawn again at each validation; of the looks, the first one
    is drawn, that of the last step asked for, and those of each `every`-th epoch. A run that goes on from an
    earlier step loses the rows from there on, which it writes anew. Events are written where tensorboard is
    installed, unless `tensorboard` is False. What cannot be written is a warning in the log: no run ends for
    its diary.
    """

    def __init__(self, folder: str | os.PathLike[str], *, every: int = 5, tensorboard: bool = True) -> None:
        self._folder, self._every = Path(folder), max(1, every)
        self._events = _Events(self._folder / "tensorboard") if tensorboard else None
        self._last: int | None = None  # the step of the table's last row; None before the table was looked at
        self._final: int | None = None
        self._undrawn = 0
        self._complained = False

    @property
    def table(self) -> Path:
        """The path of curves.csv."""
        return self._folder / "curves.csv"

    def step(self, step: Step) -> None:
        """Take note of a step."""
        with self._forgiving():
            if self._last is None or step.step <= self._last or not self.table.exists():
                self._last = None
                self._rewind(step.step)
            line = ",".join(_text(getattr(step, name, None)) for name in COLUMNS)
            # One unbuffered write: a line is there as a whole, whenever the run is killed.
            with self.table.open("ab", buffering=0) as file:
                self._last = step.step if file.write(f"{line}\n".encode()) == len(line) + 1 else None
        self._final, self._undrawn = step.steps, self._undrawn + 1
        if self._events is not None:
            with self._forgiving():
                self._events.scalars(step)
        if step.validation is not None or step.step >= step.steps or self._undrawn >= _REDRAWN:
            self._undrawn = 0
            with self._forgiving():
                draw_curves(read_curves(self.table), self._folder / "curves.png")
        if step.step >= step.steps:
            self.close()

    def look(self, look: Look) -> None:
        """Draw a look at the network's answer, if it is one of those to be drawn."""
        folder = self._folder / "looks"
        path = folder / f"step_{look.step:06d}.png"
        with self._forgiving():
            first = not any(folder.glob("step_*.png"))
            if first or look.epoch % self._every == 0 or look.step == self._final:
                draw_look(look, path)
                if self._events is not None:
                    self._events.picture(path, look.step)

    def close(self) -> None:
        """Write out the events; a step or a look after this goes on with them."""
        if self._events is not None:
            with self._forgiving():
                self._events.close()

    def _rewind(self, step: int) -> None:
        """Begin the table, or leave of it the whole rows before a step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        if self.table.exists():
            text = self.table.read_text(encoding="utf-8", errors="replace")
            if "step" in text.partition("\n")[0].split(","):
                rows = list(_rows_before(text, step))
            else:  # somebody else's
                self.table.replace(self.table.with_name(f"{self.table.name}~"))
        with whole(self.table) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Turn a disk that is full or gone, or a table that somebody changed, into one warning."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not self._complained:
                _LOGGER.warning("the diary in %s is not whole: %s", self._folder, error)
            self._complained = True


class _Events:
    """TensorBoard's events; nothing where tensorboard is not installed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._absent = False

    def scalars(self, step: Step) -> None:
        """Write the numbers of a step; the events from this step on that an earlier part left are void."""
        writer = self._opened(step.step)
        for tag, name in _SCALARS.items():
            value = getattr(step, name, None)
            if writer is not None and value is not None:
                writer.add_scalar(tag, value, step.step)

    def picture(self, path: Path, step: int) -> None:
        """Write a PNG's picture."""
        writer = self._opened(step + 1)  # the scalars of this step are there
        if writer is not None:
            writer.add_image("look", (imread(path)[..., :3] * 255).astype("uint8"), step, dataformats="HWC")
            writer.flush()

    def close(self) -> None:
        """Write out what is held back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _opened(self, step: int) -> Any:
        """Return the writer, None where there is none; what was written for `step` and later is void."""
        if self._writer is None and not self._absent:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=step)
            except ModuleNotFoundError:
                self._absent = True
            except (
                ImportError,
                AttributeError,
                TypeError,
            ) as error:  # of a version that does not fit the rest
                self._absent = True
                _LOGGER.warning("no events for TensorBoard: %s", error)
        return self._writer


def read_curves(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return the table of a run, one row a step, NaN where a step did not say."""
    return pd.read_csv(path, dtype=float)


def _rows_before(text: str, step: int) -> Iterator[dict[str, str]]:
    """Yield the whole rows before a step; what a killed writer tore is not whole."""
    names, *lines = (line.split(",") for line in text.split("\n")[:-1])  # the last one has no end
    for cells in lines:
        row = dict(zip(names, cells, strict=False))
        try:
            numbers = [float(cell or "nan") for cell in cells]
        except ValueError:
            continue
        if len(numbers) == len(names) and float(row["step"] or "inf") < step:
            yield row


def _text(value: object) -> str:
    """Return a cell: nothing for None, else nine digits, as many as float32 has."""
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
