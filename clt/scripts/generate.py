"""Capture what a host's MLPs read and write, to disk.

clt generate --model gpt2 --dataset monology/pile-uncopyrighted --target-total-tokens 2000000
clt generate --model world:shapes --dataset world:shapes
"""

from clt.activation_generation import ActivationGenerator
from clt.config import ActivationConfig
from clt.data.metadata import metadata_from_json, read_json

Options = ActivationConfig


def main(options: ActivationConfig) -> None:
    """Write the data set, or say that it is already there."""
    generator = ActivationGenerator(options)
    was_finished = generator.is_finished
    folder = generator.run()
    if was_finished:
        print(f"{folder} is already finished with these options; nothing to do.")
    for split, path in generator.splits.items():
        metadata = metadata_from_json(read_json(path))
        print(
            f"{split}: {metadata.total_tokens:,} tokens x {metadata.info.num_layers} layers x {metadata.info.d_model} "
            f"as {metadata.dtype} in {len(metadata.shards)} shards: {path}"
        )
