"""Targets of the Makefile that take flags of a user."""

import pytest

from tests.docs.make import make_chat


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ["--temperature=0", "--max_tokens=256"]),
        ("--temperature=0.7", ["--max_tokens=256", "--temperature=0.7"]),
        ("--seed=1 -max_tokens 9", ["--temperature=0", "--seed=1", "-max_tokens", "9"]),
        ("--max_tokens=9 --temperature=1", ["--max_tokens=9", "--temperature=1"]),
    ],
)
def test_flags_of_a_chat_take_the_place_of_the_targets_own(given, expected):
    """The program takes a flag once."""
    assert make_chat(given) == expected
