"""A tiny real U-Net and VAE: seconds to build, 16-pixel images."""

from dataclasses import replace

import pytest
from tiny_checkpoint import make_checkpoint, make_prior
from tiny_references import SixFeatures

from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor


@pytest.fixture(scope="session")
def extractor() -> FeatureExtractor:
    """Fits the tiny checkpoints."""
    return SixFeatures().eval()


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """Without a feature prior, as old ones are."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def prior_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a prior of four classes: DF has few images."""
    return replace(checkpoint, sha256="c0ffee" + 58 * "1", prior=make_prior({"BKL": 40, "DF": 5, "MEL": 40, "NV": 90}))
