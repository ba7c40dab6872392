"""The generator draws the same image for a row whatever stands beside it in the batch."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from tiny_references import SixFeatures, write_photographs
from torch.utils._python_dispatch import TorchDispatchMode

from m2d.classes import ISIC7
from m2d.diffusion.settings import SOLVERS, SamplingSettings, Solver
from m2d.diffusion.solver import GuidedVelocity, solve
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.generation import generator as generator_module
from m2d.generation.generator import Generator, noise_for, pick_device, pick_feature, start_of
from m2d.generation.plan import PlanRow, image2image_plan, interpolation_plan, rows_of, seed_of, standard_plan, table_of
from m2d.generation.references import Pasted, Reference, read_reference, read_references
from m2d.generation.settings import Feature
from m2d.models.autoencoder import coded_at_once, to_uint8
from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor
from m2d.models.unet import TIME_SCALE

SAMPLING = SamplingSettings(steps=4, guidance_scale=2.0)
ByClass = dict[str, tuple[Reference, ...]]


def rows_for(counts: dict[str, int], feature: Feature = "none", **settings: Any) -> list[PlanRow]:
    temperature = settings.pop("feature_temperature", 1.0)
    sampling = replace(SAMPLING, **settings)
    plan = standard_plan(counts, run_seed=0, sampling=sampling, feature=feature, feature_temperature=temperature)
    return rows_of(plan)


ROWS = rows_for({"DF": 4, "MEL": 4})
LATENT_MEAN = torch.tensor([0.5, -1.0, 0.0, 2.0]).view(1, 4, 1, 1)  # of make_checkpoint
LATENT_STD = torch.tensor([4.0, 0.25, 1.0, 2.0]).add(1e-4).sqrt().view(1, 4, 1, 1)
PRIOR_ROWS = rows_for({"DF": 4, "MEL": 4}, "prior")


def images_of(
    checkpoint: Checkpoint,
    rows: Sequence[PlanRow] = ROWS,
    batch_size: int = 8,
    extractor: FeatureExtractor | None = None,
) -> np.ndarray:
    return Generator(checkpoint, batch_size=batch_size, device="cpu", extractor=extractor).generate(rows)


def levels_apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second.astype(int)).max())


@pytest.fixture
def contexts(prior_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], Any]]:
    """(labels, feature) of every context that the denoiser was asked for."""
    asked: list[tuple[list[int], Any]] = []
    real = prior_checkpoint.denoiser.conditioning.forward

    def recording(labels: torch.Tensor, cls: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
        asked.append((labels.tolist(), cls))
        return real(labels, cls, **more)

    monkeypatch.setattr(prior_checkpoint.denoiser.conditioning, "forward", recording)
    return asked


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> ByClass:
    """Three of DF and three of MEL."""
    folder = tmp_path_factory.mktemp("references")
    write_photographs(folder, {"DF": 3, "MEL": 3})
    return read_references(str(folder)).by_class


def from_images(
    references: ByClass, strength: float, feature: Feature = "reference", *, num_samples: int = 4, **settings: Any
) -> list[PlanRow]:
    drawn = {"run_seed": 0, "sampling": replace(SAMPLING, **settings), "feature": feature}
    return rows_of(image2image_plan(references, num_samples=num_samples, strength=strength, **drawn))


def walks(references: ByClass, steps_between: int = 2, **settings: Any) -> list[PlanRow]:
    """From each MEL image to the next one."""
    a, b = {"MEL": references["MEL"][:2]}, {"MEL": references["MEL"][1:]}
    sampling = replace(SAMPLING, **settings)
    return rows_of(interpolation_plan(a, b, steps_between=steps_between, run_seed=0, sampling=sampling))


def as_standard(row: PlanRow, *, end: str = "a") -> PlanRow:
    """A standard row with the noise and the feature of one end of a walk, or of an image2image row."""
    seed, reference = (row.seed, row.reference) if end == "a" else (row.seed_b, row.reference_b)
    assert seed is not None
    alone = dict.fromkeys(("seed_b", "reference_b", "position", "strength", "group"))
    own = reference if row.feature == "reference" else None
    return replace(row, mode="standard", seed=seed, reference=own, **alone)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_the_batch_size(checkpoint: Checkpoint, solver: Solver) -> None:
    rows = rows_for({"DF": 4, "MEL": 4}, solver=solver)
    together, alone = images_of(checkpoint, rows), images_of(checkpoint, rows, batch_size=1)
    assert together.std() > 20, "flat images would make this test say nothing"
    # Convolutions of another batch size may add in another order: at most one grey level, where rounding tips.
    assert levels_apart(together, alone) <= 1


def every_kind(references: ByClass) -> list[PlanRow]:
    """Rows of all modes, features and two solvers, shuffled, each with an id of its own."""
    rows = [
        *ROWS,
        *PRIOR_ROWS,
        *rows_for({"NV": 2}, solver="heun"),
        *from_images(references, 0.0),
        *from_images(references, 0.6),
        *from_images(references, 0.6, "prior"),
        *from_images(references, 1.0, "none"),
        *walks(references),
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    return [replace(rows[place], id=f"row_{place}") for place in order]


def test_rows_of_all_kinds_may_be_mixed_and_come_back_in_their_order(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor
) -> None:
    rows = every_kind(references)
    together = images_of(prior_checkpoint, rows, 16, extractor)
    apart = np.concatenate([images_of(prior_checkpoint, rows[n : n + 1], 1, extractor) for n in range(0, 58, 4)])
    assert levels_apart(together[::4], apart) <= 1
    assert levels_apart(together, images_of(prior_checkpoint, rows[::-1], 7, extractor)[::-1]) <= 1


def test_batches_are_full_where_the_solver_s_settings_are_equal(
    prior_checkpoint: Checkpoint, references: ByClass
) -> None:
    """58 rows: 32 of unipc from noise, 2 of heun, 16 from t = 0.6, and 8 of strength 0, which no solver touches."""
    rows = every_kind(references)
    batches = Generator(prior_checkpoint, batch_size=10, device="cpu").batches(rows)
    assert sorted(place for batch in batches for place in batch) == list(range(58))
    assert sorted(map(len, batches)) == sorted([10, 10, 10, 2, 2, 10, 6, 8])


def test_the_drawn_feature_is_of_the_class_and_of_the_seed_of_its_image(
    prior_checkpoint: Checkpoint, contexts: list[tuple[list[int], Any]]
) -> None:
    images_of(prior_checkpoint, PRIOR_ROWS[:2])
    prior = prior_checkpoint.prior
    assert prior is not None
    labels = [ISIC7.index(row.label) for row in PRIOR_ROWS[:2]]
    noise = torch.stack([noise_for(seed_of(f"{row.seed}/feature"), (prior.noise_dim,)) for row in PRIOR_ROWS[:2]])
    (guided, feature), (null, null_feature) = contexts
    assert guided == labels
    assert torch.equal(feature, prior.sample(torch.tensor(labels), noise))
    assert null == [7, 7]
    assert null_feature is None


def test_at_temperature_zero_every_image_of_a_class_has_its_mean_feature(
    prior_checkpoint: Checkpoint, contexts: list[tuple[list[int], Any]]
) -> None:
    assert prior_checkpoint.prior is not None
    images_of(prior_checkpoint, rows_for({"DF": 4, "MEL": 4}, "prior", feature_temperature=0.0))
    labels, feature = contexts[0]
    assert torch.equal(feature, prior_checkpoint.prior.mean[labels])


def test_without_a_feature_a_prior_changes_nothing(checkpoint: Checkpoint, prior_checkpoint: Checkpoint) -> None:
    alone = images_of(prior_checkpoint)
    assert np.array_equal(alone, images_of(checkpoint))
    assert not np.array_equal(alone, images_of(prior_checkpoint, PRIOR_ROWS))


def test_the_feature_of_a_reference_is_that_of_training(
    prior_checkpoint: Checkpoint, references: ByClass, contexts: list[tuple[list[int], Any]]
) -> None:
    """The extractor of the image at the checkpoint's size, here written out by hand."""
    extractor = SixFeatures().eval()
    rows = from_images(references, 0.5)
    images_of(prior_checkpoint, rows, extractor=extractor)
    pixels = torch.stack([torch.from_numpy(read_reference(row.reference or "", 16)) for row in rows])
    standardized = (pixels.permute(0, 3, 1, 2).float() - 127) / 64
    cls = extractor.network(standardized).flatten(2).mean(dim=2)
    torch.testing.assert_close(contexts[0][1], cls)


