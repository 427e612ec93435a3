"""Byte pair encoding itself: learning merges from counted words, and applying them to a word.

Each is here twice. `learn_merges_plain` and `apply_merges_plain` say what is computed; `learn_merges` and
`apply_merges` compute the same, quickly.

Every detail of the order of merges is that of the trainer of the Hugging Face `tokenizers` library, so that both learn
the same merges from the same text.

Sources: Gage, "A new algorithm for data compression" (1994); Sennrich, Haddow and Birch, "Neural machine translation
of rare words with subword units" (2016), section 3.2.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

# The fast trainer writes a token id as the character with that code point.
MAX_VOCAB_SIZE = 0x110000
# In a word shorter than this, scanning a list for the best pair is faster than keeping a heap of pairs.
SHORT_WORD = 128

Pair = tuple[int, int]


def learn_merges_plain(
    word_counts: Mapping[bytes, int], tokens: Sequence[bytes], vocab_size: int, min_frequency: int = 1
) -> dict[Pair, int]:
    """Learn merges from words: again and again, make the most frequent pair of neighbouring tokens one token.

    Among equally frequent pairs, the one with the smaller left id wins, then the one with the smaller right id. In a
    run such as "aaa", every neighbouring pair counts, and merging goes from left to right.

    No two merges spell the same bytes: what a stretch of tokens looks like, when no token reaches across its ends,
    depends only on its bytes and on the merges so far.

    Args:
        word_counts: How often each word (a piece of the text, as UTF-8) occurs.
        tokens: The bytes of the tokens that exist before the first merge, by id; all 256 single bytes among them. A
            merge that spells one of the others (a special token) gets its id; an empty entry cannot be spelled.
        vocab_size: Stop when there are so many tokens.
        min_frequency: Stop when no pair occurs so often.

    Returns:
        (left id, right id) -> id of the merged token, first merge first.
    """
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    words = {word: [id_of[bytes([byte])] for byte in word] for word in word_counts}
    merges: dict[Pair, int] = {}
    while len(tokens) < vocab_size:
        pair_counts: Counter[Pair] = Counter()
        for word, ids in words.items():
            for pair in pairwise(ids):
                pair_counts[pair] += word_counts[word]
        if max(pair_counts.values(), default=0) < min_frequency:
            break
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        merged_bytes = tokens[best[0]] + tokens[best[1]]
        if merged_bytes not in id_of:
            id_of[merged_bytes] = len(tokens)
            tokens.append(merged_bytes)
        merges[best] = id_of[merged_bytes]
        words = {word: merge_pair(ids, best, merges[best]) for word, ids in words.items()}
    return merges


def merge_pair(ids: Sequence[int], pair: Pair, merged: int) -> list[int]:
    """`ids` with `merged` in place of every occurrence of the pair, from left to right."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        out.append(merged if found else ids[at])
        at += 2 if found else 1
    return out


def learn_merges(
    word_counts: Mapping[bytes, int], tokens: Sequence[bytes], vocab_size: int, min_frequency: int = 1
) -> dict[Pair, int]:
    """The same as `learn_merges_plain`, without counting anew or looking at every word for every merge.

    It remembers how often each pair occurs and in which words it has appeared, and corrects the counts around each
    merge. Pairs wait in buckets, one for each count. A pair's count can only fall after the merge that brought it up,
    and no new pair is more frequent than the merged one: so the buckets are emptied from the highest count down, and
    a pair that has become rarer is moved when it is met. A word is held as a `str` whose characters are token ids: a
    pair is then a string of two characters, and hashing, comparing and finding it is the work of C code.
    """
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    character = {byte: chr(id_of[bytes([byte])]) for byte in range(256)}
    words = [word.decode("latin-1").translate(character) for word in word_counts]
    counts = list(word_counts.values())
    pair_counts: dict[str, int] = defaultdict(int)
    found_in: dict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        for left, right in pairwise(word):
            pair_counts[left + right] += counts[i]
            found_in[left + right].append(i)
    buckets: dict[int, list[str]] = defaultdict(list)
    for pair, count in pair_counts.items():
        buckets[count].append(pair)
    merges: dict[Pair, int] = {}
    while buckets and (highest := max(buckets)) >= min_frequency:
        queue = buckets.pop(highest)
        heapify(queue)  # equally frequent: smaller ids first
        while queue:
            if len(tokens) >= vocab_size:
                return merges
            pair = heappop(queue)
            if (count := pair_counts[pair]) < highest:
                buckets[count].append(pair)
                continue
            left, right = pair[0], pair[1]
            merged_bytes = tokens[ord(left)] + tokens[ord(right)]
            if merged_bytes not in id_of:
                id_of[merged_bytes] = len(tokens)
                tokens.append(merged_bytes)
            merges[ord(left), ord(right)] = id_of[merged_bytes]
            merged = chr(id_of[merged_bytes])
            new_pairs, _ = merge_in_words(pair, merged, found_in.pop(pair), words, counts, pair_counts)
            found_in.update(new_pairs)
            for new_pair in new_pairs:
                if (count := pair_counts[new_pair]) == highest:
                    heappush(queue, new_pair)
                else:
                    buckets[count].append(new_pair)
    return merges


