"""Perceptual distances: a closed form with an extractor of known maps, the properties of a distance; the PatchGAN."""

import pytest
import torch
import torch.hub
from torch import Tensor, nn
from torch.testing import assert_close

from m2d.models.extractors import FeatureExtractor, load_feature_extractor
from m2d.models.perceptual import FeatureDistance, LpipsDistance, PatchDiscriminator, build_perceptual, lpips_available


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
    network = LpipsDistance("squeeze")
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
