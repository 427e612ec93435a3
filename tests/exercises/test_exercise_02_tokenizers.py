"""Exercise 02: wrong answers that students are likely to give; the solution against the libraries that people use."""

import io

import pytest
import regex
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordPiece
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from minillm.exercises.testing import ExerciseTests, solution_names

COUNT_PAIRS = """
def count_pairs(words):
    pairs = {{}}
    for word, count in words.items():
        {body}
    return pairs
"""

MERGE_PAIR = """
def merge_pair(word, pair, new_id):
    merged, i = [], 0
    {body}
    return tuple(merged)
"""

TRAIN_BPE = """
def train_bpe(words, n_merges):
    current = {{tuple(word): count for word, count in words.items()}}
    merges = []
    while len(merges) < n_merges:
        pairs = count_pairs(current)
        {stop}
        best = {best}
        new_id = {new_id}
        current = {{merge_pair(word, best, new_id): count for word, count in current.items()}}
        merges.append(best)
    return merges
"""
STOP = "if not pairs: break"
BEST = "min(pairs, key=lambda pair: (-pairs[pair], pair))"
NEW_ID = "256 + len(merges)"

ENCODE = """
def encode(text, merges, special_tokens):
    {parts}
    ids = []
    for part in parts:
        if part in special_tokens:
            ids.append(special_tokens[part])
        else:
            for word in split_words(part):
                ids.extend(encode_word(word, merges))
    return ids
"""

DECODE = """
def decode(ids, merges, special_tokens):
    pieces = {{i: bytes([i]) for i in range(256)}}
    for rank, (left, right) in enumerate(merges):
        pieces[256 + rank] = pieces[left] + pieces[right]
    {special}
    return {text}
"""
SPECIAL = "pieces.update({i: text.encode() for text, i in special_tokens.items()})"
TEXT = "b''.join(pieces[i] for i in ids).decode(errors='replace')"

PAIR_SCORES = """
def wordpiece_letters(word):
    return {letters}

def pair_scores(words):
    pieces, pairs = {{}}, {{}}
    for word, count in words.items():
        for piece in {pieces}:
            pieces[piece] = pieces.get(piece, 0) + {piece_count}
        for pair in zip(word, word[1:]):
            pairs[pair] = pairs.get(pair, 0) + {pair_count}
    return {{(a, b): {score} for (a, b), n in pairs.items()}}

def best_pair(scores):
    return {best}
"""
SCORED = {
    "letters": "tuple('##' * (i > 0) + word[i] for i in range(len(word)))",
    "pieces": "word",
    "piece_count": "count",
    "pair_count": "count",
    "score": "n / (pieces[a] * pieces[b])",
    "best": "min(scores, key=lambda pair: (-scores[pair], pair))",
}

LONGEST_MATCH = """
def encode_wordpiece(word, vocabulary):
    pieces, start = [], 0
    while start < len(word):
        mark = {mark}
        for end in {ends}:
            if mark + word[start:end] in vocabulary:
                pieces.append({piece})
                start = end
                break
        else:
            {nothing}
    return pieces
"""
MATCHED = {
    "mark": "'##' if start else ''",
    "ends": "range(len(word), start, -1)",
    "piece": "mark + word[start:end]",
    "nothing": "return ['[UNK]']",
}

VITERBI = """
def viterbi(text, log_probs):
    {before}
    best, last_start = [{zero}] + [{worst}] * len(text), [0] * (len(text) + 1)
    for end in range(1, len(text) + 1):
        for start in {starts}:
            piece = text[start:end]
            if piece in log_probs:
                score = {known}
            elif len(piece) == 1:
                score = {alone}
            else:
                continue
            if {better}:
                best[end], last_start[end] = score, start
    pieces, end = [], len(text)
    while end > 0:
        pieces.append(text[last_start[end]:end])
        end = last_start[end]
    return {pieces}
"""
CUT = {
    "before": "unknown = min(log_probs.values()) - 10",
    "zero": "0.0",
    "worst": "float('-inf')",
    "starts": "range(end)",
    "known": "best[start] + log_probs[piece]",
    "alone": "best[start] + unknown",
    "better": "score > best[end]",
    "pieces": "pieces[::-1]",
}

EXPECTED_COUNTS = """
def expected_counts(words, probabilities):
    expected = {expected}
    for word, count in words.items():
        n = len(word)
        alpha = [1.0] + [0.0] * n
        for end in range(1, n + 1):
            alpha[end] = sum(alpha[s] * probabilities.get(word[s:end], 0.0) for s in range(end))
        beta = [0.0] * n + [1.0]
        for start in reversed(range(n)):
            beta[start] = sum(probabilities.get(word[start:e], 0.0) * beta[e] for e in range(start + 1, n + 1))
        {before}
        for start in range(n):
            for end in range(start + 1, n + 1):
                piece = word[start:end]
                if piece in probabilities:
                    expected[piece] {add} {count} * {share}
    return expected

def em_step(words, probabilities):
    expected = expected_counts(words, probabilities)
    return {new}
"""
EXPECTED = {
    "expected": "dict.fromkeys(probabilities, 0.0)",
    "before": "",
    "add": "+=",
    "count": "count",
    "share": "alpha[start] * probabilities[piece] * beta[end] / alpha[n]",
    "new": "{piece: count / sum(expected.values()) for piece, count in expected.items()}",
}
EVERY_WAY = """
def ways(word, probabilities):
    if not word:
        return [([], 1.0)]
    return [
        ([word[:end], *pieces], probabilities[word[:end]] * p)
        for end in range(1, len(word) + 1)
        if word[:end] in probabilities
        for pieces, p in ways(word[end:], probabilities)
    ]

def expected_counts(words, probabilities):
    expected = dict.fromkeys(probabilities, 0.0)
    for word, count in words.items():
        every = {every}
        for pieces, p in every:
            for piece in pieces:
                expected[piece] += count * {share}
    return expected

def em_step(words, probabilities):
    expected = expected_counts(words, probabilities)
    return {{piece: count / sum(expected.values()) for piece, count in expected.items()}}
"""

BYTE_FALLBACK = """
def encode_pieces(text, log_probs):
    if not text:
        return []
    pieces = []
    for piece in viterbi({marked}, log_probs):
        {spell}
    return pieces

def decode_pieces(pieces):
    out = []
    for piece in pieces:
        if piece.startswith("<0x") and piece.endswith(">"):
            out.append({byte})
        else:
            out.append({plain})
    return {text}
"""
SPELLED = {
    "marked": "'▁' + text.replace(' ', '▁')",
    "spell": "pieces.extend([piece] if piece in log_probs else [f'<0x{b:02X}>' for b in piece.encode()])",
    "byte": "bytes([int(piece[3:-1], 16)])",
    "plain": "piece.replace('▁', ' ').encode()",
    "text": "b''.join(out).decode(errors='replace').removeprefix(' ')",
}


def fallback(**changes: str) -> str:
    """Part 2.11's answer with some of its places filled in otherwise."""
    return BYTE_FALLBACK.format(**(SPELLED | changes))


def bytes_as(token: str) -> str:
    """How part 2.11's answer spells a piece that is not in the vocabulary."""
    return f"pieces.extend([piece] if piece in log_probs else {token})"


