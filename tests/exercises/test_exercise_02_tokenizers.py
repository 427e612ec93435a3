"""Exercise 02: wrong answers that students are likely to give, and the solution against Hugging Face `tokenizers`."""

import nbformat
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from minillm.exercises.folder import find_folder
from minillm.exercises.testing import ExerciseTests

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


class TestExercise02(ExerciseTests):
    exercise = "02"
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
    }


@pytest.fixture(scope="module")
def solution() -> dict[str, object]:
    """The names that the solution's setup and answer cells define."""
    notebook = nbformat.read(find_folder() / "solutions" / "02_tokenizers.ipynb", as_version=4)
    names: dict[str, object] = {"regex": regex}
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.metadata["nbgrader"]["grade"]:
            exec(cell.source, names)
    return names


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
