"""What ranks tell each other in one step, on paper: bytes by purpose, as `Traffic` counts them (docs/parallel.md)."""

from __future__ import annotations

from clt.config import CLTConfig, TrainingConfig

# Of the digits that batchtopk's threshold is found by, and of one count (see thresholds.py).
_COUNTS = {4: 2048 + 2048 + 512, 8: 5 * 2048 + 256}
_COUNT_BYTES = 8


def step_bytes(
    clt: CLTConfig,
    training: TrainingConfig,
    tp: int,
    dp: int,
    n_parameters: int,
    *,
    n_features: int,
    n_updated: int = 0,
    has_dead: bool = False,
    by_hand: bool = False,
) -> dict[str, int]:
    """Of a rank that is the first of its groups (the others send a little less), without checkpoints and logging.

    By hand, batchtopk's candidates are counted again (8 bytes) whenever the bar they must lie above has to be lowered.

    Args:
        clt: the whole dictionary.
        training: says how many tokens a step has, in how many micro-batches.
        tp: parts of the dictionary.
        dp: copies; each sees 1 / dp of the tokens.
        n_parameters: of one part.
        n_features: per layer, of one part.
        n_updated: parameters that this rank's optimiser looks after for the other copies; 0: each for itself.
        has_dead: topk and batchtopk: some feature is dead, so that AuxK is at work.
        by_hand: no autograd.
    """
    width = 8 if clt.clt_dtype == "float64" else 4
    tokens = training.train_batch_size_tokens // dp
    values = tokens * clt.num_layers * clt.d_model * width
    sent = {"signals": 8, "losses": 5 * 8} if tp * dp > 1 else {}
    n_micro = -(-training.train_batch_size_tokens // (training.micro_batch_tokens or training.train_batch_size_tokens))
    chooses = clt.activation_fn in ("topk", "batchtopk")
    revives = chooses and training.aux_loss_factor is not None
    if tp > 1:
        sent |= {"reconstruction": values * (2 if revives and has_dead else 1), "gradient norm": 8}
        sent |= {"shared gradients": _shared(clt) * width}
        if revives:
            sent["dead features"] = 8 * n_micro
        if clt.activation_fn == "topk":
            sent["topk candidates"] = tokens * width * clt.topk_count * _layers(clt, clt.topk_mode)
        if revives and has_dead:
            aux = training.aux_k or min(512, max(1, clt.d_model // 2))
            shown = tokens * width * clt.num_layers * min(aux, clt.num_features)
            sent["topk candidates"] = sent.get("topk candidates", 0) + shown
    if clt.activation_fn == "batchtopk" and tp * dp > 1:
        n_cuts = n_micro * _layers(clt, clt.batchtopk_mode)
        sent["batchtopk counts"] = _COUNTS[width] * _COUNT_BYTES * n_cuts
        sent["batchtopk candidates"] = 8 * n_cuts * by_hand
        if dp > 1:
            sent["tokens"] = 8 * (n_cuts if by_hand else n_micro)
    if by_hand and training.route == "auto" and not chooses and tp * dp > 1:
        sent["density"] = 8
    if dp > 1:
        sent |= {"gradients": n_parameters * width, "features fired": clt.num_layers * n_features * 8}
        sent["updated weights"] = n_updated * width
        sent["tokens"] = sent.get("tokens", 0) + 8
    return sent


def _layers(clt: CLTConfig, mode: str) -> int:
    return 1 if mode == "global" else clt.num_layers


def _shared(clt: CLTConfig) -> int:
    """Numbers that all parts have: decoder biases, skip connections, and the thin matrices of low-rank decoders."""
    windows = [len(clt.targets_of(source)) for source in range(clt.num_layers)]
    skips = sum(len(clt.skip_targets_of(source)) for source in range(clt.num_layers))
    thin = sum(max(n - 1, 0) for n in windows) * (clt.decoder_rank or 0)
    return clt.num_layers * clt.d_model + skips * clt.d_model**2 + thin * clt.d_model
