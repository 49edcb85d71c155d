"""The ranks of a world are started once, and again after an error; nothing waits for a rank that does not end."""

import pytest
import world


@pytest.fixture(scope="module")
def small_world():
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(world, "GRACE_SECONDS", 0.5)
        ranks = world.World(2)
        yield ranks
        ranks.close()
        assert ranks.ranks == []


@pytest.mark.parametrize(
    ("fault", "args", "timeout", "message"),
    [
        ("fail_in_second", (), 60, r"(?s)rank_faults:fail_in_second in 2 ranks\nrank 1: .*KeyError: 'lost'"),
        ("end_second", (), 60, "rank 1: the process ended"),
        ("sleep", (60,), 0.2, "rank 0 did not end\nrank 1 did not end"),
        ("missing", (), 60, "has no attribute 'missing'"),
    ],
)
def test_an_error_in_a_rank_ends_the_world_and_the_next_call_starts_another(small_world, fault, args, timeout, message):
    def pids():
        (first, total), (second, same) = small_world.run("rank_faults:process_and_sum", 5)
        assert total == same == 11
        return {first, second}

    started = pids()
    assert len(started) == 2
    assert pids() == started
    with pytest.raises(world.RankError, match=message):
        small_world.run(f"rank_faults:{fault}", *args, timeout=timeout)
    assert not pids() & started


def test_what_a_call_changes_is_undone(world_of_two):
    for _ in range(2):
        assert world_of_two.run("rank_faults:patch") == [True, True]
