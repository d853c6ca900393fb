"""What can go wrong, as a tree.

    CLTError
    ├── ConfigError       a field, a flag or a combination of them that cannot work
    ├── HostModelError    a model that cannot be loaded, hooked, replaced or linearised
    ├── DatasetError      activations at rest: missing, cut off, of another model
    ├── CheckpointError   a transcoder or trainer state that cannot be read
    ├── GraphError        an attribution graph that cannot be made, read or exported
    ├── TrainingError     a loss that is not a number, a store that runs dry
    ├── BenchmarkError    questions, answers or judgements that do not fit together
    ├── ParallelError     another rank that is gone, or does not answer in time
    ├── DiscoveryError    phases of feature discovery that lack their input or have too few samples
    └── WorldError        an embedded world that does not exist or lacks its weights

The command line prints the message without a traceback (`--debug` shows it) and exits with 2.
A message names the thing, both values, the likely cause and the way out.
"""


class CLTError(Exception):
    """Anything this package refuses to do, and why."""


class ConfigError(CLTError, ValueError):
    """A field, a flag or a combination of them that cannot work."""


class HostModelError(CLTError):
    """A host model that cannot be loaded, hooked, replaced or linearised."""


class DatasetError(CLTError):
    """Activations at rest that are missing, damaged or of another model."""


class CheckpointError(CLTError):
    """A saved transcoder or trainer state that cannot be read."""


class GraphError(CLTError):
    """An attribution graph that cannot be made, read or exported."""


class TrainingError(CLTError):
    """Training that cannot go on."""


class BenchmarkError(CLTError):
    """Questions, answers or judgements of a benchmark that are missing, damaged or do not fit together."""


class WorldError(CLTError):
    """An embedded world that does not exist or lacks its weights."""


class ParallelError(CLTError):
    """Another rank that is gone, or does not answer in time."""


class DiscoveryError(CLTError):
    """A phase of feature discovery that lacks its input or has too few samples."""
