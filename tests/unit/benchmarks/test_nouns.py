"""Which words of AMBER a text mentions, by table and rules; and the official route where NLTK is."""

import importlib.util
import re

import pytest

from clt.benchmarks import nouns_nltk
from clt.benchmarks.nouns import VocabularyRules, amber_lemmas, reachable_words, sentences
from clt.benchmarks.nouns_nltk import NltkNouns, amber_nouns, missing_for_nltk
from clt.errors import BenchmarkError

extract = VocabularyRules(amber_lemmas())


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("Two women and a man walk their dogs.", ["woman", "man", "dog"]),
        ("Trees line the road, and trees stand by the lines.", ["road", "tree", "line"]),
        ("A man can see cans, a can and a trash can.", ["man", "can"]),
        ("The hot coffee is hot.", ["coffee"]),
        ("Three men hold vases with leaves.", []),
        ("An orange cat, an orange, and orange and white cups.", ["cat", "orange", "cup"]),
        ("A light blue car under a traffic light.", ["car", "light"]),
        ("People watch the game; a watch lies on the table next to water.", ["watch", "table", "water"]),
        ("They ski to watch birds.", ["bird"]),
        ('The man\'s hat, the (red) umbrella and the wall-mounted "clock".', ["man", "hat", "umbrella", "clock"]),
        ("A boat is sailing on the sea.", ["boat", "sea"]),
        ("A brick building that houses a bus, street lights up ahead.", ["building", "bus", "street", "light"]),
        ("An individual standing by individual boxes", ["individual", "box"]),
        ("TV, air-conditioning and an e-book", ["TV", "air-conditioning", "e-book"]),
        ("", []),
    ],
)
def test_objects_are_found_as_the_official_tagger_finds_them(text, nouns):
    assert extract(text) == nouns


def test_the_table_leads_into_the_vocabulary_and_leaves_out_what_wordnet_cannot_reach():
    lemmas = amber_lemmas()
    assert len(lemmas) == 852
    assert len(set(lemmas.values())) == 415
    assert "men" not in lemmas
    assert lemmas["glasses"] == "glass"
    assert "can" in reachable_words()
    assert "hot" not in reachable_words()


@pytest.mark.skipif(importlib.util.find_spec("nltk") is not None, reason="nltk is installed")
def test_without_nltk_the_official_route_says_what_is_missing():
    assert missing_for_nltk() == "the package nltk"
    assert amber_nouns("auto", {"dog"}).describe()["extractor"] == "rules"
    with pytest.raises(BenchmarkError, match="needs the package nltk"):
        NltkNouns({"dog"})


def test_half_of_the_official_data_is_said_to_be_half(monkeypatch):
    def cut_off(text):
        raise FileNotFoundError(2, "No such file or directory", "averaged_perceptron_tagger_eng.weights.json")

    monkeypatch.setattr(nouns_nltk, "find_spec", lambda name: True)
    monkeypatch.setattr(nouns_nltk, "_nouns", cut_off)
    assert amber_nouns("auto", {"dog"}).describe()["extractor"] == "rules"
    with pytest.raises(BenchmarkError, match=r"needs NLTK's data, whole: .*tagger_eng.weights.json"):
        NltkNouns({"dog"})


def test_auto_takes_the_official_route_where_its_data_is(monkeypatch):
    monkeypatch.setattr(nouns_nltk, "missing_for_nltk", lambda: None)
    monkeypatch.setattr(nouns_nltk, "_nouns", lambda text: text.split())
    assert amber_nouns("auto", {"dog"})("dog house dog") == ["dog", "dog"]
    assert isinstance(amber_nouns("rules", {"dog"}), VocabularyRules)


@pytest.mark.skipif(importlib.util.find_spec("nltk") is None, reason="needs nltk")
@pytest.mark.parametrize(
    "text",
    [
        "There's a dog (brown), a \"cat\" and a man's hat; it isn't big. Is it 3,000 km away? Yes... No!",
        "The woman — who's near the bus: number 7 — can't see the dogs' bowl, e.g. an air-conditioning unit.",
        "A “quoted” word, it’s here. A cat/dog and 50% of $5 & #3 @home* [sic] {x} <b>.",
    ],
)
def test_tokens_are_those_of_the_official_tokenizer_where_it_matters(text):
    from nltk.tokenize import NLTKWordTokenizer

    parts = re.split(r"(?<=[.!?]) ", text)
    theirs = [token for part in parts for token in NLTKWordTokenizer().tokenize(part)]
    ours = [token for sentence in sentences(text) for token in sentence]
    words = amber_lemmas()
    assert [token for token in ours if token in words] == [token for token in theirs if token in words]