RIGHT = {
    "exact fractions": (
        "2.7",
        """
from fractions import Fraction

def wordpiece_letters(word):
    return (*word[:1], *("##" + letter for letter in word[1:]))

def pair_scores(words):
    def freq(piece):
        return sum(count * word.count(piece) for word, count in words.items())
    pairs = [(pair, count) for word, count in words.items() for pair in zip(word, word[1:])]
    return {p: Fraction(sum(n for other, n in pairs if other == p), freq(p[0]) * freq(p[1])) for p, _ in pairs}

def best_pair(scores):
    return sorted(pair for pair in scores if scores[pair] == max(scores.values()))[0]
""",
    ),
    "every piece tried at every place": (
        "2.8",
        """
def encode_wordpiece(word, vocabulary):
    pieces = []
    while word:
        mark = "##" if pieces else ""
        fits = [p for p in vocabulary if p.startswith("##") == bool(mark) and word.startswith(p[len(mark):])]
        if not fits:
            return ["[UNK]"]
        pieces.append(max(fits, key=len))
        word = word[len(pieces[-1]) - len(mark):]
    return pieces
""",
    ),
    "a recursive match": (
        "2.8",
        """
def match(rest, vocabulary, mark):
    for end in range(len(rest), 0, -1):
        if mark + rest[:end] in vocabulary:
            after = match(rest[end:], vocabulary, "##")
            return None if after is None else [mark + rest[:end], *after]
    return None if rest else []

def encode_wordpiece(word, vocabulary):
    found = match(word, vocabulary, "")
    return ["[UNK]"] if found is None else found
""",
    ),
    "recursion that remembers": (
        "2.9",
        """
from functools import cache

def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    @cache
    def best(end):
        ways = []
        for start in range(end):
            p = log_probs.get(text[start:end], unknown if end - start == 1 else None)
            if p is not None:
                ways.append((best(start)[0] + p, -start))
        return max(ways) if ways else (0.0, 0)
    pieces, end = [], len(text)
    while end:
        pieces.insert(0, text[-best(end)[1]:end])
        end = -best(end)[1]
    return pieces
""",
    ),
    "recursion from the end, remembered": (
        "2.9",
        """
from functools import lru_cache

def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    @lru_cache(maxsize=None)
    def best(end):
        if end == 0:
            return 0.0, ()
        ways = []
        for start in reversed(range(end)):
            piece = text[start:end]
            if piece in log_probs or len(piece) == 1:
                score, pieces = best(start)
                ways.append((score + log_probs.get(piece, unknown), -start, pieces + (piece,)))
        score, _, pieces = max(ways)
        return score, pieces
    return list(best(len(text))[1])
""",
    ),
    "pushing forward, whole lists of pieces kept": (
        "2.9",
        """
def viterbi(text, log_probs):
    lowest = min(log_probs.values())
    probs = {c: lowest - 10 for c in text} | dict(log_probs)
    best = {0: (0.0, [])}
    for start in range(len(text)):
        for piece, p in probs.items():
            if text.startswith(piece, start):
                end, score = start + len(piece), best[start][0] + p
                if end not in best or score > best[end][0]:
                    best[end] = score, best[start][1] + [piece]
    return best[len(text)][1]
""",
    ),
    "expectations carried forward": (
        "2.10",
        """
from collections import defaultdict

def expected_counts(words, probabilities):
    expected = defaultdict(float, dict.fromkeys(probabilities, 0.0))
    for word, count in words.items():
        table = [(1.0, {})]  # for each end: the probability of all ways, and each piece's share of it
        for end in range(1, len(word) + 1):
            alpha, shares = 0.0, defaultdict(float)
            for start in range(end):
                p = probabilities.get(word[start:end], 0.0)
                alpha += table[start][0] * p
                shares[word[start:end]] += table[start][0] * p
                for piece, share in table[start][1].items():
                    shares[piece] += share * p
            table.append((alpha, shares))
        for piece, share in table[-1][1].items():
            if piece in probabilities:
                expected[piece] += count * share / table[-1][0]
    return expected

def em_step(words, probabilities):
    expected = expected_counts(words, probabilities)
    return {piece: expected[piece] / sum(expected.values()) for piece in probabilities}
""",
    ),
    "one U+FFFD for each byte, as SentencePiece writes": (
        "2.11",
        """
import re

def encode_pieces(text, log_probs):
    pieces = []
    for piece in viterbi(("▁" + text).replace(" ", "▁"), log_probs) if text else []:
        pieces += [piece] if piece in log_probs else ["<0x%02X>" % byte for byte in piece.encode()]
    return pieces

def of_bytes(run):
    text, i = "", 0
    while i < len(run):
        for n in (1, 2, 3, 4):
            try:
                text, i = text + run[i:i + n].decode(), i + n
                break
            except UnicodeDecodeError:
                pass
        else:
            text, i = text + "\ufffd", i + 1
    return text

def decode_pieces(pieces):
    text, run = "", b""
    for piece in pieces:
        byte = re.fullmatch("<0x(..)>", piece)
        if byte:
            run += bytes.fromhex(byte[1])
        else:
            text, run = text + of_bytes(run) + piece.replace("▁", " "), b""
    text += of_bytes(run)
    return text[1:] if text.startswith(" ") else text
""",
    ),
}


