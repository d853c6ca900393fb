"""What the documentation says exists: commands, flags, files, tests, pages."""

import importlib
import json
import re

import pytest
import tyro

import clt.__main__ as command_line
from clt.scripts.invoke import take_shared
from tests.docs.pages import PAGES, ROOT, Block, blocks, commands

SHELL = [block for page in PAGES for block in blocks(page) if block.language in ("bash", "sh")]
LINES = [(block, words) for block in SHELL for words in commands(block)]


def parsed(words: list[str]) -> None:
    """Parse a command line with the command's own parser; nothing runs."""
    name, arguments = words[0], list(words[1:])
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return
    assert name in {each for group in command_line.COMMANDS.values() for each in group}
    preset = command_line.take_preset(name, arguments)
    if preset is not None:
        importlib.import_module(f"clt.scripts.{preset}").parse(arguments)
        return
    module = importlib.import_module(f"clt.scripts.{command_line.module_name(name)}")
    shared = take_shared(arguments, module.Options)
    if "--help" in arguments:
        return
    if shared.config is None:
        tyro.cli(module.Options, args=arguments)
        return
    # The file is not here; its options are the defaults.
    tyro.cli(module.Options, args=arguments, default=module.Options())


def test_pages_hold_commands_at_all():
    assert len(LINES) > 60


@pytest.mark.parametrize(("block", "words"), LINES, ids=lambda value: value.name if isinstance(value, Block) else "")
def test_every_command_is_one_that_the_parser_takes(block, words):
    parsed(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_json_blocks_are_json(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)


def test_the_files_and_tests_of_the_seeds_page_exist():
    text = (ROOT / "docs" / "seeds.md").read_text()
    named = re.findall(r"`((?:clt|tests|scripts|clt_server)/[^` ]*)", text)
    assert len(named) > 80
    for each in named:
        path, _, test = each.partition("::")
        assert (ROOT / path).exists(), each
        if test:
            assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), each


def test_files_and_tests_named_by_the_security_page_exist():
    for path in re.findall(r"`(tests/[\w/.]+)`", (ROOT / "docs" / "security.md").read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#", "mailto:")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.name != "README.md"}
