"""Finding and reading text: what is taken, in which order, and what is refused."""

from __future__ import annotations

import gzip
import json

import fsspec
import pytest

from mixtral_jax.errors import InputError
from mixtral_jax.train.corpus import document_hash, find_files, read_documents, scan_documents


def read(*sources: object, text_field: str = "text", document_bytes: int = 1 << 18) -> list[str]:
    return list(read_documents(find_files([str(source) for source in sources]), text_field, document_bytes))


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_folder_gives_its_files_by_name_without_hidden_and_empty_ones(tmp_path):
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a" / "z.py", "first")
    write(tmp_path / ".git" / "x", "hidden")
    write(tmp_path / "__pycache__" / "x.pyc", b"\xff")
    write(tmp_path / "__init__.py", "")
    assert read(tmp_path) == ["first", "second"]


def test_a_glob_and_a_file_name_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "deep/d.txt"]
    assert read(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.txt", "c.md", "deep/d.txt"]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    assert read(write(tmp_path / "data[1].txt", "here")) == ["here"]


def test_buckets_are_read_like_folders():
    with fsspec.open("memory://corpus-test/a.txt", "wb") as file:
        file.write(b"far away")
    assert read("memory://corpus-test") == ["far away"]


def test_compressed_files_are_unpacked(tmp_path):
    assert read(write(tmp_path / "a.txt.gz", gzip.compress(b"packed"))) == ["packed"]
    cut_short = write(tmp_path / "b.txt.gz", gzip.compress(b"packed")[:-4])
    with pytest.raises(InputError, match=r"b\.txt\.gz': .*a whole, readable file is wanted"):
        read(cut_short)


def test_the_standard_library_is_found_without_tests_and_packages():
    files = find_files(["python-stdlib"])
    paths = [file.path for file in files]
    assert any(path.endswith("/argparse.py") for path in paths)
    assert any(path.endswith("/asyncio/tasks.py") for path in paths)
    assert not any("/test/" in path or "site-packages" in path or "idlelib" in path for path in paths)
    assert paths == sorted(paths)


@pytest.mark.parametrize(
    ("text", "limit", "documents"),
    [
        ("one\ntwo\n", 8, ["one\ntwo\n"]),
        ("one\ntwo\nthree", 8, ["one\ntwo\n", "three"]),
        ("one\ntwo\nthree", 7, ["one\n", "two\n", "three"]),
        ("abcdefgh", 4, ["abcd", "efgh"]),
        ("€€€", 4, ["€", "€", "€"]),
        ("😀😀", 4, ["😀", "😀"]),
    ],
)
def test_long_text_is_cut_at_lines_else_at_characters(tmp_path, text, limit, documents):
    assert read(write(tmp_path / "a.txt", text), document_bytes=limit) == documents


def test_json_lines_give_a_document_a_line(tmp_path):
    lines = [{"text": "one\n  two"}, {"text": "", "id": 1}, {"text": "\u4f60"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    assert read(path) == ["one\n  two", "\u4f60"]
    assert read(write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"body": "x"}')), text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", "", "the file is empty; text is wanted"),
        ("a.txt", b"good\nb\xe9d", "byte 6 is not UTF-8 .* UTF-8 text is wanted"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "byte 24 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON .*one object a line is wanted"),
        ("a.jsonl", "[1]", "line 1 is no JSON object"),
        ("a.jsonl", '{"txt": "a", "id": 3}', r"line 1 has no text in the field 'text' .*its fields: 'txt', 'id'"),
        ("a.jsonl", '{"text": 3}', "line 1 has no text in the field 'text'"),
        ("a.jsonl", r'{"text": "\ud800"}', "line 1 holds half of a surrogate pair"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=rf"data\.sources = '.*{name}': {problem}"):
        read(path)


def test_the_byte_that_is_not_utf8_counts_from_the_files_start(tmp_path):
    path = write(tmp_path / "a.txt", b"one\ntwo\n\xff")
    with pytest.raises(InputError, match="byte 8 is not UTF-8"):
        read(path, document_bytes=4)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("nowhere/a.txt", "no such file or folder; a file, a folder, a glob or python-stdlib is wanted"),
        ("nowhere/*.txt", "the glob matches nothing; at least one file is wanted"),
        ("nosuch://bucket", "can't be opened .*nosuch"),
        ("empty", "holds no file with text"),
    ],
)
def test_a_source_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch, source, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=rf"data\.sources = '{source.replace('*', '.')}': {problem}"):
        find_files([source])


def test_a_misspelt_name_is_guessed():
    with pytest.raises(InputError, match="did you mean 'python-stdlib'"):
        find_files(["python-stdlb"])
    with pytest.raises(InputError, match=r"FILES = \[\]: at least one file"):
        find_files([], key="FILES")


DOCUMENTS = [f"document {number}" for number in range(10)]


def test_validation_has_its_share_of_the_documents_whatever_their_order():
    def chosen(documents):
        scan = scan_documents(documents, 0.3)
        return {document for document in documents if document_hash(document) < scan.validation_below}

    assert len(chosen(DOCUMENTS)) == 3
    assert chosen(DOCUMENTS) == chosen(DOCUMENTS[::-1])


def test_equal_documents_are_on_the_same_side():
    smallest = min(DOCUMENTS, key=document_hash)
    scan = scan_documents([*DOCUMENTS, smallest, smallest], 0.1)
    below = [document for document in DOCUMENTS if document_hash(document) < scan.validation_below]
    assert below == [smallest]


def test_a_tiny_share_is_one_document_and_none_is_none():
    assert scan_documents(DOCUMENTS, 1e-6).validation_below == min(map(document_hash, DOCUMENTS)) + 1
    assert scan_documents(DOCUMENTS, 0.0).validation_below == 0


def test_a_scan_counts_and_tells_other_text_and_other_order_apart():
    scan = scan_documents(["a\u20ac", "b"], 0.5)
    assert (scan.num_documents, scan.num_bytes) == (2, 5)
    assert scan == scan_documents(["a\u20ac", "b"], 0.5)
    digests = {scan_documents(texts, 0.5).digest for texts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"])}
    assert len(digests) == 4
