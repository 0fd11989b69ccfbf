"""What command lines take alike."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.common.arguments import json_object


def test_json_objects() -> None:
    assert json_object('{"page_size": 16}') == {"page_size": 16}


@pytest.mark.parametrize("text", ["[1]", "{", "page_size=16"])
def test_what_is_no_json_object_is_refused(text) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        json_object(text)
