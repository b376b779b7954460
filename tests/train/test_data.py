"""From text to batches: built once, the same from anywhere, nothing twice, and refused early when it can't be."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from pydantic import ValidationError

from mixtral_jax.errors import InputError
from mixtral_jax.sharding.mesh import MeshConfig, make_mesh
from mixtral_jax.sharding.rules import TRAINING
from mixtral_jax.text.training import train_tokenizer
from mixtral_jax.train.batches import device_rows, training_batches, validation_batches
from mixtral_jax.train.data import DataConfig, prepare
from mixtral_jax.train.token_index import TokenIndex, build_index, is_whole, unigram_entropy

SHARES = ((0, 1), (2, 3))
DOCUMENTS = [f"def function_{n}(x):\n    return x + {n * n}\n" + "    # more of it\n" * (n % 7) for n in range(40)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number, document in enumerate(DOCUMENTS):
        (folder / f"{number:02}.py").write_text(document)
    return folder


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory):
    return DataConfig(
        sources=(str(corpus),),
        vocab_size=300,
        sequence_length=16,
        batch_size=4,
        validation_fraction=0.1,
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )


@pytest.fixture(scope="session")
def data(config):
    return prepare(config)


@pytest.fixture
def private(config, tmp_path):
    """The same settings with a cache of the test's own."""
    return dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(data):
    return data.tokenizer


def index_of(*documents: list[int]) -> TokenIndex:
    """An index of whole documents, begin and end tokens given."""
    tokens = np.array([token for document in documents for token in document], np.uint16)
    return TokenIndex(tokens, np.cumsum([0, *map(len, documents)]))


def take(batches, count):
    """The first batches; the rest is closed."""
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_equal(left, right):
    for field, value in left._asdict().items():
        np.testing.assert_array_equal(value, getattr(right, field), err_msg=field)


def texts(index, tokenizer):
    ends = zip(index.offsets[:-1], index.offsets[1:], strict=True)
    return [tokenizer.decode(index.tokens[start:end].tolist()) for start, end in ends]


# Preparation


def test_every_document_is_in_one_of_the_two_indexes(data):
    training, validation = texts(data.training, data.tokenizer), texts(data.validation, data.tokenizer)
    assert sorted(training + validation) == sorted(DOCUMENTS)
    assert len(validation) == 4
    assert training == [document for document in DOCUMENTS if document not in validation]


def test_documents_stand_between_begin_and_end(data):
    assert data.training.tokens.dtype == np.uint16
    assert set(data.training.tokens[data.training.offsets[:-1]].tolist()) == {1}
    assert set(data.training.tokens[data.training.offsets[1:] - 1].tolist()) == {2}


def test_the_second_time_nothing_is_read_or_written(private):
    calls: list[tuple[str, int, int]] = []
    first = prepare(private, progress=lambda *call: calls.append(call))
    assert [stage for stage, _, _ in calls] == ["reading"] * 40 + ["tokenising"]
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert calls[-1] == ("tokenising", size, size)
    calls.clear()
    again = prepare(private, progress=lambda *call: calls.append(call))
    assert calls == []
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.training.tokens, first.training.tokens)


def test_the_index_depends_on_text_and_split_not_on_the_folder(data, config, private, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for number, document in enumerate(DOCUMENTS):
        (copy / f"{number:02}.py").write_text(document)
    there = dataclasses.replace(private, sources=(str(copy),))
    assert prepare(there).digest == data.digest
    assert prepare(dataclasses.replace(private, validation_fraction=0.2)).digest != data.digest
    (copy / "00.py").write_text("def other(x):\n    return x\n" * 10)
    assert prepare(there).digest != data.digest


def test_a_given_tokenizer_is_used(config, private, tmp_path):
    given = train_tokenizer(DOCUMENTS, 295, tmp_path / "given.model")
    prepared = prepare(dataclasses.replace(private, tokenizer=str(tmp_path / "given.model")))
    assert prepared.tokenizer.digest == given.digest


@pytest.mark.parametrize("damage", ["short tokens", "no offsets", "no description", "bad description"])
def test_a_damaged_index_is_built_again(private, damage):
    tokens = np.array(prepare(private).training.tokens)
    (folder,) = (Path(private.cache_dir) / "indexes").iterdir()
    if damage == "short tokens":
        (folder / "training.tokens").write_bytes(b"12")
    elif damage == "no offsets":
        (folder / "validation.offsets").unlink()
    elif damage == "no description":
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_text('{"format": 1}')
    assert not is_whole(folder)
    np.testing.assert_array_equal(prepare(private).training.tokens, tokens)


def test_a_damaged_index_is_refused_with_file_and_sizes(tokenizer, tmp_path):
    build_index(tmp_path / "index", [("training", "def f"), ("validation", "x")], tokenizer)
    path = tmp_path / "index" / "training.tokens"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=rf"training\.tokens': {size} bytes are wanted, the file has {size - 1}; delete"
    ):
        TokenIndex.open(tmp_path / "index", "training")
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"format": 99}))
    with pytest.raises(InputError, match="format 1 is wanted, got 99"):
        TokenIndex.open(tmp_path / "index", "validation")


