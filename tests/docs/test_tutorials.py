"""The tutorials do what they print: each page runs from top to bottom in an empty folder.

Blocks that begin with *Needs: ...* ask for what a test does not have, and are only parsed (test_pages.py).
"""

import json

import matplotlib.pyplot as plt
import pytest

import clt.__main__ as command_line
from tests.docs.pages import ROOT, TUTORIALS, blocks, commands

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RUNNABLE = [page for page in TUTORIALS if any(block.needs is None for block in blocks(page))]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_top_to_bottom(page):
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.needs is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, block.name, "exec"), names)  # the page is ours
        elif block.language in ("bash", "sh"):
            lines = commands(block)
            assert lines, f"{block.name}: only `clt` lines can be run; say what others need"
            for words in lines:
                command_line.main(words)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path):
    names: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)


def test_there_are_tutorials_and_notebooks():
    assert {page.stem for page in RUNNABLE} >= {"text-model", "llava", "own-benchmark", "own-family", "circuit-tracer"}
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
