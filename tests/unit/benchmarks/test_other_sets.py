"""CHAIR, Object HalBench, MME, HallusionBench and jsonl on files small enough to count by hand."""

import json

import pytest

from clt import benchmarks
from clt.benchmarks import judges, read_responses
from clt.benchmarks.coco_objects import ObjectNames, plural
from clt.benchmarks.mme import read_answer
from clt.errors import BenchmarkError, CLTError
from tests.tiny_benchmarks import write_lines

SYNONYMS = """person, man, woman, child, people
dog, puppy
bear, teddy
teddy bear, stuffed bear
toilet
chair, seat
train
tie
dining table, table
wine glass
knife
"""


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    images = [{"id": id, "file_name": f"COCO_val2014_{id}.jpg"} for id in (1, 2, 3)]
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "dining table"}]
    instances = [
        {"image_id": 1, "category_id": 1},
        {"image_id": 1, "category_id": 2},
        {"image_id": 2, "category_id": 3},
    ]
    captions = [{"image_id": 2, "caption": "Two men at a table."}, {"image_id": 3, "caption": "A sunny day."}]
    rows = {"images": images, "categories": categories, "annotations": instances}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(rows))
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return tmp_path


def chair(coco, name="chair", **options):
    return benchmarks.load(name, data=coco, synonyms=coco / "synonyms.txt", **options)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("Two men and a Puppy.", ["person", "dog"]),
        ("Knives, wine glasses and tables", ["knife", "wine glass", "dining table"]),
        ("A teddy bear on a bear", ["teddy bear", "bear"]),
        ("A baby bear and an adult bear", ["bear", "bear"]),
        ("a passenger train on the train tracks", ["train"]),
        ("a bow tie, a tie", ["tie", "tie"]),
        ("The toilet seat is up; the toilet has a seat", ["toilet", "toilet"]),
        ("a seated person", ["person"]),
        ("", []),
    ],
)
def test_objects_are_found_by_synonym_plural_and_pair(coco, text, classes):
    assert ObjectNames.read(coco / "synonyms.txt").mentioned(text) == classes


@pytest.mark.parametrize(
    ("word", "many"), [("bus", "buses"), ("bench", "benches"), ("puppy", "puppies"), ("boy", "boys"), ("mouse", "mice")]
)
def test_plurals(word, many):
    assert plural(word) == many


def test_chair_counts_captions_mentions_and_objects(coco):
    benchmark = chair(coco)
    assert [sample.meta["objects"] for sample in benchmark.samples()] == [
        ["dog", "person"],
        ["dining table", "person"],
        [],
    ]
    report = benchmark.score({"1": "A man, a man and a bear.", "2": "A table.", "3": "The sun."})
    assert report.metrics == {"chair_s": 1 / 3, "chair_i": 1 / 4, "recall": 2 / 4}
    assert report.provenance["n_without_objects"] == 1
    assert [benchmark.verdict(score) for score in report.scores] == ["bad", "good", "neither"]


def test_object_halbench_divides_by_the_responses_that_name_objects(coco):
    report = chair(coco, "object-halbench").score({"1": "A man and a bear.", "2": "A table.", "3": "The sun."})
    expected = {"response_hallucination": 1 / 2, "object_hallucination": 1 / 3, "recall": 2 / 4, "mean_words": 9 / 3}
    assert report.metrics == expected
    empty = chair(coco, "object-halbench").score({"3": "The sun."})
    assert empty.provenance["undefined"] == ["response_hallucination", "object_hallucination"]


def test_images_are_drawn_with_a_seed_or_named_by_questions(coco):
    drawn = [[sample.id for sample in chair(coco, n=2, seed=seed).samples()] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(ids) for ids in drawn}) > 1
    questions = write_lines(coco / "questions.jsonl", [{"image_id": 2, "question": "Tell me all."}])
    (sample,) = chair(coco, "object-halbench", questions=questions).samples()
    assert (sample.id, sample.prompt) == ("2", "Tell me all.")
    questions = write_lines(coco / "questions.jsonl", [{"image_id": 9, "question": "Tell me all."}])
    with pytest.raises(BenchmarkError, match="1 images are not in"):
        chair(coco, "object-halbench", questions=questions).samples()


