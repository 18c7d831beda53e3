"""A few kills of the soak, which `python tests/soak.py` goes on with; and what single ones must not lose."""

from soak import soak


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, capsys):
    violations = soak(tmp_path, kills=5, processes=2, seed=35)
    told = capsys.readouterr().out
    assert not violations
    for place in ("saving", "pruning", "validation", "step", "finish"):
        assert f" {place} " in told, told
