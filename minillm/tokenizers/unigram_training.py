"""Training a Unigram model: the pieces and the probabilities that make counted words likely.

It begins with many pieces (`frequent_substrings`) and alternates two things: expectation maximization finds better
probabilities for the pieces there are, and pruning takes away those that matter least (`unigram_pruning`), until the
vocabulary has the size that was asked for.

Source: Kudo, "Subword regularization: improving neural network translation models with multiple subword candidates"
(2018), section 3.2.

What the trainers of `sentencepiece` and `tokenizers` do otherwise, so that their vocabularies differ from this one's
and from each other's: seeds are ranked by how often they occur in the distinct words (or lines), whatever the words'
counts; the M-step replaces c by exp(digamma(c)), a prior that favours few pieces, and drops pieces with c < 0.5; losses
are computed once a round, from best segmentations; the last tenth above the wanted size goes by probability, not loss.
Here the M-step is maximum likelihood, so that the likelihood never falls, and losses follow the removals.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

import numpy as np

from minillm.tokenizers.arguments import checked_flag, checked_integer
from minillm.tokenizers.frequent_substrings import frequent_substrings
from minillm.tokenizers.metaspace import SPACE
from minillm.tokenizers.unigram_expectation import Floats, WordLattices
from minillm.tokenizers.unigram_lattice import Lattice
from minillm.tokenizers.unigram_pruning import prune

# Longer words, such as lines of Chinese or base64, are cut: no piece is learned across the cut.
LONGEST_WORD = 256
# A piece is never impossible: one that others have made needless is needed again when they are taken away.
SMALLEST_COUNT = 1e-100


def train_unigram(
    word_counts: Mapping[str, int],
    vocab_size: int,
    *,
    seed_size: int | None = None,
    max_piece_length: int = 16,
    shrinking_factor: float = 0.75,
    n_sub_iterations: int = 2,
    required_pieces: Collection[str] = (),
    split_by_script: bool = False,
) -> dict[str, float]:
    """Learn pieces and their probabilities from counted words.

    Args:
        word_counts: How often each word occurs. Words of more than LONGEST_WORD characters are cut into such.
        vocab_size: How many pieces to learn. All characters of the words are among them, whatever their probability;
            fewer come out when the words have too few substrings that occur twice.
        seed_size: From how many pieces of several characters to start at most; by default 4 * `vocab_size`. More make
            the text of the words a little likelier, but other texts less so: what comes last are long and rare ones.
        max_piece_length: In characters.
        shrinking_factor: Which share of the pieces a round of pruning leaves.
        n_sub_iterations: EM steps before each round, and at the end.
        required_pieces: Pieces to have whether or not they occur.
        split_by_script: Learn no piece that holds letters and digits, or either and punctuation, or letters of several
            scripts: see `ScriptCutter`. `sentencepiece` does so by default. It makes training faster, as there are
            fewer different words then.

    Returns:
        piece -> natural logarithm of its probability, most likely first.

    Raises:
        TypeError: A number is no integer, `split_by_script` no bool.
        ValueError: There are no words; a count is not positive; `vocab_size` is smaller than the number of characters
            and required pieces; another number is out of range.
    """
    if not any(word_counts):
        raise ValueError("word_counts must hold at least one word: nothing can be learned from an empty corpus")
    if min(word_counts.values()) < 1:
        raise ValueError(f"counts must be at least 1, got {min(word_counts.values())}")
    checked_integer("vocab_size", vocab_size, 1)
    seed_size = 4 * vocab_size if seed_size is None else checked_integer("seed_size", seed_size, 1)
    checked_integer("n_sub_iterations", n_sub_iterations, 1)
    checked_integer("max_piece_length", max_piece_length, 1, 255)
    checked_flag("split_by_script", split_by_script)
    if not 0.0 < shrinking_factor < 1.0:
        raise ValueError(f"shrinking_factor must be between 0 and 1, got {shrinking_factor}")
    if not all(required_pieces):
        raise ValueError("a required piece must not be empty")
    words = cut_words(word_counts, split_by_script=split_by_script)
    seeds = frequent_substrings(words, seed_size, max_length=max_piece_length)
    required = set("".join(words)).union(required_pieces, *required_pieces)
    if vocab_size < len(required):
        n_characters = sum(len(piece) == 1 for piece in required)
        raise ValueError(
            f"vocab_size must be at least {len(required)} ({n_characters} different characters and "
            f"{len(required) - n_characters} longer required pieces), got {vocab_size}"
        )
    for piece in sorted(required):
        seeds.setdefault(piece, 0)
    pieces = list(seeds)
    scores = _log_probabilities(np.array(list(seeds.values()), np.float64))
    lattices = WordLattices(words, pieces)
    while True:
        for _ in range(n_sub_iterations):
            _, counts = lattices.expected_counts(scores)
            scores = _log_probabilities(counts)
        if len(pieces) <= vocab_size:
            break
        kept, counts = prune(pieces, counts, scores, max(vocab_size, int(shrinking_factor * len(pieces))), required)
        pieces = [piece for piece, keep in zip(pieces, kept.tolist(), strict=True) if keep]
        lattices.keep(kept)
        scores = _log_probabilities(counts)
    # Every character has occurred: in other texts it may stand alone, and should not cost more than what occurs once.
    scores = _log_probabilities(np.maximum(counts, 1.0))
    return dict(sorted(zip(pieces, scores.tolist(), strict=True), key=lambda item: (-item[1], item[0])))


def em_step_plain(word_counts: Mapping[str, int], scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """One step of expectation maximization: better log probabilities for the same pieces.

    E-step: c(x) = how often piece x is expected in the segmentations of the words, each weighted with its probability.
    M-step: p(x) = c(x) / sum of all c. No choice of probabilities makes the expected log likelihood greater, and the
    log likelihood of the words itself never falls.

    Args:
        word_counts: How often each word occurs.
        scores: piece -> log probability; all characters of the words among them.

    Returns:
        The new log probabilities, and the log likelihood of the words under the old ones.
    """
    lattice = Lattice(scores)
    expected: Counter[str] = Counter()
    log_likelihood = 0.0
    for word, count in word_counts.items():
        score, marginals = lattice.marginals(word)
        log_likelihood += count * score
        for (start, end), probability in marginals.items():
            expected[word[start:end]] += count * probability  # type: ignore[assignment]
    new = _log_probabilities(np.array([expected[piece] for piece in scores], np.float64))
    return dict(zip(scores, new.tolist(), strict=True)), log_likelihood


def em_step(word_counts: Mapping[str, int], scores: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """The same as `em_step_plain`, for all words at once (`unigram_expectation`)."""
    lattices = WordLattices(word_counts, list(scores))
    log_likelihood, counts = lattices.expected_counts(np.array(list(scores.values()), np.float64))
    return dict(zip(scores, _log_probabilities(counts).tolist(), strict=True)), log_likelihood


def _log_probabilities(counts: Floats) -> Floats:
    counts = np.maximum(counts, SMALLEST_COUNT)
    return np.asarray(np.log(counts) - np.log(counts.sum()))


def cut_words(word_counts: Mapping[str, int], *, split_by_script: bool) -> Counter[str]:
    """The words, cut at scripts if wanted, and where they are longer than LONGEST_WORD."""
    cut = ScriptCutter()
    out: Counter[str] = Counter()
    for word, count in word_counts.items():
        for part in cut(word) if split_by_script else [word]:
            for start in range(0, len(part), LONGEST_WORD):
                out[part[start : start + LONGEST_WORD]] += count
    return out


class ScriptCutter:
    """Cuts words into stretches of letters of one script, digits, and everything else.

    A space marker belongs to what follows it, combining marks and joiners to what precedes them. The script of a letter
    is the first word of its Unicode name; kana and Chinese characters count as one.
    """

    _ONE_SCRIPT: ClassVar = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK"}
    _run = re.compile(f"{SPACE}+(?={SPACE}[^{SPACE}])|{SPACE}?([^{SPACE}])(?:\\1|M)*|{SPACE}+", re.DOTALL)

    def __init__(self) -> None:
        self._kinds = _Kinds(self._kind)
        self._scripts: dict[str, str] = {}

    def __call__(self, word: str) -> list[str]:
        kinds = word.translate(self._kinds)
        return [word[match.start() : match.end()] for match in self._run.finditer(kinds)]

    def _kind(self, character: str) -> str:
        category = unicodedata.category(character)[0]
        if character == SPACE:
            return SPACE
        if category == "M" or character in "\u200c\u200d":
            return "M"
        if category == "N":
            return "N"
        if category != "L":
            return "O"
        name = unicodedata.name(character, "?").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split()[0]
        # Any character will do, if it is another one for another name.
        return self._scripts.setdefault(self._ONE_SCRIPT.get(name, name), chr(0xE000 + len(self._scripts)))


class _Kinds(dict[int, str]):
    """Code point -> a character that stands for its kind, found when first asked for."""

    def __init__(self, kind: Callable[[str], str]) -> None:
        self._kind = kind

    def __missing__(self, code_point: int) -> str:
        self[code_point] = self._kind(chr(code_point))
        return self[code_point]