class TestExercise02(ExerciseTests):
    exercise = "02"
    right_answers = RIGHT
    wrong_answers = {  # noqa: RUF012
        "2.1": {
            "every word counts once": (
                COUNT_PAIRS.format(body="for pair in zip(word, word[1:]): pairs[pair] = pairs.get(pair, 0) + 1"),
                "a word that occurs 5 times adds 5",
            ),
            "the last pair is left out": (
                COUNT_PAIRS.format(
                    body="for i in range(len(word) - 2): pairs[word[i:i+2]] = pairs.get(word[i:i+2], 0) + count"
                ),
                "you leave out the last pair",
            ),
            "each pair once a word": (
                COUNT_PAIRS.format(
                    body="for pair in set(zip(word, word[1:])): pairs[pair] = pairs.get(pair, 0) + count"
                ),
                "only once in each word",
            ),
            "pairs across words": (
                """
def count_pairs(words):
    pairs = {}
    text = [i for word, count in words.items() for i in word * count]
    for pair in zip(text, text[1:]):
        pairs[pair] = pairs.get(pair, 0) + 1
    return pairs
""",
                "from the end of one word into the next",
            ),
            "order of the pair ignored": (
                COUNT_PAIRS.format(
                    body="for p in zip(word, word[1:]): p = tuple(sorted(p)); pairs[p] = pairs.get(p, 0) + count"
                ),
                "two different pairs",
            ),
            "no overlap": (
                COUNT_PAIRS.format(
                    body="""i = 0
        while i < len(word) - 1:
            pair = word[i : i + 2]
            pairs[pair] = pairs.get(pair, 0) + count
            i += 2 if word[i] == word[i + 1] else 1"""
                ),
                "pairs may overlap",
            ),
            "pairs as lists of counts": ("def count_pairs(words):\n    return list(words.items())", "returns a dict"),
        },
        "2.2": {
            "overlapping merges": (
                MERGE_PAIR.format(
                    body="""while i < len(word):
        if word[i:i+2] == pair: merged.append(new_id)
        elif not (i and word[i-1:i+1] == pair): merged.append(word[i])
        i += 1"""
                ),
                "the middle 7 twice",
            ),
            "from the right": (
                MERGE_PAIR.format(
                    body="""i = len(word)
    while i > 0:
        hit = i > 1 and word[i-2:i] == pair
        merged.insert(0, new_id if hit else word[i-1])
        i -= 2 if hit else 1"""
                ),
                "from the right",
            ),
            "the second id copied as well": (
                MERGE_PAIR.format(
                    body="for i in range(len(word)): merged.append(new_id if word[i:i+2] == pair else word[i])"
                ),
                "step over both ids after a merge, you copy the second one as well; yours become (3, 256, 2)",
            ),
            "the second id copied, the last position left out": (
                MERGE_PAIR.format(
                    body="for i in range(len(word) - 1): merged.append(new_id if word[i:i+2] == pair else word[i])"
                ),
                "you copy the second one as well; yours become (3, 256) and (256, 2)",
            ),
            "the sum of the two": (
                MERGE_PAIR.format(
                    body="""while i < len(word):
        hit = word[i:i+2] == pair
        merged.append(pair[0] + pair[1] if hit else word[i])
        i += 2 if hit else 1"""
                ),
                "put new_id in the word, not the sum of the two",
            ),
            "first occurrence only": (
                """
def merge_pair(word, pair, new_id):
    for i in range(len(word) - 1):
        if word[i : i + 2] == pair:
            return word[:i] + (new_id,) + word[i + 2 :]
    return word
""",
                "not only the first",
            ),
            "last id lost": (
                MERGE_PAIR.format(
                    body="""while i < len(word) - 1:
        hit = word[i:i+2] == pair
        merged.append(new_id if hit else word[i])
        i += 2 if hit else 1"""
                ),
                "the last id",
            ),
            "pair at the end missed": (
                MERGE_PAIR.format(
                    body="""while i < len(word):
        hit = word[i:i+2] == pair and i + 2 < len(word)
        merged.append(new_id if hit else word[i])
        i += 2 if hit else 1"""
                ),
                "at the end of the word must be merged too; yours becomes (3, 1, 2)",
            ),
            "either order": (
                MERGE_PAIR.format(
                    body="""while i < len(word):
        hit = word[i:i+2] in (pair, pair[::-1])
        merged.append(new_id if hit else word[i])
        i += 2 if hit else 1"""
                ),
                "the order of the two counts",
            ),
            "replace in the written digits": (
                """
def merge_pair(word, pair, new_id):
    text = " ".join(map(str, word)).replace(f"{pair[0]} {pair[1]}", str(new_id))
    return tuple(map(int, text.split()))
""",
                "compare whole ids",
            ),
            "returns a list": (MERGE_PAIR.format(body="return list(word)"), "returns a tuple"),
        },
        "2.3": {
            "tie to the pair seen first": (
                TRAIN_BPE.format(stop=STOP, best="max(pairs, key=pairs.get)", new_id=NEW_ID),
                "a tie goes to the smaller pair",
            ),
            "tie to the larger pair": (
                TRAIN_BPE.format(stop=STOP, best="max(pairs, key=lambda p: (pairs[p], p))", new_id=NEW_ID),
                "a tie goes to the smaller pair",
            ),
            "smallest pair whatever its count": (
                TRAIN_BPE.format(stop=STOP, best="min(pairs)", new_id=NEW_ID),
                "before the counts",
            ),
            "tie by the first id only": (
                TRAIN_BPE.format(stop=STOP, best="min(pairs, key=lambda p: (-pairs[p], p[0], -p[1]))", new_id=NEW_ID),
                "the smaller second id",
            ),
            "counted once at the start": (
                """
def train_bpe(words, n_merges):
    pairs = count_pairs({tuple(word): count for word, count in words.items()})
    return sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:n_merges]
""",
                "count again after each merge",
            ),
            "fails when nothing is left": (
                TRAIN_BPE.format(stop="pass", best=BEST, new_id=NEW_ID),
                "when no pair is left, stop",
            ),
            "stops at pairs that occur once": (
                TRAIN_BPE.format(
                    stop="if not pairs or (max(pairs.values()) < 2 and merges): break", best=BEST, new_id=NEW_ID
                ),
                "occurs once and is still merged",
            ),
            "stops when the most frequent pair occurs once": (
                TRAIN_BPE.format(
                    stop=f"best = {BEST} if pairs else None\n        if best is None or pairs[best] < 2: break",
                    best="best",
                    new_id=NEW_ID,
                ),
                "a pair that occurs once is still merged",
            ),
            "rarest pair first": (
                TRAIN_BPE.format(stop=STOP, best="min(pairs, key=lambda p: (pairs[p], p))", new_id=NEW_ID),
                "you take the rarest",
            ),
            "words left as bytes": (
                TRAIN_BPE.format(stop=STOP, best=BEST, new_id=NEW_ID).replace("tuple(word)", "word"),
                "Are your words tuples of ids? tuple(b'ab') is (97, 98)",
            ),
            "words left as bytes, pairs counted with zip": (
                "def pairs_by_zip(words):\n"
                "    every = [(p, n) for word, n in words.items() for p in zip(word, word[1:])]\n"
                "    return {p: sum(n for other, n in every if other == p) for p, _ in every}\n"
                + TRAIN_BPE.format(stop=STOP, best=BEST, new_id=NEW_ID)
                .replace("tuple(word)", "word")
                .replace("count_pairs", "pairs_by_zip"),
                "you learn (97, 98) twice: the first merge changed no word. Are your words tuples of ids? "
                "tuple(b'ab') is (97, 98)",
            ),
            "ids start at 257": (
                TRAIN_BPE.format(stop=STOP, best=BEST, new_id="257 + len(merges)"),
                "number k makes the id 256 + k",
            ),
            "changes its input": (
                """
def train_bpe(words, n_merges):
    merges = []
    while len(merges) < n_merges:
        pairs = count_pairs(words)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in list(words):
            words[merge_pair(tuple(word), best, 256 + len(merges))] = words.pop(word)
        merges.append(best)
    return merges
""",
                "work on a copy",
            ),
        },
        "2.4": {
            "first pair from the left": (
                """
def encode_word(word, merges):
    ids, i = list(word), 0
    while i < len(ids) - 1:
        pair = (ids[i], ids[i + 1])
        if pair in merges:
            ids[i : i + 2] = [256 + merges.index(pair)]
            i = 0
        else:
            i += 1
    return ids
""",
                "not the leftmost pair",
            ),
            "latest merge first": (
                """
def encode_word(word, merges):
    ids = tuple(word)
    while True:
        known = [pair for pair in zip(ids, ids[1:]) if pair in merges]
        if not known:
            return list(ids)
        best = max(known, key=merges.index)
        ids = merge_pair(ids, best, 256 + merges.index(best))
""",
                "the latest merge",
            ),
            "longest token first": (
                """
def encode_word(word, merges):
    pieces = {bytes([i]): i for i in range(256)}
    by_id = {i: piece for piece, i in pieces.items()}
    for rank, (left, right) in enumerate(merges):
        by_id[256 + rank] = by_id[left] + by_id[right]
        pieces[by_id[256 + rank]] = 256 + rank
    ids, start = [], 0
    while start < len(word):
        end = max(end for end in range(start + 1, len(word) + 1) if word[start:end] in pieces)
        ids.append(pieces[word[start:end]])
        start = end
    return ids
""",
                "the longest token that fits",
            ),
            "one pass only": (
                """
def encode_word(word, merges):
    ids = tuple(word)
    first = set(zip(ids, ids[1:]))
    for rank, pair in enumerate(merges):
        if pair in first:
            ids = merge_pair(ids, pair, 256 + rank)
    return list(ids)
""",
                "look again",
            ),
            "rank instead of id": (
                """
def encode_word(word, merges):
    ids = tuple(word)
    for rank, pair in enumerate(merges):
        ids = merge_pair(ids, pair, rank)
    return list(ids)
""",
                "makes the id 256 + k",
            ),
            "merges ignored": ("def encode_word(word, merges):\n    return list(word)", "makes the id 256 + k"),
        },
        "2.5": {
            "not escaped": (
                ENCODE.format(
                    parts="""special = sorted(special_tokens, key=len, reverse=True)
    parts = regex.split("(" + "|".join(special) + ")", text) if special else [text]"""
                ),
                "escape the special tokens",
            ),
            "special tokens not looked for": (ENCODE.format(parts="parts = [text]"), "comes out as its bytes"),
            "looked for after the split into words": (
                """
def encode(text, merges, special_tokens):
    ids = []
    for word in split_words(text):
        if word.decode() in special_tokens:
            ids.append(special_tokens[word.decode()])
        else:
            ids.extend(encode_word(word, merges))
    return ids
""",
                "before you cut the text into words",
            ),
            "in the order given": (
                ENCODE.format(
                    parts="""special = [regex.escape(s) for s in special_tokens]
    parts = regex.split("(" + "|".join(special) + ")", text) if special else [text]"""
                ),
                "the longer special token wins",
            ),
            "empty pattern": (
                ENCODE.format(
                    parts="""special = sorted(special_tokens, key=len, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, special)) + ")", text)"""
                ),
                "an empty pattern splits everywhere",
            ),
            "text not cut into words": (
                ENCODE.format(
                    parts="""special = sorted(special_tokens, key=len, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, special)) + ")", text) if special else [text]"""
                ).replace("split_words(part)", "[part.encode()]"),
                "a merge never reaches from one word into the next",
            ),
            "text cut into words only without special tokens": (
                ENCODE.format(
                    parts="""special = sorted(special_tokens, key=len, reverse=True)
    parts = regex.split("(" + "|".join(map(regex.escape, special)) + ")", text) if special else [text]"""
                ).replace("split_words(part)", "([part.encode()] if special else split_words(part))"),
                "a merge never reaches into it",
            ),
            "first occurrence only": (
                """
def encode(text, merges, special_tokens):
    ids = []
    for special, i in special_tokens.items():
        if special in text:
            before, _, after = text.partition(special)
            return encode(before, merges, {}) + [i] + encode(after, merges, {})
    for word in split_words(text):
        ids.extend(encode_word(word, merges))
    return ids
""",
                "three times",
            ),
            "merged across": (
                """
def encode(text, merges, special_tokens):
    ids, places, rest = [], [], text
    for special, i in special_tokens.items():
        while special in rest:
            places.append((rest.index(special), i))
            rest = rest.replace(special, "", 1)
    for word in split_words(rest):
        ids.extend(encode_word(word, merges))
    for place, i in reversed(places):
        ids.insert(place, i)
    return ids
""",
                "nothing merges across",
            ),
        },
        "2.6": {
            "each token decoded alone": (
                DECODE.format(special=SPECIAL, text="''.join(pieces[i].decode(errors='replace') for i in ids)"),
                "join the bytes of all tokens first",
            ),
            "each token decoded alone, damage ignored": (
                DECODE.format(special=SPECIAL, text="''.join(pieces[i].decode(errors='ignore') for i in ids)"),
                "spell '日', you return '': errors='ignore', token by token",
            ),
            "damage hidden": (
                DECODE.format(special=SPECIAL, text="b''.join(pieces[i] for i in ids).decode(errors='ignore')"),
                "yours vanish",
            ),
            "fails on half a character": (
                DECODE.format(special=SPECIAL, text="b''.join(pieces[i] for i in ids).decode()"),
                "use errors='replace'",
            ),
            "latin-1": (
                DECODE.format(special=SPECIAL, text="b''.join(pieces[i] for i in ids).decode('latin-1')"),
                "the bytes are UTF-8",
            ),
            "special tokens unknown": (DECODE.format(special="", text=TEXT), "does not know the id 1000"),
            "special tokens dropped": (
                DECODE.format(special="", text="b''.join(pieces.get(i, b'') for i in ids).decode(errors='replace')"),
                "yours is dropped",
            ),
            "bytes": (DECODE.format(special=SPECIAL, text="b''.join(pieces[i] for i in ids)"), "not bytes"),
        },
        "2.7": {
            "## forgotten": (PAIR_SCORES.format(**SCORED | {"letters": "tuple(word)"}), "you forget the ##"),
            "## on the first letter too": (
                PAIR_SCORES.format(**SCORED | {"letters": "tuple('##' + letter for letter in word)"}),
                "the first letter of a word is bare",
            ),
            "letters as a list": (
                PAIR_SCORES.format(**SCORED | {"letters": "['##' * (i > 0) + word[i] for i in range(len(word))]"}),
                "returns a tuple",
            ),
            "only the count of the pair": (
                PAIR_SCORES.format(**SCORED | {"score": "n"}),
                "divide it by the counts of its two pieces",
            ),
            "divided by the sum": (
                PAIR_SCORES.format(**SCORED | {"score": "n / (pieces[a] + pieces[b])"}),
                "you say 0.3333, that divides by the sum of the two counts",
            ),
            "divided by the left count only": (
                PAIR_SCORES.format(**SCORED | {"score": "n / pieces[a]"}),
                "by the count of the left piece only",
            ),
            "divided by the right count only": (
                PAIR_SCORES.format(**SCORED | {"score": "n / pieces[b]"}),
                "by the count of the right piece only",
            ),
            "a word counts once": (
                PAIR_SCORES.format(**SCORED | {"piece_count": "1", "pair_count": "1"}),
                "that counts each word once",
            ),
            "the pieces of a word count once": (
                PAIR_SCORES.format(**SCORED | {"piece_count": "1"}),
                "that counts the pieces once a word",
            ),
            "the pairs of a word count once": (
                PAIR_SCORES.format(**SCORED | {"pair_count": "1"}),
                "that counts the pair once a word",
            ),
            "words of one piece left out": (
                PAIR_SCORES.format(**SCORED | {"pieces": "(word if len(word) > 1 else ())"}),
                "the word that is only 'a' counts too",
            ),
            "the last piece has no count": (
                PAIR_SCORES.format(**SCORED | {"pieces": "word[:-1]"}),
                "KeyError: '##b'",
            ),
            "## taken away before counting": (
                PAIR_SCORES.format(
                    **SCORED
                    | {
                        "pieces": "[p.removeprefix('##') for p in word]",
                        "score": "n / (pieces[a.removeprefix('##')] * pieces[b.removeprefix('##')])",
                    }
                ),
                "'l' and '##l' are two different pieces",
            ),
            "a repeated piece counts once": (
                PAIR_SCORES.format(**SCORED | {"pieces": "set(word)"}),
                "the piece ##o occurs 3 times and the pair (##o, ##o) twice",
            ),
            "shares instead of counts": (
                PAIR_SCORES.format(
                    **SCORED
                    | {
                        "score": "(n / sum(pairs.values()))"
                        " / (pieces[a] / sum(pieces.values()) * pieces[b] / sum(pieces.values()))"
                    }
                ),
                "the formula has plain counts",
            ),
            "bare wherever the first letter stands": (
                PAIR_SCORES.format(**SCORED | {"letters": "tuple(c if c == word[0] else '##' + c for c in word)"}),
                "for only the first place is bare, not every 'l'",
            ),
            "bare wherever the first place of a letter is 0": (
                PAIR_SCORES.format(
                    **SCORED | {"letters": "tuple(c if word.index(c) == 0 else '##' + c for c in word)"}
                ),
                "for only the first place is bare, not every 'l'",
            ),
            "scores made while counting": (
                PAIR_SCORES.format(**SCORED)
                .replace("    pieces, pairs = {}, {}", "    pieces, pairs, scores = {}, {}, {}")
                .replace(
                    "pairs[pair] = pairs.get(pair, 0) + count",
                    "pairs[pair] = pairs.get(pair, 0) + count\n"
                    "            scores[pair] = pairs[pair] / (pieces[pair[0]] * pieces[pair[1]])",
                )
                .replace(
                    "return {(a, b): n / (pieces[a] * pieces[b]) for (a, b), n in pairs.items()}", "return scores"
                ),
                "you say 0.1429, that is its score after the first word",
            ),
            "brackets missing": (
                PAIR_SCORES.format(**SCORED | {"score": "n / pieces[a] * pieces[b]"}),
                "put the product into brackets",
            ),
            "brackets missing, right count first": (
                PAIR_SCORES.format(**SCORED | {"score": "n / pieces[b] * pieces[a]"}),
                "put the product into brackets",
            ),
            "whole-number division": (
                PAIR_SCORES.format(**SCORED | {"score": "n // (pieces[a] * pieces[b])"}),
                "all your scores are 0: //",
            ),
            "a logarithm": (
                "import math\n" + PAIR_SCORES.format(**SCORED | {"score": "math.log(n / (pieces[a] * pieces[b]))"}),
                "you say -2.698, that is the logarithm of the score",
            ),
            "rounded": (
                PAIR_SCORES.format(**SCORED | {"score": "round(n / (pieces[a] * pieces[b]), 4)"}),
                "= 0.0673076923, you say 0.0673: don't round a score",
            ),
            "smoothed": (
                PAIR_SCORES.format(**SCORED | {"score": "n / (pieces[a] * pieces[b]) + 1e-6"}),
                "you say 0.0673086923: don't round a score, and don't add anything",
            ),
            "divided twice": (
                PAIR_SCORES.format(**SCORED | {"score": "n / pieces[a] / pieces[b]"}),
                "yours differ in the last digit: one division",
            ),
            "tie to the pair seen first": (
                PAIR_SCORES.format(**SCORED | {"best": "max(scores, key=scores.get)"}),
                "of equal scores the smallest pair wins, (a, ##b); you take ('b', '##a')",
            ),
            "tie to the largest pair": (
                PAIR_SCORES.format(**SCORED | {"best": "max(scores, key=lambda pair: (scores[pair], pair))"}),
                "of equal scores the smallest pair wins",
            ),
            "lowest score": (
                PAIR_SCORES.format(**SCORED | {"best": "min(scores, key=lambda pair: (scores[pair], pair))"}),
                "the highest score wins",
            ),
        },
        "2.8": {
            "shortest match": (
                LONGEST_MATCH.format(**MATCHED | {"ends": "range(start + 1, len(word) + 1)"}),
                "you take the shortest that fits",
            ),
            "## forgotten inside a word": (LONGEST_MATCH.format(**MATCHED | {"mark": "''"}), "you look up, or return"),
            "## not returned": (
                LONGEST_MATCH.format(**MATCHED | {"piece": "word[start:end]"}),
                "'lower' gives 'low', '##er'; you look up, or return, the bare 'er'",
            ),
            "## or bare inside a word": (
                """
def encode_wordpiece(word, vocabulary):
    pieces, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            fits = [p for p in ("##" * (start > 0) + word[start:end], word[start:end]) if p in vocabulary]
            if fits:
                pieces.append(fits[0])
                start = end
                break
        else:
            return ["[UNK]"]
    return pieces
""",
                "the bare piece 'er' fits only the beginning of a word",
            ),
            "## at the beginning too": (
                LONGEST_MATCH.format(**MATCHED).replace(
                    "        for end in",
                    "        if not start and word not in vocabulary and '##' + word in vocabulary:\n"
                    "            return ['##' + word]\n"
                    "        for end in",
                ),
                "'##er' fits only inside a word",
            ),
            "only the rest unknown": (
                LONGEST_MATCH.format(**MATCHED | {"nothing": "return pieces + ['[UNK]']"}),
                "then the whole word is unknown, ['[UNK]'], not only the rest",
            ),
            "one unknown letter": (
                LONGEST_MATCH.format(**MATCHED | {"nothing": "pieces.append('[UNK]'); start += 1"}),
                "then the whole word is unknown",
            ),
            "the rest dropped": (LONGEST_MATCH.format(**MATCHED | {"nothing": "break"}), "and you drop it"),
            "unknown letters dropped": (LONGEST_MATCH.format(**MATCHED | {"nothing": "start += 1"}), "you drop it"),
            "a loop without end": (LONGEST_MATCH.format(**MATCHED | {"nothing": "continue"}), "your loop never ends"),
            "an error where nothing fits": (
                """
def encode_wordpiece(word, vocabulary):
    pieces, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        end = max(end for end in range(start + 1, len(word) + 1) if mark + word[start:end] in vocabulary)
        pieces.append(mark + word[start:end])
        start = end
    return pieces
""",
                "'lows' fails with ValueError (max() ",
            ),
            "a list index where nothing fits": (
                """
def encode_wordpiece(word, vocabulary):
    pieces, start = [], 0
    while start < len(word):
        mark = "##" if start else ""
        end = [end for end in range(start + 1, len(word) + 1) if mark + word[start:end] in vocabulary][-1]
        pieces.append(mark + word[start:end])
        start = end
    return pieces
""",
                "where no piece fits, return ['[UNK]']",
            ),
            "recursion without end": (
                """
def encode_wordpiece(word, vocabulary):
    if word in vocabulary:
        return [word]
    return encode_wordpiece(word[:-1], vocabulary) + encode_wordpiece(word, vocabulary)
""",
                "RecursionError: maximum recursion depth exceeded",
            ),
            "a slip that raises": (
                LONGEST_MATCH.format(**MATCHED | {"piece": "mark + word[start, end]"}),
                "TypeError: string indices must be integers",
            ),
            "the step counts the ## too": (
                LONGEST_MATCH.format(**MATCHED).replace("start = end", "start += len(pieces[-1])"),
                "or does your step count the ## too?",
            ),
            "stops before the last letter": (
                LONGEST_MATCH.format(**MATCHED).replace("while start < len(word):", "while start < len(word) - 1:"),
                "does your loop reach the last letter",
            ),
            "goes back": (
                """
def encode_wordpiece(word, vocabulary, mark=""):
    for end in range(len(word), 0, -1):
        if mark + word[:end] in vocabulary:
            rest = encode_wordpiece(word[end:], vocabulary, "##") if end < len(word) else []
            if rest != ["[UNK]"]:
                return [mark + word[:end], *rest]
    return ["[UNK]"]
""",
                "you go back to the shorter 'ab'",
            ),
            "fewest pieces": (
                """
def encode_wordpiece(word, vocabulary):
    best = {0: []}
    for end in range(1, len(word) + 1):
        for start in range(end):
            piece = "##" * (start > 0) + word[start:end]
            if start in best and piece in vocabulary and (end not in best or len(best[start]) + 1 < len(best[end])):
                best[end] = best[start] + [piece]
    return best.get(len(word), ["[UNK]"])
""",
                "neither the fewest pieces that win",
            ),
            "from the right": (
                """
def encode_wordpiece(word, vocabulary):
    pieces, end = [], len(word)
    while end > 0:
        for start in range(end):
            if "##" * (start > 0) + word[start:end] in vocabulary:
                pieces.insert(0, "##" * (start > 0) + word[start:end])
                end = start
                break
        else:
            return ["[UNK]"]
    return pieces
""",
                "nor the longest one anywhere",
            ),
            "returns a tuple": (
                LONGEST_MATCH.format(**MATCHED).replace("return pieces", "return tuple(pieces)"),
                "returns a list",
            ),
        },
        "2.9": {
            "longest piece first": (
                """
def viterbi(text, log_probs):
    pieces, start = [], 0
    while start < len(text):
        ends = [e for e in range(start + 1, len(text) + 1) if text[start:e] in log_probs] or [start + 1]
        pieces.append(text[start:max(ends)])
        start = max(ends)
    return pieces
""",
                "taking the longest piece first is greedy",
            ),
            "most probable piece first": (
                """
def viterbi(text, log_probs):
    pieces, start = [], 0
    while start < len(text):
        ends = [e for e in range(start + 1, len(text) + 1) if text[start:e] in log_probs] or [start + 1]
        end = max(ends, key=lambda e: log_probs.get(text[start:e], -99))
        pieces.append(text[start:end])
        start = end
    return pieces
""",
                "or take the most probable piece first?",
            ),
            "lowest score": (
                VITERBI.format(**CUT | {"worst": "float('inf')", "better": "score < best[end]"}),
                "higher is better",
            ),
            "backtracking not reversed": (VITERBI.format(**CUT | {"pieces": "pieces"}), "in reverse order"),
            "unknown characters dropped": (
                VITERBI.format(**CUT | {"pieces": "[p for p in pieces[::-1] if p in log_probs]"}),
                "it is neither dropped nor replaced",
            ),
            "unknown characters replaced": (
                VITERBI.format(**CUT | {"pieces": "[p if p in log_probs else '<unk>' for p in pieces[::-1]]"}),
                "joined, are 'a<unk>b'",
            ),
            "unknown characters fail": (
                VITERBI.format(**CUT | {"alone": "best[start] + log_probs[piece]"}),
                "fails with KeyError: in 'a?b', '?' is no piece: it stands alone",
            ),
            "unknown characters cost nothing": (
                VITERBI.format(**CUT | {"alone": "best[start]"}),
                "your price for an unknown character is too low",
            ),
            "unknown characters cost 10": (
                VITERBI.format(**CUT | {"before": "unknown = -10"}),
                "your price for an unknown character is too low",
            ),
            "unknown characters as a last resort": (
                VITERBI.format(**CUT | {"before": "unknown = -1e9"}),
                "your price for an unknown character is too high",
            ),
            **{
                f"unknown characters cost {price}": (
                    VITERBI.format(**CUT | {"before": f"unknown = min(log_probs.values()) - {price}"}),
                    f"your price for an unknown character is too {too}",
                )
                for too, prices in {"low": (0, 5, 9, 9.5), "high": (10.5, 11, 20)}.items()
                for price in prices
            },
            "unknown characters cost 14": (
                VITERBI.format(**CUT | {"before": "unknown = -14"}),
                "your price for an unknown character is too low",
            ),
            "the lowest piece instead of the lowest log probability": (
                VITERBI.format(**CUT | {"before": "unknown = min(log_probs) - 10"}),
                "TypeError: unsupported operand",
            ),
            "tie to the fewest pieces": (
                """
def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    best = [(0.0, 0, [], [])]
    for end in range(1, len(text) + 1):
        ways = []
        for start in range(end):
            piece = text[start:end]
            if piece in log_probs or len(piece) == 1:
                score, n, lengths, pieces = best[start]
                score += log_probs.get(piece, unknown)
                ways.append((score, n - 1, [len(piece), *lengths], pieces + [piece]))
        best.append(max(ways))
    return best[-1][-1]
""",
                "and not the one with the fewest pieces",
            ),
            "multiplied": (
                VITERBI.format(
                    **CUT | {"zero": "1.0", "known": "best[start] * log_probs[piece]", "alone": "best[start] * unknown"}
                ),
                "log probabilities are added, not multiplied",
            ),
            "multiplied, from 0": (
                VITERBI.format(**CUT | {"known": "best[start] * log_probs[piece]", "alone": "best[start] * unknown"}),
                "log probabilities are added, not multiplied",
            ),
            "best begins with 0": (
                VITERBI.format(**CUT | {"worst": "0.0"}),
                "you return 'low', which is no piece: do your best scores begin with 0",
            ),
            "what is no piece costs nothing": (
                VITERBI.format(**CUT)
                .replace("if piece in log_probs:", "if True:")
                .replace("log_probs[piece]", "log_probs.get(piece, 0.0)"),
                "or does a string that is no piece count as 0?",
            ),
            "best begins with -100": (
                VITERBI.format(**CUT | {"worst": "-100.0"}),
                "a number that is not low enough? Use -inf",
            ),
            "best begins with -1000": (
                VITERBI.format(**CUT | {"worst": "-1000.0"}),
                "a number that is not low enough? Use -inf",
            ),
            "every cut tried, by the pieces": (
                """
def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    def best(rest):
        if not rest:
            return 0.0, []
        ways = []
        if rest[0] not in log_probs:
            score, pieces = best(rest[1:])
            ways.append((score + unknown, [rest[0], *pieces]))
        for piece, p in log_probs.items():
            if rest.startswith(piece):
                score, pieces = best(rest[len(piece):])
                ways.append((score + p, [piece, *pieces]))
        return max(ways, key=lambda way: (way[0], [len(p) for p in reversed(way[1])]))
    return best(text)[1]
""",
                "you try the cuts one by one",
            ),
            "tie to the shorter last piece": (
                VITERBI.format(**CUT | {"better": "score >= best[end]"}),
                "the one with the longer last piece wins",
            ),
            "starts from the right, tie to the shorter last piece": (
                VITERBI.format(**CUT | {"starts": "reversed(range(end))"}),
                "the one with the longer last piece wins",
            ),
            "tie to the longer first piece": (
                """
def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    best, next_end = [float("-inf")] * len(text) + [0.0], [0] * len(text)
    for start in reversed(range(len(text))):
        for end in range(len(text), start, -1):
            piece = text[start:end]
            if piece in log_probs or len(piece) == 1:
                score = best[end] + (log_probs[piece] if piece in log_probs else unknown)
                if score > best[start]:
                    best[start], next_end[start] = score, end
    pieces, start = [], 0
    while start < len(text):
        pieces.append(text[start:next_end[start]])
        start = next_end[start]
    return pieces
""",
                "the one with the longer last piece wins",
            ),
            "every cut tried": (
                """
def viterbi(text, log_probs):
    unknown = min(log_probs.values()) - 10
    def best(end):
        if end == 0:
            return 0.0, []
        ways = []
        for start in range(end):
            piece = text[start:end]
            if piece in log_probs or len(piece) == 1:
                score, pieces = best(start)
                score += log_probs[piece] if piece in log_probs else unknown
                ways.append((score, len(piece), pieces + [piece]))
        return max(ways)[0], max(ways)[2]
    return best(len(text))[1]
""",
                "you try the cuts one by one",
            ),
            "probabilities, which underflow": (
                "import math\n"
                + VITERBI.format(
                    **CUT
                    | {
                        "zero": "1.0",
                        "worst": "0.0",
                        "known": "best[start] * math.exp(log_probs[piece])",
                        "alone": "best[start] * math.exp(unknown)",
                    }
                ),
                "Do you turn the log probabilities into probabilities?",
            ),
            "logarithms of probabilities that were rounded to 0": (
                "import math\n"
                + VITERBI.format(
                    **CUT
                    | {
                        "known": "math.log(math.exp(best[start]) * math.exp(log_probs[piece]))",
                        "alone": "math.log(math.exp(best[start]) * math.exp(unknown))",
                    }
                ).replace("score > best[end]", "score > best[end] + 1e-9"),
                "ValueError: ",
            ),
            "pieces of at most three characters": (
                VITERBI.format(**CUT | {"starts": "range(max(0, end - 3), end)"}),
                "or long pieces are not tried",
            ),
            "a joined text": (VITERBI.format(**CUT | {"pieces": "' '.join(pieces[::-1])"}), "returns a list of pieces"),
        },
        "2.10": {
            "most probable way only": (
                EVERY_WAY.format(
                    every="[max(ways(word, probabilities), key=lambda way: way[1])]",
                    share="1",
                ),
                "you count only the most probable way",
            ),
            "every way counts fully": (
                EVERY_WAY.format(every="ways(word, probabilities)", share="1"),
                "you count every way fully",
            ),
            "all ways alike": (
                EVERY_WAY.format(every="list(ways(word, probabilities))", share="1 / len(every)"),
                "you count all ways alike",
            ),
            "every way listed": (
                EVERY_WAY.format(every="ways(word, probabilities)", share="p / sum(p for _, p in every)"),
                "you list the ways to cut one by one",
            ),
            "shares not divided by the word's probability": (
                EXPECTED_COUNTS.format(**EXPECTED | {"share": "alpha[start] * probabilities[piece] * beta[end]"}),
                "divide by the probability of the whole word",
            ),
            "beta not used": (
                EXPECTED_COUNTS.format(**EXPECTED | {"share": "alpha[start] * probabilities[piece] / alpha[n]"}),
                "is beta left out?",
            ),
            "the most probable way in the tables": (
                EXPECTED_COUNTS.format(**EXPECTED).replace("= sum(", "= max("),
                "do you take the best way (max) where all ways are added up?",
            ),
            "beta from the left, divided by beta[0]": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"share": "alpha[start] * probabilities[piece] * beta[end] / beta[0]"}
                ).replace("reversed(range(n))", "range(n)"),
                "Or fill beta from the left",
            ),
            "beta from the left": (
                EXPECTED_COUNTS.format(**EXPECTED).replace("reversed(range(n))", "range(n)"),
                "do you fill beta from the left?",
            ),
            "the piece's own probability left out": (
                EXPECTED_COUNTS.format(**EXPECTED | {"share": "alpha[start] * beta[end] / alpha[n]"}),
                "is the probability of the piece itself left out",
            ),
            "beta[n] is 0": (
                EXPECTED_COUNTS.format(**EXPECTED).replace("[0.0] * n + [1.0]", "[0.0] * (n + 1)"),
                "do alpha[0] and beta[n] begin with 1?",
            ),
            "alpha behind the piece": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"share": "alpha[end] * probabilities[piece] * beta[end] / alpha[n]"}
                ),
                "is alpha taken behind the piece?",
            ),
            "beta before the piece": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"share": "alpha[start] * probabilities[piece] * beta[start] / alpha[n]"}
                ),
                "is beta taken before the piece?",
            ),
            "an index too far": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"share": "alpha[start] * probabilities[piece] * beta[end + 1] / alpha[n]"}
                ),
                "IndexError: list index out of range",
            ),
            "counts rounded": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"share": "round(alpha[start] * probabilities[piece] * beta[end] / alpha[n], 3)"}
                ),
                "yours are [0.111, 0.111, 0.889]: don't round them",
            ),
            "counts smoothed": (
                EXPECTED_COUNTS.format(**EXPECTED | {"expected": "dict.fromkeys(probabilities, 1e-6)"}),
                "yours are [0.1111121, 0.1111121, 0.8888899]: don't round them, don't add anything to them",
            ),
            "probabilities smoothed": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"new": "{p: c / sum(expected.values()) + 1e-6 for p, c in expected.items()}"}
                ),
                "yours are [0.100001, 0.100001, 0.800001]: don't round them, don't add anything to them",
            ),
            "every way listed, by the pieces": (
                EVERY_WAY.format(every="ways(word, probabilities)", share="p / sum(p for _, p in every)")
                .replace("for end in range(1, len(word) + 1)", "for piece, own in probabilities.items()")
                .replace("if word[:end] in probabilities", "if word.startswith(piece)")
                .replace("in ways(word[end:]", "in ways(word[len(piece):]")
                .replace("([word[:end], *pieces], probabilities[word[:end]] * p)", "([piece, *pieces], own * p)"),
                "you list the ways to cut one by one",
            ),
            "unused pieces put back by em_step": (
                EXPECTED_COUNTS.format(
                    **EXPECTED
                    | {
                        "expected": "{}",
                        "add": "= expected.get(piece, 0.0) +",
                        "new": "{p: expected.get(p, 0.0) / sum(expected.values()) for p in probabilities}",
                    }
                ),
                "expected_counts has no entry for the piece 'c'",
            ),
            "strings that are no pieces": (
                EXPECTED_COUNTS.format(**EXPECTED).replace("return expected\n", "return expected | {'x': 0.0}\n", 1),
                "expected_counts returns only pieces; ['x'] are not in `probabilities`",
            ),
            "alpha not used": (
                EXPECTED_COUNTS.format(**EXPECTED | {"share": "probabilities[piece] * beta[end] / alpha[n]"}),
                "is alpha left out?",
            ),
            "forward only": (
                EXPECTED_COUNTS.format(**EXPECTED | {"share": "alpha[start] * probabilities[piece] / alpha[end]"}),
                "you divide by alpha[j]",
            ),
            "shares of all counts at once": (
                EXPECTED_COUNTS.format(**EXPECTED).replace(
                    "return expected\n",
                    "total = sum(expected.values())\n    return {p: c / total for p, c in expected.items()}\n",
                    1,
                ),
                "these are shares already",
            ),
            "not normalised": (EXPECTED_COUNTS.format(**EXPECTED | {"new": "expected"}), "divide each by their sum"),
            "divided by the number of words": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"new": "{p: c / sum(words.values()) for p, c in expected.items()}"}
                ),
                "divide each by their sum",
            ),
            "word counts not used": (
                EXPECTED_COUNTS.format(**EXPECTED | {"count": "1"}),
                "a word that occurs 5 times counts 5 times",
            ),
            "a repeated piece overwritten": (
                EXPECTED_COUNTS.format(**EXPECTED | {"before": "before = dict(expected)", "add": "= before[piece] +"}),
                "add up every place where a piece fits",
            ),
            "a repeated piece counted once a way": (
                """
def expected_counts(words, probabilities):
    def ways(word):
        if not word:
            return [([], 1.0)]
        return [([word[:e], *pieces], probabilities[word[:e]] * p)
                for e in range(1, len(word) + 1) if word[:e] in probabilities for pieces, p in ways(word[e:])]
    expected = dict.fromkeys(probabilities, 0.0)
    for word, count in words.items():
        whole = sum(p for _, p in ways(word))
        for pieces, p in ways(word):
            for piece in set(pieces):
                expected[piece] += count * p / whole
    return expected

def em_step(words, probabilities):
    expected = expected_counts(words, probabilities)
    return {piece: count / sum(expected.values()) for piece, count in expected.items()}
""",
                "holds 'a' three times, and you count it once",
            ),
            "each word overwrites the one before": (
                EXPECTED_COUNTS.format(**EXPECTED | {"before": "expected = dict.fromkeys(probabilities, 0.0)"}),
                "add up the words",
            ),
            "unused pieces lost": (
                EXPECTED_COUNTS.format(
                    **EXPECTED | {"new": "{p: c / sum(expected.values()) for p, c in expected.items() if c > 0}"}
                ),
                "no word uses the piece 'c': it stays",
            ),
            "unused pieces keep their probability": (
                EXPECTED_COUNTS.format(
                    **EXPECTED
                    | {"new": "{p: c / sum(expected.values()) or probabilities[p] for p, c in expected.items()}"}
                ),
                "its new probability is 0.0, not 0.25",
            ),
            "changes its input": (
                EXPECTED_COUNTS.format(
                    **EXPECTED
                    | {
                        "new": "probabilities.update({p: c / sum(expected.values()) for p, c in expected.items()})"
                        " or probabilities"
                    }
                ),
                "make a new dict",
            ),
        },
        "2.11": {
            "no dummy prefix": (
                fallback(marked="text.replace(' ', '▁')"),
                "the dummy prefix, a ▁ before the text, is missing",
            ),
            "spaces dropped": (
                fallback(marked="'▁' + text.replace(' ', '')"),
                "you drop the space",
            ),
            "spaces as bytes": (fallback(marked="'▁' + text"), "not the byte <0x20>"),
            "the underscore": (fallback(marked="'_' + text.replace(' ', '_')"), "not the underscore"),
            "rows of spaces become one": (
                fallback(marked="'▁' + '▁'.join(text.split())"),
                "every space becomes a ▁",
            ),
            "one token for the character": (
                fallback(spell=bytes_as("[f'<0x{piece.encode().hex().upper()}>']")),
                "two tokens, <0xC3> and <0xA4>; you make one",
            ),
            "the character's number": (
                fallback(spell=bytes_as("[f'<0x{ord(piece):02X}>']")),
                "<0xE4> is its number in Unicode",
            ),
            "Latin-1": (
                fallback(spell=bytes_as("[f'<0x{b:02X}>' for b in piece.encode('latin-1', 'replace')]")),
                "encode the character to bytes first",
            ),
            "UTF-16": (
                fallback(spell=bytes_as("[f'<0x{b:02X}>' for b in piece.encode('utf-16-le')]")),
                "are the bytes of 'ä' in UTF-16",
            ),
            "small letters": (fallback(spell=bytes_as("[f'<0x{b:02x}>' for b in piece.encode()]")), "in capitals"),
            "one digit": (
                fallback(spell=bytes_as("[f'<0x{b:X}>' for b in piece.encode()]")),
                "a tab is <0x09>, yours is <0x9>",
            ),
            "unknown": (fallback(spell=bytes_as("['<unk>']")), "not '<unk>'"),
            "left as it is": (fallback(spell="pieces.append(piece)"), "you leave it as it is"),
            "dropped": (fallback(spell=bytes_as("[]")), "and you drop it"),
            "bytes for every piece of one character": (
                fallback(
                    spell="pieces.extend([piece] if len(piece) > 1 or piece == '▁' else "
                    "[f'<0x{b:02X}>' for b in piece.encode()])"
                ),
                "'a' is a piece, so it needs no bytes",
            ),
            "bytes in reverse order": (
                fallback(spell=bytes_as("[f'<0x{b:02X}>' for b in reversed(piece.encode())]")),
                "yours stand in reverse order",
            ),
            "the space symbol kept": (
                fallback(plain="piece.encode()"),
                "▁ becomes a space again",
            ),
            "the dummy prefix kept": (
                fallback(text="b''.join(out).decode(errors='replace')"),
                "you leave a space before it",
            ),
            "the text stripped": (
                fallback(text="b''.join(out).decode(errors='replace').strip()"),
                "only one space is the dummy prefix, you take them all away",
            ),
            "spaces on the left stripped": (
                fallback(text="b''.join(out).decode(errors='replace').lstrip()"),
                "only one space is the dummy prefix",
            ),
            "spaces lost in decoding": (fallback(plain="piece.replace('▁', '').encode()"), "you lose the space"),
            "each byte decoded alone": (
                fallback(
                    byte="bytes([int(piece[3:-1], 16)]).decode(errors='replace')",
                    plain="piece.replace('▁', ' ')",
                    text="''.join(out).removeprefix(' ')",
                ),
                "you decode each byte alone",
            ),
            "each byte is a character": (
                fallback(
                    byte="chr(int(piece[3:-1], 16))",
                    plain="piece.replace('▁', ' ')",
                    text="''.join(out).removeprefix(' ')",
                ),
                "you turn each byte into the character of that number",
            ),
            "byte tokens left as text": (fallback(byte="piece.encode()"), "byte tokens are bytes, not text"),
            "damage hidden": (
                fallback(text="b''.join(out).decode(errors='ignore').removeprefix(' ')"),
                "must leave U+FFFD behind",
            ),
            "fails on half a character": (
                fallback(text="b''.join(out).decode().removeprefix(' ')"),
                "use errors='replace'",
            ),
            "a letter inside a longer piece left as it is": (
                fallback(
                    spell="pieces.extend([piece] if piece in log_probs or piece in ''.join(log_probs) else "
                    "[f'<0x{b:02X}>' for b in piece.encode()])"
                ),
                "'e' stands inside the piece 'er', but is no piece itself",
            ),
            "no prefix before a space": (
                fallback(marked="('' if text[0] == ' ' else '▁') + text.replace(' ', '▁')"),
                "one ▁ is missing at the beginning, the prefix or the space itself",
            ),
            "the spaces at the beginning taken for the prefix": (
                fallback(marked="'▁' + text.lstrip().replace(' ', '▁')"),
                "one ▁ is missing at the beginning, the prefix or the space itself",
            ),
            "hex in capitals": (
                fallback(spell=bytes_as("[f'<{hex(b).upper()}>' for b in piece.encode()]")),
                "its x is not: <0xC3>, and yours is <0XC3>",
            ),
            "changes log_probs": (
                fallback(
                    spell="piece in log_probs or log_probs.update({piece: -99.0}); "
                    + bytes_as("[f'<0x{b:02X}>' for b in piece.encode()]")
                ),
                "encode_pieces changes the log_probs",
            ),
            "the first character always taken away": (
                fallback(text="b''.join(out).decode(errors='replace')[1:]"),
                "here there is none to take away; you return 'r low'",
            ),
            "the first space taken away, wherever it is": (
                fallback(text="b''.join(out).decode(errors='replace').replace(' ', '', 1)"),
                "here there is none to take away; you return 'erlow'",
            ),
            "only the first ▁ of a piece": (
                fallback(plain="(' ' + piece[1:] if piece[0] == '▁' else piece).encode()"),
                "every ▁ in a piece is a space",
            ),
            "all ▁ of a piece are one space": (
                fallback(plain="(' ' * (piece[0] == '▁') + piece.lstrip('▁')).encode()"),
                "every ▁ in a piece is a space",
            ),
            "one ▁ a piece replaced": (
                fallback(plain="piece.replace('▁', ' ', 1).encode()"),
                "every ▁ in a piece is a space",
            ),
            "▁ only at the beginning of a piece": (
                fallback(
                    plain="(' ' * (len(piece) - len(piece.lstrip('▁'))) + piece.lstrip('▁')).encode()",
                ),
                "the one piece ▁w▁t spells 'w t'",
            ),
            "all spaces at the beginning but one": (
                fallback(text="' ' + b''.join(out).decode(errors='replace').strip()"),
                "you leave a space before it",
            ),
            "one space taken for two": (
                fallback(text="b''.join(out).decode(errors='replace').removeprefix(' ').removeprefix(' ')"),
                "spell '  low '; you return ' low '",
            ),
            "bytes at the end lost": (
                """
def encode_pieces(text, log_probs):
    if not text:
        return []
    pieces = []
    for piece in viterbi("▁" + text.replace(" ", "▁"), log_probs):
        pieces.extend([piece] if piece in log_probs else [f"<0x{b:02X}>" for b in piece.encode()])
    return pieces

def decode_pieces(pieces):
    out, waiting = "", b""
    for piece in pieces:
        if piece.startswith("<0x"):
            waiting += bytes([int(piece[3:5], 16)])
        else:
            out += waiting.decode(errors="replace") + piece.replace("▁", " ")
            waiting = b""
    return out.removeprefix(" ")
""",
                "are bytes at the end of the list lost",
            ),
            "str and bytes mixed": (fallback(plain="piece.replace('▁', ' ')"), "TypeError: sequence item"),
            "bytes joined across a piece": (
                """
def encode_pieces(text, log_probs):
    if not text:
        return []
    pieces = []
    for piece in viterbi("▁" + text.replace(" ", "▁"), log_probs):
        pieces.extend([piece] if piece in log_probs else [f"<0x{b:02X}>" for b in piece.encode()])
    return pieces

def decode_pieces(pieces):
    out, waiting = "", b""
    for piece in pieces:
        if piece.startswith("<0x"):
            waiting += bytes([int(piece[3:5], 16)])
            try:
                out += waiting.decode()
                waiting = b""
            except UnicodeDecodeError:
                pass
        else:
            out += piece.replace("▁", " ")
    return (out + waiting.decode(errors="replace")).removeprefix(" ")
""",
                "<0xE6> b spell",
            ),
        },
    }


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    return solution_names("02")


