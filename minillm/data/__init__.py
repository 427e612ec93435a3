"""Corpora and batches: real text (offline or downloaded), a synthetic language of known entropy, token shards."""

from minillm.data.corpora import Corpus, load_corpus
from minillm.data.dataset import TokenDataset
from minillm.data.download import DownloadError, download
from minillm.data.grammar import ProbabilisticGrammar
from minillm.data.shard_index import DatasetError
from minillm.data.shards import tokenizer_fingerprint
from minillm.data.synthetic import SyntheticGrammar

__all__ = [
    "Corpus",
    "DatasetError",
    "DownloadError",
    "ProbabilisticGrammar",
    "SyntheticGrammar",
    "TokenDataset",
    "download",
    "load_corpus",
    "tokenizer_fingerprint",
]
