from benchmarks.timing import amounts, rates


def test_of_amounts_the_ratio_is_ours_over_theirs():
    ours, theirs = amounts("memory", "MB", {"ours": [3.0, 1.0, 2.0], "theirs": [8.0, 8.0, 9.0]}, "ours")
    assert (ours.least, ours.median, ours.most, ours.ratio) == (1, 2, 3, 1)
    assert theirs.ratio == 0.25


def test_a_rate_is_work_over_seconds():
    ours, theirs = rates("train", "tokens/s", 100, {"ours": [1.0, 2.0, 4.0], "theirs": [10.0, 5.0, 5.0]}, "ours")
    assert (ours.least, ours.median, ours.most) == (25, 50, 100)
    assert theirs.ratio == 2.5  # 50 over 100 / 5
