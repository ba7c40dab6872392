"""Perceptual distances: a closed form with an extractor of known maps, the properties of a distance; discriminators."""

import pytest
import torch
import torch.hub
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.perceptual import (
    LITE0_MAPS,
    FeatureDistance,
    LpipsDistance,
    PatchDiscriminator,
    ProjectedDiscriminator,
    build_perceptual,
    load_lpips,
    lpips_available,
    spectral_norm,
)


class ImageItself(FeatureExtractor):
    """The pyramid is the image and its half, in the units of [-1, 1]."""

    def __init__(self) -> None:
        super().__init__("itself", 3, 4, torch.full((3,), 127.5), torch.full((3,), 127.5), num_patches=1)
        self.weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)
        self.dtypes: list[torch.dtype] = []

    def pyramid(self, x: Tensor) -> list[Tensor]:
        x = x * self.weight
        self.dtypes.append((x.flatten(2) @ torch.ones(x.shape[2] * x.shape[3], 1)).dtype)  # matmul obeys autocast
        return [x, x[..., ::2, ::2]]


def test_orthogonal_pixels_are_two_apart() -> None:
    """|a/|a| - b/|b||^2 = 2 for orthogonal pixel vectors, at any length; half the pixels differ, so 1."""
    images, targets = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    images[:, 0] = 0.5
    targets[:, 0], targets[:, 0, :, :2] = 0.25, 0.0
    targets[:, 1, :, :2] = 1.0
    assert_close(FeatureDistance(ImageItself())(images, targets), torch.tensor([1.0]))


def test_opposite_pixels_are_four_apart_in_every_map() -> None:
    images = torch.full((2, 3, 4, 4), 0.3)
    assert_close(FeatureDistance(ImageItself())(images, -images), torch.tensor([4.0, 4.0]))


@pytest.fixture(scope="module")
def distance() -> FeatureDistance:
    return FeatureDistance(load_feature_extractor("efficientnet-lite0", input_size=64))


def some_images(seed: int) -> Tensor:
    """Smooth random images [2, 3, 32, 32] in [-1, 1]."""
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="nearest")


def test_equal_images_are_zero_apart_and_the_distance_is_symmetric(distance: FeatureDistance) -> None:
    assert distance(some_images(0), some_images(0)).tolist() == [0.0, 0.0]
    assert_close(distance(some_images(0), some_images(1)), distance(some_images(1), some_images(0)))


def test_it_grows_with_blur(distance: FeatureDistance) -> None:
    sharp = some_images(0)
    padded = [(r, nn.functional.pad(sharp, (r, r, r, r), mode="reflect")) for r in (1, 2, 4)]
    blurred = [nn.functional.avg_pool2d(images, 2 * r + 1, stride=1) for r, images in padded]
    assert (torch.stack([distance(images, sharp) for images in blurred]).diff(dim=0) > 0).all()


def test_the_gradient_reaches_the_images_and_not_the_extractor() -> None:
    extractor = load_feature_extractor("efficientnet-lite0", input_size=64)
    images = some_images(0).requires_grad_()
    FeatureDistance(extractor)(images, some_images(1)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in extractor.parameters())


def test_inside_autocast_it_computes_in_float32() -> None:
    extractor = ImageItself()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = FeatureDistance(extractor)(some_images(0).bfloat16(), some_images(1))
    assert {*extractor.dtypes, result.dtype} == {torch.float32}


class Patches(FeatureExtractor):
    """An extractor without a pyramid, as PanDerm is."""

    def __init__(self) -> None:
        super().__init__("patches", 3, 4, torch.full((3,), 1.0), torch.full((3,), 1.0), num_patches=1)


@pytest.mark.parametrize("extractor", [Patches(), None], ids=["a ViT", "cached features"])
def test_where_there_is_no_pyramid_the_maps_are_the_packaged_lite0s(
    extractor: FeatureExtractor | None, distance: FeatureDistance
) -> None:
    built = build_perceptual("features", extractor)
    assert_close(built(some_images(0), some_images(1)), distance(some_images(0), some_images(1)))
    assert built.state_dict() == {}


def test_an_extractor_with_a_pyramid_is_taken_itself() -> None:
    extractor = ImageItself()
    build_perceptual("features", extractor)(some_images(0), some_images(1))
    assert len(extractor.dtypes) == 2


def test_the_hidden_extractor_moves_with_its_module() -> None:
    built = build_perceptual("features", None).to("meta")
    assert isinstance(built, FeatureDistance)
    assert built._network[0].mean.is_meta
    assert all(parameter.is_meta for parameter in built._network[0].parameters())


def test_a_projected_discriminators_maps_are_lite0s_whatever_the_extractor(distance: FeatureDistance) -> None:
    extractor, images = ImageItself(), some_images(0)
    shared = build_perceptual("features", extractor, projected=True)
    assert shared.maps is not None
    assert extractor.dtypes == []
    assert_close(list(shared.maps(images)), list(distance.maps(images)))
    assert_close(shared(images, some_images(1)), distance(images, some_images(1)))
    lite0 = distance._network[0]
    assert build_perceptual("features", lite0, projected=True)._network == [lite0]


@pytest.mark.usefixtures("lpips_of_random_weights")
def test_beside_lpips_a_projected_discriminator_has_maps_of_its_own_that_move_with_it(
    distance: FeatureDistance,
) -> None:
    built = build_perceptual("lpips", None, "squeeze", projected=True)
    assert built.maps is not None
    assert_close(list(built.maps(some_images(0))), list(distance.maps(some_images(0))))
    built.to("meta")
    assert all(parameter.is_meta for hidden in (built, built.maps) for parameter in hidden._network[0].parameters())
    assert build_perceptual("lpips", None, "squeeze").maps is None


