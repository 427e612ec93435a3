"""Learning WordPiece vocabularies, held against a plain reading of the formula and the trainer of `tokenizers`."""

from collections import Counter
from pydoc_data.topics import topics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minillm.tokenizers.wordpiece_training import Score, learn_wordpiece, learn_wordpiece_plain
from minillm.tokenizers.wordpiece_vocabulary import alphabet_of, learn_vocabulary

SPECIAL = ["[PAD]", "[UNK]"]
SCORES: list[Score] = ["likelihood", "frequency"]
scores = pytest.mark.parametrize("score", SCORES)
documents = [topics[name] for name in sorted(topics)]
real_words = Counter(word for text in documents for word in text.lower().split())


def counted(alphabets: list[str]) -> st.SearchStrategy[dict[str, int]]:
    """Few letters: many ties, many runs of one letter, many pairs that overlap."""
    words = st.one_of(*(st.text(alphabet, min_size=1, max_size=12) for alphabet in alphabets))
    return st.dictionaries(words, st.integers(1, 9), min_size=1, max_size=12)


any_words = counted(["a", "ab", "abc", "abcdef", "aé中👍", "ab#"])
# A word that begins with the prefix is spelled like the rest of another one: `tokenizers` then counts wrongly.
plain_words = counted(["a", "ab", "abc", "abcdef", "aé中👍"])


def peer_vocabulary(counts: dict[str, int], **options: object) -> list[str]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator([" ".join([word] * count) for word, count in counts.items()], trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)


@scores
@given(
    counts=any_words,
    special=st.sampled_from([[], SPECIAL, ["ab"], ["a", "##b"], ["##ab"]]),
    n_merges=st.integers(0, 40),
    min_frequency=st.integers(1, 6),
    limit=st.sampled_from([None, 2]),
)
def test_the_fast_learner_equals_the_plain_one(
    score: Score, counts: dict[str, int], special: list[str], n_merges: int, min_frequency: int, limit: int | None
) -> None:
    tokens = list(dict.fromkeys([*special, *alphabet_of(counts, limit=limit)]))
    vocab_size = len(tokens) + n_merges
    plain = learn_wordpiece_plain(counts, tokens, vocab_size, score=score, min_frequency=min_frequency)
    assert learn_wordpiece(counts, tokens, vocab_size, score=score, min_frequency=min_frequency) == plain
    backwards = dict(reversed(counts.items()))
    assert learn_wordpiece(backwards, tokens, vocab_size, score=score, min_frequency=min_frequency) == plain


@scores
def test_the_fast_learner_equals_the_plain_one_on_real_words(score: Score) -> None:
    counts = dict(real_words.most_common(400))
    tokens = alphabet_of(counts)
    plain = learn_wordpiece_plain(counts, tokens, len(tokens) + 100, score=score, min_frequency=5)
    assert learn_wordpiece(counts, tokens, len(tokens) + 100, score=score, min_frequency=5) == plain


def test_a_worked_example() -> None:
    """That of Hugging Face's course, chapter 6: `##g ##s` has the score 5 / (20 * 5), then `h ##u` 15 / (15 * 36), as
    has `p ##u`, which is more frequent."""
    counts = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    alphabet = alphabet_of(counts)
    assert set(alphabet) == {*"hpbugns", "##u", "##g", "##n", "##s"}
    assert learn_wordpiece(counts, alphabet, len(alphabet) + 3)[len(alphabet) :] == ["##gs", "pu", "hu"]
    assert learn_wordpiece(counts, alphabet, len(alphabet) + 3, score="frequency")[-3:] == ["##ug", "##un", "hug"]


def test_the_score_of_a_pair_rises_when_its_tokens_become_rarer() -> None:
    # `a ##b` has 6 / (10 * 16) against `e ##f` with 4 / (8 * 8); once `##b` is in `c ##b` it has 6 / (10 * 6).
    counts = {"ab": 6, "a": 4, "cb": 10, "ef": 4, "e": 4, "gf": 4}
    alphabet = alphabet_of(counts)
    assert learn_wordpiece_plain(counts, alphabet, len(alphabet) + 2)[-2:] == ["gf", "ef"]
    assert learn_wordpiece(counts, alphabet, len(alphabet) + 4)[-4:] == ["gf", "ef", "cb", "ab"]


def test_no_tie_is_made_by_rounding() -> None:
    """1 / (2^60 + 1) and 1 / 2^60 are the same floating-point number, of which the more frequent pair would win."""
    counts = {"ab": 2**60 + 1, "cd": 2**60}
    alphabet = alphabet_of(counts)
    for learn in (learn_wordpiece_plain, learn_wordpiece):
        assert learn(counts, alphabet, len(alphabet) + 2)[-2:] == ["cd", "ab"]


