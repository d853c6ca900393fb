"""Progress: a bar in a terminal, lines elsewhere, nothing where it is not wanted."""

import logging
import sys

import pytest
import stamina

from clt import progress
from clt.progress import Lines, progress_bar, watched


class Clock:
    """Time that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_line_says_how_many_how_long_and_how_long_still(clock, capsys):
    with Lines(1000, "train", "steps", initial=200, seconds=10) as bar:
        bar.update(100)
        assert capsys.readouterr().err == "", "not yet"
        clock.now = 3600.0
        bar.set_postfix({"loss": "0.5"})
        bar.update(100)
        assert capsys.readouterr().err == "train: 400 of 1,000 steps, 1:00:00 gone, 3:00:00 left, loss 0.5\n"
        clock.now = 3605.0
        bar.update(600)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 1,000 of 1,000 steps, 1:00:05 gone, loss 0.5"


def test_a_short_loop_writes_nothing_to_a_pipe(clock, capsys):
    with Lines(3, "short", "steps", seconds=10) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_an_unknown_total_has_no_time_left(clock, capsys):
    bar = Lines(None, "read", "tokens", seconds=1)
    clock.now = 2.0
    bar.update(5)
    assert capsys.readouterr().err == "read: 5 tokens, 00:02 gone\n"


def test_pipes_get_lines_and_terminals_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(3, "x"), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(watched(iter("abc"), 3, "letters")) == ["a", "b", "c"]
    assert "letters: 100%" in capsys.readouterr().err
    assert isinstance(progress_bar(3, "x", hidden=True), Lines)


def test_a_notebook_without_widgets_gets_no_widget(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert not progress.in_notebook()


def test_retries_are_told_in_words_and_not_by_the_dozen(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("stamina"), "handlers", [])
    for _ in range(2):
        progress.announce_retries()
    assert len(logging.getLogger("stamina").handlers) == 1
    tries = 0
    for attempt in stamina.retry_context(on=OSError, attempts=4, wait_initial=0.01, wait_jitter=0):
        with attempt:
            tries += 1
            if tries < 4:
                raise ConnectionResetError("the peer is gone")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["no answer: ConnectionResetError('the peer is gone'); trying again in 0.01 s (retry 1)"]
