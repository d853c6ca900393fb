"""Generation end to end on tiny hosts: the right rows, exactly once, whatever interrupts it."""

import json

import pytest
import torch

from clt.activation_generation import ActivationGenerator
from clt.activation_generation.corpus import samples_of
from clt.config import ActivationConfig
from clt.data import LocalActivationStore
from clt.data.metadata import metadata_from_json, read_json
from clt.errors import DatasetError, HostModelError
from clt.types import TokenKind
from tests.tiny_hosts import tiny_adapter, tiny_image


@pytest.fixture(scope="module")
def llama():
    return tiny_adapter("llama")


@pytest.fixture(scope="module")
def llava():
    return tiny_adapter("llava")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (i % 4 + 1)}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def pictures(tmp_path):
    lines = []
    for i in range(12):
        tiny_image(i).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"prompt": f"<image>\nwhat {i}", "image": f"{i}.png", "answer": "noise"}))
    (tmp_path / "pictures.jsonl").write_text("\n".join(lines))
    return tmp_path / "pictures.jsonl"


def config_of(path, **options):
    defaults = {
        "model_name": "tiny",
        "dataset_path": str(path),
        "activation_dir": str(path.parent / "activations"),
        "context_size": 16,
        "inference_batch_size": 3,
        "chunk_token_threshold": 64,
        "activation_dtype": "float32",
    }
    return ActivationConfig(**{**defaults, **options})


def all_rows(folder):
    store = LocalActivationStore(folder, batch_size_tokens=100_000)
    batch = next(store.one_pass())
    order = (batch.sample * 1000 + batch.position).argsort()
    return batch.select(order)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metadata.json"
    }


def test_rows_are_what_the_host_gives_for_them(text, llama):
    folder = ActivationGenerator(config_of(text, exclude_special_tokens=False), llama).run()
    stored = all_rows(folder / "train")
    chosen = int(stored.sample[0])
    row = stored.select(stored.sample == chosen)

    assert folder == text.parent / "activations" / "tiny" / "text_train"
    assert row.position.tolist() == list(range(16))
    assert int(row.kind[0]) == TokenKind.SPECIAL
    assert metadata_from_json(read_json(folder / "train")).info.hookpoints == llama.hookpoints


def test_special_tokens_are_left_out_unless_asked_for(text, llama):
    without = ActivationGenerator(config_of(text), llama).run()
    kinds = {
        split: json.loads((without / split / "metadata.json").read_text())["kinds"] for split in ("train", "held_out")
    }
    assert all(kind["special"] == 0 < kind["text"] for kind in kinds.values())


def test_held_out_samples_are_whole_and_disjoint(pictures, llava):
    folder = ActivationGenerator(config_of(pictures, held_out_fraction=0.25), llava).run()
    train, held_out = (set(all_rows(folder / split).sample.tolist()) for split in ("train", "held_out"))
    assert not train & held_out
    assert train | held_out == set(range(12))
    assert len(held_out) == 3


def test_image_and_text_tokens_are_marked(pictures, llava):
    folder = ActivationGenerator(config_of(pictures, held_out_fraction=0), llava).run()
    rows = all_rows(folder)
    first = rows.select(rows.sample == 0)
    assert (first.kind == TokenKind.IMAGE).sum() == 4
    assert (rows.kind == TokenKind.SPECIAL).sum() == 0


