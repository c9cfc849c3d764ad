"""States of servers and the ways between them."""

import itertools
import logging

import pytest

from megatron_rl.rollout import health
from megatron_rl.rollout.client import Client
from megatron_rl.rollout.health import (
    WAYS,
    Asleep,
    Dead,
    Health,
    Healthy,
    ImpossibleTransition,
    Left,
    Outdated,
    Paused,
    Quarantined,
    Starting,
    Suspect,
    change,
)
from megatron_rl.rollout.worker import Worker

STATES: tuple[Health, ...] = (
    Starting(),
    Healthy(),
    Suspect(1, "why"),
    Quarantined("why"),
    Outdated("why"),
    Paused(),
    Asleep(),
    Dead("why"),
    Left(),
)


@pytest.mark.parametrize(("old", "new"), list(itertools.product(STATES, STATES)), ids=health.name)
def test_only_the_ways_there_are(old: Health, new: Health) -> None:
    if type(new) in WAYS[type(old)]:
        assert change("http://a", old, new) is new
    else:
        with pytest.raises(ImpossibleTransition, match=f"http://a cannot become {health.name(new)} from {health.name(old)}"):
            change("http://a", old, new)


def test_who_has_left_stays_away_and_everybody_can_leave() -> None:
    assert WAYS[Left] == ()
    assert all(Left in ways for state, ways in WAYS.items() if state is not Left)


def test_what_is_only_reached_on_purpose() -> None:
    """Work is given to none but those found well; nobody comes to life again but by a start."""
    assert {state for state, ways in WAYS.items() if Healthy in ways} == {Starting, Suspect, Quarantined, Outdated, Paused}
    assert WAYS[Dead] == (Starting, Left)
    assert Healthy not in WAYS[Asleep] and Suspect not in WAYS[Asleep]


def test_changes_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        change("http://a", Healthy(), Suspect(2, "it stuttered"))
    (record,) = caplog.records
    assert record.getMessage() == "server http://a: healthy -> suspect (it stuttered)"
    assert (record.levelname, record.__dict__["server"], record.__dict__["new"]) == ("WARNING", "http://a", "suspect")


def make_worker(forgiven: int = 2) -> Worker:
    worker = Worker(Client("http://a", 10), lambda: None, forgiven)
    worker.become(Healthy())
    return worker


def test_requests_that_fail_together_count_once() -> None:
    worker = make_worker()
    for _ in range(50):
        worker.request_failed("cut off")
    assert worker.health == Suspect(1, "cut off")


def test_strikes_are_forgiven_by_a_whole_response_and_by_nothing_else() -> None:
    worker = make_worker(forgiven=2)
    for _ in range(2):
        worker.request_failed("babble")
        worker.become(Healthy())  # a probe went well
    worker.request_failed("babble")
    assert isinstance(worker.health, Quarantined) and "3 failures in a row" in worker.health.reason
    worker.become(Healthy())
    worker.request_failed("babble")  # back from quarantine there is no more forgiveness
    assert isinstance(worker.health, Quarantined) and worker.rests == 2
    worker.become(Healthy())
    worker.request_done()
    worker.request_failed("babble")
    assert isinstance(worker.health, Suspect)


def test_failures_say_nothing_about_a_server_that_gets_no_work() -> None:
    for state in (Paused(), Asleep(), Left()):
        worker = make_worker()
        if isinstance(state, Asleep):
            worker.become(Paused())
        worker.become(state)
        worker.request_failed("cut off")
        worker.probe_failed("silent")
        assert worker.health == state and worker.strikes == 0
