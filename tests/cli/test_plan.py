"""`mixtral-jax plan`: what it prints, what it refuses, and its exit status."""

import json

import pytest

from mixtral_jax.planning import compilers

NATURAL = ("--topology", "v5p:4x4x4", "--mesh", "expert=8,fsdp=8", "--batch-per-chip", "1", "--no-compile")


def test_a_plan_that_fits(run):
    status, out, err = run("plan", *NATURAL, "--tokens", "1e12")
    assert (status, err) == (0, "")
    assert "train on v5p:4x4x4 (64 chips), mesh fsdp=8,expert=8" in out
    for part in ("weights", "moments", "all-to-all", "bound by", "estimated, not measured", "MFU", "chip-hours"):
        assert part in out
    assert "GiB a chip to spare (by counts" in out


def test_json(run):
    status, out, _ = run("plan", *NATURAL, "--tokens", "1e12", "--json")
    plan = json.loads(out)
    assert (status, plan["fits"], plan["mesh"], plan["rows"]) == (0, True, {"fsdp": 8, "expert": 8}, 64)
    rate = plan["estimates"]["train"]["tokens_per_second"]
    assert plan["chip_hours"] == pytest.approx(1e12 / rate * 64 / 3600)


def test_a_plan_that_does_not_fit_says_what_would(run):
    status, out, err = run("plan", "--topology", "h100:8", "--mesh", "expert=8", "--batch-per-chip", "1", "--json")
    plan = json.loads(out)
    assert (status, plan["fits"]) == (2, False)
    assert plan["remedies"][-1].startswith("more chips: --topology h100:32")
    assert "error: h100:8: does not fit by" in err
    assert "what would: " in err


def test_without_a_mesh_the_best_is_planned(run):
    status, out, _ = run("plan", "--model", "mistral-7b-v0.1", "--topology", "h100:8", "--json")
    assert status == 0
    assert json.loads(out)["mesh"] == {"fsdp": 8}


def test_mixtral_is_served_by_one_card_in_int8_and_by_two_in_bfloat16(run):
    serve = ("plan", "--model", "mixtral-8x7b", "--serve", "--json")
    status, out, _ = run(*serve, "--topology", "h100:1", "--quantize", "int8")
    one = json.loads(out)
    assert (status, one["fits"], one["quantize"], one["cache_dtype"]) == (0, True, "int8", "bfloat16")
    # 46.6 of the 46.7 billion weights take a byte, the embedding's 0.13 two; scales a thousandth.
    assert one["memory_by_counts"]["weights"] == pytest.approx(46.87e9, rel=1e-3)
    status, out, _ = run(*serve, "--topology", "h100:2")
    two = json.loads(out)
    assert (status, two["fits"], two["mesh"]) == (0, True, {"tensor": 2})
    assert two["memory_by_counts"]["weights"] == pytest.approx(2 * 46.7e9 / 2, rel=1e-3)
    status, out, err = run(*serve, "--topology", "h100:1")
    assert (status, json.loads(out)["fits"]) == (2, False)
    assert "what would: weights in fewer bits: --mesh data=1 --batch-per-chip 1 --quantize int8; or more chips:" in err
    assert "--topology h100:2 --mesh tensor=2" in err


def test_an_int8_cache_makes_room_for_more_texts(run):
    serve = ("plan", "--serve", "--topology", "h100:1", "--quantize", "int8", "--mesh", "data=1", "--batch-per-chip")
    assert run(*serve, "20")[0] == 2
    status, out, _ = run(*serve, "20", "--cache-dtype", "int8")
    assert status == 0
    assert "weights in int8, cache in int8" in out


def test_search(run):
    arguments = ("plan", "--model", "mistral-7b-v0.1", "--topology", "h100:8", "--search")
    status, out, _ = run(*arguments, "--json")
    ranked = json.loads(out)
    assert status == 0
    assert len(ranked) == 10
    assert ranked[0]["flags"] == "--mesh fsdp=8 --batch-per-chip 1 --remat none"
    status, out, _ = run(*arguments)
    assert status == 0
    assert "by counts and the estimate" in out


def test_a_search_that_finds_nothing(run):
    status, _, err = run("plan", "--model", "mixtral-8x22b", "--topology", "h100:8", "--search")
    assert status == 2
    assert "what would: more chips: --topology h100:64" in err


def test_serving(run):
    status, out, _ = run("plan", "--topology", "h100:8", "--serve", "--mesh", "tensor=8", "--batch-per-chip", "1")
    assert status == 0
    assert "decode, estimate" in out
    assert "prefill, estimate" in out
    assert "cache" in out


