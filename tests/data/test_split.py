"""Train and validation text: nothing lost, nothing on both sides, the right share, the same every time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.split import split_documents

texts = st.lists(st.text(max_size=40), max_size=40)


def sides(documents: list[str], fraction: float, seed: int = 0, **kwargs: int) -> tuple[list[str], list[str]]:
    divided = list(split_documents(iter(documents), fraction, seed, **kwargs))
    return [text for side, text in divided if side == "train"], [text for side, text in divided if side != "train"]


@settings(max_examples=80, deadline=None)
@given(documents=texts, fraction=st.floats(0.01, 0.9), seed=st.integers(0, 100), held=st.integers(1, 400))
def test_no_document_is_lost_or_on_both_sides(documents: list[str], fraction: float, seed: int, held: int) -> None:
    different = set(documents) - {""}
    if len(different) < 2:
        return
    train, validation = sides(documents, fraction, seed, held_characters=held)
    assert Counter(train + validation) == Counter(text for text in documents if text)
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert [text for text in documents if text in set(train)] == train
    assert sides(documents, fraction, seed, held_characters=held) == (train, validation)


@settings(max_examples=60, deadline=None)
@given(document=st.text(min_size=2, max_size=300), fraction=st.floats(0.01, 0.99), copies=st.integers(1, 3))
def test_a_lone_document_is_cut_in_two(document: str, fraction: float, copies: int) -> None:
    divided = list(split_documents([document] * copies, fraction))
    assert [side for side, _ in divided] == ["train", "validation"] * copies
    assert all(text for _, text in divided)
    assert "".join(text for _, text in divided) == document * copies


def test_a_lone_document_is_cut_at_the_nearest_line_end() -> None:
    document = "".join(f"line {number:03d}\n" for number in range(100))
    train, validation = sides([document], 0.1)
    assert train == [document[:810]]
    assert validation == [document[810:]]
    train, validation = sides(["word " * 100], 0.25)
    assert len(train[0]) == 375


@pytest.mark.parametrize("seed", range(5))
def test_a_small_corpus_of_unequal_documents_is_divided_by_size(seed: int) -> None:
    documents = [chr(97 + number % 26) * (100 + 13 * number**2 % 6000) + str(number) for number in range(60)]
    _, validation = sides(documents, 0.1, seed)
    share = sum(map(len, validation)) / sum(map(len, documents))
    assert 0.09 <= share <= 0.11


def test_a_long_stream_is_divided_by_hash() -> None:
    documents = [f"document {number}" for number in range(20_000)]
    validation = sides(documents, 0.1, held_characters=1000)[1]
    assert 0.09 < len(validation) / 20_000 < 0.11  # five standard errors are 0.0106
    # Past the held beginning the side of a document is its own affair: neither order nor company matters.
    again = sides(documents[:100] + documents[:9999:-1], 0.1, held_characters=1000)[1]
    beginning, rest = set(documents[:100]), set(documents[10_000:])
    assert set(again) == set(validation) & (beginning | rest)


def test_many_copies_at_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.data.split.HELD_DOCUMENTS", 3)
    train, validation = sides(["a"] * 10 + ["b"] * 5 + ["c"] * 5, 0.1, held_characters=2)
    assert Counter(train + validation) == {"a": 10, "b": 5, "c": 5}
    assert train
    assert validation
    assert not set(train) & set(validation)
    assert sides(["ab"] * 10, 0.5) == (["a"] * 10, ["b"] * 10)


def test_another_seed_is_another_division() -> None:
    documents = [f"document {number}" for number in range(200)]
    assert sides(documents, 0.2, 0)[1] != sides(documents, 0.2, 1)[1]


def test_no_validation_text_when_none_is_asked_for() -> None:
    assert sides(["a", "", "b"], 0.0) == (["a", "b"], [])


def test_bad_input_is_refused() -> None:
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction must be in"):
            list(split_documents(["a", "b"], fraction))
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        list(split_documents("one text", 0.1))
    with pytest.raises(TypeError, match="document 1 is bytes"):
        list(split_documents(["a", b"b"], 0.1))  # type: ignore[list-item]
    for fraction in (0.0, 0.1):
        with pytest.raises(ValueError, match="there is no text"):
            list(split_documents(["", ""], fraction))
    with pytest.raises(ValueError, match="one character cannot be split"):
        list(split_documents(["a"], 0.1))
