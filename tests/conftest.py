"""What tests share: real ranks, started at most once."""

from collections.abc import Iterator

import pytest

from tests.parallel.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    ranks = Cluster()
    yield ranks
    ranks.close()
