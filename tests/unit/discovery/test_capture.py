"""Answers of different makes do not mix, and a run that left none binds nobody."""

import json

import pytest

from clt.discovery.capture import _check_same_run
from clt.discovery.layout import Layout
from clt.errors import DiscoveryError


def test_only_answers_that_are_there_bind_the_next_run(tmp_path):
    layout = Layout(tmp_path, "mine")
    layout.results.mkdir(parents=True)
    _check_same_run(layout, {"n": 8})
    _check_same_run(layout, {"n": 20})
    assert json.loads(layout.run.read_text()) == {"n": 20}
    layout.responses.parent.mkdir(parents=True, exist_ok=True)
    layout.responses.write_text("")
    with pytest.raises(DiscoveryError, match="n = 20, now it is 8"):
        _check_same_run(layout, {"n": 8})
