"""Corpora and batches: real text (offline or downloaded), a synthetic language of known entropy, token shards."""

from minillm.data.dataset import DatasetError, TokenDataset

__all__ = ["DatasetError", "TokenDataset"]
