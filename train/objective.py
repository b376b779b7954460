"""What a run learns by: the section `[objective]`, its data, and its loss."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mixtral_jax.config import STRICT, require, require_positive
from mixtral_jax.model.transformer import Transformer
from mixtral_jax.text.chat import ChatFormat
from mixtral_jax.train.dpo import preference, preference_terms
from mixtral_jax.train.losses import LossConfig
from mixtral_jax.train.step import Objective, pretraining

TooLong = Literal["refuse", "cut", "skip"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig:
    """Every token of the text is learnt."""

    kind: Literal["pretrain"] = "pretrain"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig:
    """Supervised fine-tuning: the assistant's answers are learnt, the end of each among them."""

    kind: Literal["sft"]
    format: ChatFormat | None = None
    """How conversations are written; unset: as the tokenizer's model wants them."""
    answers: Literal["all", "last"] = "all"
    """Which of a conversation's answers are learnt."""
    packing: bool = True
    """Whether examples share rows; they never see each other."""
    too_long: TooLong = "refuse"
    """What happens to an example that does not fit a row."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DpoConfig:
    """Direct preference optimisation (Rafailov et al., 2023); a pair is two rows of a batch."""

    kind: Literal["dpo"]
    format: ChatFormat | None = None
    too_long: TooLong = "refuse"
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """`ipo` (Azar et al., 2023) takes log-probabilities a token."""
    beta: float = 0.1
    label_smoothing: float = 0.0
    """The share of pairs that are the wrong way round (Mitchell, 2023); sigmoid only."""
    sft: float = 0.0
    """Coefficient of the chosen answers' nats a token."""

    @model_validator(mode="after")
    def check(self) -> DpoConfig:
        require_positive(self, ("beta",))
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "label_smoothing", smoothing, "zero or more and below 0.5")
        require(not smoothing or self.loss == "sigmoid", "label_smoothing", smoothing, "0, but for the sigmoid loss")
        require(self.sft >= 0, "sft", self.sft, "zero or more")
        return self


ObjectiveConfig = Annotated[PretrainConfig | SftConfig | DpoConfig, Field(discriminator="kind")]


def make_objective(config: PretrainConfig | SftConfig | DpoConfig, model: Transformer, losses: LossConfig) -> Objective:
    """The objective of a config. Answers alone carry loss weight in SFT's batches: its loss is that of pretraining."""
    if not isinstance(config, DpoConfig):
        return pretraining(model, losses)
    terms = partial(
        preference_terms, kind=config.loss, beta=config.beta, smoothing=config.label_smoothing, sft=config.sft
    )
    return preference(model, losses, terms)
