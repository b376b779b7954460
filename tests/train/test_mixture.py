"""Mixtures: each source's share of any number of rows, and each of its rows once an epoch of its own."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.config import build
from mixtral_jax.errors import InputError
from mixtral_jax.train import config as configs
from mixtral_jax.train.batches import training_batches, validation_batches
from mixtral_jax.train.data import DataConfig, prepare
from mixtral_jax.train.mixture import Mixture, quotas, text_entropy, turns
from mixtral_jax.train.token_index import TokenIndex, unigram_entropy

LENGTH = 4


def test_turns_by_hand():
    assert turns([2, 1]).tolist() == [0, 1, 0]
    assert turns([1]).tolist() == [0]
    assert quotas([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert quotas([3, 1]) == quotas([0.75, 0.25]) == quotas([300, 100.0]) == [3, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_after_any_rows_each_source_has_had_its_share(quota_K):
    source_P = turns(quota_K)
    given_PK = np.cumsum(source_P[:, None] == np.arange(len(quota_K)), axis=0)
    due_PK = np.arange(1, len(source_P) + 1)[:, None] * np.array(quota_K) / sum(quota_K)
    assert np.abs(given_PK - due_PK).max() < 1
    assert given_PK[-1].tolist() == quota_K


def _index(source, rows):
    """An index of so many rows, whose tokens say where they are from."""
    tokens = np.arange(rows * LENGTH + 1, dtype=np.uint32) + 100_000 * source
    return TokenIndex(tokens, np.array([0, len(tokens)]), f"source {source}")


def _rows(batches, count):
    """(source, number) of the first rows of a stream."""
    taken = [batch.tokens[:, 0] for batch in itertools.islice(batches, count)]
    batches.close()
    return [divmod(int(token), 100_000) for token in np.concatenate(taken)]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 1, 2, 3.5, 7]), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_a_stream_of_sources(sizes, weights, seed, data):
    weights = weights[: len(sizes)]
    mixture = Mixture([_index(source, rows) for source, rows in enumerate(sizes)], weights)
    batch = data.draw(st.integers(1, min(4, sum(sizes))))
    config = DataConfig(sequence_length=LENGTH, batch_size=batch, seed=seed, prefetch=0)
    stream = _rows(training_batches(mixture, config), 60)
    # Shares, after any number of rows.
    for count in range(1, len(stream) + 1):
        had = Counter(source for source, _ in stream[:count])
        for source, weight in enumerate(weights):
            assert abs(had[source] - count * weight / sum(weights)) < 1 + 1e-9
    # Each source's rows once an epoch of its own.
    for source, rows in enumerate(sizes):
        own = [number // LENGTH for which, number in stream if which == source]
        for first in range(0, len(own) - rows + 1, rows):
            assert sorted(own[first : first + rows]) == list(range(rows))
    # Gone on with at any step, and shared among hosts.
    first = data.draw(st.integers(0, 50))
    assert _rows(training_batches(mixture, config, first), 5) == stream[first * batch :][: 5 * batch]
    shares = [range(0, batch, 2), range(1, batch, 2)]
    parts = [_rows(training_batches(mixture, config, first, rows), 5) for rows in shares if rows]
    assert sorted(itertools.chain(*parts)) == sorted(stream[first * batch :][: 5 * batch])


def test_a_source_alone_with_a_weight_has_the_order_of_one_without():
    config = DataConfig(sequence_length=LENGTH, batch_size=3, prefetch=0)
    alone, mixed = _index(0, 7), Mixture([_index(0, 7)], [5])
    assert _rows(training_batches(alone, config), 9) == _rows(training_batches(mixed, config), 9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "code").mkdir()
    for shard in range(3):  # one source in several files
        (folder / "code" / f"{shard}.jsonl").write_text(
            "".join(f'{{"text": "def f{n}(x): return x + {n}"}}\n' for n in range(shard, 60, 3))
        )
    (folder / "prose.jsonl").write_text("".join(f'{{"text": "{n} bottles of beer on the wall"}}\n' for n in range(30)))
    config = DataConfig(
        sources=(str(folder / "code" / "*.jsonl"), str(folder / "prose.jsonl")),
        weights=(1, 3),
        vocab_size=300,
        sequence_length=16,
        batch_size=4,
        validation_fraction=0.1,
        cache_dir=str(folder / "cache"),
    )
    return config, prepare(config)


def test_files_become_a_mixture(prepared):
    config, data = prepared
    code, prose = data.training.parts
    assert code.num_documents + prose.num_documents == 90 - data.validation.num_documents
    assert data.validation.num_documents == 9
    rows = [batch.tokens for batch in itertools.islice(training_batches(data.training, config), 25)]
    first_prose = {row.tobytes() for row in (prose.row(n, 16).tokens for n in range(prose.rows(16)))}
    had = sum(row.tobytes() in first_prose for row in np.concatenate(rows))
    assert had == 75
    assert prepare(config).digest == data.digest
    assert prepare(dataclasses.replace(config, weights=(2, 3))).digest == data.digest  # the same text
    assert prepare(dataclasses.replace(config, weights=None)).digest != data.digest


def test_held_out_text_is_of_all_sources_each_row_once(prepared):
    config, data = prepared
    batches = list(validation_batches(data.validation, config))
    learnt = np.concatenate([batch.targets[batch.loss_weight == 1] for batch in batches])
    assert len(learnt) == data.validation.num_tokens - data.validation.num_documents
    streams = [part.tokens for part in data.validation.parts]
    offsets = np.cumsum([0, *(n for part in data.validation.parts for n in np.diff(part.offsets))])
    joined = TokenIndex(np.concatenate(streams), offsets)
    assert text_entropy(data.validation, 300) == pytest.approx(unigram_entropy(joined, 300), rel=1e-12)
    assert text_entropy(object(), 300) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2, 3], r"weights = \[1.0, 2.0, 3.0\]: a number for each of data.sources, of which there are 1"),
        ([0], r"weights = \[0.0\]: numbers above zero"),
        ([float("nan")], "numbers above zero"),
    ],
)
def test_refuses(weights, message):
    with pytest.raises(InputError, match=message):
        build(DataConfig, {"weights": weights})


def test_refuses_what_only_a_run_can_tell(prepared, toy_config, tmp_path):
    with pytest.raises(InputError, match="shares in whole rows of at most 10,000"):
        quotas([1, 0.333333])
    with pytest.raises(InputError, match=r"data.weights = \[1.0\]: of text alone, with objective.kind = 'pretrain'"):
        configs.load(toy_config, ["data.weights=[1]", "objective.kind=sft", f"init_from={tmp_path}"])
    config, _ = prepared
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"blank.jsonl': has no text to train on; a source with a weight needs some"):
        prepare(dataclasses.replace(config, sources=(config.sources[0], str(tmp_path / "blank.jsonl"))))
