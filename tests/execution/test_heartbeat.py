"""Who counts as dead: by watching, never by comparing clocks."""

from datetime import timedelta

from agent_server.domain.base import utcnow
from agent_server.execution.heartbeat import Watch

NOW = utcnow()


def test_a_node_is_dead_when_its_beat_stood_still_for_a_lease() -> None:
    watch = Watch(2.0)
    for second in range(3):
        assert watch.dead({"a": NOW, "b": NOW + timedelta(seconds=second)}, float(second)) == (
            {"a": NOW} if second >= 2 else {}
        )


def test_a_clock_that_is_an_hour_off_kills_nobody() -> None:
    watch = Watch(2.0)
    for second in range(10):
        beat = NOW - timedelta(hours=1) + timedelta(seconds=second)
        assert watch.dead({"behind": beat}, float(second)) == {}


def test_who_was_frozen_itself_watches_anew_before_it_judges() -> None:
    watch = Watch(2.0)
    assert watch.dead({"a": NOW}, 0.0) == {}
    assert watch.dead({"a": NOW}, 3600.0) == {}
    assert watch.dead({"a": NOW}, 3601.0) == {}
    assert watch.dead({"a": NOW}, 3602.0) == {"a": NOW}
