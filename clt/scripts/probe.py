"""Opens what `clt train --fidelity-interval N` measures with, before a step is trained."""

from __future__ import annotations

from clt.config import CLTConfig, TrainingConfig
from clt.errors import ConfigError
from clt.replacement import FidelityProbe
from clt.replacement.loading import check_fit, open_host
from clt.scripts import fidelity
from clt.types import choose_device


def fidelity_probe(training: TrainingConfig, config: CLTConfig, device: str | None = None) -> FidelityProbe | None:
    """The probe that the options of a run ask for; None if they ask for none.

    Args:
        config: of the transcoder to be trained, with its layers and width.
        device: of the host; None: a GPU if there is one.

    Raises:
        ConfigError, DatasetError, HostModelError: what cannot be opened, or does not fit the transcoder.
    """
    if training.fidelity_interval is None or training.fidelity_dataset is None:
        return None
    host = training.fidelity_model or config.model_name
    if host is None:
        raise ConfigError(
            "The activations do not say which host they are of. Name it: --fidelity-model ID (a Hugging Face id, a "
            "folder or world:NAME)."
        )
    adapter = open_host(host, config, {"device": choose_device(device)})
    check_fit(adapter, config)
    options = fidelity.Options(
        model=host,
        clt="",
        dataset=training.fidelity_dataset,
        samples=training.fidelity_samples,
        max_new_tokens=training.fidelity_new_tokens,
    )
    samples = fidelity.held_out_samples(options, adapter)
    return FidelityProbe(adapter, samples, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
