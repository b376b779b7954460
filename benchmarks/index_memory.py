"""Resident memory while text is read and tokenised, on Linux: python -m benchmarks.index_memory --documents 10000000.

The text is short JSON lines in shards; the tokenizer one that a few of them train. Bytes a document tell what grows.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.convert_memory import resident_peak
from mixtral_jax.text.training import train_tokenizer
from mixtral_jax.train.data import DataConfig, prepare

SHARDS = 10
TRAINED_ON = 2000


def write(folder: Path, documents: int) -> None:
    """The shards."""
    for shard in range(SHARDS):
        with (folder / f"{shard}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f'{{"text": "number {n}"}}\n' for n in range(shard, documents, SHARDS))


def main() -> None:
    """Prints the peak before and after, and what it grew by."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000_000)
    documents = parser.parse_args().documents
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        write(folder / "text", documents)
        train_tokenizer([f"number {n}" for n in range(TRAINED_ON)], 284, folder / "small.model")
        config = DataConfig(
            sources=(str(folder / "text" / "*.jsonl"),),
            tokenizer=str(folder / "small.model"),
            cache_dir=str(folder / "cache"),
        )
        before, began = resident_peak(), time.perf_counter()
        data = prepare(config)
        seconds, peak = time.perf_counter() - began, resident_peak()
        found = data.training.num_documents + data.validation.num_documents
        tokens = data.training.num_tokens + data.validation.num_tokens
        grown = (peak - before) * 2**20 / found
    print(
        f"{found:,} documents, {tokens:,} tokens in {seconds:.0f} s: peak {before} MB before, {peak} MB after,"
        f" {grown:.1f} bytes a document"
    )


if __name__ == "__main__":
    main()
