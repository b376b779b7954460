"""How each format lays a tensor out, on arrays small enough to see."""

import numpy as np
import pytest
from oracles import tiny

from mixtral_jax.checkpoints.archive import WHOLE, Part, rows_of
from mixtral_jax.checkpoints.tensor_names import (
    LAYOUTS,
    deinterleave,
    file_shape,
    from_file,
    huggingface_fused,
    interleave,
    to_file,
    transposed,
)
from mixtral_jax.model.backends.few_rows import by_output
from mixtral_jax.model.tensors import tensors

ALL = [layout for layouts in LAYOUTS.values() for layout in layouts]


def test_rows_of_a_head_go_from_pairs_to_halves():
    pairs_HD = np.array([[0], [1], [2], [3], [4], [5], [10], [11], [12], [13], [14], [15]])
    halves = [0, 2, 4, 1, 3, 5, 10, 12, 14, 11, 13, 15]  # two heads of six
    assert deinterleave(pairs_HD, 6)[:, 0].tolist() == halves
    assert interleave(deinterleave(pairs_HD, 6), 6).tolist() == pairs_HD.tolist()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 7), (17, 33), (40, 16)])
def test_transposed(shape):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(transposed(array), array.T)
    assert transposed(array).flags.c_contiguous


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_tensor_comes_back_from_every_layout(layout, family):
    config = tiny.config(family)
    for number, (tensor, stored) in enumerate(layout(config).items()):
        ours = np.random.default_rng(number).standard_normal(tensor.shape)
        theirs = to_file(ours, tensor, stored)
        assert theirs.shape == file_shape(tensor, stored)
        np.testing.assert_array_equal(from_file(theirs, tensor, stored), ours)
        view = from_file(theirs, tensor, stored, in_order=False)
        np.testing.assert_array_equal(view, ours)
        assert stored.interleaved or np.shares_memory(view, theirs)
        if stored.inputs:
            assert by_output(view, tensor.inputs).values.flags.c_contiguous


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_has_a_place_of_its_own(layout, family):
    config = tiny.config(family)
    stored = layout(config)
    assert tuple(stored) == tensors(config)
    places = [(each.name, each.part) for each in stored.values()]
    assert len(set(places)) == len(places)
    for name in {each.name for each in stored.values()}:
        parts = [each.part for each in stored.values() if each.name == name]
        assert sorted(part.index for part in parts) == list(range(parts[0].count))
        assert {part.count for part in parts} == {parts[0].count}


def test_an_experts_gate_lies_before_its_up():
    """[E, 2F, D] by rows is e0 gate, e0 up, e1 gate, ..."""
    parts = {tensor.name: stored.part for tensor, stored in huggingface_fused(tiny.config("mixtral")).items()}
    assert parts["layers.0.moe.gate.0"] == Part(0, 8)
    assert parts["layers.0.moe.up.0"] == Part(1, 8)
    assert parts["layers.0.moe.gate.3"] == Part(6, 8)
    assert parts["layers.1.moe.down.3"] == Part(3, 4)


def test_rows_of_a_part():
    assert rows_of((8, 6, 5), Part(1, 4)) == (12, 24, 5)
    assert rows_of((6, 5), WHOLE) == (0, 6, 5)
    assert rows_of((7,), WHOLE) == (0, 7, 1)
