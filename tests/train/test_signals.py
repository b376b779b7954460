"""Signals."""

import signal

import pytest

from mixtral_jax.train.signals import Signals


def test_the_first_is_noted_and_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