def spelled(token: str) -> bytes:
    """A token of `tokenizers`, as bytes: its byte-level alphabet writes a space as "Ġ"."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    return bytes(byte_of[character] for character in token)


@pytest.fixture(scope="module")
def reference() -> Tokenizer:
    """`tokenizers`' BPE, trained on lower-case words (where its order of the bytes is that of their values)."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=256 + 30, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|end|>>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def merges(solution: dict[str, object]) -> list[tuple[int, int]]:
    return solution["train_bpe"]({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, 30)


@pytest.fixture(scope="module")
def pieces(merges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of each of the solution's ids."""
    found = [bytes([i]) for i in range(256)]
    for left, right in merges:
        found.append(found[left] + found[right])
    return found


def test_the_solution_learns_what_tokenizers_learns(pieces, reference):
    vocabulary = reference.get_vocab(with_added_tokens=False)
    theirs = [spelled(token) for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    assert pieces[256:] == theirs[256:]


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(), st.sampled_from(["low", " lowest", "newer", "widest", "<|end|>", "<|end|>>"])))
)
def test_the_solution_encodes_as_tokenizers_does(solution, merges, pieces, reference, parts):
    text = "".join(parts)
    special = {"<|end|>": 1000, "<|end|>>": 1001}
    ids = solution["encode"](text, merges, special)
    ours = [pieces[i] if i < 1000 else {1000: b"<|end|>", 1001: b"<|end|>>"}[i] for i in ids]
    theirs = [token.encode() if token in special else spelled(token) for token in reference.encode(text).tokens]
    assert ours == theirs
    assert solution["decode"](ids, merges, special) == text


