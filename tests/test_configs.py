"""Every shipped config loads, and the published models have their published sizes."""

import pytest

from mixtral_jax import configs
from mixtral_jax.config import ModelConfig, build, model_config, read_toml
from mixtral_jax.errors import InputError
from mixtral_jax.model.transformer import count_parameters

PUBLISHED = {
    "mistral-7b-v0.1": (7_241_732_096, 7_241_732_096, 4096, 1e4),
    "mistral-7b-v0.2": (7_241_732_096, 7_241_732_096, None, 1e6),
    "mistral-7b-v0.3": (7_248_023_552, 7_248_023_552, None, 1e6),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, None, 1e6),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, None, 1e6),
    "mixtral-8x22b-v0.3": (140_630_071_296, 39_161_468_928, None, 1e6),
}


def test_each_published_model_is_shipped():
    assert set(PUBLISHED) <= set(configs.names("models"))


@pytest.mark.parametrize("name", configs.names("models"))
def test_loads(name):
    config = model_config(name)
    assert config == build(ModelConfig, read_toml(f"models/{name}"))
    assert config == model_config(configs.find(f"models/{name}"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    total, active, window, theta = PUBLISHED[name]
    config = model_config(name)
    assert count_parameters(config) == (total, active)
    assert (config.sliding_window, config.rope_theta) == (window, theta)


@pytest.mark.parametrize("name", PUBLISHED)
def test_kv_bytes_a_token(name):
    config = model_config(name)
    elements = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert 2 * elements == (229_376 if "8x22b" in name else 131_072)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_names_its_size(name):
    total, active, *_ = PUBLISHED[name]
    head = configs.find(f"models/{name}").read_text().splitlines()[0]
    assert f"{total:,} parameters" in head
    assert total == active or f"{active:,} active" in head


def test_find_prefers_the_users_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "mixtral-8x7b"
    file.write_text("dim = 1")
    assert configs.find("models/mixtral-8x7b").read_text() == "dim = 1"


@pytest.mark.parametrize("name", ["models/nothing", "../pyproject", "models", ""])
def test_find_refuses(name):
    with pytest.raises(InputError, match=r"config = .*: no such file; .*shipped: .*models/mixtral-8x7b"):
        configs.find(name)
