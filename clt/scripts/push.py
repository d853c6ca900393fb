"""Put a transcoder on the Hugging Face Hub, with a card of what its files say: host, data, figures, training command.

The token is the environment's HF_TOKEN or the saved login; it is never printed. Without --yes nothing is sent: the card
is written and shown.

clt push --clt runs/gpt2 --repo me/gpt2-clt --yes
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from clt.config.base import write_text_atomically
from clt.errors import ConfigError
from clt.models.hub import model_card, push_folder


@dataclass(frozen=True, kw_only=True)
class Options:
    """What and where to."""

    clt: str
    """Folder of a transcoder of ours."""
    repo: str
    """OWNER/NAME on the Hub; made if need be."""
    private: bool = False
    """Whether a repository that is made is private."""
    license: str | None = None
    """Licence of the weights, for the card."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Upload; without it, only write the card."""


def main(options: Options) -> None:
    """Card, then upload."""
    folder = Path(options.clt)
    card = folder / "README.md"
    if not card.exists():
        write_text_atomically(card, model_card(folder, options.repo, options.license))
    elif options.license and f"license: {options.license}" not in card.read_text().splitlines():
        raise ConfigError(
            f"{card} is there already and does not say `license: {options.license}`. Write that into its head (between "
            "the lines of ---), or delete it to have a new one generated."
        )
    if not options.yes:
        print(card.read_text())
        print(f"Nothing was uploaded. Edit {card} if you like, then run again with --yes.")
        return
    print(push_folder(folder, options.repo, private=options.private))
