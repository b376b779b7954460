"""Stop strings, in texts that come token by token."""

import pytest

from mixtral_jax.text.growing import GrowingText, _overlap


@pytest.mark.parametrize(
    ("text", "stop", "held"), [("abc", "cd", 1), ("abcd", "cde", 2), ("ab", "xy", 0), ("aa", "aaa", 2)]
)
def test_overlap(text, stop, held):
    assert _overlap(text, stop) == held


def test_nothing_is_shown_that_may_be_taken_back(v3):
    """Word by word "one S T O P two", of which the stop string and the rest are never seen."""
    ids = [token for word in ["one", "S", "T", "O", "P", "two"] for token in v3.encode(word)]
    text, seen = GrowingText(v3, [], ["S T O P"]), []
    for count in range(1, len(ids) + 1):
        text.grow(ids[:count])
        seen.append(text.shown)
    assert text.stopped
    assert text.finish() == seen[-1]
    assert seen[-1].strip() == "one"
    assert all(seen[-1].startswith(each) for each in seen)


def test_an_end_token_is_no_text(v3):
    text = GrowingText(v3, [], [])
    text.grow([*v3.encode("yes"), v3.eos_id])
    assert text.finish() == "yes"
