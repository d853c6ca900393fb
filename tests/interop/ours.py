"""Our half of the comparison, run by the environment that crosslayer is installed in.

The other projects want older packages than crosslayer, so both halves talk through files:

    python -m tests.interop.ours make FOLDER          hosts, exports (by `clt export`) and what we compute with them
    python -m tests.interop.ours run CLT IN OUT       a folder of theirs: encoded and reconstructed by us
    python -m tests.interop.ours graph FILE OUT       a graph file of theirs, as we read it
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clt.__main__ import main
from clt.attribution import attribute, read_circuit_tracer_json, read_circuit_tracer_pt, write_circuit_tracer_pt
from clt.lm import ModelAdapter
from clt.models import CrossLayerTranscoder
from clt.replacement import ReplacementModel
from tests.attribution_hosts import random_transcoder
from tests.interop.cases import CASES, HOSTS, PROMPT, TOKENIZER
from tests.tiny_hosts import TEXT_CONFIGS, from_config, tiny_tokenizer


def make(folder: Path) -> None:
    """Hosts, and per case an export, random inputs, and what we compute from them."""
    for host in HOSTS:
        save_host(folder / host, host)
    for name, case in CASES.items():
        torch.manual_seed(0)
        place, host = folder / name, str(folder / case.host)
        adapter = ModelAdapter.from_pretrained(host)
        transcoder = random_transcoder(adapter, seed=1, **case.options).eval()
        with torch.no_grad():
            for log in transcoder.log_threshold if transcoder.config.activation_fn == "jumprelu" else ():
                log.uniform_(-4, -1)
        transcoder.save_pretrained(place / "ours")
        export(place, case, host)
        x = torch.randn(transcoder.config.num_layers, 50, transcoder.config.d_model)
        computed = {"inputs": x, "activations": transcoder.encode(x), "outputs": transcoder(x)}
        save_file({key: value.detach().contiguous() for key, value in computed.items()}, place / "computed.safetensors")
        if case.hooks:
            graph(ReplacementModel(adapter, transcoder), place, host)


def save_host(folder: Path, family: str) -> None:
    """A random host, with files that older transformers read too."""
    from_config(TEXT_CONFIGS[family]()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({"n_ctx": config.get("n_positions")} if family == "gpt2" else {"rope_theta": 10000.0})
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))


def export(place: Path, case, host: str) -> None:
    """What a user would type."""
    command = ["export", "--clt", str(place / "ours"), "--format", case.format, "--output", str(place / "theirs")]
    hooks = case.hooks or ("hook_resid_mid", "hook_mlp_out")
    command += ["--input-hook", hooks[0], "--output-hook", hooks[1], "--model-name", host]
    main([*command, *(["--own-layer-only"] if case.own_layer_only else [])])


def graph(model: ReplacementModel, place: Path, host: str) -> None:
    """Our graph of the prompt, as tensors and as circuit-tracer's file."""
    whole = attribute(model, PROMPT, max_feature_nodes=None, scan=str(place / "theirs"))
    pruned = whole.prune()
    write_circuit_tracer_pt(whole, place / "graph.pt", tokenizer=host)
    save_file(
        {
            "adjacency": whole.to_dense().contiguous(), "features": whole.features.contiguous(),
            "active": whole.active_features.contiguous(), "values": whole.active_values.contiguous(),
            "targets": torch.tensor([target.token_id for target in whole.targets]),
            "probabilities": whole.target_weights.contiguous(), "node_mask": pruned.node_mask,
            "edge_mask": pruned.edge_mask.contiguous(), "cumulative": pruned.cumulative.contiguous(),
            "scores": torch.tensor([whole.scores.replacement, whole.scores.completeness]),
        },
        place / "graph.safetensors",
    )  # fmt: skip


def run(folder: str, inputs: str, output: str) -> None:
    """Read somebody's transcoder directly and after `clt import`, and compute."""
    x, imported = load_file(inputs)["inputs"], Path(output).parent / "imported"
    main(["import", folder, str(imported)])
    found = {}
    for name, path in (("", folder), ("imported_", imported)):
        transcoder = CrossLayerTranscoder.from_pretrained(path)
        found |= {f"{name}activations": transcoder.encode(x), f"{name}outputs": transcoder(x)}
    save_file({key: value.detach().contiguous() for key, value in found.items()}, output)


def read_graph(path: str, output: str) -> None:
    """Read somebody's graph file."""
    if path.endswith(".pt"):
        whole = read_circuit_tracer_pt(path)
        save_file({"adjacency": whole.to_dense().contiguous(), "features": whole.features.contiguous()}, output)
    else:
        kept = read_circuit_tracer_json(path)
        save_file({"weights": kept.edges.weight.sort().values, "features": kept.features.contiguous()}, output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = {"make": lambda folder: make(Path(folder)), "run": run, "graph": read_graph}
    commands[sys.argv[1]](*sys.argv[2:])
