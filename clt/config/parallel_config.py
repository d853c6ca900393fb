"""How a run is spread over the ranks that torchrun started; changes how fast it is, never what comes out."""

from dataclasses import dataclass

from clt.config.base import Config, require_positive


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Ranks, who reads, who looks after the optimiser's state."""

    tp: int | None = None
    """Parts into which the features are divided; None: as many as there are ranks, or ranks / dp."""
    dp: int | None = None
    """Copies of the dictionary, each training on other tokens of every batch; None: ranks / tp."""
    shard_optimizer: bool = False
    """With dp: every copy keeps the optimiser's moments for some rows only, and is sent the others' updates."""
    one_reader: bool = False
    """One rank of each machine reads the activations for all its parts, instead of each for itself."""
    timeout_seconds: float = 600.0
    """Longest wait for another rank, after which the run stops with an error (torchrun --max-restarts goes on)."""

    def __post_init__(self) -> None:
        require_positive("ParallelConfig", tp=self.tp, dp=self.dp, timeout_seconds=self.timeout_seconds)