@settings(max_examples=100, deadline=None)
@given(
    bare=st.sets(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=8),
    inside=st.sets(st.text("abc", min_size=1, max_size=3), max_size=8),
    word=st.text("abc", min_size=1, max_size=12),
)
def test_the_solution_matches_pieces_as_tokenizers_does(solution, bare, inside, word):
    vocabulary = bare | {"##" + piece for piece in inside}
    model = WordPiece({piece: i for i, piece in enumerate(["[UNK]", *sorted(vocabulary)])}, unk_token="[UNK]")
    assert solution["encode_wordpiece"](word, vocabulary) == Tokenizer(model).encode(word).tokens


@settings(max_examples=100, deadline=None)
@given(
    log_probs=st.dictionaries(
        st.text("abc", min_size=1, max_size=4), st.integers(-40, -1).map(lambda n: n / 4), min_size=1, max_size=12
    ),
    text=st.text("abcd", min_size=1, max_size=20),
)
def test_the_solution_finds_the_cut_that_tokenizers_finds(solution, log_probs, text):
    """Quarters, whose sums are exact: where cuts are equally probable, the tie decides."""
    model = Unigram([("<unk>", 0.0), *log_probs.items()], unk_id=0, byte_fallback=False)
    lowest = min(log_probs.values())
    assert lowest < 0.0  # "<unk>" is a piece too, and must not be the lowest
    # It joins unknown characters that stand side by side: take both sides' ends of known pieces.
    ours = joined([(piece, piece in log_probs) for piece in solution["viterbi"](text, log_probs)])
    theirs = [text[start:end] for start, end in Tokenizer(model).encode(text).offsets]
    assert ours == theirs


