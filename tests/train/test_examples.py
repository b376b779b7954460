"""From JSON lines to rows: what is learnt of a conversation, and what is wrong with a line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.errors import InputError
from mixtral_jax.text.training import train_tokenizer
from mixtral_jax.train import config as configs
from mixtral_jax.train.answers import AnswerIndex, PairIndex, pack, prepare_pairs, prepare_supervised
from mixtral_jax.train.batches import training_batches, validation_batches
from mixtral_jax.train.data import DataConfig
from mixtral_jax.train.examples import Example, Pair, fill_row, preferred, supervised
from mixtral_jax.train.objective import DpoConfig, SftConfig

ROOT = Path(__file__).parent.parent.parent
TEXTS = [f"what is {n} plus {n}? it is {n + n}." for n in range(60)]
CHAT = [
    {"role": "user", "content": "what is 1 plus 1?"},
    {"role": "assistant", "content": "it is 2."},
    {"role": "user", "content": "and 2 plus 2?"},
    {"role": "assistant", "content": "it is 4."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter(TEXTS), 290, tmp_path_factory.mktemp("tokenizer") / "toy.model")


def example(*ids, learnt):
    return Example(np.array(ids, np.int32), np.array([each in learnt for each in ids]))


def learnt_text(found, tokenizer):
    """The learnt runs' texts, and the ids that end them."""
    edges = np.flatnonzero(np.diff([0, *found.answers.astype(int), 0]))
    runs = [found.ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]
    return [(tokenizer.decode(run).strip(), run[-1]) for run in runs]


def test_the_answers_of_a_conversation_are_learnt_with_their_ends(tokenizer):
    found = supervised({"messages": CHAT}, tokenizer, "v1", "all")
    eos = tokenizer.eos_id
    assert learnt_text(found, tokenizer) == [("it is 2.", eos), ("it is 4.", eos)]
    assert learnt_text(supervised({"messages": CHAT}, tokenizer, "v1", "last"), tokenizer) == [("it is 4.", eos)]


def test_a_completion_is_learnt_with_its_end(tokenizer):
    found = supervised({"prompt": "what is 3 plus 3? ", "completion": "it is 6."}, tokenizer, None, "all")
    assert found.ids.tolist() == tokenizer.encode("what is 3 plus 3? it is 6.", bos=True, eos=True)
    ((text, end),) = learnt_text(found, tokenizer)
    assert (text, end) == ("it is 6.", tokenizer.eos_id)


def test_a_pair_shares_its_prompt(tokenizer):
    line = {"prompt": CHAT[:1], "chosen": "it is 2.", "rejected": [{"role": "assistant", "content": "it is 3."}]}
    chosen, rejected = preferred(line, tokenizer, "v1")
    first = int(np.argmax(chosen.answers))
    assert chosen.ids[:first].tolist() == rejected.ids[:first].tolist()
    assert [learnt_text(each, tokenizer)[0][0] for each in (chosen, rejected)] == ["it is 2.", "it is 3."]
    messages = {("messages" if key == "prompt" else key): value for key, value in line.items()}
    np.testing.assert_array_equal(preferred(messages, tokenizer, "v1").chosen.ids, chosen.ids)