def test_coco_files_and_synonyms_that_do_not_fit_are_refused(coco):
    (coco / "synonyms.txt").write_text("person\ndog")
    with pytest.raises(BenchmarkError, match="do not know COCO's category 'dining table'"):
        chair(coco).samples()
    (coco / "synonyms.txt").write_text("person, man\ndog, man")
    with pytest.raises(BenchmarkError, match="line 2: 'man' belongs to 'person' already"):
        chair(coco).samples()
    (coco / "captions_val2014.json").unlink()
    with pytest.raises(BenchmarkError, match=r"one file captions_\*.json; it holds 0"):
        chair(coco).samples()


MME_LINES = [
    ("1.jpg", "Is there a dog? Please answer yes or no.", "Yes"),
    ("1.jpg", "Is there a cat? Please answer yes or no.", "No"),
    ("2.jpg", "Is there a car? Please answer yes or no.", "Yes"),
    ("2.jpg", "Is there a bus? Please answer yes or no.", "No"),
]


def write_mme(path, answers=()):
    columns = ([*line, answer] for line, answer in zip(MME_LINES, answers or [None] * 4))
    path.write_text("".join("\t".join(each for each in row if each is not None) + "\n" for row in columns))
    return path


def test_mme_adds_the_share_of_answers_and_of_images(tmp_path):
    benchmark = benchmarks.load("mme", data=write_mme(tmp_path / "existence.txt"))
    answers = write_mme(tmp_path / "answers.txt", ["Yes", "No.", "Yes, there is", "Yes"])
    report = benchmark.score(read_responses(answers, benchmark))
    assert report.metrics == {"score": 100 * 3 / 4 + 100 / 2, "accuracy": 3 / 4, "accuracy_plus": 1 / 2}
    assert [benchmark.verdict(score) for score in report.scores] == ["good", "good", "good", "bad"]
    half = benchmark.score({"1.jpg/1": "yes", "2.jpg/2": "It is hard to say"})
    assert (half.provenance["n_incomplete_images"], half.provenance["n_unparsed"], half.provenance["n_missing"]) == (
        2,
        1,
        2,
    )
    assert half.metrics["accuracy_plus"] == 1 / 2


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("yes", "yes"),
        ("NO", "no"),
        ("No, it", "no"),
        (" yes", "yes"),
        ("The answer is no", None),
        ("noyes", "no"),
        ("", None),
    ],
)
def test_mme_reads_the_first_four_characters(response, said):
    assert read_answer(response) == said


def test_mme_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "existence.txt"
    benchmark = benchmarks.load("mme", data=write_mme(path))
    answers = tmp_path / "answers.txt"
    answers.write_text("9.jpg\tIs there?\tYes\tYes\n")
    with pytest.raises(BenchmarkError, match=r"about 9.jpg, which is not asked"):
        read_responses(answers, benchmark)
    with pytest.raises(BenchmarkError, match="4 lines have no fourth column"):
        read_responses(path, benchmark)
    path.write_text("1.jpg\tIs there?\tPerhaps\n")
    with pytest.raises(BenchmarkError, match="line 1: MME's lines are"):
        benchmarks.load("mme", data=path).samples()
    path.write_text("1.jpg\tIs there?\tYes\n")
    with pytest.raises(BenchmarkError, match=r"two consecutive lines per image; 1.jpg has not"):
        benchmarks.load("mme", data=tmp_path).samples()


def hallusion_row(category, figure, question, answer):
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": "0" if figure == "0" else "1",
        "set_id": "0",
        "figure_id": figure,
        "question_id": question,
        "question": f"Is it {question}?",
        "gt_answer": answer,
        "filename": None if figure == "0" else f"{category}_{figure}.png",
    }


HALLUSION = [
    hallusion_row("VS", "0", "0", "1"),
    hallusion_row("VS", "1", "0", "1"),
    hallusion_row("VS", "1", "1", "0"),
    hallusion_row("VD", "0", "0", "0"),
    hallusion_row("VD", "1", "0", "1"),
]
SAID = ["I cannot tell", "Yes", "Yes", "No", "Yes"]


@pytest.fixture
def hallusion(tmp_path):
    path = tmp_path / "HallusionBench.json"
    path.write_text(json.dumps(HALLUSION))
    return path


