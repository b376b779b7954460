"""Configs check themselves, and loading names every key that a user got wrong."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import tiny
from pydantic import TypeAdapter

from mixtral_jax import config as c
from mixtral_jax.errors import InputError

MISTRAL = c.to_table(tiny.config("mistral"))
MIXTRAL = c.to_table(tiny.config("mixtral"))


def _refused(*parts):
    return pytest.raises(InputError, match="(?s)" + ".*".join(map(re.escape, parts)))


def test_configs_are_frozen_and_hashable():
    config = tiny.config("mixtral")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3
    assert hash(config) == hash(tiny.config("mixtral"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_table_goes_there_and_back(family):
    config = tiny.config(family)
    assert c.build(c.ModelConfig, c.to_table(config)) == config


def test_table_leaves_none_out():
    assert "sliding_window" not in c.to_table(tiny.config("mistral", sliding_window=None))
    assert "moe" not in MISTRAL
    assert MIXTRAL["moe"] == {"num_experts": 4, "experts_per_token": 2, "selection_bias": False}


def test_defaults():
    config = c.build(c.ModelConfig, {k: v for k, v in MISTRAL.items() if k != "sliding_window"})
    assert (config.sliding_window, config.moe, config.tie_embeddings) == (None, None, False)
    assert (config.rope_theta, config.norm_eps, config.max_position) == (1e4, 1e-5, 32768)
    assert c.Dispatch().capacity_factor is None


def test_a_whole_number_does_for_a_float():
    assert c.build(c.ModelConfig, MISTRAL | {"rope_theta": 1000000}).rope_theta == 1e6


def test_queries_per_kv_head():
    assert tiny.config("mistral", num_heads=12, num_kv_heads=3).queries_per_kv_head == 4


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"dmi": 3}, ("dmi = 3: unknown key; did you mean 'dim'? known: dim, head_dim, hidden_dim,",)),
        ({"zzzz": 3}, ("zzzz = 3: unknown key; known: dim,",)),
        (
            {"moe": {"num_expert": 4, "experts_per_token": 2}},
            ("moe.num_expert = 4: unknown key; did you mean 'num_experts'? known: experts_per_token, num_experts",),
        ),
        ({"dim": "16"}, ("dim = '16': ", "valid integer")),
        ({"dim": 16.5}, ("dim = 16.5: ", "valid integer")),
        ({"dim": True}, ("dim = True: ", "valid integer")),
        ({"tie_embeddings": 1}, ("tie_embeddings = 1: ", "valid boolean")),
        ({"rope_theta": "1e6"}, ("rope_theta = '1e6': ", "valid number")),
        ({"moe": 3}, ("moe = 3: ",)),
        ({"num_layers": 0}, ("num_layers = 0: a number above zero",)),
        ({"sliding_window": 0}, ("sliding_window = 0: a number above zero",)),
        ({"vocab_size": -1}, ("vocab_size = -1: a number above zero",)),
        ({"norm_eps": float("inf")}, ("norm_eps = inf: a number above zero",)),
        ({"norm_eps": float("nan")}, ("norm_eps = nan: a number above zero",)),
        ({"num_heads": 4, "num_kv_heads": 3}, ("num_kv_heads = 3: must divide num_heads = 4",)),
        ({"head_dim": 7}, ("head_dim = 7: must be even",)),
        ({"moe": {"num_experts": 4, "experts_per_token": 5}}, ("moe.experts_per_token = 5: at most num_experts = 4",)),
        ({"moe": {"num_experts": 0, "experts_per_token": 0}}, ("moe.num_experts = 0: a number above zero",)),
        ({"moe": {"num_experts": 4, "experts_per_token": 0}}, ("moe.experts_per_token = 0: a number above zero",)),
    ],
)
def test_refuses(change, parts):
    with _refused(*parts):
        c.build(c.ModelConfig, MISTRAL | change)


@pytest.mark.parametrize("key", ["dim", "num_layers", "vocab_size"])
def test_refuses_a_missing_key(key):
    with _refused(f"{key}: is missing and has no default"):
        c.build(c.ModelConfig, {k: v for k, v in MISTRAL.items() if k != key})


def test_names_all_problems_in_one_message_and_missing_keys_last():
    with _refused("head_dim = 'x'", "dmi = 16: unknown key", "dim: is missing"):
        c.build(c.ModelConfig, {k: v for k, v in MISTRAL.items() if k != "dim"} | {"dmi": 16, "head_dim": "x"})


def test_a_prefix_goes_before_the_key():
    with _refused("model.moe.num_experts = 0: "):
        c.build(c.ModelConfig, MISTRAL | {"moe": {"num_experts": 0, "experts_per_token": 1}}, prefix="model")


@pytest.mark.parametrize(
    ("cls", "table", "parts"),
    [
        (c.Dispatch, {"capacity_factor": 0}, ("capacity_factor = 0.0: a number above zero",)),
        (c.Dispatch, {"group_size": -3}, ("group_size = -3: a number above zero",)),
        (c.Dispatch, {"priority": "first"}, ("priority = 'first': ", "'position', 'choice' or 'probability'")),
        (c.Execution, {"activation_dtype": "float16"}, ("activation_dtype = 'float16': ", "'float32' or 'bfloat16'")),
        (c.Execution, {"attention_chunk": 0}, ("attention_chunk = 0: a number above zero",)),
        (c.Execution, {"remat": True}, ("remat = True: ", "'none'", "'full'")),
    ],
)
def test_refuses_a_run(cls, table, parts):
    with _refused(*parts):
        c.build(cls, table)


def test_constructing_in_python_checks_too():
    with pytest.raises(ValueError, match=r"capacity_factor = -1\.0"):
        c.Dispatch(capacity_factor=-1.0)


def test_reads_toml(tmp_path):
    file = tmp_path / "model.toml"
    file.write_text("dim = 3\n[moe]\nnum_experts = 8\n")
    assert c.read_toml(file) == {"dim": 3, "moe": {"num_experts": 8}}


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"dim = ", ("not valid TOML", "at end of document")), (b"dim = 1\n# \xff", ("not UTF-8 at byte 10",))],
)
def test_refuses_a_file(tmp_path, content, parts):
    file = tmp_path / "model.toml"
    file.write_bytes(content)
    with _refused("model.toml", *parts):
        c.read_toml(file)


def test_refuses_a_date(tmp_path):
    file = tmp_path / "model.toml"
    file.write_text("dim = 2024-01-01\n")
    with _refused("dim = '2024-01-01': ", "valid integer"):
        c.model_config(file)


def test_refuses_a_missing_file():
    with _refused("config = 'models/mixtral-8x7c': no such file; did you mean 'models/mixtral-8x7b'? shipped: models/"):
        c.read_toml("models/mixtral-8x7c")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model.dim=8", {"model": {"dim": 8}}),
        (" model.dim = 8 ", {"model": {"dim": 8}}),
        ("model.moe.num_experts=2", {"model": {"dim": 4, "moe": {"num_experts": 2}}}),
        ("train.data=[1, 2]", {"model": {"dim": 4}, "train": {"data": [1, 2]}}),
        ("train.path=runs/a=b", {"model": {"dim": 4}, "train": {"path": "runs/a=b"}}),
        ("train.lr=3e-4", {"model": {"dim": 4}, "train": {"lr": 3e-4}}),
        ("train.on=true", {"model": {"dim": 4}, "train": {"on": True}}),
        ("model.dim=none", {"model": {}}),
        ("train.x=none", {"model": {"dim": 4}, "train": {}}),
    ],
)
def test_override(setting, value):
    table = {"model": {"dim": 4}}
    assert c.override(table, [setting]) == value
    assert table == {"model": {"dim": 4}}


def test_the_last_override_counts():
    assert c.override({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("dim", ("--set = 'dim': written as key=value",)),
        ("=3", ("--set = '=3': written as key=value",)),
        ("dim.x=3", ("--set = 'dim.x=3': dim holds a value, not a section",)),
    ],
)
def test_refuses_an_override(setting, parts):
    with _refused(*parts):
        c.override({"dim": 4}, [setting])


@given(
    st.dictionaries(st.text("abcdim_", min_size=1, max_size=8), st.integers() | st.text() | st.booleans() | st.none())
)
def test_any_table_is_built_or_refused(table):
    known = TypeAdapter(c.Dispatch).json_schema()["properties"]
    try:
        c.build(c.Dispatch, table)
    except InputError:
        assert table
    else:
        assert set(table) <= set(known)
