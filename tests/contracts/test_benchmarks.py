"""What every benchmark keeps: sums of counts are the numbers, parts can be scored, nothing is dropped in silence."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clt.__main__ as command_line
from clt import benchmarks
from clt.benchmarks import About, Benchmark, CountingBenchmark, SampleScore, registry, summed
from clt.errors import BenchmarkError
from clt.types import Sample
from tests.tiny_benchmarks import pope_rows, write_amber, write_lines


# --- a benchmark of somebody else, in full ----------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class Counting(CountingBenchmark):
    """How many dots are in the image?"""

    largest: int = 9

    about = About(
        name="counting",
        summary="How many dots?",
        source="a test",
        license="MIT",
        higher_is_better={"accuracy": True},
        max_new_tokens=4,
    )

    def samples(self):
        return [
            Sample(id=f"dots-{n}", prompt="How many dots?", meta={"reference": str(n)}) for n in range(self.largest)
        ]

    def count(self, sample, response):
        right = response.strip() == sample.meta["reference"]
        return SampleScore(id=sample.id, counts={"n": 1, "right": int(right)})

    def metrics(self, totals):
        return {"accuracy": totals["right"] / totals["n"]}

    def verdict(self, score):
        return "good" if score.counts["right"] else "bad"


# ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    benchmarks.register("counting", Counting)


@pytest.fixture(params=["pope", "amber", "amber-questions", "shapes-pope", "shapes-amber", "counting"])
def benchmark(request, tmp_path, counting):
    if request.param == "pope":
        return benchmarks.load("pope", data=write_lines(tmp_path / "pope.json", pope_rows()))
    if request.param.startswith("amber"):
        task = "discriminative" if request.param.endswith("questions") else "generative"
        return benchmarks.load("amber", data=write_amber(tmp_path / "amber"), task=task, extractor="rules")
    return benchmarks.load(request.param, **({"n": 12} if request.param.startswith("shapes") else {}))


def references(benchmark):
    return {sample.id: sample.meta["reference"] for sample in benchmark.samples()}


def test_it_meets_the_protocol_and_leaves_answers_to_the_host(benchmark):
    assert isinstance(benchmark, Benchmark)
    samples = list(benchmark.samples())
    assert len({sample.id for sample in samples}) == len(samples) > 0
    assert all(sample.answer is None for sample in samples)
    assert benchmark.about.higher_is_better
    assert set(benchmark.about.higher_is_better) <= set(benchmark.score(references(benchmark)).metrics)


def test_the_sum_of_the_counts_gives_the_numbers(benchmark):
    report = benchmark.score(references(benchmark))
    assert benchmark.metrics(summed(report.scores)) == report.metrics
    assert [score.id for score in report.scores] == [sample.id for sample in benchmark.samples()]
    assert {benchmark.verdict(score) for score in report.scores} <= {"good", "bad", "neither"}


@settings(suppress_health_check=["function_scoped_fixture"])
@given(data=st.data())
def test_parts_add_up_to_the_whole(benchmark, data):
    responses = references(benchmark)
    first = data.draw(st.sets(st.sampled_from(sorted(responses)), min_size=1, max_size=len(responses) - 1))
    parts = [{id: text for id, text in responses.items() if (id in first) == is_first} for is_first in (True, False)]
    scores = [score for part in parts for score in benchmark.score(part).scores]
    assert benchmark.metrics(summed(scores)) == pytest.approx(benchmark.score(responses).metrics)


def test_missing_and_empty_responses_are_counted_and_unknown_ones_refused(benchmark):
    responses = references(benchmark)
    first, second, *_ = responses
    provenance = benchmark.score({first: "", second: responses[second]}).provenance
    assert (provenance["n_scored"], provenance["n_missing"], provenance["n_empty"]) == (2, len(responses) - 2, 1)
    with pytest.raises(BenchmarkError, match="'no-such-id'"):
        benchmark.score({**responses, "no-such-id": "Yes"})
    with pytest.raises(BenchmarkError, match="no responses to score"):
        benchmark.score({})


def test_a_new_benchmark_needs_forty_lines_and_no_change_here(counting, tmp_path, capsys):
    source = Path(__file__).read_text().split("# ---")
    assert len(source[1].splitlines()) <= 40
    assert "counting" in benchmarks.names()
    answers = write_lines(tmp_path / "answers.jsonl", [{"answer": "0"}, {"answer": "one"}])
    command_line.main(["bench", "score", "counting", "--responses", str(answers), "--option", "largest=4"])
    printed = capsys.readouterr()
    assert "accuracy 0.5" in " ".join(printed.out.split())
    assert "2 of 4 samples have no response" in printed.err
    command_line.main(["bench", "list"])
    assert "How many dots are in the image?" in capsys.readouterr().out


def test_an_entry_point_brings_a_benchmark_too(monkeypatch):
    class Point:
        name, value = "theirs", "theirs:make"

        def __init__(self, load):
            self.load = load

    def found(group, name=None):
        return [point] if name in (None, "theirs") else []

    monkeypatch.setattr(registry, "entry_points", found)
    point = Point(lambda: Counting)
    assert "theirs" in benchmarks.names()
    assert benchmarks.load("theirs", largest=3).about.name == "counting"

    def missing():
        raise ImportError("no module named theirs")

    point = Point(missing)
    with pytest.raises(BenchmarkError, match=r"announced by theirs:make, which fails: no module named theirs"):
        benchmarks.load("theirs")


def test_names_are_unique_and_options_are_checked(counting):
    with pytest.raises(BenchmarkError, match="There is a benchmark 'pope' already"):
        benchmarks.register("pope", Counting)
    with pytest.raises(BenchmarkError, match="Did you mean 'pope'"):
        benchmarks.load("popes")
    with pytest.raises(BenchmarkError, match=r"no option 'colour'. It has: largest"):
        benchmarks.load("counting", colour="red")
    with pytest.raises(BenchmarkError, match=r"pope needs data .*--data"):
        benchmarks.load("pope")
