"""A tokenizer is trained alike every time, in Mistral's layout, within the bounds that its text sets."""

from __future__ import annotations

import re

import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.text.training import _sample, train_tokenizer


def test_ids_have_mistrals_layout(ours):
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 1, 2, -1, 352)


def test_indentation_is_one_piece_and_digits_are_apart(ours):
    pieces = [ours.piece(token) for token in ours.encode("\n        self\n    20")]
    assert pieces == ["\n        ", "self", "\n    ", "2", "0"]


def test_training_is_deterministic_and_quiet(ours, code, capfd):
    again = train_tokenizer(iter(code), 352)
    other = train_tokenizer(code[:1], 300)
    assert ours.digest == again.digest != other.digest
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "pattern", "step"), [(100, r"at least (\d+) is", -1), (9000, r"at most (\d+) is", 1)])
def test_the_bound_in_the_message_is_the_bound(code, size, pattern, step):
    with pytest.raises(InputError, match=rf"vocab_size = {size}: too .*{pattern}") as caught:
        train_tokenizer(code[:1], size)
    bound = int(re.search(pattern, str(caught.value))[1])
    assert train_tokenizer(code[:1], bound).vocab_size == bound
    with pytest.raises(InputError, match="for this text"):
        train_tokenizer(code[:1], bound + step)


def test_no_text_and_no_size_are_refused(code):
    with pytest.raises(InputError, match="there is no text to learn from"):
        train_tokenizer(["", "\n\n"], 300)
    with pytest.raises(InputError, match="vocab_size = 0: a positive number"):
        train_tokenizer(code[:1], 0)


def test_a_sample_is_spread_evenly_and_bounded():
    # Four characters each. At the fifth, 20 > 16: every second stays (0, 2, 4), and from there every second is taken.
    documents = [f"doc{number}" for number in range(8)]
    assert _sample(iter(documents), 16) == ["doc0", "doc2", "doc4", "doc6"]
    assert _sample(iter(documents), 1) == ["doc0"]
    assert _sample(iter(documents), 32) == documents