def joined(pieces: list[tuple[str, bool]]) -> list[str]:
    """Pieces, those that are unknown and side by side joined."""
    out: list[str] = []
    before = True
    for piece, known in pieces:
        if known or before:
            out.append(piece)
        else:
            out[-1] += piece
        before = known
    return out


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    """A small Unigram model with byte fallback that leaves the text as it is; its scores are rounded to quarters, whose
    sums are exact: `sentencepiece` adds in float32."""
    model = io.BytesIO()
    sentences = ["the lowest newer tower was lower than the newest low tower", "the widest was the slowest to grow"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 10),
        model_writer=model,
        model_type="unigram",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    rounded = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in rounded.pieces:
        piece.score = round(piece.score * 4) / 4
    return sentencepiece.SentencePieceProcessor(model_proto=rounded.SerializeToString())


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0"), max_size=4),
            st.sampled_from(["low", "lowest", " ", "  ", "tower ", " the", "new", "<0x41>"]),
        ),
        max_size=8,
    ),
    soup=st.lists(st.integers(128, 255).map(lambda byte: f"<0x{byte:02X}>"), max_size=6),
)
def test_the_solution_spells_as_sentencepiece_does(solution, processor, parts, soup):
    ids = range(processor.get_piece_size())
    plain = [i for i in ids if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))]
    log_probs = {processor.id_to_piece(i): processor.get_score(i) for i in plain}
    text = "".join(parts)
    pieces = solution["encode_pieces"](text, log_probs)
    assert pieces == processor.encode(text, out_type=str)
    assert solution["decode_pieces"](pieces) == text == processor.decode(pieces)
    # Of a run of bytes that are no character, each becomes one U+FFFD there, and the run at least one here.
    ours, theirs = (decode([*pieces, *soup]) for decode in (solution["decode_pieces"], processor.decode))
    assert regex.sub("\ufffd+", "\ufffd", ours) == regex.sub("\ufffd+", "\ufffd", theirs)
