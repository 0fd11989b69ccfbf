"""The demo's document and what its report makes of the figures."""

from __future__ import annotations

import pytest

from demo.documents import MAX_CHARS, Question, hide, string_methods
from demo.report import Figure, read_shares, table_text


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0.0, "one\n\nNOTE\n\ntwo\n\nthree"),
        (0.5, "one\n\ntwo\n\nNOTE\n\nthree"),
        (1.0, "one\n\ntwo\n\nthree\n\nNOTE"),
    ],
)
def test_a_hidden_sentence_is_a_paragraph_of_its_own(depth: float, expected: str) -> None:
    assert hide("one\n\ntwo\n\nthree", "NOTE", depth) == expected


def test_the_pass_key_stands_in_its_note_only() -> None:
    document = string_methods(pass_key="90775")
    paragraphs = [text for text in document.text.split("\n\n") if "90775" in text]
    assert len(paragraphs) == 1
    assert document.questions[0].answer == "90775"
    assert "90775" not in document.questions[0].text
    assert len(document.text) < MAX_CHARS + 500


def test_every_prompt_starts_with_the_same_text() -> None:
    document = string_methods()
    assert all(document.prompt(question).startswith(document.text) for question in document.questions)


def test_a_right_answer_contains_the_expected_words_in_any_case() -> None:
    question = Question("name", "Who?", "Maria Lindqvist")
    assert question.is_right("It is MARIA LINDQVIST.")
    assert not question.is_right("It is Maria.")


def test_shares_count_dense_layers_as_read_in_full() -> None:
    counters = {
        "decode_rows_sparse": 30,
        "decode_rows_dense_layer": 10,
        "pages_scored": 400,
        "pages_read": 100,
        "bytes_read": 3_000,
        "bytes_dense": 9_000,
    }
    shares = read_shares(counters)
    assert shares["pages"] == pytest.approx(1 / 4)
    assert shares["bytes_sparse_layers"] == pytest.approx(1 / 3)
    assert shares["bytes_all_layers"] == pytest.approx((3_000 + 3_000) / 12_000)


def test_without_sparse_rows_everything_is_read() -> None:
    assert set(read_shares({"decode_rows_sparse": 0}).values()) == {1.0}


def test_the_table_says_where_quest_loses() -> None:
    speed = Figure("decode speed", "tokens/s", 12.0, 8.0, words=("faster", "slower"))
    memory = Figure("KV memory per token", "bytes", 1_000.0, 1_060.0)
    table = table_text([speed, memory, Figure("decode attention per step", "ms", None, None)])
    assert "1.50x slower" in table
    assert "1.06x more" in table
