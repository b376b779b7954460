import itertools

from benchmarks.timing import amounts, interleave, rates


def test_of_amounts_the_ratio_is_ours_over_theirs():
    ours, theirs = amounts("memory", "MB", {"ours": [3.0, 1.0, 2.0], "theirs": [8.0, 8.0, 9.0]}, "ours")
    assert (ours.least, ours.median, ours.most, ours.ratio) == (1, 2, 3, 1)
    assert theirs.ratio == 0.25


def test_a_rate_is_work_over_seconds():
    ours, theirs = rates("train", "tokens/s", 100, {"ours": [1.0, 2.0, 4.0], "theirs": [10.0, 5.0, 5.0]}, "ours")
    assert (ours.least, ours.median, ours.most) == (25, 50, 100)
    assert theirs.ratio == 2.5  # 50 over 100 / 5


def test_a_timed_call_follows_calls_of_its_own(monkeypatch):
    """By a clock that goes on by 0.06 s a look: two calls before each that is timed, but in warming up one."""
    clock = itertools.count(step=0.06)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    called = []
    contenders = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = interleave(contenders, repeats=2, warm_up=1)
    assert "".join(called) == "ab" + 2 * "aaabbb"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}
