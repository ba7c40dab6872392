"""What shapes the pixels of a run, in one record: its hash names the output folder, and its text guards it."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from m2d.generation.settings import Feature, GenerateConfig
from m2d.models.settings import Precision


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that shapes a run's images, and nothing else: two runs share a folder only if these are equal.

    How many images there are and how they are batched is not in it, so that a run can ask for more. Where the input
    images or a plan that somebody edited decide, `plan` holds the digest of all rows, and more rows go elsewhere.
    """

    checkpoint: str  # sha256
    seed: int
    solver: str
    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    precision: str
    feature: str
    feature_temperature: float | None  # None where no feature is drawn
    mode: str = "standard"
    format: str = "folder"
    gates: dict[str, Any] | None = None  # what is checked, with which reference; None: every image is kept
    balance: dict[str, Any] | None = None  # the target and the hash of the catalog whose images it counts
    plan: str | None = None  # sha256 over the rows, input images by their content

    @classmethod
    def of(
        cls,
        config: GenerateConfig,
        *,
        checkpoint_sha256: str,
        precision: Precision,
        feature: Feature,
        gates: dict[str, Any] | None = None,
        balance: dict[str, Any] | None = None,
        plan: str | None = None,
    ) -> Self:
        """The part of a run's settings that shapes images; `precision` and `feature` are those decided, never None."""
        low, high = config.guidance_interval
        return cls(
            checkpoint=checkpoint_sha256,
            seed=config.seed,
            solver=config.solver,
            steps=config.steps,
            guidance_scale=float(config.guidance_scale),  # 2 and 2.0 are one recipe
            guidance_interval=(float(low), float(high)),
            precision=precision,
            feature=feature,
            feature_temperature=float(config.feature_temperature) if feature == "prior" else None,
            mode="plan" if config.plan else config.mode,
            format=config.format,
            gates=gates,
            balance=balance,
            plan=plan,
        )

    @property
    def hash(self) -> str:
        """First ten hex digits of a SHA-256 over the fields."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:10]

    def to_json(self) -> str:
        """One line, keys sorted: equal recipes give equal text."""
        return json.dumps(asdict(self), sort_keys=True)


def default_output(checkpoint_path: str, recipe: Recipe) -> Path:
    """<experiment>/generated_images/<hash>."""
    return experiment_of(checkpoint_path) / "generated_images" / recipe.hash


def experiment_of(checkpoint_path: str) -> Path:
    """The folder that holds checkpoints/, or that of the checkpoint where it stands alone."""
    path = Path(os.path.abspath(checkpoint_path))
    return next((parent.parent for parent in path.parents if parent.name == "checkpoints"), path.parent)
