"""Flags that change the joint step's graph: every pair of their values meets in some combination, and each one learns.

Networks are those of tests/tiny_run.py, built from the flags as a run builds them. torch.compile's tracer runs,
its generator of code, which takes minutes, does not.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_networks import moved, random_batch, state_of
from tiny_run import TINY
from torch import Tensor

from m2d.cli import parse
from m2d.models.extractors import Features
from m2d.models.perceptual import FeatureDistance, ProjectedDiscriminator
from m2d.training.batch import ImageBatch, extract
from m2d.training.networks import Networks, build_networks
from m2d.training.settings import TrainConfig
from m2d.training.step import JointStep, StepConfig

CPU = torch.device("cpu")
WARMUP = 1
IN_WARMUP, FIRST, SECOND = 0, 1, 2  # steps: the VAE alone, the first with the U-Net, and one that may leave the VAE out
# The first value of each is the plain one. In this order four combinations compile, which takes seconds each.
FLAGS: dict[str, tuple[Any, ...]] = {
    "compile": (False, True),
    "schedule.vae_every_k_steps": (1, 2),
    "step": (FIRST, IN_WARMUP, SECOND),
    "loss_weights.alignment_vae": (0.1, 0.0),
    "alignment.tap": ("middle", "down_1", "up_0", "up_1"),
    "unet.gradient_checkpointing": (False, True),
    "gradient_accumulation_steps": (1, 2),
    "mixed_precision": ("no", "bf16", "fp16"),
    "autoencoder.gradient_checkpointing": (False, True),
    "features": ("extracted", "cached"),
    "channels_last": (False, True),
    "alignment.spatial_norm": (0.0, 0.6),
    "projector.kind": ("mlp", "conv3x3"),
    "discriminator.enabled": (False, True),
    "discriminator.kind": ("patch", "projected"),
}
PLAIN = {flag: values[0] for flag, values in FLAGS.items()}
Combination = dict[str, Any]


def pairs_of(combination: Combination) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}


def pairwise(flags: dict[str, tuple[Any, ...]]) -> list[Combination]:
    """Few combinations in which every two values of two flags meet; greedy, so not the fewest, and always the same.

    Each begins with a pair that is still missing. The other flags follow in their order, each with the value that
    completes most missing pairs; of equals the first.
    """
    missing: dict[frozenset[tuple[str, Any]], None] = {}  # a set that keeps its order
    for one, other in itertools.combinations(flags, 2):
        missing |= {frozenset([(one, a), (other, b)]): None for a in flags[one] for b in flags[other]}
    found = []
    while missing:
        chosen = dict(next(iter(missing)))
        for flag, values in flags.items():
            if flag not in chosen:
                gains = [sum(frozenset([(flag, v), item]) in missing for item in chosen.items()) for v in values]
                chosen[flag] = values[gains.index(max(gains))]
        found.append({flag: chosen[flag] for flag in flags})
        missing = {pair: None for pair in missing if pair not in pairs_of(chosen)}
    return found


COMBINATIONS = pairwise(FLAGS)


def name_of(combination: Combination) -> str:
    return ",".join(f"{flag}={value}" for flag, value in combination.items() if value != PLAIN[flag]) or "plain"


def test_every_two_values_of_two_flags_meet() -> None:
    met = set().union(*map(pairs_of, COMBINATIONS))
    everything = itertools.product(*(itertools.product([flag], values) for flag, values in FLAGS.items()))
    assert met == {frozenset(pair) for items in everything for pair in itertools.combinations(items, 2)}


@pytest.fixture(autouse=True)
def nothing_stays_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Case:
    """A tiny run with the flags of a combination."""

    def __init__(self, combination: Combination, backend: str = "eager") -> None:
        flags = {
            "feature_extractor.input_size": 64,  # 2 x 2 patches
            "conditioning.feature_dropout": 0.5,
            "discriminator.channels": 8,
            "discriminator.layers": 1,
            "discriminator.start_step": 0,
        } | {flag: value for flag, value in combination.items() if flag not in ("features", "step")}
        self.config: TrainConfig = parse("train", [*TINY, *(f"--{flag}={value}" for flag, value in flags.items())])
        self.networks: Networks = build_networks(self.config, CPU)
        torch.manual_seed(0)
        last = self.networks.denoiser.unet.conv_out.weight  # its zero start would stop gradients
        last.data.copy_(0.1 * torch.randn(last.shape))  # not in place: that would follow the memory's order
        extractor = self.networks.extractor
        assert extractor is not None
        self.batches = [
            random_batch(self.config, self.networks, seed, 2) for seed in range(self.config.gradient_accumulation_steps)
        ]
        if isinstance(self.networks.discriminator, ProjectedDiscriminator):
            self.networks.discriminator.adaptive_weight.fill_(1.0)  # as if measured in a step before
        perceptual = FeatureDistance(extractor)
        if combination["features"] == "cached":
            self.networks.extractor = None
            self.batches = [(with_features(batch, extractor), draws) for batch, draws in self.batches]
        self.step = JointStep(self.networks, perceptual, self._step_config(backend), CPU)
        self.number = combination["step"]

    def take_step(self) -> None:
        self.step(self.batches, self.number)

    def gradients(self) -> dict[str, Tensor]:
        """Those of a step, as they were added up for the update."""
        found: dict[str, Tensor] = {}
        for owner, module in self.networks.trained().items():
            for name, parameter in module.named_parameters():
                key = f"{owner}.{name}"
                parameter.register_post_accumulate_grad_hook(
                    lambda tensor, key=key: found.update({key: tensor.grad.detach().clone()})
                )
        self.take_step()
        return found

    def _step_config(self, backend: str) -> StepConfig:
        compiled = {"backend": backend} if self.config.compile else None
        kind = type("", (StepConfig,), {"compile": compiled})
        return kind(self.config, self.config.mixed_precision or "no", 100, WARMUP)  # type: ignore[no-any-return]


def with_features(batch: ImageBatch, extractor: Any) -> ImageBatch:
    """As the cache gives them, in fp16."""
    features = extract(extractor, batch.images.permute(0, 3, 1, 2))
    return ImageBatch(batch.images, batch.labels, Features(features.cls.half(), features.patches.half()))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_a_joint_step_with_any_two_flags_learns(combination: Combination) -> None:
    """What learns moves, what does not stays, and every number is finite."""
    case = Case(combination)
    before = state_of(case.networks)
    case.take_step()
    scalars = case.step.read_scalars()
    assert scalars.pop("skipped_steps") == 0
    assert [name for name, value in scalars.items() if not math.isfinite(value)] == []
    changed = moved(case.networks, before)
    vae_learns = combination["step"] != SECOND or combination["schedule.vae_every_k_steps"] == 1
    unet_learns = combination["step"] != IN_WARMUP
    some_of_the_vae = {"vae.encoder.conv_in.weight", "vae.quant_conv.weight", "vae.decoder.conv_out.weight"}
    assert changed["autoencoder"] & some_of_the_vae == (some_of_the_vae if vae_learns else set())
    assert vae_learns or changed["autoencoder"] == set()
    if combination["discriminator.enabled"]:
        first = {"patch": "stages.0.weight", "projected": "heads.0.0.weight"}[combination["discriminator.kind"]]
        assert (first in changed["discriminator"]) is vae_learns
        assert vae_learns or changed["discriminator"] == set()
    some_of_the_unet = {"unet.conv_in.weight", "unet.conv_out.weight", "conditioning.class_embedding.weight"}
    statistics = {"latent_norm.running_mean", "latent_norm.running_var"}
    assert changed["denoiser"] & (some_of_the_unet | statistics) == statistics | (
        some_of_the_unet if unet_learns else set()
    )
    assert unet_learns or changed["denoiser"] == statistics
    assert changed["projector"] == (set(before["projector"]) if unet_learns else set())
    aligned = vae_learns and unet_learns and combination["loss_weights.alignment_vae"] > 0
    assert ("loss/alignment_vae" in scalars) is aligned


# Group norms over pairs of numbers, which 8 channels have on maps of one cell, turn rounding into signs.
FULL = {**PLAIN, "discriminator.enabled": True, "discriminator.kind": "projected", "discriminator.channels": 64}


@functools.cache
def plain_gradients(tap: str) -> dict[str, Tensor]:
    return Case({**FULL, "alignment.tap": tap}).gradients()


@pytest.mark.parametrize(
    ("flags", "tap", "tolerance"),
    [
        (["unet.gradient_checkpointing"], "middle", 0.0),  # the same operations in the same order
        (["unet.gradient_checkpointing"], "up_1", 0.0),
        (["autoencoder.gradient_checkpointing"], "middle", 0.0),
        (["channels_last"], "middle", 1e-4),  # convolutions add up in another order
        # aot_eager takes some operations apart
        (["compile", "unet.gradient_checkpointing", "autoencoder.gradient_checkpointing"], "up_1", 1e-4),
    ],
)
def test_flags_of_memory_and_speed_leave_the_gradients_as_they_are(
    flags: list[str], tap: str, tolerance: float
) -> None:
    """float32, a joint step after the warm-up, every parameter; tolerance: of the largest number of its gradient."""
    plain = plain_gradients(tap)
    found = Case({**FULL, "alignment.tap": tap, **dict.fromkeys(flags, True)}, backend="aot_eager").gradients()
    assert plain.keys() == found.keys()
    largest = {name: gradient.abs().max().item() for name, gradient in plain.items()}
    error = {name: (found[name] - gradient).abs().max().item() for name, gradient in plain.items()}
    assert {name: error[name] / largest[name] for name in plain if not error[name] <= tolerance * largest[name]} == {}
