"""Random transcoders in other projects' files, written from the formats' descriptions, with each one's own formula.

Each function fills a folder and returns `forward(x)`, inputs and outputs `[layer, token, d_model]`.
"""

import json

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

LAYERS, WIDTH, FEATURES = 3, 4, 6


def normal(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def json_to(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def jump(h, theta):
    return h * (h > theta)


def cross_layer(x, encode, decoders, bias):
    """y_t = bias_t + sum over sources of a_s D_st; `decoders(s, t)` is [feature, d_model]."""
    a = [encode(s, x[s]) for s in range(LAYERS)]
    return torch.stack([bias[t] + sum(a[s] @ decoders(s, t) for s in range(t + 1)) for t in range(LAYERS)])


def clt_forge(folder, shards=1):
    randn = normal()
    pairs = [(s, t) for s in range(LAYERS) for t in range(s, LAYERS)]
    w = {
        "W_enc": randn(LAYERS, WIDTH, FEATURES),
        "b_enc": randn(LAYERS, FEATURES),
        "W_dec": randn(len(pairs), FEATURES, WIDTH),
        "b_dec": randn(len(pairs), WIDTH),
        "log_threshold": randn(LAYERS, FEATURES) - 1,
        "feature_count": torch.zeros(LAYERS, FEATURES, dtype=torch.long),
        "layer_mask": torch.tensor([[float(t == layer) for _, t in pairs] for layer in range(LAYERS)]),
        "estimated_norm_scaling_factor_in": randn(LAYERS).exp(),
        "estimated_norm_scaling_factor_out": randn(LAYERS).exp(),
    }
    json_to(
        folder / "clt_cfg.json",
        {
            "d_in": WIDTH,
            "d_latent": FEATURES,
            "n_layers": LAYERS,
            "model_name": "gpt2",
            "cross_layer_decoders": True,
            "jumprelu_bandwidth": 1.0,
            "dtype": "float32",
        },
    )
    axis = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1, "feature_count": 1}
    if shards == 1:
        save_file(w, folder / "clt_weights.safetensors")
    for rank in range(shards if shards > 1 else 0):
        part = {n: v.chunk(shards, axis[n])[rank].contiguous() if n in axis else v for n, v in w.items()}
        save_file(part, folder / f"rank{rank}_clt_weights.safetensors")

    def forward(x):
        s_in, s_out = w["estimated_norm_scaling_factor_in"], w["estimated_norm_scaling_factor_out"]
        bias = [sum(w["b_dec"][i] for i, (_, t) in enumerate(pairs) if t == layer) for layer in range(LAYERS)]
        y = cross_layer(
            x,
            lambda s, v: jump(v * s_in[s] @ w["W_enc"][s] + w["b_enc"][s], w["log_threshold"][s].exp()),
            lambda s, t: w["W_dec"][pairs.index((s, t))],
            bias,
        )
        return y / s_out[:, None, None]

    return forward


def openmoss(folder, act="jumprelu", by_norm=True):
    randn = normal()
    hooks = {side: [f"blocks.{i}.{name}" for i in range(LAYERS)] for side, name in (("in", "ln2"), ("out", "mlp_out"))}
    w = {"W_E": randn(LAYERS, WIDTH, FEATURES), "b_E": randn(LAYERS, FEATURES)}
    for t in range(LAYERS):
        w |= {f"W_D.{t}": randn(t + 1, FEATURES, WIDTH), f"b_D.{t}": randn(WIDTH)}
    if act == "jumprelu":
        w["activation_function.log_jumprelu_threshold"] = randn(LAYERS, FEATURES)
    for side in hooks.values():
        w |= {f"dataset_average_activation_norm.{hook}": randn(()).exp() * 3 for hook in side}
    json_to(
        folder / "config.json",
        {
            "sae_type": "clt",
            "d_model": WIDTH,
            "expansion_factor": FEATURES / WIDTH,
            "use_decoder_bias": True,
            "act_fn": act,
            "norm_activation": "dataset-wise",
            "sparsity_include_decoder_norm": by_norm,
            "top_k": 2,
            "hook_points_in": hooks["in"],
            "hook_points_out": hooks["out"],
        },
    )
    save_file(w, folder / "sae_weights.safetensors")
    scale = {
        side: torch.stack([WIDTH**0.5 / w[f"dataset_average_activation_norm.{hook}"] for hook in names])
        for side, names in hooks.items()
    }

    def encode(s, x):
        h = x * scale["in"][s] @ w["W_E"][s] + w["b_E"][s]
        squares = sum(w[f"W_D.{t}"][s].square().sum(-1) for t in range(s, LAYERS))
        norm = squares.sqrt() if by_norm else torch.ones(FEATURES)
        h = h * norm
        if act == "jumprelu":
            return jump(h, w["activation_function.log_jumprelu_threshold"][s].exp()) / norm
        kept = h.relu().topk(2, dim=-1)
        return torch.zeros_like(h).scatter(-1, kept.indices, kept.values) / norm

    return lambda x: (
        cross_layer(x, encode, lambda s, t: w[f"W_D.{t}"][s], [w[f"b_D.{t}"] for t in range(LAYERS)])
        / scale["out"][:, None, None]
    )


def goreg(folder, folded=False, nonlinearity="JumpReLU"):
    randn = normal()
    w = {
        "encoder.W": randn(LAYERS, WIDTH, FEATURES),
        "encoder.b": randn(LAYERS, FEATURES),
        "decoder.b": randn(LAYERS, WIDTH),
    }
    w |= {f"decoder.W_{t}": randn(t + 1, FEATURES, WIDTH) for t in range(LAYERS)}
    if nonlinearity == "JumpReLU":
        w["nonlinearity.theta"] = randn(1, LAYERS, FEATURES).abs()
        theta = w["nonlinearity.theta"][0]
    else:
        w["nonlinearity.threshold"] = torch.tensor([0.7])
        theta = torch.full((LAYERS, FEATURES), 0.7)
    if not folded:
        w |= {f"{side}_standardizer.mean": randn(LAYERS, WIDTH) for side in ("input", "output")}
        w |= {f"{side}_standardizer.std": randn(LAYERS, WIDTH).exp() for side in ("input", "output")}
    path = f"crosslayer_transcoder.model.jumprelu.{nonlinearity}"
    values = {
        "model": {
            "class_path": "crosslayer_transcoder.model.clt.CrossLayerTranscoder",
            "init_args": {
                "nonlinearity": {"class_path": path},
                "is_folded": folded,
            },
        }
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    save_file(w, folder / "checkpoint.safetensors")

    def forward(x):
        if not folded:
            x = (x - w["input_standardizer.mean"][:, None]) / w["input_standardizer.std"][:, None]
        y = cross_layer(
            x,
            lambda s, v: jump(v @ w["encoder.W"][s] + w["encoder.b"][s], theta[s]),
            lambda s, t: w[f"decoder.W_{t}"][s],
            w["decoder.b"],
        )
        return y if folded else y * w["output_standardizer.std"][:, None] + w["output_standardizer.mean"][:, None]

    return forward


def circuit_tracer(folder, thresholds=True):
    randn = normal()
    folder.mkdir(parents=True, exist_ok=True)
    w = {}
    for i in range(LAYERS):
        part = {f"W_enc_{i}": randn(FEATURES, WIDTH), f"b_enc_{i}": randn(FEATURES), f"b_dec_{i}": randn(WIDTH)}
        if thresholds:
            part[f"threshold_{i}"] = randn(FEATURES).abs()
        decoder = {f"W_dec_{i}": randn(FEATURES, LAYERS - i, WIDTH)}
        save_file(part, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        w |= {**part, **decoder}
    names = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", **names}))
    return lambda x: cross_layer(
        x,
        lambda s, v: jump(
            h := v @ w[f"W_enc_{s}"].T + w[f"b_enc_{s}"], w.get(f"threshold_{s}", torch.zeros_like(h[0]))
        ),
        lambda s, t: w[f"W_dec_{s}"][:, t - s],
        [w[f"b_dec_{t}"] for t in range(LAYERS)],
    )


def per_layer(folder, kind):
    """SAELens folders, a circuit-tracer set, Gemma Scope archives."""
    randn = normal()
    layers = []
    for i in range(LAYERS):
        w = {
            "W_enc": randn(WIDTH, FEATURES),
            "b_enc": randn(FEATURES),
            "W_dec": randn(FEATURES, WIDTH),
            "b_dec": randn(WIDTH),
            "threshold": randn(FEATURES).abs(),
        }
        if kind != "gemma-scope":
            w["W_skip"] = randn(WIDTH, WIDTH)
        layers.append(w)
        if kind == "saelens":
            json_to(
                folder / f"blocks_{i}" / "cfg.json",
                {
                    "architecture": "jumprelu_skip_transcoder",
                    "d_in": WIDTH,
                    "d_sae": FEATURES,
                    "d_out": WIDTH,
                    "apply_b_dec_to_input": False,
                    "normalize_activations": "none",
                    "dtype": "float32",
                    "metadata": {"hook_name": f"blocks.{i}.mlp.hook_in", "hook_name_out": f"blocks.{i}.hook_mlp_out"},
                },
            )
            save_file(w, folder / f"blocks_{i}" / "sae_weights.safetensors")
        elif kind == "circuit-tracer":
            folder.mkdir(parents=True, exist_ok=True)
            theirs = {**w, "W_enc": w["W_enc"].T.contiguous(), "activation_function.threshold": w["threshold"]}
            del theirs["threshold"]
            save_file(theirs, folder / f"layer_{i}.safetensors")
        else:
            place = folder / f"layer_{i}" / "width_6" / "average_l0_2"
            place.mkdir(parents=True)
            np.savez(place / "params.npz", **{name: value.numpy() for name, value in w.items()})

    def forward(x):
        outputs = []
        for w, v in zip(layers, x, strict=True):
            y = jump(v @ w["W_enc"] + w["b_enc"], w["threshold"]) @ w["W_dec"] + w["b_dec"]
            outputs.append(y + v @ w["W_skip"].T if "W_skip" in w else y)
        return torch.stack(outputs)

    return forward


def eleuther(folder, coalesce="none", tied=False, span=LAYERS, skip=True):
    """Its runner, target by target: every active source's contribution, then the post-encoders."""
    randn, files = normal(), []
    for p in range(LAYERS):
        count = min(span, LAYERS - p)
        sources = [q for q in range(p + 1) if q + min(span, LAYERS - q) > p]
        w = {
            "encoder.weight": randn(FEATURES, WIDTH),
            "encoder.bias": randn(FEATURES),
            "in_norm": randn(1).exp(),
            "out_norm": randn(1).exp(),
        }
        by_target = coalesce != "none"

        def lists(name, number, *shape, w=w):
            names = [name] if number == 1 else [f"{name}s.{i}" for i in range(number)]
            w |= {each: randn(*shape) for each in names}

        rows = FEATURES * len(sources) if coalesce == "per-layer" else FEATURES
        lists("W_dec", 1 if by_target or tied else count, rows, WIDTH)
        lists("b_dec", 1 if by_target else count, WIDTH)
        if skip:
            lists("W_skip", 1 if by_target else count, WIDTH, WIDTH)
        lists("post_enc", count, FEATURES)
        lists("post_enc_scale", count, FEATURES)
        files.append(w)
        options = {
            "activation": "topk",
            "num_latents": FEATURES,
            "k": 2,
            "transcode": True,
            "skip_connection": skip,
            "normalize_io": True,
            "coalesce_topk": coalesce,
            "per_source_tied": tied,
            "post_encoder_scale": True,
            "train_post_encoder": True,
            "dtype": "none",
            "d_in": WIDTH,
            "n_targets": count,
            "n_sources": len(sources),
        }
        json_to(folder / f"h.{p}.mlp" / "cfg.json", options)
        save_file(w, folder / f"h.{p}.mlp" / "sae.safetensors")

    def get(p, name, i):
        return files[p].get(f"{name}s.{i}", files[p].get(name))

    def forward(x):
        scaled = [v * WIDTH**0.5 / files[p]["in_norm"] for p, v in enumerate(x)]
        h = [(v @ f["encoder.weight"].T + f["encoder.bias"]).relu() for v, f in zip(scaled, files, strict=True)]
        kept = [each.topk(2, dim=-1) for each in h]
        a = [torch.zeros_like(each).scatter(-1, k.indices, k.values) for each, k in zip(h, kept, strict=True)]
        outputs = []
        for t in range(LAYERS):
            sources = [q for q in range(t + 1) if q + min(span, LAYERS - q) > t]
            y = torch.zeros_like(x[0])
            for place, s in enumerate(sources):
                i = t - s
                effective = (a[s] + get(s, "post_enc", i) * (a[s] > 0)) * get(s, "post_enc_scale", i)
                if coalesce == "none":
                    y = y + effective @ get(s, "W_dec", 0 if tied else i) + get(s, "b_dec", i)
                    y = y + scaled[s] @ get(s, "W_skip", i).T if skip else y
                else:
                    block = files[t]["W_dec"]
                    block = block if coalesce == "concat" else block[place * FEATURES : (place + 1) * FEATURES]
                    y = y + effective @ block
            if coalesce != "none":
                y = y + files[t]["b_dec"]
                y = y + scaled[t] @ files[t]["W_skip"].T if skip else y
            outputs.append(y * files[t]["out_norm"] / WIDTH**0.5)
        return torch.stack(outputs)

    return forward


def kokosdev(folder, n_targets=2):
    """Layer norm, linear, ReLU, linear; file l predicts the MLPs of l + 1, l + 2, ..."""
    randn, models = normal(), []
    for layer in range(LAYERS - 1):
        norm = torch.nn.LayerNorm(WIDTH)
        model = torch.nn.ModuleDict(
            {
                "enc": torch.nn.Sequential(norm, torch.nn.Linear(WIDTH, FEATURES)),
                "dec": torch.nn.Linear(FEATURES, WIDTH * n_targets),
            }
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(randn(*parameter.shape))
        state = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
        torch.save({"layer": layer, "state_dict": state}, folder / f"transcoder_L{layer}.pt")
        models.append(model)

    def forward(x):
        outputs = torch.zeros_like(x)
        with torch.no_grad():
            for layer, model in enumerate(models):
                written = model["dec"](model["enc"](x[layer]).relu()).unflatten(-1, (n_targets, WIDTH))
                for i in range(min(n_targets, LAYERS - layer - 1)):
                    outputs[layer + 1 + i] += written[:, i]
        return outputs

    return forward
