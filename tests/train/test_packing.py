"""Rows of the stream: every token trained on once, documents apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.train.packing import empty_row, num_rows, pack_row, stack_rows

# Three documents, 1 begins and 2 ends: they start at 0, 4 and 7 of the stream.
STREAM = np.array([1, 5, 6, 2, 1, 7, 2, 1, 8, 9, 2])
STARTS = np.array([0, 4, 7])


def row_of(number: int, length: int):
    first = number * length
    window = STREAM[first : first + length + 1]
    inside = np.isin(STARTS, np.arange(first, first + len(window)))
    return pack_row(window, STARTS[inside] - first, length)


def test_a_row_with_two_documents():
    row = row_of(0, 6)
    np.testing.assert_array_equal(row.tokens, [1, 5, 6, 2, 1, 7])
    np.testing.assert_array_equal(row.targets, [5, 6, 2, 1, 7, 2])
    np.testing.assert_array_equal(row.segment, [1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(row.position, [0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(row.loss_weight, [1, 1, 1, 0, 1, 1])


def test_the_last_row_goes_on_with_a_document_and_is_padded():
    row = row_of(1, 6)  # stream 6..10: the end of the second document, then the third
    np.testing.assert_array_equal(row.tokens, [2, 1, 8, 9, 0, 0])
    np.testing.assert_array_equal(row.targets, [1, 8, 9, 2, 0, 0])
    np.testing.assert_array_equal(row.segment, [1, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(row.position, [0, 0, 1, 2, 0, 0])
    np.testing.assert_array_equal(row.loss_weight, [0, 1, 1, 1, 0, 0])


def test_a_target_that_starts_a_document_carries_no_loss():
    row = row_of(0, 4)  # the window's last token, a target only, is the second document's first
    np.testing.assert_array_equal(row.targets, [5, 6, 2, 1])
    np.testing.assert_array_equal(row.segment, [1, 1, 1, 1])
    np.testing.assert_array_equal(row.loss_weight, [1, 1, 1, 0])


def test_dtypes_and_an_empty_row():
    row = empty_row(3)
    assert [field.dtype.name for field in row] == ["int32"] * 4 + ["float32"]
    assert all(not field.any() and field.shape == (3,) for field in row)


def test_rows_stack_to_a_batch():
    batch = stack_rows([row_of(0, 6), row_of(1, 6)])
    assert [field.shape for field in batch] == [(2, 6)] * 5
    np.testing.assert_array_equal(batch.tokens[1], [2, 1, 8, 9, 0, 0])


@pytest.mark.parametrize(("tokens", "length", "rows"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (5, 4, 1), (6, 4, 2)])
def test_number_of_rows(tokens, length, rows):
    assert num_rows(tokens, length) == rows


@given(st.integers(1, 13))
def test_each_token_is_learnt_once_whatever_the_length(length):
    rows = [row_of(number, length) for number in range(num_rows(len(STREAM), length))]
    learnt = np.concatenate([row.targets[row.loss_weight == 1] for row in rows])
    np.testing.assert_array_equal(learnt, np.delete(STREAM, STARTS))
    inputs = np.concatenate([row.tokens[row.segment > 0] for row in rows])
    np.testing.assert_array_equal(inputs, STREAM[:-1])
