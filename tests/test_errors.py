"""The user's error and the did-you-mean."""

import pytest

from mixtral_jax.errors import InputError, nearest


def test_names_key_value_and_what_is_allowed():
    error = InputError("model.dim", "4k", "a whole number")
    assert str(error) == "model.dim = '4k': a whole number"
    assert (error.key, error.value, error.allowed) == ("model.dim", "4k", "a whole number")


def test_is_a_value_error():
    with pytest.raises(ValueError, match=r"dim = 0: above zero"):
        raise InputError("dim", 0, "above zero")


@pytest.mark.parametrize(
    ("name", "phrase"), [("dmi", "did you mean 'dim'? "), ("hiden_dim", "did you mean 'hidden_dim'? "), ("x", "")]
)
def test_nearest(name, phrase):
    assert nearest(name, ["dim", "hidden_dim"]) == phrase