def test_a_row_of_two_examples():
    row = fill_row([example(1, 5, 6, 2, learnt={6, 2}), example(1, 7, 2, learnt={7, 2})], 8)
    np.testing.assert_array_equal(row.tokens, [1, 5, 6, 1, 7, 0, 0, 0])
    np.testing.assert_array_equal(row.targets, [5, 6, 2, 7, 2, 0, 0, 0])
    np.testing.assert_array_equal(row.segment, [1, 1, 1, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row.position, [0, 1, 2, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(row.loss_weight, [0, 1, 1, 1, 1, 0, 0, 0])


@given(st.lists(st.integers(1, 9), max_size=30))
def test_packing_places_each_once_where_it_fits(lengths):
    bins = pack(lengths, 9)
    assert sorted(place for each in bins for place in each) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in each) for each in bins]
    assert all(size <= 9 for size in sizes)
    assert sum(size <= 4 for size in sizes) <= 1  # two that are half empty would have been one


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_rows_of_a_pair_come_into_one_micro_batch(accumulation):
    pairs = [Pair(example(1, 10 + n, 2, learnt={2}), example(1, 30 + n, 2, learnt={2})) for n in range(9)]
    index = PairIndex(pairs)
    index.reference = np.arange(18, dtype=np.float32)
    config = DataConfig(sequence_length=4, batch_size=8, prefetch=0)
    batches = training_batches(index, config)
    for batch in (next(batches), next(batches)):
        for first in range(accumulation):
            chosen, rejected = np.split(batch.tokens[first::accumulation, 1], 2)
            np.testing.assert_array_equal(chosen + 20, rejected)
        np.testing.assert_array_equal(batch.reference[:4, 0] + 1, batch.reference[4:, 0])
        np.testing.assert_array_equal(batch.reference[:4, 0], 2 * (batch.tokens[:4, 1] - 10))
    batches.close()
    every = list(validation_batches(index, config))
    tokens = np.concatenate([batch.tokens[:4, 1] for batch in every])
    np.testing.assert_array_equal(tokens, [*range(10, 19), 0, 0, 0])


def test_unpacked_examples_have_a_row_each():
    examples = [example(1, 5, 2, learnt={2})] * 3
    assert AnswerIndex(examples, 8, packing=False).rows(8) == 3
    assert AnswerIndex(examples, 8, packing=True).rows(8) == 1


GOOD = {"messages": CHAT}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        ("sft", "{", "line 2 is not JSON"),
        ("sft", "[1]", "line 2 is list"),
        ("sft", json.dumps({"message": CHAT}), "line 2: message = .*did you mean 'messages'"),
        ("sft", json.dumps({"text": "x"}), "line 2: keys = .*either messages, or prompt and completion"),
        ("sft", json.dumps({"messages": CHAT[:1]}), "line 2: messages"),
        ("sft", json.dumps({"messages": [{"role": "bot", "content": "x"}]}), r"line 2: messages\[0\].role = 'bot'"),
        ("sft", json.dumps({"prompt": "x"}), "line 2: completion"),
        ("sft", json.dumps({"prompt": "x", "completion": ""}), "line 2: completion = ''"),
        ("sft", json.dumps({"prompt": "x", "completion": "y" * 200}), "line 2 has .* a row 64.*too_long"),
        ("dpo", json.dumps({"prompt": "x", "chosen": "y"}), "line 2: rejected"),
        ("dpo", json.dumps({**PAIR, "chosen": 3}), "line 2: chosen = 3"),
        ("dpo", json.dumps({**PAIR, "prompt": CHAT[:2]}), "line 2: prompt = .*whose turn"),
    ],
)
def test_a_bad_line_is_named(kind, line, said, tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(GOOD if kind == "sft" else PAIR) + "\n" + line + "\n")
    config = DataConfig(sources=(str(file),), sequence_length=64, batch_size=2)
    read = prepare_supervised if kind == "sft" else prepare_pairs
    settings = SftConfig(kind="sft", format="v1") if kind == "sft" else DpoConfig(kind="dpo", format="v1")
    with pytest.raises(InputError, match=f"(?s)data.sources = .*data.jsonl.*{said}"):
        read(config, tokenizer, settings, 300)


@pytest.mark.parametrize(("name", "examples"), [("toy-sft", 48), ("toy-dpo", 40)])
def test_the_toy_recipes_have_data(name, examples, tokenizer, monkeypatch):
    """Of which each line is read, by a tokenizer whose pieces are shorter than theirs, and none is too long."""
    monkeypatch.chdir(ROOT)
    config = configs.load(f"runs/{name}")
    longer = dataclasses.replace(config.data, sequence_length=256)
    read = prepare_supervised if name == "toy-sft" else prepare_pairs
    data = read(longer, tokenizer, config.objective, config.model.vocab_size)
    assert data.training.num_documents == examples
    lines = [json.loads(line) for line in (ROOT / config.data.sources[0]).read_text().splitlines()]
    assert len({json.dumps(line) for line in lines}) == len(lines) == examples


def test_what_is_too_long_is_cut_or_left_out(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"prompt": "what is ", "completion": f"{n} plus " * 30} for n in range(2)]
    lines += [{"prompt": "what is ", "completion": f"{n} plus {n}"} for n in range(4)]
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    config = DataConfig(sources=(str(file),), sequence_length=24, batch_size=1, validation_fraction=0.0)
    counts = {}
    for choice in ("cut", "skip"):
        data = prepare_supervised(config, tokenizer, SftConfig(kind="sft", too_long=choice), 300)
        counts[choice] = data.training.num_documents
    assert counts == {"cut": 6, "skip": 4}


def test_an_example_is_kept_apart_by_its_content(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [json.dumps({"prompt": "what is ", "completion": f"{n} plus {n}"}) for n in range(20)]

    def apart(lines):
        file.write_text("\n".join(lines))
        config = DataConfig(sources=(str(file),), sequence_length=24, batch_size=1, validation_fraction=0.2)
        data = prepare_supervised(config, tokenizer, SftConfig(kind="sft", packing=False), 300)
        assert (data.training.num_documents, data.validation.num_documents) == (16, 4)
        return {data.validation.row(n, 24).tokens.tobytes() for n in range(4)}

    assert apart(lines) == apart(lines[::-1])