def merge_in_words(
    pair: str,
    merged: str,
    found_in: Sequence[int],
    words: list[str],
    counts: Sequence[int],
    pair_counts: dict[str, int],
) -> tuple[dict[str, list[int]], int]:
    """Write `merged` for a pair in the words that have it, and correct the counts of the pairs around each place.

    Args:
        pair, merged: Two symbols, and the one that they become; a symbol is one character.
        found_in: The words in which the pair has been seen, by number. It may be gone from some, or named twice.
        words, counts: All words, one character a symbol (changed here), and how often each occurs.
        pair_counts: How often each pair of neighbours occurs (changed here, the merged pair's own count excepted); or
            an empty `defaultdict(int)` that is to receive the differences.

    Returns:
        The words in which each new pair stands, and how many merges there were, each word by its count.
    """
    left, right = pair[0], pair[1]
    new_pairs: dict[str, list[int]] = defaultdict(list)
    n_merged = 0
    for i in dict.fromkeys(found_in):
        word, count, end = words[i], counts[i], 0
        while (at := word.find(pair, end)) >= 0:
            n_merged += count
            if at > 0:
                before = word[at - 1] if at > end else merged
                pair_counts[before + left] -= count
                pair_counts[before + merged] += count
                new_pairs[before + merged].append(i)
            end = at + 2
            if after := word[end : end + 1]:
                pair_counts[right + after] -= count
                pair_counts[merged + after] += count
                new_pairs[merged + after].append(i)
        if end > 0:  # else the word has lost the pair to another merge since it was found there
            words[i] = word.replace(pair, merged)
    return new_pairs, n_merged


def apply_merges_plain(ids: Sequence[int], merges: Mapping[Pair, int]) -> list[int]:
    """Merge neighbours until no merge applies: each time the pair earliest in `merges`, where it is leftmost.

    Args:
        ids: The tokens of one word, at first one a byte.
        merges: (left id, right id) -> id of the merged token, in the order in which they were learned.
    """
    ids = list(ids)
    rank = {pair: n for n, pair in enumerate(merges)}
    while candidates := [(rank[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in rank]:
        _, at = min(candidates)
        ids[at : at + 2] = [merges[ids[at], ids[at + 1]]]
    return ids


class MergeTable:
    """The merges of a tokenizer, indexed for `apply`.

    Args:
        merges: As for `apply_merges_plain`, to which `apply` is equal.
    """

    def __init__(self, merges: Mapping[Pair, int]) -> None:
        self._rank = {pair: n for n, pair in enumerate(merges)}
        self._merged = list(merges.values())

    def apply(self, ids: Sequence[int]) -> list[int]:
        """The tokens of one word after all merges: O(n^2) with a tiny constant if it is short, else O(n log n)."""
        return self._apply_to_short(ids) if len(ids) < SHORT_WORD else self._apply_to_long(ids)

    def _apply_to_short(self, ids: Sequence[int]) -> list[int]:
        ids = list(ids)
        rank, merged, none = self._rank.get, self._merged, len(self._merged)
        ranks = [rank(pair, none) for pair in pairwise(ids)]
        while (best := min(ranks, default=none)) < none:
            at = ranks.index(best)
            ids[at] = merged[best]
            del ids[at + 1], ranks[at]
            if at < len(ranks):
                ranks[at] = rank((ids[at], ids[at + 1]), none)
            if at > 0:
                ranks[at - 1] = rank((ids[at - 1], ids[at]), none)
        return ids

    def _apply_to_long(self, ids: Sequence[int]) -> list[int]:
        """Candidate pairs wait in a heap; the tokens are a doubly linked list."""
        ids, end = list(ids), len(ids)
        following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
        rank = self._rank
        heap = [(rank[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in rank]
        heapify(heap)
        while heap:
            best, at = heappop(heap)
            second = following[at]
            if second == end or rank.get((ids[at], ids[second])) != best:
                continue  # since this pair was found, one of the two has been merged with its other neighbour
            ids[at], ids[second] = self._merged[best], -1
            third = following[at] = following[second]
            if third < end:
                previous[third] = at
            for left, right in ((previous[at], at), (at, third)):
                if left >= 0 and right < end and (pair := (ids[left], ids[right])) in rank:
                    heappush(heap, (rank[pair], left))
        return [token for token in ids if token >= 0]
