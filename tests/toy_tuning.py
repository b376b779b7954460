"""Fine-tuning small enough for a test: a toy model's folder as Hugging Face has it, and data for it."""

import json
from pathlib import Path

import pytest
from oracles import tiny

from mixtral_jax.text.training import train_tokenizer

SUMS = [(f"what is {a} plus {b}?", f"it is {a + b}.", f"no, {a}.") for a in range(10) for b in range(6)]
CONFIG = """
init_from = {base}
steps = 10
save_every = 4
log_every = 1

[objective]
kind = "{kind}"
{objective}

[data]
sources = [{data}]
sequence_length = 48
batch_size = 8
validation_fraction = 0.0

[optimizer]
learning_rate = 2e-3
schedule = "constant"
weight_decay = 0.0

[mesh]
data = 2
fsdp = 4
"""


def model_config(family, **changes):
    return tiny.config(family, vocab_size=300, max_position=64, num_heads=4, **changes)


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory):
    texts = [part for each in SUMS for part in each]
    return train_tokenizer(iter(texts), 290, tmp_path_factory.mktemp("tokenizer") / "toy.model")


@pytest.fixture(scope="session")
def bases(toy_tokenizer, tmp_path_factory):
    """For each family a folder with weights by transformers and the tokenizer."""
    from oracles.huggingface import to_huggingface

    folders = {}
    for family in tiny.FAMILIES:
        config = model_config(family)
        folder = tmp_path_factory.mktemp(family)
        to_huggingface(config, tiny.params(config)).save_pretrained(folder)
        toy_tokenizer.save_into(folder, "huggingface")
        folders[family] = folder
    return folders


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> dict[str, Path]:
    """JSON lines for each kind of objective."""
    folder = tmp_path_factory.mktemp("data")
    supervised = [{"prompt": prompt + " ", "completion": good} for prompt, good, _ in SUMS]
    pairs = [{"prompt": prompt + " ", "chosen": good, "rejected": bad} for prompt, good, bad in SUMS]
    for kind, lines in (("sft", supervised), ("dpo", pairs)):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return {kind: folder / f"{kind}.jsonl" for kind in ("sft", "dpo")}


@pytest.fixture(scope="session")
def tuning_config(bases, toy_data, tmp_path_factory):
    """Writes a config: of a kind of objective and a family, with more lines of `[objective]` and of other sections."""

    def write(kind, family, objective="", more=""):
        file = tmp_path_factory.mktemp("config") / f"{kind}.toml"
        base, data = json.dumps(str(bases[family])), json.dumps(str(toy_data[kind]))
        file.write_text(CONFIG.format(base=base, kind=kind, objective=objective, data=data) + more)
        return file

    return write
