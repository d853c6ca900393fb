"""Reading the documentation: its fenced blocks, what each needs, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    needs: str | None
    """The line *Needs: ...* right before it, if it asks for what a test does not have."""

    @property
    def name(self) -> str:
        """For the messages of tests."""
        return f"{self.page.relative_to(ROOT)}: {self.text.strip().splitlines()[0]}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        paragraph = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        needs = paragraph if paragraph.lstrip().startswith("*Needs") else None
        found.append(Block(page, match[1], match[2], needs))
    return found


def commands(block: Block) -> list[list[str]]:
    """The `clt ...` lines of a block, continued lines joined, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "clt"]
