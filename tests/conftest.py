"""Fixtures that all tests share. One Ray cluster serves the whole run; never `ray stop` it."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Eight logical CPUs, reachable from this machine only."""
    import ray

    # In its default, token, mode a local cluster writes ~/.ray/auth_token.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "disabled")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=8,
            num_gpus=0,
            object_store_memory=400 * 2**20,
            include_dashboard=True,  # Train's clean-up asks it which trials live
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            yield
        finally:
            ray.shutdown()