@pytest.fixture
def no_weights_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("the network is not to be had\nmore lines")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    for module in ("alexnet", "vgg", "squeezenet", "_api"):  # each took the name for itself
        monkeypatch.setattr(f"torchvision.models.{module}.load_state_dict_from_url", refuse, raising=False)


@pytest.mark.usefixtures("no_weights_to_be_had")
def test_lpips_without_weights_says_why_in_one_line() -> None:
    assert lpips_available("alex") == (False, "the network is not to be had")


@pytest.fixture
def lpips_of_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS's own learned channel weights on a random SqueezeNet: the form of the thing, without a download."""
    import lpips

    build = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: build(**{**options, "pnet_rand": True}))


@pytest.mark.usefixtures("lpips_of_random_weights")
def test_lpips_is_frozen_moves_with_its_module_and_gives_one_number_per_image() -> None:
    assert lpips_available("squeeze") == (True, "")
    network = LpipsDistance(load_lpips("squeeze"))
    images, targets = (nn.functional.interpolate(some_images(seed), 64) for seed in (0, 1))
    distances = network(torch.cat([images, images]), torch.cat([images, targets]))
    assert distances[:2].tolist() == [0.0, 0.0]
    assert (distances[2:] > 0).all()
    parameters = list(network.to(torch.float64)._network[0].parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
    assert not any(parameter.requires_grad for parameter in parameters)


# --- the PatchGAN


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_published_size(layers: int, pixels: int) -> None:
    """16, 34 and 70 pixels: Isola et al., appendix 6.1.2. Without group norms, whose statistics see it all."""
    network = PatchDiscriminator(4, layers)
    for number, stage in enumerate(network.stages):
        if isinstance(stage, nn.GroupNorm):
            network.stages[number] = nn.Identity()
        elif isinstance(stage, nn.Conv2d):
            nn.init.ones_(stage.weight)
    images = torch.ones(1, 3, 160, 160, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    seen = images.grad[0, 0] != 0
    assert (seen.any(dim=0).sum().item(), seen.any(dim=1).sum().item()) == (pixels, pixels)


def test_there_is_a_logit_per_patch_and_images_do_not_see_each_other() -> None:
    """64 -> 32 -> 16 -> 8 by the strides, then 7 and 6 by two 4 x 4 kernels.

    Batch norm would let real and reconstructed images be told apart by the company they keep.
    """
    network, images = PatchDiscriminator(8, 3), torch.randn(2, 3, 64, 64)
    logits = network(images)
    assert logits.shape == (2, 1, 6, 6)
    assert_close(logits[:1], network(images[:1]))


# --- the projected discriminator


@pytest.mark.parametrize("shape", [(1, 144), (4, 16), (64, 576), (64, 1024)])
def test_the_spectral_norm_is_the_largest_singular_value(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    u, s, v = torch.linalg.svd(matrix.detach(), full_matrices=False)
    for scaled in (matrix, 1e-4 * matrix, 1e4 * matrix):
        scale = (scaled / matrix).flatten()[0].item()
        assert spectral_norm(scaled).item() == pytest.approx(scale * s[0].item(), rel=0.02)
    spread = (u * torch.linspace(1, 0.1, len(s))) @ v  # where the largest stands out, the gradient is known
    spread.requires_grad_()
    spectral_norm(spread).backward()
    assert spread.grad is not None
    assert_close(spread.grad, torch.outer(u[:, 0], v[0]), rtol=0, atol=0.15)


def test_a_projected_discriminator_has_as_many_logits_from_every_map_and_images_do_not_see_each_other(
    distance: FeatureDistance,
) -> None:
    """Images of 64 pixels have maps of 32, 16, 8 and 4, all of them halved to 4 x 4."""
    images = torch.cat([nn.functional.interpolate(some_images(seed), 64) for seed in (0, 1)])
    maps = distance.maps(images)
    assert tuple(found.shape[1] for found in maps) == LITE0_MAPS
    network = ProjectedDiscriminator(LITE0_MAPS, 8)
    assert network(maps).shape == (4, 4 * 4 * 4)
    assert_close(network([found[:1] for found in maps]), network(maps)[:1])


def test_the_mixes_are_the_seeds_are_kept_and_do_not_learn() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(ProjectedDiscriminator(LITE0_MAPS, 8))
    mixes = [
        {name: tensor for name, tensor in each.state_dict().items() if name.startswith(("mixing", "across"))}
        for each in drawn
    ]
    assert len(mixes[0]) == 4 + 3
    assert not mixes[0].keys() & dict(drawn[0].named_parameters()).keys()
    assert_close(mixes[0], mixes[1], rtol=0, atol=0)
    assert not torch.equal(mixes[0]["mixing_0"], mixes[2]["mixing_0"])


def test_a_projected_discriminator_learns_to_tell_a_blur_from_the_originals(distance: FeatureDistance) -> None:
    """On eight textures, tried on eight others. The maps' network stays as it is."""
    torch.manual_seed(0)
    sharp = torch.rand(16, 3, 32, 32) * 2 - 1
    blurred = nn.functional.avg_pool2d(nn.functional.pad(sharp, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    before = {name: tensor.clone() for name, tensor in distance._network[0].state_dict().items()}
    network = ProjectedDiscriminator(LITE0_MAPS, 16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    real, made = distance.maps(sharp), distance.maps(blurred)
    for _ in range(20):
        first, second = (network([found[:8] for found in maps]) for maps in (real, made))
        loss = nn.functional.relu(1 - first).mean() + nn.functional.relu(1 + second).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = [network([found[8:] for found in maps]).mean(dim=1) for maps in (real, made)]
    assert scores[0].min() > scores[1].max()
    assert_close(dict(distance._network[0].state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in distance._network[0].parameters())
