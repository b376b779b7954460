"""`mixtral-jax tokenizer train` on files, and its refusals."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from mixtral_jax.cli.tokenizer import app
from mixtral_jax.errors import InputError
from mixtral_jax.text.files import load_tokenizer

TEXT = "def first(x):\n    return x + 1\n\n\ndef second(y):\n    return first(y) * 2\n" * 20


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_writes_a_model_and_says_so(tmp_path):
    (tmp_path / "a.py").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text('{"body": "third thing"}\n')
    out = tmp_path / "out" / "small.model"
    result = run("train", tmp_path, "--vocab-size", 300, "--out", out, "--text-field", "body")
    tokenizer = load_tokenizer(out)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "learnt from 2 files",
        f"wrote {out}: 300 ids, {out.stat().st_size} bytes, sha256 {tokenizer.digest}",
    ]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("files", "size", "problem"),
    [
        ("missing.txt", 300, r"FILES = '.*missing\.txt': no such file or folder"),
        ("a.txt", 10, r"--vocab-size = 10: too small for this text; at least \d+ is needed"),
        ("bad.txt", 300, r"FILES = '.*bad\.txt': byte 1 is not UTF-8"),
    ],
)
def test_mistakes_are_named(tmp_path, files, size, problem):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    result = run("train", tmp_path / files, "--vocab-size", size, "--out", tmp_path / "x.model")
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match=problem):
        raise result.exception
    assert not (tmp_path / "x.model").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    result = run("train", tmp_path / "a.txt", "--vocab-size", 300, "--out", tmp_path / "a.txt" / "x.model")
    with pytest.raises(InputError, match=r"--out = '.*x\.model': .*a writable path is wanted"):
        raise result.exception
