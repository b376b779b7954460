"""What a run says on the terminal."""

from __future__ import annotations

import time
from typing import Any

import jax
from rich.console import Console

from mixtral_jax.sharding.axes import MESH_AXES
from mixtral_jax.sharding.mesh import MeshConfig
from mixtral_jax.train.config import TrainConfig
from mixtral_jax.train.data import PreparedData
from mixtral_jax.train.mixture import Mixture, quotas
from mixtral_jax.train.validation import Validation


class Progress:
    """Prints lines; only on the first of several processes."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(quiet=jax.process_index() > 0, highlight=False, soft_wrap=True)
        self._told = 0.0

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False)

    def start(self, config: TrainConfig, mesh: MeshConfig, parameters: tuple[int, int]) -> None:
        """What is about to be trained, on what."""
        devices = jax.devices()
        axes = " x ".join(f"{axis} {mesh.size(axis)}" for axis in MESH_AXES if mesh.size(axis) > 1)
        self.say(f"devices: {len(devices)} {devices[0].device_kind} ({devices[0].platform})" + (axes and f", {axes}"))
        total, active = parameters
        self.say(f"model: {total:,} parameters, {active:,} active a token")

    def reading(self, stage: str, done: int, total: int) -> None:
        """How far reading and tokenising the text is."""
        if time.monotonic() - self._told > 5:
            self._told = time.monotonic()
            of = f" of {total / 1e6:.0f}" if total else ""
            self.say(f"{stage}: {done / 1e6:.0f}{of} MB")

    def data(self, data: PreparedData, config: TrainConfig) -> None:
        """What it is trained on."""
        a_step = config.data.batch_size * config.data.sequence_length
        training, validation = data.training, data.validation
        self.say(
            f"data: {training.num_documents:,} documents, {training.num_tokens:,} tokens;"
            f" {validation.num_documents:,} and {validation.num_tokens:,} held out;"
            f" {config.steps * a_step / training.num_tokens:.2f} epochs"
        )
        if isinstance(training, Mixture):
            quota_K = quotas(training.weights)
            for source, part, quota in zip(config.data.sources, training.parts, quota_K, strict=True):
                share = quota / sum(quota_K)
                epochs = config.steps * config.data.batch_size * share / part.rows(config.data.sequence_length)
                self.say(f"  {source}: {share:.2%} of rows, {part.num_tokens:,} tokens, {epochs:.2f} epochs")

    def step(self, values: dict[str, Any], config: TrainConfig) -> None:
        """A step's numbers, every log_every steps."""
        done = values["step"] + 1
        if done % config.log_every and done != config.steps:
            return
        parts = [f"step {done}/{config.steps}", f"loss {_number(values['loss'], '.3f')}"]
        if "expert_load_max" in values:
            parts += [f"balance {_number(values['balance_loss'], '.2f')}", f"load max {values['expert_load_max']:.2f}"]
            parts += [f"dropped {values['dropped_fraction']:.1%}"]
        if "reward_margin" in values:
            parts += [f"margin {_number(values['reward_margin'], '.3f')}", f"accuracy {values['reward_accuracy']:.0%}"]
        parts += [f"grad {_number(values['grad_norm'], '.2f')}", f"lr {values['learning_rate']:.1e}"]
        rate = values["tokens_per_second"]
        if rate:
            left = (config.steps - done) * config.data.batch_size * config.data.sequence_length / rate
            parts += [f"{rate:,.0f} tokens/s", f"{int(left) // 60}:{int(left) % 60:02d} left"]
        if values.get("mfu") is not None:
            parts += [f"MFU {values['mfu']:.1%}"]
        self.say("  ".join(parts))

    def validation(self, found: Validation, entropy: float | None) -> None:
        """The loss on held-out data, beside a text's unigram entropy, and the load of the experts there."""
        line = f"validation loss {found.loss:.3f}"
        if entropy is not None:
            line += f" nats, {entropy - found.loss:.2f} under the unigram entropy"
            line += f" of the same {found.tokens:,} tokens ({entropy:.3f})"
        if found.load_LE is not None:
            line += "; expert load max/mean by layer " + " ".join(f"{load:.2f}" for load in found.load_LE.max(axis=1))
        self.say(line)


def _number(value: float | None, form: str) -> str:
    """A number; what is not finite is None in a run's files."""
    return "nan" if value is None else format(value, form)