def test_prompts_without_placeholder_get_one_per_picture(llava, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    for i in range(4):
        tiny_image(i).save(plain / f"{i}.png")
    folder = ActivationGenerator(
        config_of(plain, held_out_fraction=0, activation_dir=str(tmp_path / "acts")), llava
    ).run()
    rows = all_rows(folder)
    assert (rows.kind == TokenKind.IMAGE).sum() == 16


@pytest.mark.parametrize("target", [1, 50, 137])
def test_exactly_the_tokens_asked_for(text, llama, target):
    config = config_of(text, target_total_tokens=target, held_out_fraction=0)
    assert LocalActivationStore(ActivationGenerator(config, llama).run()).total_tokens == target


def test_a_small_target_still_holds_its_share_out(text, llama):
    config = config_of(text, target_total_tokens=101, inference_batch_size=32)
    folder = ActivationGenerator(config, llama).run()
    assert LocalActivationStore(folder / "train").total_tokens == 90
    assert LocalActivationStore(folder / "held_out").total_tokens == 11


def test_one_text_per_row(text, llama):
    config = config_of(text, pack=False, held_out_fraction=0, max_samples=5)
    rows = all_rows(ActivationGenerator(config, llama).run())
    assert set(rows.sample.tolist()) == set(range(5))
    assert rows.position.max() <= 15


@pytest.mark.parametrize("stop_at", [0, 1, 4, 9, 13])
def test_an_interrupted_run_goes_on_to_the_same_bytes(text, llama, stop_at, monkeypatch):
    whole = ActivationGenerator(config_of(text, activation_dir=str(text.parent / "whole")), llama).run()
    generator = ActivationGenerator(config_of(text), llama)
    capture, calls = llama.capture, iter(range(1000))

    def interrupted(*arguments, **options):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return capture(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(llama, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generator.run()
    assert not generator.is_finished
    parts = ActivationGenerator(config_of(text), llama).run()
    assert files_of(parts) == files_of(whole)


def test_one_finished_split_is_not_made_again(text, llama):
    generator = ActivationGenerator(config_of(text), llama)
    folder = generator.run()
    before = files_of(folder)
    for path in (folder / "held_out").iterdir():
        path.unlink()
    assert not generator.is_finished
    generator.run()
    assert files_of(folder) == before


def test_a_finished_data_set_is_left_alone_and_other_options_are_refused(text, llama, monkeypatch):
    ActivationGenerator(config_of(text), llama).run()
    monkeypatch.setattr(llama, "capture", None)
    again = ActivationGenerator(config_of(text, inference_batch_size=5), llama)
    assert again.is_finished
    again.run()
    with pytest.raises(DatasetError, match="context_size: 16 there, 12 now"):
        ActivationGenerator(config_of(text, context_size=12), llama).run()


def test_a_corpus_too_small_to_hold_anything_out_is_refused(tmp_path, llama):
    (tmp_path / "one.txt").write_text("a few words")
    with pytest.raises(DatasetError, match="gave no tokens for"):
        ActivationGenerator(config_of(tmp_path / "one.txt", held_out_fraction=0.01), llama).run()


def test_bad_samples_stop_or_in_a_second_try_are_listed(pictures, llava):
    with pictures.open("a") as file:
        file.write('\n{"prompt": "<image> gone", "image": "gone.png"}\n')
    with pytest.raises(DatasetError, match=r"pictures\.jsonl:13: the image gone\.png does not exist"):
        ActivationGenerator(config_of(pictures, held_out_fraction=0.25), llava).run()
    folder = ActivationGenerator(config_of(pictures, on_bad_sample="skip", held_out_fraction=0.25), llava).run()
    [skipped] = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped["sample"] == "pictures.jsonl:13"
    assert LocalActivationStore(folder).total_tokens > 0


def test_an_unknown_model_is_refused_before_anything_is_written(text):
    config = config_of(text, model_name=str(text.parent / "no-such-model"))
    with pytest.raises(HostModelError):
        ActivationGenerator(config).run()
    assert not (text.parent / "activations").exists()


def test_bf16_values_are_the_hosts_own(text):
    adapter = tiny_adapter("llama", dtype=torch.bfloat16)
    config = config_of(text, activation_dtype="bfloat16", held_out_fraction=0, chunk_token_threshold=10_000)
    stored = all_rows(ActivationGenerator(config, adapter).run())
    exact = config_of(text, held_out_fraction=0, activation_dir=str(text.parent / "exact"))
    assert torch.equal(stored.inputs.float(), all_rows(ActivationGenerator(exact, adapter).run()).inputs)


def test_the_stream_is_the_training_part_of_the_data_set(text, llama):
    generator = ActivationGenerator(config_of(text), llama)
    stored = all_rows(generator.run() / "train")
    stream = generator.stream(batch_size_tokens=stored.n_tokens, buffer_tokens=stored.n_tokens)
    batch = next(stream)
    live = batch.select((batch.sample * 1000 + batch.position).argsort())
    assert torch.equal(live.sample, stored.sample)
    assert torch.equal(live.inputs, stored.inputs)


def test_a_world_of_finite_text_is_captured_to_its_end(llama):
    config = ActivationConfig(model_name="world:two-hop", dataset_path="world:two-hop")
    splits = [split for _, split in samples_of(config, llama, None)]
    assert splits.count("train") == 351
    assert splits.count("held_out") == 57
