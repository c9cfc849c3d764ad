"""Who works on what: groups keep together while there is room, nobody is given more than he can hold."""

import random

from megatron_rl.rollout import dispatch
from megatron_rl.rollout.dispatch import Capacity, Desk, Homes


def desks(count: int, requests: int = 8, tokens: float = 1000.0) -> dict[str, Desk]:
    return {str(number): Desk(Capacity(requests, tokens)) for number in range(count)}


def give(homes: Homes, servers: dict[str, Desk], group: str, weight: int = 10) -> str | None:
    chosen = homes.choose(group, servers.items(), weight)
    if chosen is not None:
        servers[chosen].take(weight)
    return chosen


def test_a_group_shares_a_server_and_groups_spread() -> None:
    homes, servers = Homes(), desks(3)
    places = {group: [give(homes, servers, group) for _ in range(2)] for group in "abcdef"}
    assert all(first == second for first, second in places.values())
    assert sorted(desk.requests for desk in servers.values()) == [4, 4, 4]


def test_a_full_home_sends_to_the_least_loaded() -> None:
    homes, servers = Homes(), desks(3, requests=2)
    servers["2"].take(10)
    assert [give(homes, servers, "a") for _ in range(5)] == ["0", "0", "1", "1", "2"]
    assert give(homes, servers, "a") is None


def test_tokens_bound_as_requests_do_but_a_free_server_takes_anything() -> None:
    homes, servers = Homes(), desks(1, tokens=100.0)
    assert give(homes, servers, "a", 5000) == "0"
    assert give(homes, servers, "a", 1) is None
    servers["0"].finish(5000)
    assert [give(homes, servers, "a", 40) for _ in range(3)] == ["0", "0", None]


def test_nobody_there() -> None:
    assert Homes().choose("a", [], 1) is None


def test_bounds_hold_whatever_comes() -> None:
    dice = random.Random(0)
    homes, servers = Homes(), desks(4, requests=5, tokens=300.0)
    working: list[tuple[str, int]] = []
    for _ in range(3000):
        if working and dice.random() < 0.5:
            name, weight = working.pop(dice.randrange(len(working)))
            servers[name].finish(weight)
        else:
            weight = dice.randint(1, 120)
            chosen = give(homes, servers, str(dice.randrange(20)), weight)
            assert chosen is not None or not any(desk.has_room(weight) for desk in servers.values())
            if chosen is not None:
                working.append((chosen, weight))
        assert all(desk.requests <= 5 and (desk.tokens <= 300 or desk.requests == 1) for desk in servers.values())
    for name, weight in working:
        servers[name].finish(weight)
    assert all((desk.requests, desk.tokens, desk.load) == (0, 0, 0) for desk in servers.values())


def test_memory_of_homes_is_bounded() -> None:
    homes, servers = Homes(), desks(2)
    for number in range(dispatch.REMEMBERED + 100):
        homes.choose(str(number), servers.items(), 1)
    assert len(homes._homes) == dispatch.REMEMBERED
