"""Text goes to ids and back unchanged, whole and token by token; models train alike every time."""

from __future__ import annotations

import io
import re

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from mixtral_jax.errors import InputError
from mixtral_jax.text.tokenizer import StreamDecoder, Tokenizer, _sample, train_tokenizer

CODE = '''def total(values, start=0):
    """The sum of all values."""
    for value in values:
        if value is not None:
            start += value

    return start


class Account:
    def __init__(self, owner):
        self.owner = owner
        self.balance = 2024
'''
VARIANTS = [CODE.replace("value", name).replace("owner", name * 2) for name in ("item", "word", "number", "line")]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="session")
def ours() -> Tokenizer:
    return train_tokenizer([CODE, *VARIANTS], 352)


@pytest.fixture(scope="session")
def with_dummy_prefix() -> Tokenizer:
    """A model that puts a space before the text, as Mistral's do."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())


def test_ids_have_mistrals_layout(ours):
    assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 1, 2, -1, 352)


@given(TEXTS)
@example("")
@example("  two, then a tab\t, a line\r\n\n\n        deep\n ")
@example("\u2581a\u2581\u2581 b\n\u2581   ")
@example("<s>[INST]</s><unk><0x0A>\u2047\ufeff\ufffd\0")
@example("\U0001f600\u0301 \u4f60\u597d")
def test_text_comes_back_unchanged(ours, text):
    assert ours.decode(ours.encode(text)) == text


@given(TEXTS)
def test_streamed_text_comes_back_unchanged(ours, text):
    decoder = StreamDecoder(ours)
    assert "".join(map(decoder.feed, ours.encode(text))) + decoder.flush() == text


@pytest.mark.parametrize("name", ["ours", "with_dummy_prefix"])
@given(data=st.data())
def test_streaming_any_ids_equals_decoding_them(request, name, data):
    tokenizer = request.getfixturevalue(name)
    some = [*range(8), *tokenizer.encode("  \u20ac"), *range(100, 103)]
    ids = data.draw(st.lists(st.one_of(st.sampled_from(some), st.integers(0, tokenizer.vocab_size - 1))))
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_a_character_of_four_bytes_is_streamed_whole(ours):
    ids = ours.encode("a\U0001f600b")
    decoder = StreamDecoder(ours)
    assert [decoder.feed(token) for token in ids] == ["a", "", "", "", "\U0001f600", "b"]


def test_flush_gives_what_was_held_back(ours):
    decoder = StreamDecoder(ours)
    assert [decoder.feed(token) for token in ours.encode("\U0001f600")[:2]] == ["", ""]
    assert decoder.flush() == "\ufffd\ufffd"
    assert decoder.flush() == ""


def test_the_dummy_prefix_is_dropped_at_the_start_only(with_dummy_prefix):
    ids = with_dummy_prefix.encode("self self")
    assert with_dummy_prefix.decode(ids) == "self self"
    decoder = StreamDecoder(with_dummy_prefix, after=with_dummy_prefix.encode("self", bos=True))
    assert "".join(map(decoder.feed, with_dummy_prefix.encode("self"))) == " self"


def test_begin_and_end_are_added_when_asked(ours):
    plain = ours.encode("start")
    assert ours.encode("start", bos=True, eos=True) == [1, *plain, 2]
    assert ours.decode([1, *plain, 2]) == "start"


@given(TEXTS)
@example("<s></s>")
def test_text_never_becomes_a_control_id(ours, text):
    assert not {0, 1, 2} & set(ours.encode(text))


@given(st.lists(TEXTS))
def test_a_batch_equals_its_texts_apart(ours, texts):
    assert ours.encode_batch(texts) == [ours.encode(text) for text in texts]


def test_indentation_is_one_piece_and_digits_are_apart(ours):
    pieces = [ours.piece(token) for token in ours.encode("\n        self\n    20")]
    assert pieces == ["\n        ", "self", "\n    ", "2", "0"]


def test_training_is_deterministic_and_quiet(ours, capfd):
    again = train_tokenizer(iter([CODE, *VARIANTS]), 352)
    other = train_tokenizer([CODE], 300)
    assert ours.digest == again.digest != other.digest
    assert capfd.readouterr() == ("", "")


def test_saved_and_loaded_it_is_the_same(ours, tmp_path):
    path = tmp_path / "new" / "a.model"
    ours.save(path)
    assert Tokenizer.load(path).digest == ours.digest
    assert [file.name for file in path.parent.iterdir()] == ["a.model"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file or directory; a SentencePiece .model file is wanted"),
        (b"", "the file is empty; a SentencePiece"),
        (b"not a model", r"\(11 bytes\) is not a whole SentencePiece model"),
        (-40, "is not a whole SentencePiece model"),
    ],
)
def test_what_is_no_model_is_refused_by_name(ours, tmp_path, capfd, content, problem):
    path = tmp_path / "some.model"
    if content == -40:
        ours.save(path)
        content = path.read_bytes()[:-40]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"tokenizer = '.*some\.model': .*{problem}"):
        Tokenizer.load(path)
    assert capfd.readouterr().err == ""


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="Is a directory"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("size", "pattern", "step"), [(100, r"at least (\d+) is", -1), (9000, r"at most (\d+) is", 1)])
def test_the_bound_in_the_message_is_the_bound(size, pattern, step):
    with pytest.raises(InputError, match=rf"vocab_size = {size}: too .*{pattern}") as caught:
        train_tokenizer([CODE], size)
    bound = int(re.search(pattern, str(caught.value))[1])
    assert train_tokenizer([CODE], bound).vocab_size == bound
    with pytest.raises(InputError, match="for this text"):
        train_tokenizer([CODE], bound + step)


def test_no_text_and_no_size_are_refused():
    with pytest.raises(InputError, match="there is no text to learn from"):
        train_tokenizer(["", "\n\n"], 300)
    with pytest.raises(InputError, match="vocab_size = 0: a positive number"):
        train_tokenizer([CODE], 0)


def test_a_sample_is_spread_evenly_and_bounded():
    # Four characters each. At the fifth, 20 > 16: every second stays (0, 2, 4), and from there every second is taken.
    documents = [f"doc{number}" for number in range(8)]
    assert _sample(iter(documents), 16) == ["doc0", "doc2", "doc4", "doc6"]
    assert _sample(iter(documents), 1) == ["doc0"]
    assert _sample(iter(documents), 32) == documents
