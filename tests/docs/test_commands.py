"""The commands of the pages run, in a folder that holds a small stand-in for everything they name.

Hosts are random models in folders called `gpt2`, `llava-hf/llava-1.5-7b-hf`, ...; corpora, images and benchmark files
are a few lines. Left out are the tutorials' own blocks, which test_tutorials.py runs with what they print, the record
of measurements (benchmarks.md), and the commands listed in ELSEWHERE, which the tests named there run.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, GPT2Config

import clt.__main__ as command_line
from clt.config import CLTConfig
from clt.models import CrossLayerTranscoder
from tests.docs.pages import PAGES, ROOT, TUTORIALS, blocks, commands
from tests.tiny_benchmarks import write_amber, write_lines
from tests.tiny_hosts import WIDTH, from_config, llava_model, llava_processor, tiny_image, tiny_tokenizer

GPT2 = {"n_layer": 9, "n_embd": WIDTH, "n_head": 4, "n_positions": 128, "vocab_size": 300, "initializer_range": 0.3}
GEMMA = {"num_hidden_layers": 3, "hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 300, "initializer_range": 0.3}  # fmt: skip
TEXT = "one two three four five six seven eight nine ten to the end and the capital of Texas is Austin."
FEWER = {
    "train": ["--training-steps", "3", "--train-batch-size-tokens", "128"],
    "fidelity": ["--samples", "2", "--max-new-tokens", "4"],
    "steer": ["--max-new-tokens", "4"],
    "attribute": ["--max-feature-nodes", "20"],
    "phase capture": ["--max-new-tokens", "4", "--batch-size", "12"],
    "phase steer": ["--features", "4", "--doses", "1.0", "--controls", "2", "--learned", "0", "--patch-samples", "8"],
}
"""What a command is given besides, to be done soon."""
HUB = "tests/contracts/test_model_hub.py::test_pushed_and_fetched_it_is_the_same_and_an_old_revision_stays"
PUBLISHED = "tests/contracts/test_publish.py::test_shards_are_deleted_only_after_the_server_has_them"
ELSEWHERE = {
    "demo": "tests/unit/test_demo.py::test_the_summary_holds_what_it_promises",
    "discover": "tests/unit/test_demo.py::test_the_summary_tells_what_steering_changed_against_controls",
    "generate --model gpt2 --dataset corpus.jsonl --remote-server-url": PUBLISHED,
    "push --clt runs/gpt2 --repo me/gpt2-clt --yes": HUB,
    "import me/gpt2-clt": HUB,
}


def lines_of(page):
    """The commands that are for here: of a tutorial only what its own test leaves out."""
    chosen = [
        block
        for block in blocks(page)
        if block.language in ("sh", "bash") and (page not in TUTORIALS or block.needs is not None)
    ]
    lines = [words for block in chosen for words in commands(block)]
    return [words for words in lines if not " ".join(words).startswith(tuple(ELSEWHERE))]


CHOSEN = [page for page in PAGES if page.name != "benchmarks.md" and lines_of(page)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The folder with all that is named."""
    here = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        save_hosts()
        for name in ("texts", "corpus", "held_out", "monology/pile-uncopyrighted/train"):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            write_lines(Path(f"{name}.jsonl"), [{"text": f"{name} {n}: {TEXT}"} for n in range(40)])
        save_images_and_benchmarks()
        made = ["--model", "gpt2", "--dataset", "corpus.jsonl", "--target-total-tokens", "2000000"]
        command_line.main(["generate", *made])
        # A host from the Hub has its organisation in the path; the stand-in is a folder and has not.
        Path("activations/llava-hf").symlink_to(".")
        shutil.copytree("activations/gpt2/corpus_train", "acts/gpt2/pile_train")
        sizes = ["--num-features", "3072", "--activation-fn", "topk", "--topk-k", "8", "--training-steps", "2"]
        sizes += ["--train-batch-size-tokens", "128"]
        command_line.main(["train", "--data", "activations/gpt2/corpus_train", "--output-dir", "runs/gpt2", *sizes])
        made = {
            "runs/llava": (3, WIDTH, {}),
            "runs/demo/clt/run": (4, 64, {}),
            "runs/demo/plt/run": (4, 64, {"n_targets": 1}),
        }
        for run, (layers, width, more) in made.items():
            torch.manual_seed(0)
            shape = {"num_layers": layers, "d_model": width, "num_features": 512, "topk_k": 8, **more}
            CrossLayerTranscoder(CLTConfig(activation_fn="topk", **shape)).save_pretrained(run)
        gemma = CLTConfig(
            num_layers=3, d_model=WIDTH, num_features=64, activation_fn="relu", model_name="google/gemma-2-2b"
        )
        CrossLayerTranscoder(gemma).save_pretrained("runs/any")
        hooks = ["--input-hook", "hook_resid_mid", "--output-hook", "hook_mlp_out"]
        for folder in ("downloads/any-clt", "ORGANISATION/REPOSITORY"):
            command_line.main(["export", "--clt", "runs/any", "--format", "circuit-tracer", "--output", folder, *hooks])
    return here


