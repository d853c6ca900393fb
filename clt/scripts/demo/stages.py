"""Stages that are done once: a result on disk with the options it was made with, and the seconds it took."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clt.config.base import write_text_atomically


class Stages:
    """The finished stages of one folder; a stage depends on its own options and on all stages before it."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._say = say
        self._chain = ""

    def run(self, name: str, options: dict[str, Any], compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The stage's result: read if it was made with these options, else computed.

        Args:
            options: everything the result depends on besides earlier stages.
            compute: takes the stage's own folder (which it may find half filled by an interrupted run) and returns
                the result as JSON values.
        """
        self._chain = hashlib.sha256((self._chain + json.dumps(options, sort_keys=True)).encode()).hexdigest()[:16]
        folder = self.folder / name
        done, begun = folder / "stage.json", folder / "begun.json"
        if done.exists() and (record := json.loads(done.read_text()))["key"] == self._chain:
            self._say(f"{name}: already done ({record['seconds']:.0f} s then)")
            self.seconds[name] = record["seconds"]
            return record["result"]
        if folder.exists() and not self._was_begun_with_these_options(begun):
            self._say(f"{name}: made with other options; starting over")
            shutil.rmtree(folder)
        spent = json.loads(begun.read_text())["seconds"] if begun.exists() else 0.0
        return self._compute(name, folder, spent, compute)

    def _was_begun_with_these_options(self, begun: Path) -> bool:
        return begun.exists() and json.loads(begun.read_text())["key"] == self._chain

    def _compute(
        self, name: str, folder: Path, spent: float, compute: Callable[[Path], dict[str, Any]]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        write_text_atomically(folder / "begun.json", json.dumps({"key": self._chain, "seconds": spent}))
        try:
            result = json.loads(json.dumps(compute(folder)))
        finally:
            # Time of interrupted attempts counts too, so that a resumed run does not look faster than it was.
            self.seconds[name] = spent + time.perf_counter() - started
            begun = {"key": self._chain, "seconds": self.seconds[name]}
            write_text_atomically(folder / "begun.json", json.dumps(begun))
        record = {"key": self._chain, "seconds": self.seconds[name], "result": result}
        write_text_atomically(folder / "stage.json", json.dumps(record, indent=2) + "\n")
        return result
