"""A tiny checkpoint, for the autoencoder floor and for provenance."""

from dataclasses import replace

import pytest
from tiny_checkpoint import make_checkpoint, make_prior

from m2d.models.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def prior_checkpoint() -> Checkpoint:
    """With a feature prior of two classes."""
    return replace(make_checkpoint(), prior=make_prior({"DF": 30, "MEL": 40}))