def test_a_window(run):
    arguments = ("--sequence", "32768", "--mesh", "fsdp=8,context=8", "--batch-per-chip", "0.125", "--no-compile")
    _, out, _ = run("plan", "--topology", "v5p:4x4x4", *arguments, "--window", "1024", "--json")
    windowed = json.loads(out)
    _, out, _ = run("plan", "--topology", "v5p:4x4x4", *arguments, "--window", "none", "--json")
    whole = json.loads(out)
    kinds = [{each["kind"] for each in plan["traffic_by_counts"] if each["axes"] == ["context"]}
             for plan in (windowed, whole)]  # fmt: skip
    assert kinds == [{"all-reduce", "collective-permute"}, {"all-reduce", "all-gather", "reduce-scatter"}]
    assert windowed["estimates"]["train"]["seconds"] < whole["estimates"]["train"]["seconds"] / 2


def test_what_waits_in_the_hosts_memory(run):
    status, out, _ = run("plan", *NATURAL, "--remat", "offload")
    assert status == 0
    assert "in the host's memory: 1.00 GiB a chip by counts\n" in out
    assert "to the host and back 0.179 s meanwhile" in out
    assert "host" not in run("plan", *NATURAL, "--remat", "full")[1].split("estimated, not measured")[0]


def test_a_shipped_plan(run):
    status, out, _ = run("plan", "pods/v5p-4x4x4/mixtral-8x7b/train-4k", "--no-compile")
    assert status == 0
    assert "train on v5p:4x4x4" in out
    status, out, _ = run("plan", "pods/v5p-4x4x4/mixtral-8x7b/train-4k", "--toml")
    assert status == 0
    assert "[mesh]" in out
    status, out, _ = run("plan", "pods/v5p-4x4x4", "--json")
    assert len(json.loads(out)) == 9
    status, _, err = run("plan", "pods/h100-8/mixtral-8x7b/train-4k")
    assert status == 2
    assert "does not fit on h100:8; it does on h100:32" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--topology: is needed, such as v5p:4x4x4"),
        (("--topology", "v5p:64"), "did you mean v5p:4x4x4"),
        (("--topology", "h100:8", "--mesh", "expart=8"), "--mesh = 'expart': did you mean 'expert'?"),
        (("--topology", "h100:8", "--mesh", "expert"), "written as axis=size"),
        (("--topology", "h100:8", "--mesh", "expert=4,expert=2"), "expert stands there twice"),
        (("--topology", "h100:8", "--mesh", "expert=16"), "the axes' product must be a divisor of the 8 devices"),
        (("--topology", "h100:64", "--mesh", "expert=64"), "mesh.expert = 64: must divide the number of experts = 8"),
        (("--topology", "h100:8", "--mesh", "expert=8", "--batch-per-chip", "0.3"), "--batch-per-chip"),
        (("--topology", "h100:8", "--batch-per-chip", "-1"), "--batch-per-chip = -1.0: a number above zero"),
        (("--topology", "h100:8", "--sequence", "65536"), "no mesh of these chips"),
        (("--topology", "h100:8", "--window", "0"), "--window = '0': a number of keys above zero, or none"),
        (("--topology", "h100:8", "--dropless", "--capacity-factor", "1"), "has no --capacity-factor"),
        (("--topology", "h100:8", "--compile"), "jax-cuda12-plugin: is not installed"),
        (("--model", "mixtral-8x8b", "--topology", "h100:8"), "no such file"),
        (("pods/v5p-4x4x4", "--serve"), "leave those flags out"),
        ((*NATURAL, "--quantize", "int8"), "--quantize = 'int8': is for --serve"),
        ((*NATURAL, "--cache-dtype", "int8"), "--cache-dtype = 'int8': is for --serve"),
    ],
)
def test_refused(run, arguments, message):
    status, out, err = run("plan", *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_without_a_compiler(run, monkeypatch):
    monkeypatch.setattr(compilers, "has_compiler", lambda machine: False)
    arguments = ("plan", "--topology", "v5p:4x4x4", "--mesh", "expert=8,fsdp=8", "--batch-per-chip", "1")
    status, _, err = run(*arguments)
    assert (status, "nothing is compiled; the compiler for TPUs is needed" in err) == (0, True)
    status, _, err = run(*arguments, "--compile")
    assert status == 2
    assert "libtpu: is not installed" in err


def test_it_compiles_and_says_so(run):
    """A tiny model, for the eight devices of the test."""
    axes = ("--mesh", "fsdp=2,expert=4", "--sequence", "128", "--batch-per-chip", "1", "--dropless")
    status, out, err = run("plan", "--model", "tiny-mixtral", "--topology", "cpu:8", *axes, "--compile")
    assert status == 0
    assert err == "compiling\n"
    assert "temporaries" in out
    assert "whether it fits is unknown" in out
