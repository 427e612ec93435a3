"""Byte-level byte pair encoding: the tokenizer of GPT-2, GPT-3, GPT-4, Llama 3 and most models since.

Text is cut into pieces (`split_patterns`), a piece is turned into its UTF-8 bytes, and every byte is a token to begin
with, so no text is ever out of vocabulary. Training looks for the pair of neighbouring tokens that occurs most often,
makes it one new token, and repeats until the vocabulary is full. Encoding replays these merges in the order in which
they were learned; decoding joins bytes.

Both training and encoding are here twice. `learn_merges_plain` and `apply_merges_plain` say what is computed;
`learn_merges` and `apply_merges` compute the same, quickly. The fast ones hold a piece as a `str` whose characters are
token ids (`chr(id)`): a pair is then a two-character string, hashed, compared and replaced by C code.

Every detail of the order of merges follows the trainer of the Hugging Face `tokenizers` library, so both learn the
same merges from the same text.

Sources: Gage, "A new algorithm for data compression" (1994); Sennrich, Haddow and Birch, "Neural machine translation
of rare words with subword units" (2016), section 3.2; Radford et al., "Language models are unsupervised multitask
learners" (GPT-2, 2019), section 2.2.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, pairwise
from pathlib import Path

from minillm.tokenizers import tokenizer_json
from minillm.tokenizers.split_patterns import SplitPattern, split_pattern

CACHE_PIECES = 1 << 17
CACHE_PIECE_LENGTH = 64
MAX_VOCAB_SIZE = 0x110000  # ids must be code points

Pair = tuple[int, int]


def learn_merges_plain(
    word_counts: Mapping[bytes, int], tokens: Sequence[bytes], vocab_size: int, min_frequency: int = 1
) -> dict[Pair, int]:
    """Learn merges, in the order in which they are to be applied.

    The pair with the highest count is merged first; among equals the one with the smaller ids. A pair waits in a queue
    with the count it had when it was queued and the words it was then found in; a count that has changed since is
    put right only when the pair comes to the front. Two merges that spell the same bytes share one token; the pairs
    around that token can then be queued a second time, and the later of two equal merges is the one that stays.

    Args:
        word_counts: How often each piece occurs in the text.
        tokens: The bytes of the tokens there are before the first merge, by id; all 256 single bytes among them.
        vocab_size: Stop when there are so many tokens.
        min_frequency: Stop when no pair occurs so often.

    Returns:
        (left id, right id) -> id of the merged token, first merge first.
    """
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    words = [[id_of[bytes([byte])] for byte in word] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: Counter[Pair] = Counter()
    found_in: dict[Pair, set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[i]
            found_in[pair].add(i)
    queue = [(pair_counts[pair], pair, where) for pair, where in found_in.items()]
    merges: dict[Pair, int] = {}
    while queue and len(id_of) < vocab_size:
        queue.sort(key=lambda entry: (-entry[0], entry[1]))
        count, pair, where = queue.pop(0)
        if count != pair_counts[pair]:
            queue.append((pair_counts[pair], pair, where))
            continue
        if count < max(min_frequency, 1):
            break
        left, right = pair
        merged_bytes = tokens[left] + tokens[right]
        if merged_bytes not in id_of:
            id_of[merged_bytes] = len(tokens)
            tokens.append(merged_bytes)
        merged = id_of[merged_bytes]
        merges.pop(pair, None)
        merges[pair] = merged
        found_in = defaultdict(set)
        for i in where:
            word, at = words[i], 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    if at > 0:
                        pair_counts[word[at - 1], left] -= counts[i]
                        pair_counts[word[at - 1], merged] += counts[i]
                        found_in[word[at - 1], merged].add(i)
                    if at + 2 < len(word):
                        pair_counts[right, word[at + 2]] -= counts[i]
                        pair_counts[merged, word[at + 2]] += counts[i]
                        found_in[merged, word[at + 2]].add(i)
                    word[at : at + 2] = [merged]
                at += 1
        queue += [(pair_counts[pair], pair, where) for pair, where in found_in.items() if pair_counts[pair] > 0]
    return merges


def learn_merges(
    word_counts: Mapping[bytes, int], tokens: Sequence[bytes], vocab_size: int, min_frequency: int = 1
) -> dict[Pair, int]:
    """The same as `learn_merges_plain`, with a heap for the queue and strings of token ids for the words."""
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    character = {byte: chr(id_of[bytes([byte])]) for byte in range(256)}
    words = [word.decode("latin-1").translate(character) for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: dict[str, int] = defaultdict(int)
    found_in: dict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        count = counts[i]
        for at in range(len(word) - 1):
            pair = word[at : at + 2]
            pair_counts[pair] += count
            found_in[pair].append(i)
    heap = [(-pair_counts[pair], pair, where) for pair, where in found_in.items()]
    heapify(heap)
    merges: dict[str, str] = {}
    while heap and len(id_of) < vocab_size:
        negative_count, pair, where = heap[0]
        if -negative_count != pair_counts[pair]:
            heapreplace(heap, (-pair_counts[pair], pair, where))
            continue
        if -negative_count < max(min_frequency, 1):
            break
        heappop(heap)
        left, right = pair[0], pair[1]
        merged_bytes = tokens[ord(left)] + tokens[ord(right)]
        if merged_bytes not in id_of:
            id_of[merged_bytes] = len(tokens)
            tokens.append(merged_bytes)
        merged = chr(id_of[merged_bytes])
        merges.pop(pair, None)
        merges[pair] = merged
        found_in = defaultdict(list)
        for i in where:
            # The stretches between the occurrences; an empty one means that occurrences touch.
            stretches = words[i].split(pair)
            if len(stretches) == 1:
                continue
            words[i] = merged.join(stretches)
            count = counts[i]
            before = stretches[0][-1:]
            last = len(stretches) - 1
            for n, stretch in enumerate(stretches):
                if n == 0:
                    continue
                if before:
                    pair_counts[before + left] -= count
                    pair_counts[before + merged] += count
                    found_in[before + merged].append(i)
                after = stretch[:1] or (left if n < last else "")
                if after:
                    pair_counts[right + after] -= count
                    pair_counts[merged + after] += count
                    found_in[merged + after].append(i)
                before = stretch[-1:] or merged
        for pair, where in found_in.items():
            if pair_counts[pair] > 0:
                heappush(heap, (-pair_counts[pair], pair, where))
    return {(ord(pair[0]), ord(pair[1])): ord(merged) for pair, merged in merges.items()}


def apply_merges_plain(ids: Sequence[int], ranks: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """Merge neighbours until none of `ranks` applies: always the pair of lowest rank, the leftmost of equals.

    Args:
        ids: The tokens of one piece, at first one a byte.
        ranks: (left id, right id) -> (rank, id of the merged token); rank 0 is merged first.
    """
    ids = list(ids)
    while True:
        candidates = [(ranks[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in ranks]
        if not candidates:
            return ids
        (_, merged), at = min(candidates)
        ids[at : at + 2] = [merged]


def apply_merges(ids: Sequence[int], ranks: Mapping[Pair, tuple[int, int]]) -> list[int]:
    """The same as `apply_merges_plain` in O(n log n): candidate pairs wait in a heap, tokens are a linked list."""
    ids = list(ids)
    end = len(ids)
    following = list(range(1, end + 1))
    previous = list(range(-1, end - 1))
    heap = [(*ranks[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, merged, at = heappop(heap)
        second = following[at]
        if second == end or ranks.get((ids[at], ids[second]), (-1,))[0] != rank:
            continue  # one of the two has been merged with another neighbour since
        ids[at], ids[second] = merged, -1
        third = following[at] = following[second]
        if third != end:
            previous[third] = at
            if (merged, ids[third]) in ranks:
                heappush(heap, (*ranks[merged, ids[third]], at))
        first = previous[at]
        if first >= 0 and (ids[first], merged) in ranks:
            heappush(heap, (*ranks[ids[first], merged], first))
    return [token for token in ids if token >= 0]


class ByteBPETokenizer:
    """A byte-level BPE tokenizer.

    Made by `train`, `load` or `from_gpt2_files`. Ids of a trained one: special tokens first, then the 256 bytes in the
    order of GPT-2's byte alphabet, then the merges.

    Args:
        vocabulary: The bytes of each token -> its id; all 256 single bytes among them.
        merges: Pairs of tokens' bytes, in the order in which they are applied.
        pattern: "gpt2" or "gpt4", see `split_patterns`.
        special_tokens: Text -> id of tokens that are never split and never merged.

    Raises:
        ValueError: A byte, or a part or the result of a merge, has no id; an id is negative or used twice; the pattern
            is unknown.
    """

    def __init__(
        self,
        vocabulary: Mapping[bytes, int],
        merges: Iterable[tuple[bytes, bytes]],
        *,
        pattern: str = "gpt2",
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._split: SplitPattern = split_pattern(pattern)
        self._special_tokens = _checked_special_tokens(special_tokens or {})
        self._ids = dict(vocabulary)
        self._bytes = {i: token for token, i in self._ids.items()}
        if len(self._bytes) < len(self._ids):
            raise ValueError("vocabulary gives the same id to two tokens")
        for text, i in self._special_tokens.items():
            if self._bytes.setdefault(i, text.encode()) != text.encode():
                raise ValueError(f"special token {text!r} has id {i}, which the vocabulary gives to {self._bytes[i]!r}")
        if min(self._bytes, default=0) < 0:
            raise ValueError(f"ids must not be negative, got {min(self._bytes)}")
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if missing:
            raise ValueError(f"vocabulary must hold all 256 single bytes; missing: {', '.join(map(hex, missing))}")
        self._byte_ids = [self._ids[bytes([byte])] for byte in range(256)]
        pairs: dict[Pair, int] = {}
        for left, right in merges:
            for part in (left, right, left + right):
                if part not in self._ids:
                    raise ValueError(f"merge ({left!r}, {right!r}): {part!r} is not in the vocabulary")
            pair = self._ids[left], self._ids[right]
            pairs.pop(pair, None)  # of two equal merges the later one counts
            pairs[pair] = self._ids[left + right]
        self._ranks = {pair: (rank, merged) for rank, (pair, merged) in enumerate(pairs.items())}
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        self._special_cuts = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._cache = _PieceCache(self._encode_piece)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 1,
    ) -> ByteBPETokenizer:
        """Learn a vocabulary from texts, which are read one after the other and not kept.

        Args:
            texts: Documents; no merge crosses from one into the next.
            vocab_size: Number of tokens wanted, special tokens and the 256 bytes included. Fewer come out when every
                piece of the texts has become one token before.
            pattern: "gpt2" or "gpt4".
            special_tokens: Such as ["<|endoftext|>"]; they get the ids 0, 1, ...
            min_frequency: Learn no token that occurs less often.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: `vocab_size` is too small or too large, the pattern unknown, a special token empty or twice.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of documents, got one str; for a single document pass [text]")
        split = split_pattern(pattern)
        special = {text: i for i, text in enumerate(special_tokens)}
        if len(special) < len(special_tokens):
            raise ValueError(f"special_tokens must differ from each other, got {list(special_tokens)!r}")
        _checked_special_tokens(special)
        if not 256 + len(special) <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {256 + len(special)} (256 bytes and {len(special)} special tokens) "
                f"to {MAX_VOCAB_SIZE}, got {vocab_size}"
            )
        pieces: Counter[str] = Counter()
        for text in texts:
            _check_text(text)
            for block in split.split(text):
                pieces.update(block)
        tokens = [text.encode() for text in special] + tokenizer_json.BYTE_ALPHABET
        word_counts = {piece.encode(): count for piece, count in pieces.items()}
        merges = learn_merges(word_counts, tokens, vocab_size, min_frequency)
        by_id = dict(enumerate(tokens))
        pairs = []
        for (left, right), merged in merges.items():
            by_id[merged] = by_id[left] + by_id[right]
            pairs.append((by_id[left], by_id[right]))
        vocabulary = {token: i for i, token in by_id.items()}
        return cls(vocabulary, pairs, pattern=pattern, special_tokens=special)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1: the number of rows an embedding needs."""
        return max(self._bytes) + 1

    @property
    def pattern(self) -> str:
        """The name of the split pattern."""
        return self._split.name

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The bytes of the two tokens of each merge, in the order in which merges are applied."""
        return [(self._bytes[left], self._bytes[right]) for left, right in self._ranks]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return dict(self._special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; ValueError for an id outside the vocabulary."""
        token = self._bytes.get(token_id)
        if token is None:
            raise ValueError(f"token id must be in the vocabulary of {len(self._bytes)} tokens, got {token_id!r}")
        return token

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The token ids of `text`.

        Args:
            text: Any text without lone surrogates, which have no UTF-8 form.
            allow_special: Turn the text of a special token into its id (of several that begin at the same place, the
                longest); False treats it as any other text, which is what untrusted input calls for.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` contains a lone surrogate.
        """
        _check_text(text)
        if self._special_cuts is None or not allow_special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in self._special_cuts.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self._special_tokens[match.group()])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` for each of several texts."""
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json, atomically: a reader sees the old file or the whole new one."""
        tokenizer_json.save(Path(path), self._ids, self.merges, self._split, self._special_tokens)

    @classmethod
    def load(cls, path: str | Path) -> ByteBPETokenizer:
        """Read a Hugging Face tokenizer.json; ValueError says what in it is not byte-level BPE."""
        return cls._from_parts(tokenizer_json.load(Path(path)), path)

    @classmethod
    def from_gpt2_files(
        cls, vocab: str | Path, merges: str | Path, *, special_tokens: Sequence[str] = ("<|endoftext|>",)
    ) -> ByteBPETokenizer:
        """Read GPT-2's two files, vocab.json and merges.txt; special tokens that vocab.json lacks are added."""
        parts = tokenizer_json.load_gpt2_files(Path(vocab), Path(merges), special_tokens)
        return cls._from_parts(parts, vocab)

    @classmethod
    def _from_parts(cls, parts: tokenizer_json.Parts, path: str | Path) -> ByteBPETokenizer:
        try:
            return cls(parts.vocabulary, parts.merges, pattern=parts.pattern, special_tokens=parts.special_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        lookup = self._cache.__getitem__
        blocks = (chain.from_iterable(map(lookup, pieces)) for pieces in self._split.split(text))
        return list(chain.from_iterable(blocks))

    def _encode_piece(self, piece: str) -> list[int]:
        return apply_merges([self._byte_ids[byte] for byte in piece.encode()], self._ranks)


class _PieceCache(dict[str, list[int]]):
    """piece -> token ids, computed when first asked for; emptied when full, so that it stays small."""

    def __init__(self, compute: Callable[[str], list[int]]) -> None:
        self._compute = compute

    def __missing__(self, piece: str) -> list[int]:
        ids = self._compute(piece)
        if len(piece) <= CACHE_PIECE_LENGTH:
            if len(self) >= CACHE_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must not contain lone surrogates, got {text[error.start]!r} at index {error.start}"
        ) from None


def _checked_special_tokens(special_tokens: Mapping[str, int]) -> dict[str, int]:
    for text in special_tokens:
        _check_text(text)
        if not text:
            raise ValueError("a special token must not be empty")
        if len(text) == 1:
            raise ValueError(f"a special token must be longer than one character, got {text!r}")
    return dict(special_tokens)
