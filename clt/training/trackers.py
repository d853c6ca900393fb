"""Where the numbers of a run go. The loop emits; trackers listen."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from tqdm.auto import tqdm


@runtime_checkable
class Tracker(Protocol):
    """Anything that wants a run's numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class JSONLTracker:
    """One JSON object per line; appended, and cut back to the resumed step on resume."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._lines_before(path, resume_step) if path.exists() and resume_step else []
        # The cut file replaces the old one in one step: a kill in between loses no line.
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = path.open("a")

    @staticmethod
    def _lines_before(path: Path, step: int) -> list[str]:
        """Whole lines of steps up to `step`; later ones will be computed again."""
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        return [line for line in lines if json.loads(line)["step"] <= step]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **{k: _short(v) for k, v in values.items()}}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ProgressTracker:
    """A progress bar with the numbers one watches; a line every tenth of the run where there is no terminal."""

    SHOWN = ("loss", "nmse", "l0", "dead", "tokens_per_second", "held_out/nmse")

    def __init__(self, total_steps: int, first_step: int, title: str = "train") -> None:
        self._total = total_steps
        self._tenth = 10 * first_step // total_steps
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, desc=title, unit="step", disable=not is_terminal)
        self._step = first_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar, or write a line when another tenth is done."""
        shown = {name.rsplit("/")[0]: f"{values[name]:.4g}" for name in self.SHOWN if name in values}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._step)
        self._step = step
        if self._bar.disable and 10 * step // self._total > self._tenth:
            self._tenth = 10 * step // self._total
            numbers = ", ".join(f"{name} {value}" for name, value in shown.items())
            sys.stderr.write(f"step {step:,} of {self._total:,}: {numbers}\n")

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()


def _short(value: float) -> float:
    """Six significant digits: enough to read, short to store."""
    return float(f"{value:.6g}")