def save_hosts():
    for name, config in {"gpt2": GPT2Config(**GPT2), "google/gemma-2-2b": Gemma2Config(**GEMMA)}.items():
        from_config(config).save_pretrained(name)
        tiny_tokenizer((" Austin", " Dallas")).save_pretrained(name)
    for name in ("llava-hf/llava-1.5-7b-hf", "llava", "my-model"):
        llava_model(seed=1).save_pretrained(name)
        llava_processor().save_pretrained(name)


def save_images_and_benchmarks():
    for folder in ("pictures", "val2014", "AMBER"):
        Path(folder).mkdir()
    for n in range(24):
        tiny_image(n).save(f"val2014/{n}.jpg")
    for path in ("cat.jpg", "photo.png", *(f"pictures/{n}.png" for n in range(24))):
        tiny_image(1).save(path)
    asked = [{"question_id": n, "image": f"{n % 24}.jpg", "text": f"Is there a thing {n} in the image?",
              "label": ("yes", "no")[(n // 24 + n) % 2]} for n in range(48)]  # fmt: skip
    write_lines(Path("coco_pope_random.json"), asked)
    write_lines(
        Path("answers.jsonl"),
        [{"question": row["text"], "question_id": row["question_id"], "answer": "yes"} for row in asked],
    )
    write_amber(Path("AMBER/data"))
    Path("captions.json").write_text(json.dumps([{"id": n, "response": "A dog on grass."} for n in (1, 2)]))
    Path("answers.json").write_text(json.dumps([{"id": n, "response": "Yes"} for n in range(3, 10)]))
    seen = [{"image": f"{n}.jpg", "objects": [f"thing{(n + i) % 12}" for i in range(3)]} for n in range(500)]
    write_lines(Path("objects.jsonl"), seen)
    write_lines(
        Path("pairs.jsonl"),
        [{"image": f"val2014/{n}.jpg", "prompt": "What is it?", "answer": "a thing"} for n in range(12)],
    )


def give_answers():
    """A random host answers neither yes nor no: two of three answers become yes."""
    path = next(Path().rglob("pope/answer/model_responses.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row | {"response": "no" if n % 3 else "yes"} for n, row in enumerate(rows)])


def run(words):
    name = " ".join(words[:2]) if words[0] == "phase" else words[0]
    if "--output-dir" in words:
        shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
    command_line.main([*words, *FEWER.get(name, [])])
    if name == "phase capture":
        give_answers()


@pytest.mark.parametrize("page", CHOSEN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(stage, page, tmp_path, monkeypatch):
    shutil.copytree(stage, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    for words in lines_of(page):
        run(words)


@pytest.mark.parametrize("named", sorted(set(ELSEWHERE.values())))
def test_what_runs_elsewhere_is_there(named):
    path, _, test = named.partition("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE)
