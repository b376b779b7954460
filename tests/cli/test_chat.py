"""A conversation in the terminal, with a toy that was trained on code."""

import json

import pytest

import mixtral_jax as mj
from mixtral_jax import language_model
from mixtral_jax.cli import chat
from mixtral_jax.inference.sampling import SamplingConfig


@pytest.fixture(scope="module")
def model(whole):
    return mj.load(whole[0], dtype="float32")


@pytest.fixture
def talk(run, whole, monkeypatch):
    """Types lines, an exception being what a key raises: (exit status, stdout, stderr)."""

    def call(*lines, options=()):
        typed = iter([*lines, EOFError()])

        def answer(_):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", answer)
        return run("chat", whole[0], "--temperature", 0, "--max-new-tokens", 8, "--dtype", "float32", *options)

    return call


def test_history_is_sent_saved_and_reset(talk, model, tmp_path):
    status, out, err = talk("def f", f"/save {tmp_path / 'a b.json'}", "/reset", f"/save {tmp_path / 'empty.json'}")
    assert (status, err) == (0, "")
    said = json.loads((tmp_path / "a b.json").read_text())
    (expected,) = model.generate([model.tokenizer.encode("[INST] def f [/INST]", bos=True)], max_new_tokens=8)
    assert [each["role"] for each in said] == ["user", "assistant"]
    assert said[1]["content"] == model.tokenizer.decode(expected).lstrip(" ") or said[1]["content"] in out
    assert json.loads((tmp_path / "empty.json").read_text()) == []
    assert "a new conversation" in out


def test_the_system_stays(talk, tmp_path):
    talk("a", "/reset", f"/save {tmp_path / 's.json'}", options=["--system", "be brief"])
    assert json.loads((tmp_path / "s.json").read_text()) == [{"role": "system", "content": "be brief"}]


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    def stream(self, *arguments):
        yield ["half an"]
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model.Model, "stream", stream)
    status, out, _ = talk("a", KeyboardInterrupt(), "b")
    assert status == 0
    assert out.count("half an (stopped)") == 2


@pytest.mark.parametrize("pieces", [[], [""], ["", " "]])
def test_an_answer_of_nothing_is_forgotten_with_its_question(model, monkeypatch, pieces):
    def stream(self, *arguments):
        yield from ([piece] for piece in pieces)
        raise KeyboardInterrupt

    conversation = chat.Conversation(model, "be brief", SamplingConfig(), 8)
    before = list(conversation.messages)
    with monkeypatch.context() as patch:
        patch.setattr(language_model.Model, "stream", stream)
        with pytest.raises(KeyboardInterrupt):
            list(conversation.answer("a"))
    assert conversation.messages == before
    *_, last = conversation.answer("def f")
    assert conversation.messages[-1]["content"] == last


def test_commands_that_are_none_and_files_that_can_not_be(talk, tmp_path):
    status, out, err = talk("/dance", "/save", f"/save {tmp_path / 'no' / 'where'}", "", "/exit", "never sent")
    assert status == 0
    assert out.count("/reset begins anew") == 3
    assert "No such file or directory" in err


def test_a_full_conversation_is_refused_and_forgotten(talk):
    status, _, err = talk("x " * 80)
    assert status == 0
    assert "tokens are over the model's 64; /reset begins anew" in err


def test_a_long_answer_stops_at_the_last_position(model):
    conversation = chat.Conversation(model, None, SamplingConfig(), max_new_tokens=10**6)
    *_, last = conversation.answer("def")
    assert conversation.messages[-1] == {"role": "assistant", "content": last}


def test_needs_a_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(mj.InputError, match="MODEL: it came without a tokenizer"):
        chat.Conversation(model, None, SamplingConfig(), 8)
