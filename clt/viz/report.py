"""A report as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from PIL import Image

_CSS = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --paper: #ffffff; --wash: #f5f7fa; --accent: #0072b2;
  --bad: #b3261e; --good: #1b7f3b }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.55 system-ui, "Segoe UI", sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line) }
p { max-width: 46rem } .soft { color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .8rem; margin: 1.4rem 0 }
.card { background: var(--wash); border-radius: .6rem; padding: .8rem 1rem }
.card b { display: block; font-size: 1.4rem; line-height: 1.25; font-variant-numeric: tabular-nums }
.card span { color: var(--soft); font-size: .85rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.2rem; align-items: start }
figure { margin: 0; min-width: 0 } figure svg { width: 100%; height: auto }
figcaption { color: var(--soft); font-size: .88rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { padding: .32rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } thead th { color: var(--soft); font-weight: 600 }
.scenes { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem }
.scene { display: flex; gap: .9rem; background: var(--wash); border-radius: .6rem; padding: .9rem }
.scene img { width: 96px; height: 96px; image-rendering: pixelated; border-radius: .3rem; flex: none }
.scene div { font-size: .9rem; line-height: 1.4; min-width: 0 } .scene p { margin: 0 0 .35rem }
.label { color: var(--soft); font-size: .75rem; text-transform: uppercase; letter-spacing: .04em; display: block }
mark { background: #fde3e1; color: var(--bad); border-radius: .2rem; padding: 0 .15rem }
code, pre { font: .88rem/1.5 ui-monospace, "SF Mono", Consolas, monospace }
pre { background: var(--wash); padding: .9rem 1rem; border-radius: .6rem; overflow-x: auto }
@media (max-width: 32rem) { .figures { grid-template-columns: 1fr } h1 { font-size: 1.5rem } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document from pieces of HTML."""
    return _PAGE.format(title=escape(title), css=_CSS, body="\n".join(parts))


def heading(text: str) -> str:
    """A section's title."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, *, soft: bool = False) -> str:
    """Plain text."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def cards(values: Mapping[str, str]) -> str:
    """The numbers one looks at first: label -> value."""
    items = (f'<div class="card"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values.items())
    return f'<div class="cards">{"".join(items)}</div>'


def figures(items: Sequence[tuple[str, str]]) -> str:
    """(svg, caption) pairs beside each other where there is room."""
    inner = "".join(f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>" for svg, text in items)
    return f'<div class="figures">{inner}</div>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others numbers."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def code(text: str) -> str:
    """Something to type."""
    return f"<pre>{escape(text)}</pre>"


def links(targets: Mapping[str, str]) -> str:
    """Text -> a file beside the page."""
    items = (f'<a href="{escape(target)}">{escape(text)}</a>' for text, target in targets.items())
    return f"<p>{' · '.join(items)}</p>"


def scene(image: Image.Image, texts: Mapping[str, str], wrong_words: Iterable[str]) -> str:
    """A picture beside what was said about it, words that are not in the picture marked."""
    wrong = set(wrong_words)
    parts = []
    for label, text in texts.items():
        words = (f"<mark>{escape(w)}</mark>" if w.strip(".,").lower() in wrong else escape(w) for w in text.split())
        parts.append(f'<p><span class="label">{escape(label)}</span>{" ".join(words)}</p>')
    return f'<div class="scene"><img alt="scene" src="{data_url(image)}"><div>{"".join(parts)}</div></div>'


def scenes(items: Iterable[str]) -> str:
    """Scenes in a grid."""
    return f'<div class="scenes">{"".join(items)}</div>'


def data_url(image: Image.Image) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
