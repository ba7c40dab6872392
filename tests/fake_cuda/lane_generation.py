"""Generation on the GPU: every preset with each solver and mode, and the extractors."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda.lane import CUDA, host_waits, preset
from tiny_references import write_photograph

from m2d.diffusion.settings import SOLVERS
from m2d.generation.generator import Generator
from m2d.generation.plan import PlanRow
from m2d.models.checkpoint import Checkpoint, CheckpointInfo
from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.extractors.panderm import SIZES, PanDerm
from m2d.models.settings import Precision
from m2d.training.networks import build_networks


def checkpoint_of(name: str) -> Checkpoint:
    config = preset(name)
    networks = build_networks(config, torch.device("cpu"), cached_dim=1280)
    info = CheckpointInfo(
        step=1, stage="joint", image_size=config.data.image_size, feature_extractor="efficientnet-lite0",
        feature_dim=1280, num_patches=49, conditioning=vars(config.conditioning), config={}
    )  # fmt: skip
    return Checkpoint("here", "0" * 64, info, networks.autoencoder.eval(), networks.denoiser.eval())


@pytest.fixture(scope="module", params=["demo", "ham-64", "ham-128", "isic-256"])
def generator(request: pytest.FixtureRequest) -> Generator:
    """In the precision it picks on an H100."""
    return Generator(checkpoint_of(request.param), device="cuda", batch_size=4)


def row(number: int = 0, **changes: Any) -> PlanRow:
    values: dict[str, Any] = {
        "id": f"MEL_{number}", "label": "MEL", "index": number, "seed": number, "solver": "euler", "steps": 3,
        "guidance_scale": 2.0, "guidance_low": 0.2, "guidance_high": 0.9
    }  # fmt: skip
    return PlanRow(**values | changes)


@pytest.fixture
def finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mock computes no numbers; take them as finite."""
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones(x.shape, dtype=torch.bool))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_step_never_waits_for_the_host(generator: Generator, solver: str) -> None:
    """Eight steps wait no more often than four do, nor do eight of which a row leaves its batch after the second."""
    places = []
    for steps, watch in ((4, None), (8, None), (8, lambda step, clean: [1] if step == 2 else None)):
        with host_waits() as waits:
            generator.denoise([row(number, solver=solver, steps=steps) for number in range(2)], watch)
        places.append(waits)
    assert places[1] - places[0] == places[2] - places[0] == Counter()


@pytest.mark.usefixtures("finite")
def test_every_mode_gives_images(generator: Generator, tmp_path: Path) -> None:
    """From noise, from an image (encode), between two images; each decoded."""
    side = generator.checkpoint.image_size
    photograph = str(write_photograph(tmp_path / "a.png", 1, (side, side)))
    rows = [
        row(0),
        row(1, mode="image2image", reference=photograph, strength=0.5),
        row(2, mode="image2image", reference=photograph, strength=0.0),
        row(3, mode="interpolate", reference=photograph, reference_b=photograph, position=0.5, seed_b=9),
    ]
    images = generator.generate(rows)
    assert (images.shape, images.dtype) == ((4, side, side, 3), np.uint8)


@pytest.mark.usefixtures("finite")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_extractor_guides_in_every_precision(precision: Precision, tmp_path: Path) -> None:
    photograph = str(write_photograph(tmp_path / "a.png", 1, (48, 48)))
    extractor = load_feature_extractor("efficientnet-lite0", input_size=96)
    generator = Generator(checkpoint_of("demo"), device="cuda", mixed_precision=precision, extractor=extractor)
    images = generator.generate([row(reference=photograph, feature="reference")])
    assert images.shape == (1, 48, 48, 3)
    assert generator.features(images).shape == (1, 1280)


def blank_panderm(name: str, size: int) -> FeatureExtractor:
    """PanDerm by its shapes, without its weights."""
    return PanDerm(name, {key: torch.zeros(shape) for key, shape in SIZES[name].shapes().items()}, size)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "size", "patches", "width"),
    [
        ("efficientnet-lite0", 224, 7 * 7, 1280),
        ("efficientnet-lite1", 256, 8 * 8, 1280),
        ("panderm-base", 224, 14 * 14, 768),
        ("panderm-large", 224, 14 * 14, 1024),
        ("panderm-large", 256, 16 * 16, 1024),
    ],
)
def test_an_extractor_never_waits_for_the_host(name: str, size: int, patches: int, width: int, autocast: bool) -> None:
    panderm = name.startswith("panderm")
    extractor = blank_panderm(name, size) if panderm else load_feature_extractor(name, input_size=size)
    extractor.to(CUDA)
    images = torch.zeros(2, 3, 100, 80, dtype=torch.uint8, device=CUDA)
    with host_waits() as waits, torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        features = extractor(extractor.preprocess(images))
    assert waits == Counter()
    assert (features.cls.shape, features.patches.shape) == ((2, width), (2, patches, width))
    assert (features.cls.device, features.patches.device) == (CUDA, CUDA)
