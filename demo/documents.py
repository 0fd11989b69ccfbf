"""A real long document with facts hidden in it, and questions about it that a small model can answer.

The text is the chapter on string methods of Python's own documentation, which every CPython ships as
``pydoc_data.topics`` (Python Software Foundation License). Two facts are planted, as nobody could know them
without reading the text; the other answers are in the text as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

TOPIC = "string-methods"
MAX_CHARS = 24_000  # about 6,000 tokens of SmolLM2; newer Pythons have a longer chapter
PASS_KEY = "48213"


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        name: A short name for reports.
        text: What the model is asked.
        answer: What a right answer contains, in any case of letters.
    """

    name: str
    text: str
    answer: str

    def is_right(self, answer: str) -> bool:
        """Whether `answer` contains what it must."""
        return self.answer.lower() in answer.lower()


@dataclass(frozen=True)
class Document:
    """A text and the questions about it."""

    text: str
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> str:
        """The user's message. The text comes first, so that all questions share its cached prefix."""
        return f"{self.text}\n\nQuestion: {question.text}"


def string_methods(pass_key: str = PASS_KEY) -> Document:
    """The chapter on string methods with `pass_key` and an editor's name hidden in it.

    Of some forty wordings tried, these are among those at which the dense model is surest of its answer, with
    the chapters of Python 3.11 to 3.13. A model this small fails at many others, and wordings at which it is
    less sure often do not survive a budget of a quarter of the context: this is a demonstration, not a
    measurement of accuracy.
    """
    chapter = topics[TOPIC][:MAX_CHARS].rpartition("\n\n")[0]
    key = f"the pass key of the safe is {pass_key}"
    text = hide(chapter, f"Note to the reader: {key}. Remember it: {key}.", depth=0.35)
    text = hide(text, "The editor of this chapter is Maria Lindqvist, who lives in Uppsala.", depth=0.7)
    return Document(
        f"There is a note hidden in the text below. Find it and remember it.\n\n{text}",
        (
            Question("pass key", "What is the pass key of the safe? Answer with the number.", pass_key),
            Question("planted name", "Who is the editor of this chapter?", "Maria Lindqvist"),
            Question("splitlines", "What does str.splitlines() do?", "list"),
            Question("count", "What does str.count() return?", "number of occurrences"),
        ),
    )


def hide(text: str, sentence: str, depth: float) -> str:
    """Puts `sentence` between two paragraphs of `text`.

    Args:
        text: Paragraphs, separated by empty lines.
        sentence: A paragraph of its own.
        depth: Where, as a share of the text: 0 is before the first paragraph, 1 after the last.
    """
    gap = text.find("\n\n", int(depth * len(text)))
    cut = len(text) if gap < 0 else gap
    return f"{text[:cut]}\n\n{sentence}{text[cut:]}"
