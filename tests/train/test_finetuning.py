"""Whole runs of fine-tuning: the same numbers as TRL's, a resume that changes nothing, and beginning from an upcycled
model."""

import json
import math
import signal

import numpy as np
import pytest
from toy_run import train

from mixtral_jax.checkpoints.convert import convert
from mixtral_jax.checkpoints.opening import open_source
from mixtral_jax.checkpoints.upcycle import Upcycled
from mixtral_jax.train import config as configs
from mixtral_jax.train import loop
from mixtral_jax.train.batches import training_batches
from mixtral_jax.train.dpo import Answers, preference_terms
from mixtral_jax.train.metrics import METRICS, read
from mixtral_jax.train.setting import Setting

STEPS = 10
OBJECTIVES = {"sft": "packing = false", "sigmoid": "beta = 0.3", "ipo": 'beta = 0.3\nloss = "ipo"'}


@pytest.fixture(scope="module")
def runs(tuning_config, tmp_path_factory):
    """The metrics of a run of each kind on the toy Mistral, its config and its folder."""
    found = {}
    for name, objective in OBJECTIVES.items():
        kind = "sft" if name == "sft" else "dpo"
        file, folder = tuning_config(kind, "mistral", objective), tmp_path_factory.mktemp(name) / "run"
        train(file, folder)
        found[name] = read(folder / METRICS), file, folder
    return found


def lines_in_order(file, kind, toy_data):
    """The lines of the data as the run takes them, one after another."""
    config = configs.load(file)
    index = Setting(config).prepare().training
    length, sides = config.data.sequence_length, index.sides
    lines = [json.loads(line) for line in toy_data[kind].read_text().splitlines()]
    number = {index.row(sides * n, length).tokens.tobytes(): n for n in range(index.rows(length) // sides)}
    assert len(number) == len(lines)
    batches = training_batches(index, config.data)
    rows = [row for _ in range(STEPS) for row in next(batches).tokens[: config.data.batch_size // sides]]
    batches.close()
    return [lines[number[row.tobytes()]] for row in rows]


def trl_settings(folder, rows, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": rows,
        "max_steps": STEPS,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "max_length": 64,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **more,
    }


def trl_history(trainer_class, settings, base, lines):
    """What TRL logs of each step, the data taken in the order given."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class InOrder(trainer_class):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.unk_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    trainer = InOrder(model=model, args=settings, train_dataset=Dataset.from_list(lines), processing_class=tokenizer)
    trainer.train()
    return [each for each in trainer.state.log_history if "loss" in each]


@pytest.mark.filterwarnings("ignore")
def test_sft_is_trls(runs, bases, toy_data, tmp_path):
    from trl import SFTConfig, SFTTrainer

    metrics, file, _ = runs["sft"]
    settings = SFTConfig(**trl_settings(tmp_path, 8, completion_only_loss=True, packing=False))
    theirs = trl_history(SFTTrainer, settings, bases["mistral"], lines_in_order(file, "sft", toy_data))
    assert len(theirs) == STEPS
    np.testing.assert_allclose([m["loss"] for m in metrics], [t["loss"] for t in theirs], rtol=1e-4)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo_is_trls(loss, runs, bases, toy_data, tmp_path):
    from trl import DPOConfig, DPOTrainer

    metrics, file, _ = runs[loss]
    settings = DPOConfig(**trl_settings(tmp_path, 4, beta=0.3, loss_type=loss))
    theirs = trl_history(DPOTrainer, settings, bases["mistral"], lines_in_order(file, "dpo", toy_data))
    assert len(theirs) == STEPS
    for mine, their in (
        ("loss", "loss"),
        ("reward_chosen", "rewards/chosen"),
        ("reward_rejected", "rewards/rejected"),
        ("reward_margin", "rewards/margins"),
    ):
        np.testing.assert_allclose([m[mine] for m in metrics], [t[their] for t in theirs], atol=1e-4, err_msg=mine)
    # Before the first update the model is its own reference, and the sign of a margin is that of a rounding error.
    accuracies = zip(metrics[1:], theirs[1:], strict=True)
    assert all(mine["reward_accuracy"] == their["rewards/accuracies"] for mine, their in accuracies)
    assert metrics[-1]["reward_margin"] > 0.05


@pytest.mark.parametrize("kind", ["sft", "sigmoid"])
def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(kind, runs, tmp_path, monkeypatch):
    metrics, file, _ = runs[kind]
    record = loop.Run._record

    def interrupted(self, step, values):
        record(self, step, values)
        if step == 4:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop.Run, "_record", interrupted)
    ending, _ = train(file, tmp_path / "run")
    monkeypatch.undo()
    assert 4 < ending.step < STEPS
    train(file, tmp_path / "run")
    again = read(tmp_path / "run" / METRICS)
    assert [m["loss"] for m in again] == [m["loss"] for m in metrics]


def test_smoothing_and_the_chosen_answers_nats_by_hand():
    """beta 0.5 and a gain of 3 - 1 = 2: the margin is 1, and log sigmoid of it log(1 / (1 + 1 / e)). Smoothed by 0.2, a
    fifth of the loss is that of the margin -1; sft 0.1 adds a tenth of 6 nats over 4 tokens."""
    answers = Answers(*np.float32([[-6], [-9], [-9], [-10], [4], [2]]))
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    plain = preference_terms(answers, beta=0.5)
    np.testing.assert_allclose(plain.loss, [right], rtol=1e-6)
    np.testing.assert_allclose((plain.reward_chosen, plain.reward_rejected), ([1.5], [0.5]), rtol=1e-6)
    smoothed = preference_terms(answers, beta=0.5, smoothing=0.2)
    np.testing.assert_allclose(smoothed.loss, [0.8 * right + 0.2 * wrong], rtol=1e-6)
    more = preference_terms(answers, beta=0.5, sft=0.1)
    np.testing.assert_allclose(more.loss, [right + 0.1 * 6 / 4], rtol=1e-6)


@pytest.mark.parametrize("factor", ["none", "2.0"], ids=["dropless", "ample"])
def test_an_upcycled_model_begins_at_the_dense_models_loss(factor, runs, bases, tmp_path):
    """Four experts, two a token: at twice the balanced share, each has room for every token."""
    metrics, file, _ = runs["sft"]
    convert(Upcycled(open_source(bases["mistral"]), 4, 2), tmp_path / "mixture", "native")
    train(file, tmp_path / "run", steps=1, init_from=tmp_path / "mixture", **{"dispatch.capacity_factor": factor})
    (first,) = read(tmp_path / "run" / METRICS)
    assert first["dropped_fraction"] == 0
    np.testing.assert_allclose(first["loss"], metrics[0]["loss"], rtol=1e-5)
