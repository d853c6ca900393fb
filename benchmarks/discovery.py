"""Analysis of features at the size of AMBER: `python benchmarks/discovery.py [--samples N]`, one JSON line.

1,004 samples of 620 tokens, 32 layers of 8,192 features, 32 active per token and layer: written by our packed format
(a few different samples, linked under many names), read, tabulated, tested with 100 shuffles, chosen from. `ratio` is
seconds of all this per second that numpy needs to add as many numbers.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from clt.discovery.features_file import LayerFeatures, load_features, save_features
from clt.discovery.selection import round_robin
from clt.discovery.statistics import class_statistics, permutation_test
from clt.discovery.table import load_table

LAYERS, FEATURES, ACTIVE, TOKENS, PROMPT, DIFFERENT = 32, 8192, 32, 620, 575, 6


def random_layer(rng: np.random.Generator, popularity: np.ndarray) -> LayerFeatures:
    """Tokens that choose their features by popularity (log-normal over features and over samples)."""
    keys = popularity + rng.gumbel(size=(TOKENS, FEATURES)).astype(np.float32)
    features = np.argpartition(-keys, ACTIVE, axis=1)[:, :ACTIVE].ravel().astype(np.int64)
    positions = np.repeat(np.arange(TOKENS), ACTIVE)
    order = np.lexsort((positions, features))
    values = rng.lognormal(0, 0.8, len(order)).astype(np.float32)
    return LayerFeatures(features[order], positions[order], values, TOKENS, FEATURES)


def write_samples(folder: Path, n_samples: int) -> tuple[list[Path], float]:
    """Activation files and their mean size in bytes."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1.5, (LAYERS, FEATURES)).astype(np.float32)
    for number in range(min(DIFFERENT, n_samples)):
        own = common + rng.normal(0, 1.0, common.shape).astype(np.float32)
        layers = {layer: random_layer(rng, own[layer]) for layer in range(LAYERS)}
        save_features(folder / f"sample_{number:04d}.pt", layers)
    size = float(np.mean([path.stat().st_size for path in folder.iterdir()]))
    for number in range(DIFFERENT, n_samples):
        os.link(folder / f"sample_{number % DIFFERENT:04d}.pt", folder / f"sample_{number:04d}.pt")
    return sorted(folder.iterdir()), size


def analyse(files: list[Path], n_positions: int) -> dict[str, float]:
    """Seconds of each step."""
    mask = np.zeros(TOKENS, dtype=bool)
    mask[TOKENS - n_positions :] = True
    labels = np.random.default_rng(1).random(len(files)) < 0.25
    times = {}
    begin = time.perf_counter()
    table = load_table(files, [mask] * len(files))
    times["read"] = time.perf_counter() - begin
    begin = time.perf_counter()
    statistics = class_statistics(table, labels, 0.01)
    test = permutation_test(table, labels, np.zeros(len(files), dtype=np.int64))
    round_robin(statistics.goodness_score, test.p_value < 1, target=200, min_per_layer=3)
    times["test"] = time.perf_counter() - begin
    return times


def additions_per_second() -> float:
    """What numpy does on this machine, to compare machines by."""
    numbers = np.ones(20_000_000, dtype=np.float32)
    begin = time.perf_counter()
    for _ in range(10):
        numbers.sum()
    return 10 * len(numbers) / (time.perf_counter() - begin)


def main() -> None:
    """Print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1004)
    parser.add_argument("--positions", type=int, default=TOKENS - PROMPT + 1, help="counted: the last so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files, size = write_samples(Path(folder), options.samples)
        begin = time.perf_counter()
        n_entries = sum(len(layer.features) for layer in load_features(files[0]).values())
        one = time.perf_counter() - begin
        times = analyse(files, options.positions)
    total = sum(times.values())
    line = {
        "samples": options.samples,
        "entries": n_entries * options.samples,
        "gigabytes_on_disk": size * options.samples / 1e9,
        "bits_per_entry": 8 * size / n_entries,
        "seconds_one_file": one,
        **{f"seconds_{name}": value for name, value in times.items()},
        "seconds": total,
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "ratio": total / (n_entries * options.samples / additions_per_second()),
    }
    print(json.dumps({name: round(value, 4) for name, value in line.items()}))


if __name__ == "__main__":
    main()
