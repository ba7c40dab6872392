"""A model overfitted on purpose is found out, an untrained one is not; images near training lesions are told."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint
from tiny_networks import AUTOENCODER, CONDITIONING, FEATURE_DIM, UNET, TinyExtractor
from tiny_sets import feature_set, image_set
from torch.nn import functional as F

from m2d.classes import ISIC7
from m2d.data.views import apply_view
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.errors import ConfigError, DataError
from m2d.evaluation.images import FeatureSet, ImageSet
from m2d.evaluation.privacy import (
    AUTOENCODER as BY_AUTOENCODER,
)
from m2d.evaluation.privacy import (
    BLIND,
    DENOISER,
    NOISE_SEED,
    TIMES,
    Attack,
    Membership,
    PrivacyResult,
    equal_sides,
    familiarity,
    infer_membership,
    measure_privacy,
    model_errors,
)
from m2d.evaluation.settings import EvaluateConfig
from m2d.metrics.bootstrap import Estimate
from m2d.models.autoencoder import Autoencoder, LinearAutoencoder, build_autoencoder
from m2d.models.checkpoint import Checkpoint
from m2d.models.unet import build_denoiser

ATTACKS = (DENOISER, BY_AUTOENCODER, BLIND)
DF, MEL, NV = (ISIC7.index(code) for code in ("DF", "MEL", "NV"))


def textures(count: int, seed: int) -> np.ndarray:
    """Coarse colours with fine noise, uint8 [count, 16, 16, 3]."""
    generator = np.random.default_rng(seed)
    coarse = np.kron(generator.normal(size=(count, 4, 4, 3)), np.ones((1, 4, 4, 1)))
    return (128 + 40 * coarse + 10 * generator.normal(size=(count, 16, 16, 3))).clip(0, 255).astype(np.uint8)


def painted(name: str, count: int, seed: int, groups: Sequence[str] | None = None) -> ImageSet:
    """Half melanomas, half nevi."""
    return image_set(np.array([MEL, NV])[np.arange(count) % 2], name, groups, textures(count, seed))


def as_input(images: ImageSet) -> torch.Tensor:
    return torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 127.5 - 1


def block_pca(channels: int, patch: int, images: ImageSet) -> Autoencoder:
    vae = LinearAutoencoder(channels, patch)
    blocks = F.pixel_unshuffle(as_input(images), patch).movedim(1, -1).reshape(-1, 3 * patch**2).double()
    vae.set_basis(blocks.mean(dim=0), blocks.T @ blocks / len(blocks), whitening=0.0)
    return Autoencoder(vae).eval()


@pytest.fixture(scope="module")
def untrained() -> Checkpoint:
    """On 4 x 4 latents of block PCA that has seen neither side; its U-Net has random weights."""
    return replace(make_checkpoint(), autoencoder=block_pca(4, 4, painted("other", 200, seed=9)))


def overfitted(checkpoint: Checkpoint, images: ImageSet, steps: int) -> Checkpoint:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(UNET, CONDITIONING, latent_channels=4, latent_size=4, feature_dim=6).eval()
    generator = torch.Generator().manual_seed(0)
    clean = denoiser.normalize(checkpoint.autoencoder.encode(as_input(images)).mode().detach())
    labels = torch.from_numpy(images.labels)
    optimizer = torch.optim.AdamW(denoiser.parameters(), 3e-3)
    for _ in range(steps):
        t, noise = 0.6 * torch.rand(len(clean), generator=generator), torch.randn(clean.shape, generator=generator)
        velocity = denoiser.velocity(interpolate(clean, noise, t), t, denoiser.context(labels))
        optimizer.zero_grad()
        F.mse_loss(velocity, velocity_target(clean, noise)).backward()
        optimizer.step()
    return replace(checkpoint, sha256=f"{steps:064d}", denoiser=denoiser)


def guessed(
    checkpoint: Checkpoint, place: Path, train: ImageSet, test: ImageSet, most: int = 1000, resamples: int = 400
) -> Membership:
    return infer_membership(train, test, checkpoint, device="cpu", cache_dir=str(place), most=most, resamples=resamples)


# --- controls -------------------------------------------------------------------------------------------------------


def test_a_model_overfitted_on_sixty_images_is_found_out(untrained: Checkpoint, tmp_path: Path) -> None:
    train, test = painted("train", 60, seed=1), painted("test", 60, seed=2)
    found = guessed(overfitted(untrained, train, steps=80), tmp_path, train, test)
    by_velocity = found.attacks[DENOISER]
    assert by_velocity.auc.value > 0.8
    assert by_velocity.auc.low > 0.7
    assert by_velocity.succeeds
    assert not found.attacks[BY_AUTOENCODER].succeeds
    assert not found.attacks[BLIND].succeeds
    assert set(found.classes[DENOISER]) == {"MEL", "NV"}
    assert by_velocity.found is None, "of 60 unseen lesions none is 1 %"
    assert "taken on trust" in found.notes[0]
    assert found.condition == "class"


def test_an_untrained_model_is_at_chance(untrained: Checkpoint, tmp_path: Path) -> None:
    """Six draws of both sides: their mean is 0.5 within three standard errors, and most intervals hold it."""
    draws = [
        guessed(untrained, tmp_path, *(painted("one", 60, 100 + 2 * k + side) for side in (0, 1))) for k in range(6)
    ]
    areas = [draw.attacks[DENOISER].auc for draw in draws]
    assert abs(np.mean([area.value for area in areas]) - 0.5) < 3 * 0.053 / 6**0.5  # (2 n + 1) / (12 n^2), Mann-Whitney
    assert sum(area.low <= 0.5 <= area.high for area in areas) >= 5


def test_an_autoencoder_that_keeps_the_training_images_alone_is_found_out(tmp_path: Path) -> None:
    """150 components of the 160 blocks of forty images."""
    train, test = painted("train", 40, seed=1), painted("test", 40, seed=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(UNET, CONDITIONING, latent_channels=150, latent_size=2, feature_dim=6).eval()
    checkpoint = replace(make_checkpoint(), autoencoder=block_pca(150, 8, train), denoiser=denoiser)
    found = guessed(checkpoint, tmp_path, train, test)
    assert found.attacks[BY_AUTOENCODER].auc.low > 0.95
    assert not found.attacks[DENOISER].succeeds


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kl", "linear", "residual"])
def test_errors_are_those_of_the_training_loss_told_class_and_feature(kind: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build_denoiser(UNET, CONDITIONING, latent_channels=4, latent_size=8, feature_dim=FEATURE_DIM)
        torch.nn.init.normal_(denoiser.unet.conv_out.weight, std=0.1)
        autoencoder, extractor = build_autoencoder(replace(AUTOENCODER, kind=kind, patch_size=2), 16), TinyExtractor()
    checkpoint = replace(make_checkpoint(), autoencoder=autoencoder.eval(), denoiser=denoiser.eval())
    images, rows = painted("train", 5, seed=1), np.array([4, 1, 2])
    found = model_errors(images, rows, checkpoint, extractor, device="cpu", cache_dir=str(tmp_path), batch_size=2)
    noises = torch.randn(len(TIMES), 4, 8, 8, generator=torch.Generator().manual_seed(NOISE_SEED))
    for row, errors in zip(rows, found, strict=True):
        with torch.no_grad():
            x = as_input(images)[row : row + 1]
            latents = autoencoder.vae.encode(x).latent_dist.mean
            clean = (latents - denoiser.latent_norm.running_mean.view(1, -1, 1, 1)) / (
                denoiser.latent_norm.running_var.view(1, -1, 1, 1) + 1e-4
            ).sqrt()
            cls = extractor(
                extractor.preprocess(torch.from_numpy(images.pixels[row : row + 1]).permute(0, 3, 1, 2))
            ).cls
            context = denoiser.conditioning(torch.from_numpy(images.labels[row : row + 1]), cls)
            expected = []
            for time, noise in zip(TIMES, noises, strict=True):
                x_t = (1 - time) * clean + time * noise
                velocity = denoiser.unet(x_t, torch.tensor([1000 * time]), context).sample
                expected.append(float(((velocity - (noise - clean)) ** 2).mean()))
            expected.append(float(((autoencoder.vae.decode(latents).sample - x) ** 2).mean()))
        assert errors == pytest.approx(expected, rel=2e-4)


def test_what_is_done_is_not_done_again(untrained: Checkpoint, tmp_path: Path) -> None:
    images = painted("train", 12, seed=1)
    errors = partial(model_errors, images, checkpoint=untrained, extractor=None, device="cpu", cache_dir=str(tmp_path))
    seen: list[int] = []
    handle = untrained.denoiser.unet.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    some, every = errors(np.arange(8)), errors(np.arange(12))
    assert seen == [8] * len(TIMES) + [4] * len(TIMES)
    np.testing.assert_array_equal(every[:8], some)
    np.testing.assert_array_equal(errors(np.arange(12)), every)
    assert len(seen) == 2 * len(TIMES)
    errors(np.arange(12), checkpoint=replace(untrained, sha256="1" * 64))
    assert len(seen) == 3 * len(TIMES)
    handle.remove()


def test_a_batch_that_does_not_fit_is_one_line(
    untrained: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    monkeypatch.setattr(untrained.denoiser, "velocity", full)
    images = painted("train", 12, seed=1)
    with pytest.raises(ConfigError, match="try --batch_size 3 ") as caught:
        model_errors(images, np.arange(9), untrained, None, device="cpu", cache_dir=str(tmp_path), batch_size=6)
    assert "\n" not in str(caught.value)


# --- scores and sides -----------------------------------------------------------------------------------------------


def test_a_class_that_is_hard_is_not_taken_for_unseen() -> None:
    errors, labels = np.random.default_rng(0).random((40, 3)) + 0.5, np.arange(40) % 2
    harder = errors * np.where(labels == 1, 7.0, 1.0)[:, None]
    np.testing.assert_allclose(familiarity(harder, labels), familiarity(errors, labels), atol=1e-9)
    assert np.argmax(familiarity(errors[:, :1], np.zeros(40))) == np.argmin(errors[:, 0])


def test_sides_are_equal_in_every_class_and_show_a_lesion_once() -> None:
    train = image_set([MEL] * 20 + [NV] * 10 + [DF] * 4, "train", [f"a{k // 2}" for k in range(34)])
    test = image_set([MEL] * 4 + [NV] * 9, "test", [f"b{k // 2}" for k in range(4)] + [f"c{k}" for k in range(9)])
    members = np.arange(34) != 0
    with pytest.raises(DataError, match="have 7 lesions a side"):
        equal_sides(train, test, seed=0)
    more = image_set([MEL] * 8 + [NV] * 9, "test")
    for seed in range(5):
        one, other = equal_sides(train, more, members, seed=seed)
        for rows, images in ((one, train), (other, more)):
            assert np.bincount(images.labels[rows]).tolist() == np.bincount([MEL] * 8 + [NV] * 5).tolist()
            assert len(set(images.groups[rows].tolist())) == len(rows)
        assert 0 not in one
    assert len(equal_sides(train, more, most=10, seed=0)[0]) == 6 + 3
    np.testing.assert_array_equal(equal_sides(train, more, seed=3)[0], equal_sides(train, more, seed=3)[0])


# --- generated images -----------------------------------------------------------------------------------------------


def as_features(images: ImageSet, view: int = 0) -> np.ndarray:
    turned = np.stack([apply_view(image, view) for image in images.pixels])
    return turned.reshape(len(images), -1).astype(np.float32)


def measured(
    generated: ImageSet, train: ImageSet, test: ImageSet, membership: Membership | None = None
) -> PrivacyResult:
    def features(images: ImageSet) -> FeatureSet:
        return feature_set(images, as_features(images))

    views = [as_features(generated, view) for view in range(8)]
    return measure_privacy(
        train=features(train), test=features(test), generated_views=views, generated=generated, membership=membership,
        seed=0,
    )  # fmt: skip


def test_turned_copies_of_training_lesions_are_nearer_to_them_and_new_images_are_not() -> None:
    train, test = painted("train", 40, seed=1), painted("test", 40, seed=2)
    turned = np.stack([apply_view(image, 5) for image in train.pixels])
    copies = measured(replace(train, pixels=turned), train, test)
    assert {space: share.value for space, share in copies.nearer.items()} == {"features": 1, "thumbnails": 1}
    assert copies.found
    assert copies.verdict.startswith("training lesions can be told: 100.0 %")
    new = measured(painted("generated", 60, seed=3), train, test)
    assert not new.found
    assert all(share.low < 0.5 < share.high for share in new.nearer.values())
    assert new.verdict.startswith("no training lesion's membership was shown")


def test_a_lesion_that_is_near_to_all_images_is_one_trial() -> None:
    """Forty copies of one training image: a single lesion says nothing of the others."""
    train, test = painted("train", 40, seed=1), painted("test", 40, seed=2)
    same = measured(replace(train, pixels=np.repeat(train.pixels[:1], 40, axis=0)), train, test)
    assert same.nearer["features"].value == 1
    assert same.nearer["features"].low == pytest.approx(0.2065, abs=1e-3)  # Wilson's for 1 of 1
    assert not same.found


def test_an_image_as_near_to_both_sides_speaks_for_neither() -> None:
    train, test = (painted(name, 40, seed=1) for name in ("train", "test"))
    assert (train.pixels == test.pixels).all()
    same = measured(painted("generated", 60, seed=3), train, test)
    assert all(share.low < 0.5 < share.high for share in same.nearer.values())


def test_where_pictures_alone_tell_the_sides_apart_the_model_is_not_blamed() -> None:
    chance, told = Estimate(0.5, 0.45, 0.55), Estimate(0.8, 0.75, 0.85)
    attacks = {name: Attack(auc=told if name == BLIND else chance, found=None, lesions=100) for name in ATTACKS}
    membership = Membership(
        condition="class", lesions={}, attacks=attacks, classes={}, times={}, resamples=100, notes=[]
    )
    train, test = painted("train", 40, seed=1), painted("test", 40, seed=2)
    found = measured(painted("generated", 60, seed=3), train, test, membership)
    assert not found.found
    assert "so the split itself gives some away" in found.verdict
    blamed = replace(membership, attacks={**attacks, DENOISER: attacks[BLIND]})
    assert measured(painted("generated", 60, seed=3), train, test, blamed).found


# --- what cannot be asked -------------------------------------------------------------------------------------------


def test_without_a_checkpoint_or_at_another_size_one_line_says_so(untrained: Checkpoint, tmp_path: Path) -> None:
    train, test = painted("train", 20, seed=1), painted("test", 20, seed=2)
    with pytest.raises(DataError, match="no checkpoint is known that made the images; name it by --checkpoint"):
        infer_membership(train, test, None, device="cpu", cache_dir=str(tmp_path))
    small = replace(train, pixels=train.pixels[:, ::2, ::2])
    with pytest.raises(DataError, match="of 16 px, the evaluation of 8 px; set --image_size 16"):
        guessed(untrained, tmp_path, small, test)


def test_privacy_is_a_default_where_there_is_a_gpu() -> None:
    assert "privacy" not in EvaluateConfig().part_names(gpu=False)
    assert EvaluateConfig().part_names(gpu=True)[-1] == "privacy"
    assert EvaluateConfig(parts="privacy").part_names(gpu=False) == ("privacy",)
