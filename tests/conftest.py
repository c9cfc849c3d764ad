"""What tests share: real ranks and a real server, each started at most once."""

from collections.abc import Iterator

import pytest

from tests.parallel.cluster import Cluster
from tests.servers import tiny_models, tiny_server

__all__ = ["tiny_models", "tiny_server"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    ranks = Cluster()
    yield ranks
    ranks.close()
