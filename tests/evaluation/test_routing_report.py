"""Where tokens go: kinds, repetitions and concentration by hand, and the verb on a toy run."""

import json
import math
from itertools import takewhile

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from mixtral_jax.cli.main import app
from mixtral_jax.evaluation import routing_report as r
from mixtral_jax.evaluation.routing_pictures import table


def test_kinds_by_hand():
    pieces = [" re", "turn", " x", "1", "+", "10", ".5", "\n", "    ", " returned"]
    expected = ["keyword", "keyword", "identifier", "identifier", "punctuation", "number", "number"]
    assert r.kinds(pieces, ".py") == [*expected, "whitespace", "whitespace", "identifier"]
    assert r.kinds([" return", ""], ".md") == ["word", "whitespace"]


def test_chance_is_the_papers():
    """Section 5: 12.5%, and 1 - 6/8 * 5/7 = 46%; and by drawing."""
    first, some = r.chance(8, 2)
    assert (first, some) == (0.125, pytest.approx(1 - 6 / 8 * 5 / 7))
    rng = np.random.default_rng(0)
    drawn = np.argsort(rng.random((1, 40000, 8)), axis=-1)[..., :2]
    found = r.repetition(drawn, np.zeros(40000, int))
    np.testing.assert_allclose((found.first[0], found.any[0]), (first, some), atol=0.01)


def test_repetition_by_hand():
    """Two pairs within a window: the first repeats its first choice, the second only shares an expert."""
    expert_LNA = np.array([[[0, 1], [0, 2], [3, 0], [1, 3]]])
    found = r.repetition(expert_LNA, np.array([0, 0, 1, 1]))
    assert found == ([0.5], [1.0])
    assert math.isnan(r.repetition(expert_LNA, np.arange(4)).first[0])


def test_the_papers_table_by_hand():
    """Five layers, of which 0, 2 and 4 are told, and three pairs of neighbours, whose earlier ones are a number and two
    words. The last pair is alike everywhere; the others in each layer as it says."""
    same, other, apart = [[0, 1], [0, 2]], [[1, 0], [2, 1]], [[0, 1], [2, 3]]
    pairs = [(same, other), (same, same), (apart, apart), (other, other), (same, same)]
    expert_LNA = np.array([[*first, *second, [3, 2], [3, 2]] for first, second in pairs])
    texts = [r.Text("py", [1, 2, 3, 4], ["number", "word", "word", "number"]), r.Text("md", [5, 6], ["word", "word"])]
    found = r.summarise(texts, expert_LNA, np.array([0, 0, 1, 1, 2, 2]), 8)
    lines = list(takewhile(lambda line: "concentrated" not in line, table(found)))
    rows = {line[:22].strip(): line[22:].split() for line in lines}
    half, third = "50.0%", "66.7%"
    assert rows["chance"] == ["12.5%"] * 3 + ["46.4%"] * 3
    assert rows["number"] == ["100.0%", "0.0%", "100.0%", "100.0%", "0.0%", "100.0%"]
    assert rows["word"] == [half, half, "100.0%", "100.0%", half, "100.0%"]
    assert rows["all"] == [third, "33.3%", "100.0%", "100.0%", "33.3%", "100.0%"]
    assert rows["language py"] == [half, "0.0%", "100.0%", "100.0%", "0.0%", "100.0%"]
    assert rows["language md"] == ["100.0%"] * 6
    assert sum("first or second choice" in line for line in lines) == 2
    assert any(line.split() == ["layer", "0", "layer", "2", "layer", "4"] * 2 for line in lines)


def test_a_group_without_neighbours_has_no_share():
    texts = [r.Text("py", [1, 2], ["word", "number"])]
    found = r.summarise(texts, np.array([[[0, 1], [1, 2]]]), np.zeros(2, int), 4)
    assert found["groups"]["number"]["repetition"] == {"first": [None], "any": [None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert any(line.split() == ["number", "-", "-"] for line in table(found))


def test_concentration():
    shares = np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(r.concentration(shares), [0, 1, 0.5], atol=1e-12)


def test_the_verb(whole, tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.md"]
    files[0].write_text("def f(x):\n    return x + 12\n" * 20)
    files[1].write_text("A page about 7 functions.\n" * 20)
    words = [
        "report",
        "routing",
        str(whole[0]),
        *map(str, files),
        "--pictures",
        str(tmp_path / "out"),
        "--window",
        "32",
    ]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(next(line for line in done.output.splitlines() if line.startswith("{")))
    groups = found["groups"]
    assert {"all", "keyword", "identifier", "word", "number", "language py", "language md"} <= set(groups)
    kinds = [groups[kind]["tokens"] for kind in r.KINDS if kind in groups]
    assert sum(kinds) == found["tokens"] == groups["language py"]["tokens"] + groups["language md"]["tokens"]
    for group in groups.values():
        np.testing.assert_allclose(np.sum(group["share"], axis=1), 1, atol=1e-3)
    for name in ("share", "repetition"):
        assert np.ptp(imread(tmp_path / "out" / f"routing_{name}.png")) > 0.5
    told = CliRunner().invoke(app, words).output
    assert "first or second choice" in told
    assert "by the kind of the earlier token" in told
    assert "step 6: loss" in CliRunner().invoke(app, ["report", str(whole[0])]).output