def test_features_of_images_are_those_of_the_extractor(checkpoint: Checkpoint, extractor: FeatureExtractor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    found = Generator(checkpoint, batch_size=2, device="cpu", extractor=extractor).features(images)
    expected = extractor(extractor.preprocess(torch.from_numpy(images).permute(0, 3, 1, 2))).cls
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert Generator(checkpoint, device="cpu", extractor=extractor).features(images[:0]).shape == (0, 6)


def posterior_means(checkpoint: Checkpoint, rows: Sequence[PlanRow]) -> torch.Tensor:
    """Of the VAE, of the rows' references; not normalised."""
    pixels = torch.stack([torch.from_numpy(read_reference(row.reference or "", 16)) for row in rows])
    with torch.no_grad():
        encoded = checkpoint.autoencoder.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    return encoded.latent_dist.mean


def test_image2image_at_strength_0_is_the_reconstruction(checkpoint: Checkpoint, references: ByClass) -> None:
    rows = from_images(references, 0.0, "none", num_samples=3)
    with torch.no_grad():
        reconstruction = checkpoint.autoencoder.vae.decode(posterior_means(checkpoint, rows)).sample
    assert levels_apart(images_of(checkpoint, rows), to_uint8(reconstruction)) <= 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("feature", ["reference", "prior", "none"])
def test_image2image_at_strength_1_is_the_standard_sample_to_the_bit(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor, feature: Feature, solver: Solver
) -> None:
    rows = from_images(references, 1.0, feature, solver=solver)
    images = images_of(prior_checkpoint, rows, extractor=extractor)
    assert np.array_equal(images, images_of(prior_checkpoint, list(map(as_standard, rows)), extractor=extractor))
    if feature != "reference":  # and so the very images of a standard run
        run = rows_for({"DF": 4, "MEL": 4}, feature, solver=solver)
        assert np.array_equal(images, images_of(prior_checkpoint, run))


def test_image2image_starts_on_the_path_and_takes_its_share_of_the_steps(
    checkpoint: Checkpoint, references: ByClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x_s = (1 - s) z + s eps with z the normalised posterior mean, and round(s * steps) steps from t = s."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def recording(velocity: Any, start: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((start, options))
        return start

    monkeypatch.setattr(generator_module, "solve", recording)
    rows = from_images(references, 0.7, "none", steps=10, num_samples=1)
    images_of(checkpoint, rows)
    clean = (posterior_means(checkpoint, rows) - LATENT_MEAN) / LATENT_STD
    noise = torch.stack([noise_for(row.seed, (4, 8, 8)) for row in rows])
    ((start, options),) = seen
    torch.testing.assert_close(start, 0.3 * clean + 0.7 * noise, atol=1e-5, rtol=1e-5)
    assert (options["start_time"], options["steps"]) == (0.7, 7)


def test_a_view_is_the_reference_itself_flipped_or_turned(checkpoint: Checkpoint, references: ByClass) -> None:
    rows = [replace(row, view=view) for row, view in zip(from_images(references, 0.0, "none"), range(8), strict=True)]
    turns: list[Image.Transpose | None] = [
        None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180,
        Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.TRANSPOSE, Image.Transpose.TRANSVERSE,
    ]  # fmt: skip
    for image, row, turn in zip(images_of(checkpoint, rows), rows, turns, strict=True):
        reference = Image.fromarray(read_reference(str(row.reference), 16))
        assert np.array_equal(image, reference if turn is None else reference.transpose(turn))


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_outside_of_the_lesions_an_image_keeps_the_latents_of_the_skin(
    checkpoint: Checkpoint, references: ByClass, tmp_path: Path, strength: float
) -> None:
    """Masks of 2 x 2 pixels of 16, and a ring of up to 3 pixels; latents of 8 x 8 cells."""
    for name, (left, top) in {"lesion": (2, 2), "skin": (10, 12)}.items():
        mask = np.zeros((16, 16), np.uint8)
        mask[top : top + 2, left : left + 2] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    mask, mask_b, skin = f"{tmp_path}/lesion.png", f"{tmp_path}/skin.png", references["DF"][0].path
    plain = from_images(references, strength, "none")
    rows = [replace(row, mask=mask, reference_b=skin, mask_b=mask_b) for row in plain]
    generator = Generator(checkpoint, device="cpu")
    whole, kept = (
        generator.denoise(rows),
        generator.encode([Pasted(str(row.reference), mask, skin, mask_b) for row in rows]),
    )
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[0:4, 0:4] = outside[4:8, 3:8] = False
    assert (whole - kept)[:, :, outside].abs().max() < 1e-4
    assert (whole - kept)[:, :, 1:2, 1:2].abs().amax(dim=1).min() > 1e-2, "redrawn"
    own = generator.denoise([replace(row, mask=mask) for row in plain]) - generator.encode(
        [str(row.reference) for row in plain]
    )
    assert own[:, :, 4:].abs().max() < 1e-4, "without another skin the image's own is kept"
    narrowed = generator.denoise(rows, lambda step, clean: [5, 2] if step == 1 else None)
    assert (narrowed - whole[[5, 2]]).abs().max() < 1e-3
    assert levels_apart(images_of(checkpoint, [*rows, *plain, *ROWS], 7)[:8], generator.decode(whole)) <= 1


def test_little_strength_still_takes_a_step() -> None:
    row = replace(ROWS[0], mode="image2image", strength=0.01, reference="/a.png")
    assert start_of(row) == (0.01, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_both_ends_of_a_walk_are_the_references_own_samples_to_the_bit(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor, solver: Solver
) -> None:
    rows = walks(references, solver=solver)
    own = [as_standard(row, end="b" if row.position == 1 else "a") for row in rows]
    walked, sampled = (images_of(prior_checkpoint, some, extractor=extractor) for some in (rows, own))
    for place, row in enumerate(rows):
        assert np.array_equal(walked[place], sampled[place]) == (row.position in (0, 1)), row.id
    assert np.array_equal(walked[3], walked[4])  # the first walk ends where the second begins


def test_the_middle_of_a_walk_is_halfway_on_the_sphere(
    prior_checkpoint: Checkpoint,
    references: ByClass,
    extractor: FeatureExtractor,
    contexts: list[tuple[list[int], Any]],
) -> None:
    """At p = 1/2 both weights are sin(w/2) / sin(w) = 1 / (2 cos(w/2))."""
    start, middle, end = walks(references, steps_between=1)[:3]
    generator = Generator(prior_checkpoint, device="cpu", extractor=extractor)
    generator.generate([start, middle, end])
    a, between, b = contexts[0][1].double()
    cosine = a @ b / (a.norm() * b.norm())
    torch.testing.assert_close(between, (a + b) / (2 * (cosine.acos() / 2).cos()), rtol=1e-5, atol=1e-5)


def test_a_reference_is_read_and_encoded_once(
    checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counting(path: str, *more: Any) -> np.ndarray:
        read.append(path)
        return read_reference(path, *more)

    monkeypatch.setattr(generator_module, "read_reference", counting)
    generator = Generator(checkpoint, batch_size=2, device="cpu", extractor=extractor)
    rows = from_images(references, 0.5, num_samples=7)
    generator.generate(rows)
    generator.generate(rows)
    assert Counter(read) == {image.path: 2 for images in references.values() for image in images}  # latents, feature


def test_what_is_kept_of_references_is_bounded(
    checkpoint: Checkpoint, references: ByClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator_module, "_REFERENCES_KEPT", 2)
    rows = from_images(references, 0.5, "none", num_samples=6)
    generator = Generator(checkpoint, batch_size=3, device="cpu")
    assert levels_apart(generator.generate(rows), images_of(checkpoint, rows)) <= 1
    assert len(generator._latents) == 2


def test_a_row_whose_extractor_is_not_there_is_a_one_line_error(checkpoint: Checkpoint, references: ByClass) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*given no extractor[^\n]*$"):
        images_of(checkpoint, from_images(references, 0.5))
    with pytest.raises(ConfigError, match="have 5 dimensions"):
        Generator(checkpoint, device="cpu", extractor=SixFeatures(dim=5))


def test_a_reference_that_is_gone_is_a_one_line_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    row = replace(ROWS[0], mode="image2image", strength=0.5, reference=str(tmp_path / "gone.png"))
    with pytest.raises(DataError, match=r"gone\.png cannot be used"):
        images_of(checkpoint, rows_of(table_of([row])))


def test_a_checkpoint_with_a_prior_uses_it_unless_told_otherwise(
    checkpoint: Checkpoint, prior_checkpoint: Checkpoint
) -> None:
    picked = [pick_feature(feature, prior_checkpoint) for feature in (None, "none", "prior")]  # type: ignore[arg-type]
    assert [*picked, pick_feature(None, checkpoint)] == ["prior", "none", "prior", "none"]
    for call in (lambda: pick_feature("prior", checkpoint), lambda: images_of(checkpoint, PRIOR_ROWS)):
        with pytest.raises(ConfigError, match=r"^[^\n]*step_1000 holds no feature prior; leave --feature out[^\n]*$"):
            call()


def test_a_class_that_the_prior_does_not_know_is_a_one_line_error(prior_checkpoint: Checkpoint) -> None:
    with pytest.raises(DataError, match="no training image was of VASC"):
        images_of(prior_checkpoint, rows_for({"MEL": 1, "VASC": 1}, "prior"))


def test_images_come_as_uint8_rgb_in_the_order_of_the_rows(checkpoint: Checkpoint) -> None:
    images = images_of(checkpoint)
    assert (images.shape, images.dtype) == ((8, 16, 16, 3), np.uint8)
    assert len(np.unique(images.reshape(8, -1), axis=0)) == 8
    assert images_of(checkpoint, []).shape == (0, 16, 16, 3)


def test_rows_that_leave_their_batch_change_none_of_those_that_stay(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor
) -> None:
    """Row 1 of three leaves after the first step, what is then row 0 after the third."""
    generator = Generator(prior_checkpoint, batch_size=4, device="cpu", extractor=extractor)
    for rows in (PRIOR_ROWS[:3], from_images(references, 0.9, num_samples=3)[:3], walks(references)[:3]):
        seen: list[int] = []

        def watch(step: int, clean: torch.Tensor) -> list[int] | None:
            seen.append(len(clean))  # noqa: B023
            return {1: [0, 2], 3: [1]}.get(step)

        stayed = generator.denoise(rows, watch)
        assert seen == [3, 2, 2, 1][: len(seen)]
        assert levels_apart(generator.decode(stayed), images_of(prior_checkpoint, rows[2:], 4, extractor)) <= 1


def test_a_batch_that_all_have_left_ends_at_that_step(checkpoint: Checkpoint) -> None:
    generator, steps = Generator(checkpoint, batch_size=4, device="cpu"), []

    def watch(step: int, clean: torch.Tensor) -> list[int]:
        steps.append(step)
        return []

    assert generator.denoise(ROWS[:2], watch).shape == (0, 4, 8, 8)
    assert steps == [1]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the U-Net would have been compiled with; it computes as it is."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    return asked


def test_a_compiled_network_sees_a_full_batch_and_twice_that(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor, uncompiled: list[dict[str, Any]]
) -> None:
    rows = every_kind(references)
    generator = Generator(prior_checkpoint, batch_size=5, device="cpu", extractor=extractor, compile=True)
    seen = set()
    handle = generator.denoiser.unet.register_forward_pre_hook(
        lambda module, inputs: seen.add((tuple(inputs[0].shape), tuple(inputs[2].shape)))
    )
    images = generator.generate(rows)
    handle.remove()
    tokens = next(iter(seen))[1][1:]
    assert seen == {((5, 4, 8, 8), (5, *tokens)), ((10, 4, 8, 8), (10, *tokens))}
    assert levels_apart(images, images_of(prior_checkpoint, rows, 5, extractor)) <= 1


def test_the_compile_mode_is_handed_to_torch(checkpoint: Checkpoint, uncompiled: list[dict[str, Any]]) -> None:
    Generator(checkpoint, device="cpu", compile=True, compile_mode="max-autotune")
    Generator(checkpoint, device="cpu", compile=False)
    assert [options["mode"] for options in uncompiled] == ["max-autotune"]


def test_a_compiled_network_s_result_outlives_its_buffer(
    checkpoint: Checkpoint, uncompiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA graphs give each result in the same memory; heun needs two at once."""
    rows = rows_for({"DF": 2}, solver="heun", guidance_scale=1.0)
    expected = images_of(checkpoint, rows)
    generator = Generator(checkpoint, batch_size=2, device="cpu", compile=True, compile_mode="reduce-overhead")
    forward, buffer = generator.denoiser.unet.forward, torch.empty(2, 4, 8, 8)
    monkeypatch.setattr(
        generator.denoiser.unet, "forward", lambda *given, **more: (buffer.copy_(forward(*given, **more)[0]),)
    )
    assert np.array_equal(generator.generate(rows), expected)


def test_the_class_and_the_guidance_scale_change_the_image(checkpoint: Checkpoint) -> None:
    row = ROWS[0]
    first, second, third = images_of(checkpoint, [row, replace(row, label="NV"), replace(row, guidance_scale=1.0)])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)


def times_of(generator: Generator, rows: Sequence[PlanRow]) -> list[float]:
    """At which the U-Net is asked."""
    seen: list[float] = []
    handle = generator.denoiser.unet.register_forward_pre_hook(lambda module, given: seen.append(float(given[1][0])))
    generator.denoise(rows)
    handle.remove()
    return [time / TIME_SCALE for time in seen]


def test_the_solver_s_times_are_shifted_as_training_s_were_unless_told_otherwise(checkpoint: Checkpoint) -> None:
    """4 steps and shift 3: SD3's eq. 23 of 1, 3/4, 2/4, 1/4."""
    so_trained = replace(checkpoint, info=replace(checkpoint.info, config={"schedule": {"time_shift": 3.0}}))
    rows, even, shifted = rows_for({"DF": 1}, solver="euler"), [1.0, 0.75, 0.5, 0.25], [1.0, 0.9, 0.75, 0.5]
    assert times_of(Generator(so_trained, device="cpu"), rows) == pytest.approx(shifted)
    assert times_of(Generator(so_trained, device="cpu", time_shift=1.0), rows) == pytest.approx(even)
    assert times_of(Generator(checkpoint, device="cpu"), rows) == pytest.approx(even)
    assert times_of(Generator(checkpoint, device="cpu", time_shift=3.0), rows) == pytest.approx(shifted)


def earlier_of(checkpoint: Checkpoint, noise: float = 0.0) -> Checkpoint:
    """A checkpoint of the same run with other weights of the U-Net; 0: the same ones."""
    weaker = copy.deepcopy(checkpoint.denoiser)
    generator = torch.Generator().manual_seed(3)
    for weight in weaker.unet.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator)
    return replace(checkpoint, sha256="ea" * 32, denoiser=weaker)


def test_a_guide_of_the_same_weights_leaves_the_image_of_no_guidance(
    prior_checkpoint: Checkpoint, references: ByClass, extractor: FeatureExtractor
) -> None:
    """Whatever the scale, and whatever guides the rows: the guide is told the same."""
    rows, guide = every_kind(references), earlier_of(prior_checkpoint)
    guided = Generator(prior_checkpoint, batch_size=8, device="cpu", extractor=extractor, guide=guide).generate(rows)
    alone = [replace(row, guidance_scale=1.0) for row in rows]
    assert levels_apart(guided, images_of(prior_checkpoint, alone, extractor=extractor)) <= 1


def test_a_weaker_guide_moves_the_image_and_the_unconditional_velocity_is_not_asked_for(
    prior_checkpoint: Checkpoint, contexts: list[tuple[list[int], Any]]
) -> None:
    rows = rows_for({"DF": 2}, "prior", solver="euler")
    generator = Generator(prior_checkpoint, device="cpu", guide=earlier_of(prior_checkpoint, noise=0.02))
    guided = generator.generate(rows)
    assert {label for labels, _ in contexts for label in labels} == {ISIC7.index("DF")}
    assert levels_apart(guided, images_of(prior_checkpoint, rows)) > 1
    assert levels_apart(guided, images_of(prior_checkpoint, [replace(row, guidance_scale=1.0) for row in rows])) > 1


def test_a_guide_of_other_latents_or_conditions_is_a_one_line_error(checkpoint: Checkpoint) -> None:
    other_vae = copy.deepcopy(checkpoint.autoencoder)
    next(other_vae.parameters()).data += 1e-3
    earlier = earlier_of(checkpoint)
    other_norm = copy.deepcopy(earlier.denoiser)
    other_norm.latent_norm.running_mean.add_(1e-3)
    other_extractor = replace(checkpoint.info, feature_extractor="panderm")
    for guide, message in [
        (checkpoint, "is the checkpoint itself"),
        (replace(earlier, autoencoder=other_vae), "another autoencoder"),
        (replace(earlier, denoiser=other_norm), "another autoencoder"),
        (replace(earlier, info=other_extractor), "other classes, features or latents"),
    ]:
        with pytest.raises(ConfigError, match=f"^guide_checkpoint: [^\n]*{message}[^\n]*$"):
            Generator(checkpoint, device="cpu", guide=guide)


def test_latents_are_put_back_on_the_scale_of_the_vae(checkpoint: Checkpoint) -> None:
    """Where the velocity is zero, the image is the decoded noise, spread as the latent batch norm found latents."""
    still = replace(checkpoint, denoiser=copy.deepcopy(checkpoint.denoiser))
    torch.nn.init.zeros_(still.denoiser.unet.conv_out.weight)
    latents = noise_for(ROWS[0].seed, (4, 8, 8))[None] * LATENT_STD + LATENT_MEAN
    with torch.no_grad():
        expected = to_uint8(checkpoint.autoencoder.decode(latents))
    assert levels_apart(images_of(still, ROWS[:1]), expected) <= 1


@pytest.mark.parametrize("feature", ["none", "prior"])
def test_bf16_is_near_float32(prior_checkpoint: Checkpoint, feature: Feature) -> None:
    rows = ROWS if feature == "none" else [*ROWS[:4], *PRIOR_ROWS[4:]]  # a batch where some have a feature
    images = Generator(prior_checkpoint, device="cpu", mixed_precision="bf16").generate(rows)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - images_of(prior_checkpoint, rows).astype(int)).mean() < 4


class WeightCasts(TorchDispatchMode):
    """How often a weight is turned into another type."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__  # it is `to` in inference mode
        if name in ("to", "_to_copy") and isinstance(args[0], torch.nn.Parameter):
            self.count += result.dtype != args[0].dtype
        return result


@torch.inference_mode()
def latents_by_autocast(checkpoint: Checkpoint, rows: Sequence[PlanRow]) -> torch.Tensor:
    """Of rows without a feature: float32 weights in bf16's autocast."""
    labels = torch.tensor([ISIC7.index(row.label) for row in rows])
    noise = torch.stack([noise_for(row.seed, checkpoint.latent_shape) for row in rows])
    contexts = (checkpoint.denoiser.context(which) for which in (labels, torch.full_like(labels, len(ISIC7))))
    velocity = GuidedVelocity(checkpoint.denoiser, *contexts, scale=2.0, interval=(0.0, 0.8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return solve(velocity, noise, steps=rows[0].steps)


def test_in_bf16_no_weight_is_cast_in_a_solver_step(checkpoint: Checkpoint) -> None:
    generator = Generator(checkpoint, device="cpu", mixed_precision="bf16")
    with WeightCasts() as casts:
        generator.denoise(ROWS)
    assert casts.count == 0
    with WeightCasts() as casts:
        latents_by_autocast(checkpoint, ROWS)
    assert casts.count > 4 * 50, "what this test counts has another name"


def test_bf16_weights_are_as_near_to_float32_as_autocast(checkpoint: Checkpoint) -> None:
    rows = rows_for({"DF": 16, "MEL": 16}, steps=10)
    exact = Generator(checkpoint, device="cpu").denoise(rows)
    in_bf16 = Generator(checkpoint, device="cpu", mixed_precision="bf16").denoise(rows)
    by_autocast = (latents_by_autocast(checkpoint, rows) - exact).square().mean().sqrt()
    assert (in_bf16 - exact).square().mean().sqrt() < 1.5 * by_autocast < 0.02 * exact.std()


def test_in_bf16_the_sines_of_the_time_are_of_float32(checkpoint: Checkpoint) -> None:
    """From t = 0.998 on bf16 would be off by up to 2 of 1000 steps, and a fast sine by anything."""
    seen: list[torch.Tensor] = []
    generator = Generator(checkpoint, device="cpu", mixed_precision="bf16")
    generator.denoiser.unet.time_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    generator.denoise(rows_for({"MEL": 2}, steps=7))
    times = [1 - 1e-6, *(1 - k / 7 for k in range(1, 7))]
    expected = torch.stack([get_timestep_embedding(torch.tensor([1000 * t]), 16, True, 0)[0] for t in times])
    torch.testing.assert_close(torch.stack([sines[0] for sines in seen]), expected, atol=1e-4, rtol=0)


def test_the_checkpoint_s_own_networks_stay_in_float32(checkpoint: Checkpoint) -> None:
    """They may be those of a run in progress."""
    before = copy.deepcopy(checkpoint.denoiser.state_dict())
    generator = Generator(checkpoint, device="cpu", mixed_precision="bf16")
    generator.generate(ROWS)
    assert {weight.dtype for weight in generator.denoiser.unet.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in generator.denoiser.conditioning.parameters()} == {torch.float32}
    after = checkpoint.denoiser.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


def test_a_vae_sees_few_large_images_at_once(
    checkpoint: Checkpoint, references: ByClass, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = from_images(references, 0.5, "none", num_samples=5)
    expected = images_of(checkpoint, rows, 10)
    monkeypatch.setattr(generator_module, "coded_at_once", lambda image_size: 3)
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    handles = [
        getattr(checkpoint.autoencoder.vae, name).register_forward_pre_hook(
            lambda module, inputs, sizes=sizes: sizes.append(len(inputs[0]))
        )
        for name, sizes in seen.items()
    ]
    images = images_of(checkpoint, rows, 10)
    for handle in handles:
        handle.remove()
    assert seen == {"encoder": [3, 3], "decoder": [3, 3, 3, 1]}  # of three references each, ten images
    assert [coded_at_once(size) for size in (64, 128, 256, 2048)] == [128, 32, 8, 1]
    assert levels_apart(images, expected) <= 1


def test_rounding_is_to_the_nearest_level_and_clips() -> None:
    levels = torch.tensor([-1.5, -1.0, -0.997, -0.995, 0.0, 0.999, 1.0, 7.0])
    assert to_uint8(levels.view(1, 1, 1, 8))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_a_model_that_gives_nan_is_a_one_line_error(checkpoint: Checkpoint) -> None:
    broken = replace(checkpoint, autoencoder=copy.deepcopy(checkpoint.autoencoder))
    torch.nn.init.constant_(broken.autoencoder.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(CheckpointError, match=r"^[^\n]*not finite numbers[^\n]*$"):
        images_of(broken)


def test_torch_takes_no_more_threads_than_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit in time, as docker's --cpus: OpenMP sees the machine's cores."""
    monkeypatch.setattr(generator_module, "cpu_count", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pick_device("cpu")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_device_that_is_not_there_is_a_one_line_error() -> None:
    with pytest.raises(ConfigError, match="device is nonsense"):
        pick_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"^[^\n]*device is cuda, which cannot be used here[^\n]*$"):
            pick_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("feature", ["none", "prior"])
def test_the_gpu_draws_the_image_of_the_cpu(prior_checkpoint: Checkpoint, feature: Feature) -> None:
    rows = rows_for({"DF": 4, "MEL": 4}, feature)
    try:
        gpu = Generator(prior_checkpoint, device="cuda", mixed_precision="no").generate(rows)
    finally:
        cpu = Generator(prior_checkpoint, device="cpu").generate(rows)
    assert np.abs(gpu.astype(int) - cpu.astype(int)).mean() < 1