def test_hallusionbench_counts_answers_figures_and_questions(hallusion, tmp_path):
    benchmark = benchmarks.load("hallusionbench", data=hallusion)
    rows = write_lines(
        tmp_path / "said.jsonl", [{**row, "model_prediction": said} for row, said in zip(HALLUSION, SAID)]
    )
    report = benchmark.score(read_responses(rows, benchmark))
    # Unclear is right without a figure (VS 0). Figure VS 1 is wrong, VD 0 and VD 1 right; of three questions, two.
    assert report.metrics == {"accuracy": 4 / 5, "figure_accuracy": 2 / 3, "question_accuracy": 2 / 3}
    assert report.provenance["n_unparsed"] == 1
    part = benchmark.score({"VS_chart_0_1_1": "No"})
    assert part.provenance["n_incomplete_figures"] == 1
    assert part.metrics["figure_accuracy"] == 1


def test_hallusionbench_can_be_judged(hallusion, tmp_path, monkeypatch):
    class Judge:
        model = "scripted"
        replies = iter(["unclear", "correct", "incorrect", "well", "correct"])

        def __call__(self, prompts):
            return [next(self.replies) for _ in prompts]

    monkeypatch.setitem(judges._FACTORIES, "scripted", lambda **options: Judge())
    benchmark = benchmarks.load("hallusionbench", data=hallusion, judge="scripted", judge_log=tmp_path / "log.jsonl")
    samples = benchmark.samples()
    report = benchmark.score({sample.id: f"{said} {sample.id}" for sample, said in zip(samples, SAID)})
    assert report.metrics["accuracy"] == 3 / 5
    assert report.provenance["n_parse_failures"] == 1
    assert [benchmark.verdict(score) for score in report.scores] == ["good", "good", "bad", "neither", "good"]


def test_hallusionbench_refuses_rows_that_do_not_fit(hallusion):
    hallusion.write_text(json.dumps([*HALLUSION, HALLUSION[0]]))
    with pytest.raises(BenchmarkError, match="1 ids occur more than once"):
        benchmarks.load("hallusionbench", data=hallusion).samples()
    hallusion.write_text(json.dumps([{**HALLUSION[0], "gt_answer": "2"}]))
    with pytest.raises(BenchmarkError, match="row 1: gt_answer must be 0"):
        benchmarks.load("hallusionbench", data=hallusion).samples()


ROWS = [
    {"id": "a", "question": "Which colour?", "answer": ["Red", "crimson"], "score": 0.5, "response": "Reddish"},
    {"question": "Is it?", "answer": "yes", "score": 1, "response": "Yes"},
]


@pytest.mark.parametrize(
    ("match", "responses", "score"),
    [
        ("exact", ("red.", "yes"), 1),
        ("exact", ("it is red", "yes"), 0.5),
        ("contains", ("it is red", "oh yes"), 1),
        ("contains", ("bored", "no"), 0),
        ("yes_no", ("red", "Yes, it is."), 0.5),
        ("given", ("Reddish", "Yes"), 0.75),
    ],
)
def test_jsonl_compares_or_takes_what_is_given(tmp_path, match, responses, score):
    benchmark = benchmarks.load("jsonl", data=write_lines(tmp_path / "rows.jsonl", ROWS), match=match)
    report = benchmark.score(dict(zip(("a", "2"), responses)))
    assert report.metrics == {"score": score}


def test_jsonl_refuses_scores_of_other_responses_and_rows_without_answers(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    benchmark = benchmarks.load("jsonl", data=path, match="given")
    with pytest.raises(BenchmarkError, match="belongs to the response 'Reddish', not to 'Red'"):
        benchmark.score({"a": "Red"})
    assert [benchmark.verdict(score) for score in benchmark.score({"a": "Reddish", "2": "Yes"}).scores] == [
        "neither",
        "good",
    ]
    with pytest.raises(CLTError, match="match = 'vibes' is not one of"):
        benchmarks.load("jsonl", data=path, match="vibes")
    with pytest.raises(CLTError, match="must be below good_score"):
        benchmarks.load("jsonl", data=path, good_score=0.0)
    path = write_lines(path, [{"question": "Is it?"}])
    with pytest.raises(BenchmarkError, match="has no answer to compare with"):
        benchmarks.load("jsonl", data=path).samples()
    with pytest.raises(BenchmarkError, match="needs a number as score"):
        benchmarks.load("jsonl", data=path, match="given").samples()
