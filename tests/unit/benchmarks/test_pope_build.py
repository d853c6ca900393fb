"""POPE's builder: balanced, seeded, and true to the annotations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import clt.__main__ as command_line
from clt import benchmarks
from clt.benchmarks.pope_build import PopeRecipe, build_pope, question
from clt.errors import BenchmarkError, CLTError
from tests.tiny_benchmarks import write_lines

NAMES = ["cat", "dog", "apple", "car", "bus", "tree", "elephant", "cup"]
OBJECTS = {f"{place}.jpg": [NAMES[(place + k) % 6] for k in range(3)] for place in range(12)}


def asked(rows):
    return [(row["image"], row["text"].split()[3:-3], row["label"]) for row in rows]


@given(
    split=st.sampled_from(["random", "popular", "adversarial"]), seed=st.integers(0, 50), per_image=st.integers(1, 3)
)
def test_every_question_is_true_new_and_balanced(split, seed, per_image):
    recipe = PopeRecipe(split=split, n_images=7, per_image=per_image, seed=seed)
    rows = build_pope(OBJECTS, recipe)
    assert rows == build_pope(OBJECTS, recipe)
    assert [row["label"] for row in rows] == ["yes", "no"] * (7 * per_image)
    assert len({row["image"] for row in rows}) == 7
    assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
    for image, (name,), label in asked(rows):
        assert (name in OBJECTS[image]) == (label == "yes")


def test_negatives_are_the_most_frequent_or_the_best_company():
    objects = {"a": ["cat", "dog"], "b": ["cat", "dog"], "c": ["cat", "cup"], "d": ["car", "bus"], "e": ["dog", "tree"]}
    recipe = {"n_images": 5, "per_image": 1}
    negatives = {
        split: {
            row["image"]: row["text"]
            for row in build_pope(objects, PopeRecipe(split=split, **recipe))
            if row["label"] == "no"
        }
        for split in ("popular", "adversarial")
    }
    assert negatives["popular"]["d"] == question("cat")
    assert negatives["popular"]["c"] == question("dog")
    assert negatives["adversarial"]["c"] == question("dog"), "dogs keep cats company most often"
    assert negatives["adversarial"]["e"] == question("cat")


def test_articles_fit():
    assert question("elephant") == "Is there an elephant in the image?"
    assert question("car") == "Is there a car in the image?"


def test_too_few_images_or_objects_are_refused():
    with pytest.raises(BenchmarkError, match="12 of 12 images have at least 3 objects, not 13"):
        build_pope(OBJECTS, PopeRecipe(n_images=13))
    with pytest.raises(BenchmarkError, match="No object is left that is not in"):
        build_pope({"a": ["cat", "dog"]}, PopeRecipe(n_images=1, per_image=1))
    with pytest.raises(CLTError, match="split = 'rare' is not one of"):
        PopeRecipe(split="rare")


def test_the_command_writes_questions_that_the_benchmark_reads(tmp_path, capsys):
    rows = [{"image": image, "objects": names} for image, names in OBJECTS.items()]
    data, output = write_lines(tmp_path / "objects.jsonl", rows), tmp_path / "pope.json"
    command = ["bench", "build-pope", "--data", str(data), "--output", str(output), "--n-images", "4", "--seed", "3"]
    command_line.main(command)
    assert "24 questions about 4 images (random, seed 3)" in capsys.readouterr().out
    assert len(list(benchmarks.load("pope", data=output).samples())) == 24
