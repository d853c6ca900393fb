"""A porch: the stores under the name by which users of crosslayer-coding know them."""

from clt.data.stores import (
    BaseActivationStore,
    LocalActivationStore,
    ManifestActivationStore,
    RemoteActivationStore,
)

__all__ = ["BaseActivationStore", "LocalActivationStore", "ManifestActivationStore", "RemoteActivationStore"]