def test_a_build_that_fails_leaves_nothing(tokenizer, tmp_path):
    def documents():
        yield "training", "some text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "index", documents(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_not_used(private):
    left = Path(private.cache_dir) / "indexes" / ".building-killed"
    left.mkdir(parents=True)
    (left / "training.tokens").write_bytes(b"torn")
    assert prepare(private).training.num_documents == 36


def test_two_builds_at_once_leave_one_whole_index(tokenizer, tmp_path):
    meet = threading.Barrier(2)

    def documents():
        yield "training", "some text"
        meet.wait(timeout=20)

    builds = [threading.Thread(target=build_index, args=(tmp_path / "i", documents(), tokenizer)) for _ in range(2)]
    for build in builds:
        build.start()
    for build in builds:
        build.join()
    assert [path.name for path in tmp_path.iterdir()] == ["i"]
    assert is_whole(tmp_path / "i")


def test_an_index_that_another_process_finished_first_is_kept(tokenizer, tmp_path):
    build_index(tmp_path / "i", [("training", "some text")], tokenizer)
    first = (tmp_path / "i").stat().st_ino
    build_index(tmp_path / "i", [("training", "some text")], tokenizer)
    assert (tmp_path / "i").stat().st_ino == first


# Refusals


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sources": ("nowhere.txt",)}, r"data\.sources = 'nowhere\.txt': no such file"),
        (
            {"batch_size": 1000},
            r"data\.batch_size = 1000: the training text fills \d+ rows of 16 tokens; .*at most \d+",
        ),
        ({"vocab_size": 9}, r"data\.vocab_size = 9: too small for this text; at least"),
        ({"tokenizer": "nowhere.model"}, r"data\.tokenizer = 'nowhere\.model': No such file"),
        (
            {"document_bytes": 1 << 20, "cache_dir": "/dev/null/cache"},
            r"data\.cache_dir = .*a writable folder is wanted",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_named(private, changes, problem):
    with pytest.raises(InputError, match=problem):
        prepare(dataclasses.replace(private, **changes))


def test_one_document_cannot_be_split(private, tmp_path):
    (tmp_path / "only.txt").write_text("one line\nand another\n" * 40)
    alone = dataclasses.replace(private, sources=(str(tmp_path / "only.txt"),))
    with pytest.raises(InputError, match=r"data\.validation_fraction = 0\.1: one document can't be split; give more"):
        prepare(alone)
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"data\.sources = .*no document holds text"):
        prepare(dataclasses.replace(private, sources=(str(tmp_path / "none.jsonl"),)))


def test_without_validation_there_are_no_validation_batches(private):
    prepared = prepare(dataclasses.replace(private, validation_fraction=0.0))
    assert prepared.training.num_documents == 40
    assert list(validation_batches(prepared.validation, private)) == []


def test_a_token_beyond_the_models_vocabulary_is_named_with_its_offset(config):
    with pytest.raises(
        InputError,
        match=r"training\.tokens = \d+: token \d+, in document \d+, must be below the model's vocab_size 270",
    ):
        prepare(config, vocab_size=270)
    index = index_of([1, 5, 2], [1, 300, 2])
    index.check_vocabulary(301)
    with pytest.raises(
        InputError, match="tokens = 300: token 4, in document 1, must be below the model's vocab_size 300"
    ):
        index.check_vocabulary(300)


def test_unknown_and_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="sequence_lenght"):
        DataConfig(sequence_lenght=4)
    with pytest.raises(ValidationError, match="validation_fraction"):
        DataConfig(validation_fraction=1.0)


# The index


def test_windows_know_where_documents_start():
    index = index_of([1, 5, 6, 2], [1, 7, 2])
    assert (index.num_tokens, index.num_documents, index.rows(2), index.rows(6), index.rows(7)) == (7, 2, 3, 1, 1)
    tokens, starts = index.window(3, 3)
    np.testing.assert_array_equal(tokens, [2, 1, 7])
    np.testing.assert_array_equal(starts, [1])
    tokens, starts = index.window(4, 9)
    np.testing.assert_array_equal(tokens, [1, 7, 2])
    np.testing.assert_array_equal(starts, [0])


def test_entropy_of_the_tokens_that_carry_loss():
    # Learnt are 5 5 2 and 6 2: two, two and one of five, the begin tokens not.
    index = index_of([1, 5, 5, 2], [1, 6, 2])
    expected = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert unigram_entropy(index, 10) == pytest.approx(expected, rel=1e-12)
    assert unigram_entropy(index_of(), 10) == 0.0


