"""Activations at rest and on the way, and the corpora they come from."""

from clt.data.metadata import DatasetInfo, Metadata
from clt.data.statistics import SideStatistics, Statistics
from clt.data.stores import BaseActivationStore, LocalActivationStore, RemoteActivationStore
from clt.data.streaming import StreamingActivationStore
from clt.data.writer import ActivationWriter

__all__ = [
    "ActivationWriter",
    "BaseActivationStore",
    "DatasetInfo",
    "LocalActivationStore",
    "Metadata",
    "RemoteActivationStore",
    "SideStatistics",
    "Statistics",
    "StreamingActivationStore",
]
