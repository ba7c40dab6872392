"""Samples of a run in progress, for its pictures and its measures: what jobs/generate.py would make of it now."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from m2d.classes import class_index
from m2d.diffusion.feature_prior import FeaturePrior
from m2d.diffusion.settings import SamplingSettings
from m2d.generation.generator import Generator, pick_feature
from m2d.generation.plan import rows_of, standard_plan
from m2d.models.checkpoint import Checkpoint, CheckpointInfo
from m2d.models.extractors import FeatureExtractor
from m2d.models.unet import Denoiser
from m2d.training.networks import build_extractor
from m2d.training.plan import RunPlan
from m2d.training.step import Networks


@dataclass(frozen=True)
class RunState:
    """A run's networks as they are at the moment, on their device."""

    plan: RunPlan
    networks: Networks
    averaged: Denoiser  # the U-Net that generates
    prior: FeaturePrior
    device: torch.device

    @property
    def sampling(self) -> SamplingSettings:
        """How samples are drawn while a run goes on."""
        settings = self.plan.config.telemetry
        return SamplingSettings(steps=settings.sample_steps, guidance_scale=settings.guidance_scale)

    def samples(self, info: CheckpointInfo, counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """counts[code] images of each class: uint8 [M, H, W, 3] and labels [M], from the same seeds each time.

        Raises an M2DError where the model gives no numbers, or the prior knows no image of a class, and torch's
        OutOfMemoryError where the run's batch size fits its step but not its samples.
        """
        # A copy: the generator lays weights out in memory as it likes, and the optimiser's moments would not follow.
        autoencoder = copy.deepcopy(self.networks.autoencoder)
        checkpoint = Checkpoint("this run", "", info, autoencoder, self.averaged, self.prior)
        table = standard_plan(
            counts, run_seed=self.plan.config.seed, sampling=self.sampling, feature=pick_feature(None, checkpoint)
        )
        rows = rows_of(table)
        generator = Generator(
            checkpoint,
            batch_size=self.plan.config.batch_size,
            device=str(self.device),
            mixed_precision=self.plan.precision,
        )
        return generator.generate(rows), np.array([class_index(row.label) for row in rows])

    def extractor(self) -> FeatureExtractor:
        """The run's, or where all its features are cached, one for the moment: generated images are in no cache."""
        if self.networks.extractor is not None:
            return self.networks.extractor
        state = torch.get_rng_state()  # building a network draws from it
        try:
            return build_extractor(self.plan.config.feature_extractor).to(self.device)
        finally:
            torch.set_rng_state(state)
