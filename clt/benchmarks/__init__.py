"""Benchmarks: what is asked about images, and which answers were good.

    from clt import benchmarks

    pope = benchmarks.load("pope", data="coco_pope_random.json", images="val2014")
    samples = pope.samples()                       # clt.types.Sample: id, bare question, image; no answer yet
    responses = {sample.id: ... for sample in samples}
    report = pope.score(responses)                 # of any part of the samples
    report.metrics                                 # the official numbers
    report.scores[0].counts, .details              # per sample; `summed(scores)` into `pope.metrics` gives the numbers
    pope.verdict(report.scores[0])                 # "good", "bad" or "neither", by the benchmark's thresholds
    report.provenance                              # plug-ins used, n_missing, n_empty, n_unparsed, undefined metrics

`names()` lists what there is. Others are added without touching this package: an entry point in the group
`crosslayer.benchmarks` (`name = "module:factory"`) or `register(name, factory)`; a factory takes the options of `load`
and returns a `Benchmark`. `framed(sample, template)` puts a bare question into a host's prompt; prompts that already
hold an image placeholder stay as they are. `read_responses` and `write_responses` are the files between.
"""

from clt.benchmarks.base import (
    About,
    Benchmark,
    CountingBenchmark,
    Report,
    SampleScore,
    Verdict,
    ratio,
    summed,
)
from clt.benchmarks.prompts import LLAVA_TEMPLATE, framed
from clt.benchmarks.registry import GROUP, factory_of, load, names, options_of, register
from clt.benchmarks.responses import read_responses, write_responses

__all__ = [
    "GROUP",
    "LLAVA_TEMPLATE",
    "About",
    "Benchmark",
    "CountingBenchmark",
    "Report",
    "SampleScore",
    "Verdict",
    "factory_of",
    "framed",
    "load",
    "names",
    "options_of",
    "ratio",
    "read_responses",
    "register",
    "summed",
    "write_responses",
]
