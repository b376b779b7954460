"""JSON beside weights."""

import pytest

from mixtral_jax.checkpoints.config_files import build_config, read_json, take
from mixtral_jax.errors import InputError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "not JSON: 'a' stands twice"),
        (b'{"a": {"x": 1, "x": 1}}', "not JSON: 'x' stands twice"),
        (b"[1]", "a JSON object is wanted"),
        (b"{", "not JSON: "),
        (b'{"a": "\xff"}', "not JSON: .*utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: .*digits"),
        (b"[" * 100_000, "not JSON: "),
    ],
)
def test_refuses(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_json(tmp_path / "none.json")


def test_a_value_that_is_missing_and_one_that_is_like_it():
    with pytest.raises(InputError, match=r"params\.json: n_layers: is missing; did you mean 'n_layer'"):
        take({"n_layer": 3}, "n_layers", "params.json")


def test_messages_speak_of_the_files_own_keys():
    values = {"dim": 8, "num_layers": -1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "hidden_dim": 8}
    with pytest.raises(InputError, match=r"params\.json: n_layers = -1: a number above zero"):
        build_config({**values, "vocab_size": 9}, {"num_layers": "n_layers"}, "params.json")
