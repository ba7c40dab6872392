"""A tiny real U-Net and VAE: seconds to build, 16-pixel images."""

from dataclasses import replace

import pytest
from tiny_checkpoint import make_checkpoint, make_prior
from tiny_references import SixFeatures

from m2d.generation.output import Recipe
from m2d.generation.plan import PlanRow
from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor

RECIPE = Recipe(
    checkpoint="ab" * 32, seed=0, solver="heun", steps=10, guidance_scale=1.5, guidance_interval=(0.0, 0.8),
    precision="no", feature="prior", feature_temperature=1.0,
)  # fmt: skip


def row(label: str = "MEL", index: int = 3, seed: int = 2**62 + 1) -> PlanRow:
    return PlanRow(
        id=f"{label}_{index:06d}", label=label, index=index, seed=seed, feature="prior", feature_temperature=1.0,
        solver="heun", steps=10, guidance_scale=1.5, guidance_low=0.0, guidance_high=0.8,
    )  # fmt: skip


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
