"""M2DPipeline gives the pixels of `m2d generate`, also where M2D is not installed."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import m2d
from m2d.data.decode import decode_resized
from m2d.diffusion.settings import SamplingSettings
from m2d.export.export import conditioning_of
from m2d.export.pipeline import square
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.generation.settings import GenerateConfig
from m2d.models.checkpoint import load_checkpoint

HERE = Path(__file__).parent


def generated(folder: Path, reference: Path | None = None) -> np.ndarray:
    """What `generate --classes MEL,DF --num_samples 3 --steps 5 --seed 5` draws, class after class."""
    plan = standard_plan({"MEL": 3, "DF": 3}, run_seed=5, sampling=SamplingSettings(steps=5), feature="prior")
    rows = sorted(rows_of(plan), key=lambda row: row.label, reverse=True)
    if reference is not None:
        rows = [replace(row, mode="image2image", reference=str(reference), strength=0.6) for row in rows]
    return Generator(load_checkpoint(folder), device="cpu").generate(rows)


@pytest.fixture(scope="module")
def without_m2d(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Pixels of all exports, drawn by a process that has diffusers and not m2d."""
    folder = tmp_path_factory.mktemp("elsewhere")
    folders = [str(exports / kind) for kind in ("kl", "linear", "residual")]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-P", str(HERE / "drawn.py"), str(folder / "pixels.npz"), *folders]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "pixels.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "linear", "residual"])
def test_without_m2d_an_export_draws_the_same_pixels(without_m2d: Any, exports: Path, kind: str) -> None:
    np.testing.assert_array_equal(without_m2d[f"{kind}/noise"], generated(exports / kind))
    np.testing.assert_array_equal(without_m2d[f"{kind}/image"], generated(exports / kind, exports / "start.png"))
    assert len(np.unique(without_m2d[f"{kind}/noise"].reshape(6, -1), axis=0)) == 6


@pytest.fixture(scope="module")
def pipe(experiment: Path) -> Any:
    """Of a checkpoint that was not exported."""
    loaded = m2d.M2DPipeline.from_pretrained(str(experiment / "checkpoints" / "linear"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_where_m2d_is_any_checkpoint_is_a_pipeline(pipe: Any, experiment: Path) -> None:
    images = pipe(["MEL", "DF"], 3, num_inference_steps=5, generator=seeded(), batch_size=4).images
    pixels = np.stack([np.asarray(image) for image in images])
    assert np.abs(pixels.astype(int) - generated(experiment / "checkpoints" / "linear")).max() <= 1  # other batches


def test_its_defaults_are_those_of_generate(pipe: Any) -> None:
    defaults = {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items()}
    sampling, generate = SamplingSettings(), GenerateConfig(checkpoint="one")
    for name in ("solver", "guidance_scale", "guidance_interval"):
        assert defaults[name] == getattr(sampling, name)
    for name in ("strength", "feature_temperature", "batch_size"):
        assert defaults[name] == getattr(generate, name)
    assert defaults["num_inference_steps"] == sampling.steps


def test_a_generator_that_was_used_gives_other_images(pipe: Any) -> None:
    generator = seeded()
    first, second, again = (
        pipe("MEL", num_inference_steps=2, generator=one, output_type="pt").images
        for one in (generator, generator, seeded())
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_output_types_show_the_same_image(pipe: Any) -> None:
    of = {
        kind: pipe("MEL", num_inference_steps=2, generator=seeded(), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert of["pt"].shape == (1, 3, 16, 16)
    assert of["latent"].shape == (1, 4, 8, 8)
    np.testing.assert_array_equal(of["np"][0], of["pt"][0].permute(1, 2, 0).numpy())
    assert np.abs(np.asarray(of["pil"][0]) - 255 * of["np"][0]).max() <= 0.501
    assert pipe("MEL", num_inference_steps=1, return_dict=False)[0][0].size == (16, 16)


def test_a_callback_sees_each_step_and_may_stop(pipe: Any) -> None:
    seen: list[tuple[int, float, torch.Tensor]] = []

    def look(of: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((step, float(t), tensors["latents"]))
        of._interrupt = step == 2

    stopped = pipe("MEL", num_inference_steps=4, callback_on_step_end=look, output_type="latent").images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    np.testing.assert_allclose([t for _, t, _ in seen], [0.75, 0.5, 0.25])
    assert torch.equal(stopped, seen[-1][2])


def test_times_are_shifted_as_training_s_were(experiment: Path) -> None:
    """Those after each of 4 steps, with shift 3: eq. 23 of Stable Diffusion 3 of 3/4, 2/4, 1/4 and 0."""
    checkpoint = load_checkpoint(experiment / "checkpoints" / "linear")
    checkpoint = replace(checkpoint, info=replace(checkpoint.info, config={"schedule": {"time_shift": 3.0}}))
    conditioning = conditioning_of(checkpoint)
    pipe = m2d.M2DPipeline(checkpoint.denoiser.unet, checkpoint.autoencoder.vae, conditioning)
    pipe.set_progress_bar_config(disable=True)
    times: list[float] = []

    def look(of: Any, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        times.append(float(t))

    steps: dict[str, Any] = {"num_inference_steps": 4, "callback_on_step_end": look}
    (drawn,) = pipe("MEL", generator=seeded(), **steps).images
    np.testing.assert_allclose(times, [0.9, 0.75, 0.5, 0.0], atol=1e-7)
    plan = standard_plan({"MEL": 1}, run_seed=5, sampling=SamplingSettings(steps=4), feature="prior")
    np.testing.assert_array_equal(np.asarray(drawn), Generator(checkpoint, device="cpu").generate(rows_of(plan))[0])


def test_at_strength_0_an_image_is_its_reconstruction(pipe: Any, experiment: Path, exports: Path) -> None:
    image = Image.open(exports / "start.png")
    (drawn,) = pipe("NV", image=image, strength=0.0).images
    generator = Generator(load_checkpoint(experiment / "checkpoints" / "linear"), device="cpu")
    expected = generator.decode(generator.encode([str(exports / "start.png")]))[0]
    np.testing.assert_array_equal(np.asarray(drawn), expected)


def test_an_image_is_cut_and_resized_as_training_does_it(exports: Path) -> None:
    encoded = (exports / "start.png").read_bytes()
    expected = decode_resized(encoded, 16, max_pixels=10**6)
    np.testing.assert_array_equal(square(Image.open(exports / "start.png"), 16), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"classes": ["MEL", "WART"]}, "WART"),
        ({"classes": []}, "at least one image"),
        ({"classes": "MEL", "strength": 2.0}, "strength"),
        ({"classes": "BCC"}, "no training image was of"),
        ({"classes": "MEL", "feature": "own"}, "feature is own"),
    ],
)
def test_what_cannot_work_is_refused(pipe: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pipe(**arguments)


def test_a_class_without_training_images_is_drawn_by_the_class_alone(pipe: Any) -> None:
    assert len(pipe("BCC", feature="none", num_inference_steps=1).images) == 1
