"""Write a data set again with all its rows in a random order, in bounded memory."""

import time
from dataclasses import dataclass

from clt.activation_generation.scramble import scramble


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to shuffle, and where to."""

    input_dir: str
    """Folder that `clt generate` wrote."""
    output_dir: str
    """New folder."""
    seed: int | None = None
    """Seed of the order; None: the time."""
    memory_bytes: int = 2**29
    """About how much memory to use for rows."""


def main(options: Options) -> None:
    """Scramble and say what was checked."""
    seed = int(time.time()) if options.seed is None else options.seed
    for result in scramble(options.input_dir, options.output_dir, seed=seed, memory_bytes=options.memory_bytes):
        print(
            f"{result.folder}: {result.tokens:,} rows in a random order (seed {seed}); "
            f"the same rows as before (fingerprint {result.fingerprint:016x})."
        )
