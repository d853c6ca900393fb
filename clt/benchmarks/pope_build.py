"""POPE questions for any annotated set of images, with a seed.

Source: Li et al. 2023, arXiv 2305.10355, and the released builder's rules: images with enough objects are drawn, each
gets as many questions about objects that are there as about objects that are not, in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clt.benchmarks.base import few
from clt.benchmarks.files import read_rows, text_of
from clt.benchmarks.pope import SPLITS
from clt.config.base import require_one_of, require_positive
from clt.errors import BenchmarkError

Negative = Callable[[str, set[str], np.random.Generator], str | None]


@dataclass(frozen=True, kw_only=True)
class PopeRecipe:
    """How questions are drawn."""

    split: str = "random"
    """How absent objects are chosen. random; popular: the most frequent; adversarial: the best company of the last one
    asked about that is there."""
    n_images: int = 500
    """How many images."""
    per_image: int = 3
    """Questions of each kind per image: so many objects that are there, so many that are not."""
    seed: int = 0
    """Another seed draws other images, and other absent objects where they are random."""

    def __post_init__(self) -> None:
        require_one_of("PopeRecipe", "split", self.split, SPLITS)
        require_positive("PopeRecipe", n_images=self.n_images, per_image=self.per_image)


def build_pope(objects: Mapping[str, Sequence[str]], recipe: PopeRecipe) -> list[dict[str, str | int]]:
    """Rows of a question file, as the benchmark `pope` reads it.

    Args:
        objects: what is in each image, by the image's file name; the first `per_image` are asked about.
        recipe: how many, and how absent objects are chosen.

    Raises:
        BenchmarkError: too few images with enough objects, or too few different objects to ask for absent ones.
    """
    named = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    fit = sorted(image for image, names in named.items() if len(names) >= recipe.per_image)
    if len(fit) < recipe.n_images:
        raise BenchmarkError(
            f"{len(fit):,} of {len(objects):,} images have at least {recipe.per_image} objects, not "
            f"{recipe.n_images:,}. Ask for fewer images (n_images) or fewer questions per image (per_image)."
        )
    random = np.random.default_rng(recipe.seed)
    drawn = [fit[place] for place in random.choice(len(fit), size=recipe.n_images, replace=False)]
    choose = _CHOICES[recipe.split]({image: named[image] for image in drawn})
    rows: list[dict[str, str | int]] = []
    for image in drawn:
        taken = set(named[image])
        for present in named[image][: recipe.per_image]:
            absent = choose(present, taken, random)
            if absent is None:
                raise BenchmarkError(
                    f"No object is left that is not in {image} and was not asked for: {few(sorted(taken))}."
                )
            taken.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                rows.append({"question_id": len(rows) + 1, "image": image, "text": question(name), "label": label})
    return rows


def question(name: str) -> str:
    """POPE's question about an object."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"


def read_objects(path: Path) -> dict[str, list[str]]:
    """Objects by image from a list (or lines) of `{"image": ..., "objects": [...]}`, as POPE's builder takes it.

    Raises:
        BenchmarkError: the file is damaged, or an image occurs twice.
    """
    rows = read_rows(path, "annotated images")
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        image, names = text_of(row, ("image", "file_name"), where), row.get("objects")
        if not isinstance(names, list) or image in found:
            raise BenchmarkError(f"{where}: each row needs an image of its own and a list of objects.")
        found[image] = [str(name) for name in names]
    return found


def _at_random(objects: Mapping[str, Sequence[str]]) -> Negative:
    everything = sorted({name for names in objects.values() for name in names})

    def choose(present: str, taken: set[str], random: np.random.Generator) -> str | None:
        free = [name for name in everything if name not in taken]
        return free[int(random.integers(len(free)))] if free else None

    return choose


def _most_popular(objects: Mapping[str, Sequence[str]]) -> Negative:
    counts = Counter(name for names in objects.values() for name in names)
    ordered = sorted(counts, key=lambda name: (-counts[name], name))

    def choose(present: str, taken: set[str], random: np.random.Generator) -> str | None:
        return next((name for name in ordered if name not in taken), None)

    return choose


def _best_company(objects: Mapping[str, Sequence[str]]) -> Negative:
    company: dict[str, Counter[str]] = {}
    for names in objects.values():
        for name in names:
            company.setdefault(name, Counter()).update(other for other in names if other != name)
    otherwise = _at_random(objects)

    def choose(present: str, taken: set[str], random: np.random.Generator) -> str | None:
        ordered = sorted(company[present], key=lambda name: (-company[present][name], name))
        best = next((name for name in ordered if name not in taken), None)
        return otherwise(present, taken, random) if best is None else best

    return choose


_CHOICES: dict[str, Callable[[Mapping[str, Sequence[str]]], Negative]] = {
    "random": _at_random,
    "popular": _most_popular,
    "adversarial": _best_company,
}
