"""`python -m benchmarks.soak --minutes 30`: a server of a toy under a random load, for as long as you like.

Clients ask well and badly, stream and don't, hang up in between. At the end every request has had its answer, every
text its end, no slot is taken, and memory is where it was after the first quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak_clients import NAME, Clients

KEY = "soak"
FLAGS = ("--port", "0", "--slots", "8", "--max-length", "512", "--prefill-chunk", "64", "--max-waiting", "24")
LIMITS = ("--max-texts", "8", "--send-seconds", "5", "--model-name", NAME, "--api-key", KEY, "--dtype", "float32")
SAMPLE_SECONDS = 5.0
GROWTH = 1.03
"""Resident memory of the last quarter over the second's, at most."""


@dataclass
class Watched:
    """What was seen of the server's process, a number a sample."""

    resident: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


def make_toy(folder: Path) -> None:
    """A Mixtral of random weights, and a tokenizer of its own."""
    import transformers

    from mixtral_jax.text.training import train_tokenizer

    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer([Path(__file__).read_text(encoding="utf-8")], 400)
    config = transformers.MixtralConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_into(folder)


@contextmanager
def served(folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    """The server's process and address."""
    code = "from mixtral_jax.cli.main import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), *FLAGS, *LIMITS, "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert " is served at " in said, "the server did not start"
            yield psutil.Process(process.pid), said.split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
    assert status == 143, f"exit status {status}"


async def soak(process: psutil.Process, url: str, seconds: float, clients: int, seed: int) -> tuple[Clients, Watched]:
    """Lets clients loose on the server."""
    limits = httpx2.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    watched = Watched()
    async with httpx2.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=60, trust_env=False) as http:
        crowd = Clients(http, url, KEY, time.monotonic() + seconds)
        watching = asyncio.ensure_future(_watch(process, watched, crowd))
        await asyncio.gather(*(crowd.live(random.Random(f"{seed} {n}")) for n in range(clients)))
        watching.cancel()
        await _settle(http)
        await _hang_up_together(http, crowd)
    return crowd, watched


async def _watch(process: psutil.Process, watched: Watched, crowd: Clients) -> None:
    while True:
        watched.resident.append(process.memory_info().rss / 2**20)
        watched.descriptors.append(process.num_fds())
        if len(watched.resident) % 12 == 0:
            print(
                f"{watched.resident[-1]:7.1f} MiB  {watched.descriptors[-1]:4} fds  {dict(crowd.outcomes)}", flush=True
            )
        await asyncio.sleep(SAMPLE_SECONDS)


async def metrics(http: httpx2.AsyncClient) -> dict[str, float]:
    """The server's metrics without labels."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return {each.name: each.value for family in families for each in family.samples if not each.labels}


async def _settle(http: httpx2.AsyncClient) -> None:
    """No text is left, and each that was taken in has ended."""
    for _ in range(100):
        found = await metrics(http)
        if not found["mixtral_jax_texts_open"]:
            break
        await asyncio.sleep(0.1)
    ended = found["mixtral_jax_engine_finished_total"] + found["mixtral_jax_engine_cancelled_total"]
    print(f"texts taken in {found['mixtral_jax_texts_total']:.0f}, ended {ended:.0f}")
    for name in ("texts_open", "texts_running", "texts_waiting"):
        assert found[f"mixtral_jax_{name}"] == 0, f"{name}: {found[f'mixtral_jax_{name}']}"
    assert ended == found["mixtral_jax_texts_total"], "a text is lost"


async def _hang_up_together(http: httpx2.AsyncClient, crowd: Clients) -> None:
    """Clients for all slots, who leave: their slots are free within a second."""
    streams = [await crowd.begin_long() for _ in range(8)]
    for reader, _ in streams:
        await reader.readuntil(b"data: ")
    for _, writer in streams:
        writer.close()
    begin = time.monotonic()
    while (await metrics(http))["mixtral_jax_texts_open"]:
        assert time.monotonic() < begin + 1, "slots are not free a second after their clients left"
        await asyncio.sleep(0.005)
    print(f"eight slots were free {time.monotonic() - begin:.3f} s after their clients had hung up")


def check(crowd: Clients, watched: Watched) -> None:
    """Raises AssertionError for what should not have been."""
    quarter = max(1, len(watched.resident) // 4)
    early = statistics.median(watched.resident[quarter : 2 * quarter])
    late = statistics.median(watched.resident[-quarter:])
    print(f"resident memory {early:.1f} MiB in the second quarter, {late:.1f} MiB in the last")
    print(f"file descriptors {watched.descriptors[0]} at first, {watched.descriptors[-1]} at last")
    print(f"requests {sum(crowd.outcomes.values())}: {dict(sorted(crowd.outcomes.items()))}")
    for problem in crowd.problems[:20]:
        print(f"problem: {problem}", file=sys.stderr)
    assert not crowd.problems, f"{len(crowd.problems)} requests went wrong"
    assert late <= GROWTH * early, "resident memory grows"


def main() -> None:
    """Exit status 0: all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_toy(Path(folder))
        with served(Path(folder)) as (process, url):
            seconds = arguments.minutes * 60
            crowd, watched = asyncio.run(soak(process, url, seconds, arguments.clients, arguments.seed))
        check(crowd, watched)
    print(f"{arguments.minutes:g} minutes: memory flat, no slot and no request lost")


if __name__ == "__main__":
    main()