@given(
    plain_words,
    st.sampled_from([[], SPECIAL, ["ab"], ["a", "##b"], ["##ab"]]),
    st.integers(0, 30),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([[], ["z", "a", "é"]]),
)
def test_by_frequency_the_vocabulary_is_that_of_tokenizers(
    counts: dict[str, int], special: list[str], n_merges: int, min_frequency: int, initial: list[str]
) -> None:
    tokens = list(dict.fromkeys([*special, *alphabet_of(counts, initial=initial)]))
    vocab_size = len(tokens) + n_merges
    theirs = peer_vocabulary(
        counts,
        vocab_size=vocab_size,
        special_tokens=special,
        min_frequency=min_frequency,
        initial_alphabet=initial,
    )
    # Their order of the prefixed characters is another one in every run.
    n_ordered = sum(not token.startswith("##") or token in special for token in tokens)
    assert theirs[:n_ordered] == tokens[:n_ordered]
    assert sorted(theirs[: len(tokens)]) == sorted(tokens)
    ours = learn_wordpiece(
        counts, theirs[: len(tokens)], vocab_size, score="frequency", min_frequency=max(1, min_frequency)
    )
    assert ours == theirs


def test_a_limited_alphabet_is_that_of_tokenizers() -> None:
    counts = {"abcd": 4, "bcd": 2, "cad": 3, "xyz": 1, "dddx": 2}
    for limit in (1, 2, 3, 4, 100):
        ours = learn_vocabulary(counts, 30, score="frequency", special_tokens=SPECIAL, limit_alphabet=limit)
        theirs = peer_vocabulary(counts, vocab_size=30, special_tokens=SPECIAL, limit_alphabet=limit)
        n = len(alphabet_of(counts, limit=limit)) + len(SPECIAL)
        assert sorted(ours[:n]) == sorted(theirs[:n])
        assert learn_wordpiece(counts, theirs[:n], 30, score="frequency") == theirs
    assert alphabet_of(counts, initial=["z", "y"], limit=3) == ["d", "y", "z", "##d", "##y", "##z"]


def test_how_close_the_vocabularies_come_to_that_of_tokenizers() -> None:
    counts = Counter(word for text in documents[:25] for word in text.lower().split())
    theirs = peer_vocabulary(counts, vocab_size=1500, special_tokens=SPECIAL)
    common = {}
    for score in SCORES:
        ours = learn_vocabulary(counts, 1500, score=score, special_tokens=SPECIAL)
        assert len(set(ours)) == len(set(theirs)) == 1500
        common[score] = len(set(ours) & set(theirs)) / 1500
    rare = learn_vocabulary(counts, 1500, special_tokens=SPECIAL, min_frequency=1)
    # By frequency, only ties differ (at random); by likelihood, about half of the tokens; without a threshold, most.
    assert common["frequency"] > 0.9
    assert 0.4 < common["likelihood"] < 0.8
    assert len(set(rare) & set(theirs)) / 1500 < 0.25


def test_the_threshold_is_as_high_as_fills_the_vocabulary() -> None:
    counts = Counter(word for text in documents[:6] for word in text.lower().split())
    tokens = alphabet_of(counts)
    for vocab_size, expected in ((400, range(18, 30)), (1000, range(4, 10)), (1500, range(2, 6))):
        learned = {n: learn_wordpiece(counts, tokens, vocab_size, min_frequency=n) for n in expected}
        filling = [n for n, vocabulary in learned.items() if len(vocabulary) == vocab_size]
        assert expected[0] <= filling[-1] < expected[-1]
        assert learn_vocabulary(counts, vocab_size) in [learned[n] for n in filling if n >= 0.8 * filling[-1]]


@settings(max_examples=30)
@given(plain_words, st.integers(0, 30))
def test_a_vocabulary_that_cannot_be_filled_has_all_there_is(counts: dict[str, int], n_merges: int) -> None:
    tokens = alphabet_of(counts)
    size = len(tokens) + n_merges
    full = learn_wordpiece(counts, tokens, size, min_frequency=1)
    ours = learn_vocabulary(counts, size)
    assert len(ours) == len(full)
    assert set(ours) == set(full) or len(full) == size


def test_bad_arguments_are_refused() -> None:
    counts = {"ab": 2}
    assert learn_vocabulary(counts, 5, special_tokens=SPECIAL) == [*SPECIAL, "a", "b", "##b"]
    for message, arguments in (
        (r"vocab_size must be from 5 \(2 special tokens and an alphabet of 3\) to 1114112, got 4", {"vocab_size": 4}),
        ("got 2000000", {"vocab_size": 2_000_000}),
        ("score must be one of 'likelihood', 'frequency', got 'bpe'", {"score": "bpe"}),
        ("min_frequency must be at least 1, got 0", {"min_frequency": 0}),
        ("limit_alphabet must be at least 1, got 0", {"limit_alphabet": 0}),
        ("special_tokens must differ from each other", {"special_tokens": ["a", "a"]}),
        ("at least one word to learn from, got none", {"word_counts": {}}),
        ("initial_alphabet must hold single characters, got 'ab'", {"initial_alphabet": ["a", "ab"]}),
        ("initial_alphabet must hold single characters, got ''", {"initial_alphabet": [""]}),
    ):
        given_arguments = {"word_counts": counts, "vocab_size": 10, "special_tokens": SPECIAL} | arguments
        with pytest.raises(ValueError, match=message):
            learn_vocabulary(**given_arguments)  # type: ignore[arg-type]
    for name, value in (("vocab_size", 10.0), ("min_frequency", 1.5), ("limit_alphabet", 3.5), ("min_frequency", True)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {value}"):
            learn_vocabulary(**({"word_counts": counts, "vocab_size": 10} | {name: value}))  # type: ignore[arg-type]
    assert learn_vocabulary(counts, 10, initial_alphabet=iter("xa")) == ["a", "b", "x", "##b", "ab"]
