"""What backends say while they start."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def start_up_lines() -> Iterator[list[str]]:
    """The messages of our logger, as they come."""
    lines: list[str] = []
    logger, handler = logging.getLogger("vllm.plugins.quest"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
