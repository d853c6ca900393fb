"""Publish a folder of activations as a data set on the Hugging Face Hub, with vlm-clt-training's flags.

python scripts/upload_activations_to_hf.py --activations_dir ./my_activations --repo_id USER/NAME
"""

from dataclasses import dataclass
from pathlib import Path

from clt.activation_generation.publish import publish_to_hub
from clt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """The seed's flags, and --public."""

    activations_dir: str
    """Folder to upload."""
    repo_id: str
    """USER/NAME on the Hub; made if it does not exist."""
    token: str | None = None
    """Access token; other users of this machine can see a command line, so better set HF_TOKEN."""
    private: bool = False
    """Only you can see it."""
    public: bool = False
    """Everybody can see it; the default, as in the seed."""


def main(options: Options) -> None:
    """Upload and say where to."""
    if options.private and options.public:
        raise ConfigError("--private and --public exclude each other.")
    folder = Path(options.activations_dir)
    address = publish_to_hub(folder, options.repo_id, token=options.token, private=options.private)
    print(f"{folder} is at {address} ({'private' if options.private else 'public'})")
