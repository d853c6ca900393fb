"""The rules of the house that a machine can check."""

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import clt.__main__ as command_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "clt").rglob("*.py"))
COMMANDS = [name for commands in command_line.COMMANDS.values() for name in commands]
LONGEST_FILE, LONGEST_FUNCTION = 420, 45
# Bases that bring no methods of their own.
BASES = {"ABC", "Protocol", "NamedTuple", "Config"}


def functions_of(path):
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def docstring_lines(function):
    return len((ast.get_docstring(function, clean=False) or "").splitlines())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small_and_public_ones_say_what_they_mean(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
    for function in functions_of(path):
        length = (function.end_lineno or 0) - function.lineno + 1 - docstring_lines(function)
        assert length <= LONGEST_FUNCTION, f"{function.name} has {length} lines"
    assert ast.get_docstring(ast.parse(path.read_text())), "a file opens by saying what it is"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_fails_softly_or_is_left_for_later(path):
    text = path.read_text()
    assert not re.search(r"except\s*(Exception)?\s*:", text)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)
    assert "weights_only=False" not in text


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "clt", *arguments], capture_output=True, text=True, **options)


def test_help_lists_every_command_and_loads_no_torch():
    code = "import sys, clt.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "options" in shown
    assert "--dry-run" in shown
    examples = re.findall(
        r"^(?:clt|torchrun) .*",
        importlib.import_module(f"clt.scripts.{command_line.module_name(name)}").__doc__ or "",
        re.MULTILINE,
    )
    lines = [line.strip() for line in shown.splitlines()]
    assert [example for example in examples if example not in lines] == [], "an example shares its line with other text"


def test_an_unknown_command_is_answered_with_the_closest_one():
    result = run("evalute")
    assert result.returncode == 2
    assert "Did you mean `clt evaluate`?" in result.stderr


def test_an_unknown_flag_is_refused():
    result = run("train", "--no-such-flag", "1")
    assert result.returncode == 2
    assert "--no-such-flag" in result.stderr
    assert "Traceback" not in result.stderr


def test_underscores_and_hyphens_are_the_same_flag():
    for flag in ("--output-dir", "--output_dir"):
        result = run("train", flag, "nowhere", "--data", "does-not-exist")
        assert result.returncode == 2
        assert "does-not-exist" in result.stderr
        assert "Traceback" not in result.stderr


def test_the_wheel_holds_the_weights_of_the_worlds_and_the_graph_page(tmp_path):
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *flags, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "clt/worlds/assets/shapes/model.safetensors" in names
    assert {f"clt/viz/static/{name}" for name in ("index.html", "graphs.js", "graphs.css")} <= set(names)
    assert wheel.stat().st_size < 10e6


def test_the_graph_page_is_small_and_asks_nobody():
    files = list((ROOT / "clt/viz/static").iterdir())
    assert sum(file.stat().st_size for file in files) < 600_000
    outside = set()
    for file in files:
        outside |= set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"'`)]*", file.read_text()))
    # Names of XML namespaces and of the framework's own error pages; nothing is fetched from them.
    assert {address for address in outside if not re.search(r"www\.w3\.org|svelte\.dev", address)} == set()


def public_functions(path):
    """Functions, and methods of classes that stand for themselves; a method of a subclass has its base's docstring."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    own = [node.body for node in classes if not any(each not in BASES for each in map(ast.unparse, node.bases))]
    return [
        node
        for body in [tree.body, *own]
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if not node.name.startswith("_") and not any("overload" in ast.unparse(each) for each in node.decorator_list)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_say_what_they_mean_take_and_give(path):
    for function in public_functions(path):
        assert ast.get_docstring(function), f"{function.name} says nothing"
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        untyped = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
        assert not untyped, f"{function.name}: no type for {untyped}"
        assert function.returns is not None, f"{function.name} does not say what it returns"


def test_heavy_libraries_are_not_loaded_by_import_alone():
    code = "import sys, clt; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