def test_entropy_counts_what_the_batches_weigh(data, config):
    learnt = [batch.targets[batch.loss_weight == 1] for batch in validation_batches(data.validation, config)]
    share = np.bincount(np.concatenate(learnt)) / sum(map(len, learnt))
    expected = -sum(p * math.log(p) for p in share if p)
    assert unigram_entropy(data.validation, 300) == pytest.approx(expected, rel=1e-9)


# The loader


def test_an_epoch_has_every_row_once_and_the_next_another_order(data, config):
    count = data.training.rows(16)
    batches = take(training_batches(data.training, config), 2 * count // 4)
    seen = [row.tobytes() for batch in batches for row in batch.tokens]
    rows = sorted(data.training.row(number, 16).tokens.tobytes() for number in range(count))
    assert sorted(seen[:count]) == rows
    assert seen[:count] != [data.training.row(number, 16).tokens.tobytes() for number in range(count)]
    assert seen[count:] != seen[:count][: len(seen) - count]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("first_step", [1, 5, 200])
def test_starting_later_gives_the_same_steps(data, config, first_step, prefetch):
    from_the_start = training_batches(data.training, dataclasses.replace(config, prefetch=0))
    expected = take(from_the_start, first_step + 3)[first_step:]
    resumed = take(training_batches(data.training, dataclasses.replace(config, prefetch=prefetch), first_step), 3)
    for left, right in zip(expected, resumed, strict=True):
        assert_equal(left, right)


def test_the_seed_decides_the_order(data, config):
    orders = {
        next(training_batches(data.training, dataclasses.replace(config, seed=seed, prefetch=0))).tokens.tobytes()
        for seed in range(5)
    }
    assert len(orders) == 5


def test_a_neighbouring_seed_does_not_share_epochs(data, config):
    # 4 rows a step: the second epoch of seed 0 would be the first of seed 1 if grain's seeds were used as they are.
    one_row = dataclasses.replace(config, batch_size=1, prefetch=0)
    epoch = data.training.rows(16)
    second = take(training_batches(data.training, one_row, first_step=epoch), 8)
    first = take(training_batches(data.training, dataclasses.replace(one_row, seed=1)), 8)
    assert [batch.tokens.tobytes() for batch in second] != [batch.tokens.tobytes() for batch in first]


def test_processes_together_load_the_global_batch(data, config):
    (whole,) = take(training_batches(data.training, config, 7), 1)
    shares = [take(training_batches(data.training, config, 7, rows), 1)[0] for rows in SHARES]
    assert shares[0].tokens.shape == (2, 16)
    assert_equal(whole, type(whole)(*map(np.concatenate, zip(*shares, strict=True))))


def test_a_process_reads_the_rows_of_its_devices():
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2), jax.devices())
    assert device_rows(NamedSharding(mesh, TRAINING.use(("batch", "length"))), (8, 16)) == list(range(8))
    of_columns = _Partly({0: (slice(None), slice(0, 8)), 1: (slice(4, 6), slice(8, 16)), 2: None})
    assert device_rows(of_columns, (8, 16)) == list(range(8))
    of_two_places = _Partly({0: (slice(6, 8), slice(None)), 1: (slice(0, 2), slice(None)), 2: (slice(0, 2), slice(8))})
    assert device_rows(of_two_places, (8, 16)) == [0, 1, 6, 7]


class _Partly:
    """A sharding of which this process has these devices, each with its part of the array."""

    def __init__(self, parts):
        self._parts = parts

    def addressable_devices_indices_map(self, shape):
        return self._parts


def test_too_little_text_is_refused_before_the_first_batch(config):
    with pytest.raises(InputError, match="the training text fills 1 rows of 16 tokens"):
        training_batches(index_of([1, 5, 2]), config)


def test_closing_ends_the_threads(data, config):
    batches = training_batches(data.training, config)
    next(batches)
    assert grain_threads()
    batches.close()
    deadline = time.monotonic() + 10
    while grain_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not grain_threads()


def grain_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]


def test_validation_has_each_row_once_in_order_and_padding_after(data, config):
    batches = list(validation_batches(data.validation, config))
    count = data.validation.rows(16)
    assert [batch.tokens.shape for batch in batches] == [(4, 16)] * math.ceil(count / 4)
    tokens = np.concatenate([batch.tokens for batch in batches])
    weights = np.concatenate([batch.loss_weight for batch in batches])
    np.testing.assert_array_equal(tokens[:count], [data.validation.row(number, 16).tokens for number in range(count)])
    assert count % 4
    assert not tokens[count:].any()
    assert not weights[count:].any()
    assert weights.sum() == data.validation.num_tokens - data.validation.num_documents


def test_processes_together_validate_on_the_same_rows(data, config):
    whole = list(validation_batches(data.validation, config))
    shares = [list(validation_batches(data.validation, config, rows)) for rows in SHARES]
    assert len(shares[0]) == len(shares[1]) == len(whole)
    np.testing.assert_array_equal(np.concatenate([shares[0][-1].tokens, shares[1][-1].tokens]), whole[-1].tokens)
