"""The official way to find nouns: NLTK's tokenizer, tagger and WordNet lemmatizer, if their data is there.

Needs `pip install crosslayer[nltk]` and the data `punkt_tab`, `averaged_perceptron_tagger_eng` and `wordnet` (NLTK
before 3.9: `punkt`, `averaged_perceptron_tagger`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from typing import Any

from clt.benchmarks.nouns import NounExtractor, VocabularyRules, amber_lemmas
from clt.errors import BenchmarkError

EXTRACTORS = ("auto", "nltk", "rules")
PROBE = "Two dogs sit on a bench."
_COLOUR = re.compile(r"\x1b\[\d+m")


class NltkNouns:
    """AMBER's `extract_nouns`, kept to its vocabulary.

    Raises:
        BenchmarkError: NLTK or a part of its data is missing.
    """

    def __init__(self, vocabulary: Collection[str]) -> None:
        missing = missing_for_nltk()
        if missing:
            raise BenchmarkError(
                f"extractor = 'nltk' needs {missing}. Install NLTK and run `python -m nltk.downloader punkt_tab "
                "averaged_perceptron_tagger_eng wordnet`, or use --extractor rules."
            )
        self._vocabulary = frozenset(vocabulary)

    def __call__(self, text: str) -> list[str]:
        """The lemmas of all tokens tagged as nouns that are in the vocabulary."""
        return [noun for noun in _nouns(text) if noun in self._vocabulary]

    def describe(self) -> dict[str, Any]:
        """Its name and NLTK's version."""
        import nltk  # pyright: ignore[reportMissingImports]

        return {"extractor": "nltk", "nltk": nltk.__version__}


def missing_for_nltk() -> str | None:
    """What the official route lacks here; None when it can be used."""
    if find_spec("nltk") is None:
        return "the package nltk"
    try:
        _nouns(PROBE)
    except LookupError as error:
        lines = (_COLOUR.sub("", line).strip() for line in str(error).splitlines())
        named = next((line for line in lines if line.startswith("Resource")), "a resource")
        return f"NLTK's data ({named})"
    except OSError as error:
        return f"NLTK's data, whole: its folder is there, but a file of it is not ({error})"
    return None


def amber_nouns(name: str, vocabulary: Collection[str]) -> NounExtractor:
    """The plug-in of that name (one of `EXTRACTORS`); `auto` takes NLTK where its data is there, otherwise the rules.

    Raises:
        BenchmarkError: `nltk` without its data.
    """
    if name == "nltk" or (name == "auto" and missing_for_nltk() is None):
        return NltkNouns(vocabulary)
    return VocabularyRules({surface: word for surface, word in amber_lemmas().items() if word in set(vocabulary)})


def _nouns(text: str) -> list[str]:
    """The official function: no lower-casing, tags over all sentences at once, noun lemmas."""
    import nltk  # pyright: ignore[reportMissingImports]
    from nltk.stem import WordNetLemmatizer  # pyright: ignore[reportMissingImports]

    lemmatizer = WordNetLemmatizer()
    tagged = _tagger().tag(nltk.word_tokenize(text))
    return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]


@cache
def _tagger() -> Any:
    """What `nltk.pos_tag` uses, read once: it reads several megabytes anew for each text."""
    from nltk.tag import PerceptronTagger  # pyright: ignore[reportMissingImports]

    return PerceptronTagger()
