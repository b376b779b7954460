"""Files that are damaged, foreign, or can't be written, and text that can't be read."""

from __future__ import annotations

import gzip
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.runs import Run, Seen, Workshop
from mixtral_jax.checkpoints.digests import Standing, verify

CHECKPOINTS = "checkpoints"


class NotHere(RuntimeError):
    """This machine does not let the fault be made."""


def _largest(step: Path) -> Path:
    return max((file for file in step.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _damaged(shop: Workshop, name: str, damage: Callable[[Path], str], used: int = 10) -> Seen:
    """A finished run whose newest step is damaged, gone on with."""
    seen, folder = Seen(), shop.copy(name)
    fault = damage(folder / CHECKPOINTS / "20")
    run = shop.start(name, "steps=30")
    (status,) = run.wait()
    said = re.search(r"CHECKPOINT \d+ IS NOT USED: .*", run.said())
    seen.that(said is not None and fault in said[0] and f"step {used} is used" in said[0], _short(said, shop))
    seen.that(status == 0 and run.losses() == shop.reference[:30], "goes on, 30 losses bitwise the same")
    return seen


def _short(said: re.Match | None, shop: Workshop) -> str:
    return "a warning that names it" if said is None else f"'{said[0].replace(str(shop.folder), '')}'"


def truncated(shop: Workshop) -> Seen:
    """Half of its largest file."""

    def damage(step: Path) -> str:
        file = _largest(step)
        os.truncate(file, file.stat().st_size // 2)
        return f"{file}: "

    return _damaged(shop, "truncated", damage)


def flipped(shop: Workshop) -> Seen:
    """One bit of its largest file."""

    def damage(step: Path) -> str:
        file = _largest(step)
        _flip(file, 4 * file.stat().st_size)
        return f"{file}: its SHA-256 is not what was written"

    return _damaged(shop, "flipped", damage)


def missing(shop: Workshop) -> Seen:
    """Its largest file."""

    def damage(step: Path) -> str:
        file = _largest(step)
        file.unlink()
        return f"{file}: missing"

    return _damaged(shop, "missing", damage)


def empty_folder(shop: Workshop) -> Seen:
    """Of a step that is newer."""

    def damage(step: Path) -> str:
        step.with_name("25").mkdir()
        return str(step.with_name("25"))

    return _damaged(shop, "empty-folder", damage, used=20)


def foreign_folder(shop: Workshop) -> Seen:
    """With a file of another kind, of a step that is newer."""

    def damage(step: Path) -> str:
        step.with_name("25").mkdir()
        (step.with_name("25") / "thesis.tex").write_text("dear", encoding="utf-8")
        return str(step.with_name("25"))

    return _damaged(shop, "foreign-folder", damage, used=20)


def forty_flips(shop: Workshop) -> Seen:
    """One after another, over all bytes of a step's files."""
    seen, step, dice = Seen(), shop.copy("forty-flips") / CHECKPOINTS / "20", random.Random(0)
    files = sorted(file for file in step.rglob("*") if file.is_file())
    sizes, found = [file.stat().st_size for file in files], 0
    for _ in range(40):
        (file,) = dice.choices(files, sizes)
        bit = dice.randrange(8 * file.stat().st_size)
        _flip(file, bit)
        standing, fault = verify(step)
        found += standing == Standing.DAMAGED and str(file) in fault
        _flip(file, bit)
    seen.that(found == 40, f"{found} found and named")
    seen.that(verify(step).standing == Standing.VERIFIED, "whole again")
    return seen


def another_config(shop: Workshop) -> Seen:
    """The checkpoints of a model with another feed-forward, in this run's folder."""
    seen, folder = Seen(), shop.copy("another-config")
    other = shop.start("another-model", "steps=1", "model.hidden_dim=32")
    other.wait()
    shutil.rmtree(folder / CHECKPOINTS)
    shutil.copytree(other.folder / CHECKPOINTS, folder / CHECKPOINTS)
    _refused(seen, shop.start("another-config"), "a checkpoint of another config: .*float32", shop)
    return seen


def _refused(seen: Seen, run: Run, message: str, shop: Workshop) -> None:
    """Exit 2, with a message."""
    (status,) = run.wait()
    seen.that(status == 2, f"exit {status}")
    error = re.search(r"^error: .*", run.said(), re.MULTILINE)
    told = "" if error is None else error[0].replace(str(shop.folder), "")
    told = told if len(told) < 240 else f"{told[:240]}..."
    seen.that(re.search(message, told) is not None, f"'{told}'")


@contextmanager
def _disk(path: Path, size: str, options: str = "rw") -> Iterator[None]:
    """A file system of its own, in memory."""
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(path)], capture_output=True, text=True
    )
    if made.returncode:
        raise NotHere(made.stderr.strip() or "mount failed")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def disk_about_full(shop: Workshop) -> Seen:
    """Room for some checkpoints; all are kept."""
    return _full(shop, "disk-about-full", None, r"bytes are needed, [\d,]+ are free")


def disk_full(shop: Workshop) -> Seen:
    """The same, with a disk that says it has room until it is written to."""
    return _full(shop, "disk-full", f"room={1 << 40}", "the disk is full|No space left on device")


def _full(shop: Workshop, name: str, fault: str | None, message: str) -> Seen:
    seen = Seen()
    with _disk(shop.folder / name, "1700k"):
        run = shop.start(f"{name}/run", "keep_checkpoints=50", fault=fault)
        _refused(seen, run, message, shop)
        whole = [step for step in run.saved() if verify(run.folder / CHECKPOINTS / str(step)).standing == 0]
        told = re.search(r"[\d,]+ bytes are needed", run.said())
        seen.that(told is not None and len(whole) > 1, f"steps {whole} whole")
    return seen


def read_only(shop: Workshop) -> Seen:
    """A file system that can only be read."""
    seen = Seen()
    with _disk(shop.folder / "read-only", "1m", "ro"):
        _refused(seen, shop.start("read-only/run"), "--run-dir = .*[Rr]ead-only .*a writable folder", shop)
    return seen


def folder_of_another(shop: Workshop) -> Seen:
    """A run with another seed of its data; and a folder that holds no run."""
    seen = Seen()
    shop.copy("folder-of-another")
    _refused(seen, shop.start("folder-of-another", "data.seed=1"), "data.seed was 0, is 1", shop)
    (shop.folder / "no-run").mkdir()
    (shop.folder / "no-run" / "thesis.tex").write_text("dear", encoding="utf-8")
    _refused(seen, shop.start("no-run"), "holds files but no run", shop)
    return seen


def no_text(shop: Workshop) -> Seen:
    """A source that is not there."""
    return _text(shop, "no-text", None, r"data\.sources = 'no-text\.jsonl': no such file")


def short_text(shop: Workshop) -> Seen:
    """A packed file without its end; and too little text for a batch."""
    seen = _text(shop, "short-text.gz", gzip.compress(b"some text " * 999)[:-9], "short-text.gz': .*a whole, readable")
    (shop.folder / "little.txt").write_text("line\n" * 9, encoding="utf-8")
    settings = ("data.sources=['little.txt']", "data.validation_fraction=0.0", "data.vocab_size=270")
    _refused(seen, shop.start("little", *settings), "data.batch_size = 8: .*fills . rows", shop)
    return seen


def not_utf8(shop: Workshop) -> Seen:
    """A byte that is not UTF-8."""
    return _text(shop, "latin", b"caf\xe9\n" * 20, r"byte 3 is not UTF-8")


def _text(shop: Workshop, name: str, content: bytes | None, message: str) -> Seen:
    seen, file = Seen(), f"{name}.jsonl" if content is None else name
    if content is not None:
        (shop.folder / file).write_bytes(content)
    run = shop.start(f"of-{name}", f"data.sources=['text', '{file}']")
    _refused(seen, run, message, shop)
    seen.that(not run.losses(), "before step 1")
    return seen


def token_out_of_vocabulary(shop: Workshop) -> Seen:
    """A tokenizer with more ids than the model."""
    seen = Seen()
    run = shop.start("vocabulary", "model.vocab_size=270")
    _refused(seen, run, r"training\.tokens = \d+: token \d+, in document \d+, must be below .*vocab_size 270", shop)
    seen.that(not run.losses(), "before step 1")
    return seen
