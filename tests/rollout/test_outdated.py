"""Servers whose weights are not a run's, whatever they call them."""

from megatron_rl.rollout.health import Outdated, Quarantined
from megatron_rl.rollout.pool import Pool
from tests.rollout.talk import talk
from tests.rollout.test_pool import until, with_pool
from tests.servers import TinyServer


def test_who_missed_the_first_weights_does_not_have_them(tiny_server: TinyServer) -> None:
    """Though it calls its own by the same number: it was away, or is new."""

    async def miss(pool: Pool) -> None:
        (worker,) = pool.fleet.workers.values()
        worker.become(Quarantined("away"))
        async with pool.fleet.paused(0):
            pass
        await until(worker, Outdated)
        pool.fleet.leave(worker.url)
        await until(pool.fleet.join(worker.url), Outdated)

    talk(tiny_server, lambda client: client.update_from_disk(str(tiny_server.other), 0))
    with_pool(tiny_server, miss)
