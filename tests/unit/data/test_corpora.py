"""Text and images from files: nothing lost, everything wrong named."""

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from clt.data.corpora import Corpus
from clt.errors import DatasetError
from tests.tiny_hosts import tiny_image


def prompts(path, **options):
    return [sample.prompt for sample in Corpus(path=str(path), **options)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@given(text=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r"), min_size=1, max_size=300))
def test_pieces_of_a_text_file_join_to_the_file(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(text * 60, encoding="utf-8", newline="")
    joined = "".join(prompts(path))
    assert joined == text * 60 or not text.strip()


def test_long_text_is_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 500 + "\n\n" + "more " * 700)
    pieces = prompts(tmp_path / "a.txt")
    assert pieces[0] == "word " * 500 + "\n\n"
    assert max(map(len, pieces)) <= 4096


def test_jsonl_json_parquet_and_folders_of_them(tmp_path):
    records = [{"text": "one", "other": 1}, {"text": "two", "other": 2}]
    write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert prompts(tmp_path / name) == ["one", "two"]
    assert prompts(tmp_path) == ["one", "two"] * 3
    ids = [sample.id for sample in Corpus(path=str(tmp_path))]
    assert len(set(ids)) == 6


def test_images_with_prompts_and_folders_of_images(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for i in range(2):
        tiny_image(i).save(tmp_path / "pictures" / f"{i}.png")
    records = [
        {"prompt": "What?", "image": "pictures/0.png", "answer": "Noise."},
        {"id": 7, "query": "Where?", "image": "pictures/1.png"},
    ]
    first, second = Corpus(path=str(write_jsonl(tmp_path / "a.jsonl", records)))
    assert (first.prompt, first.answer, second.prompt, second.meta["id"]) == ("What?", "Noise.", "Where?", 7)
    assert first.images[0].size == (40, 30)
    assert prompts(tmp_path / "pictures", image_prompt="Say.") == ["Say.", "Say."]
    monkeypatch.chdir(tmp_path)
    assert prompts("pictures", image_prompt="Say.") == ["Say.", "Say."]


def test_a_missing_text_column_names_the_columns_there_are(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "id": 1}])
    with pytest.raises(DatasetError, match=r"a\.jsonl:1 has no text in column 'text'.*\n?.*content, id"):
        prompts(path)
    assert prompts(path, text_column="content") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text', "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "is a list; an object"),
        ("a.json", b'{"text": "x"}', "a list of objects is needed"),
        ("a.json", b"[", "is not JSON"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.txt", b"abc \xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        prompts(tmp_path / name)


def test_missing_and_broken_images_stop_or_are_handed_over(tmp_path):
    tiny_image(0).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    records = [{"prompt": name, "image": name} for name in ("good.png", "broken.png", "missing.png", "good.png")]
    path = write_jsonl(tmp_path / "a.jsonl", records)

    with pytest.raises(DatasetError, match=r"broken\.png cannot be read"):
        prompts(path)
    bad = []
    found = prompts(path, on_bad_sample=lambda name, error: bad.append((name, str(error))))
    assert found == ["good.png", "good.png"]
    assert [name for name, _ in bad] == ["a.jsonl:2", "a.jsonl:3"]
    assert "does not exist" in bad[1][1]


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(DatasetError, match="neither text"):
        prompts(tmp_path)


def test_a_prompt_without_its_picture_is_told_apart_from_a_text_without_its_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "<image> What is it?", "picture": "x.png"}])
    with pytest.raises(DatasetError, match=r"(?s)no image: .* column 'image'. Its columns are: picture, prompt"):
        prompts(path)


def test_a_broken_picture_is_named_without_addresses_in_memory(tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "What?", "image": "cut.png"}])
    with pytest.raises(DatasetError, match=r"cut\.png cannot be read \(no kind of image that Pillow knows\)"):
        prompts(path)
