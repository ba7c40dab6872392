"""The PatchGAN: its patches have the published size, and images get a gradient."""

import pytest
import torch
from torch import nn

from m2d.models.perceptual import PatchDiscriminator


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


def test_there_is_a_logit_a_patch() -> None:
    """64 -> 32 -> 16 -> 8 by the strides, then 7 and 6 by two 4 x 4 kernels."""
    assert PatchDiscriminator(8, 3)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_images_of_one_batch_do_not_see_each_other() -> None:
    """Batch norm would let real and reconstructed images be told apart by the company they keep."""
    network, images = PatchDiscriminator(8, 2), torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_images_get_a_gradient() -> None:
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    PatchDiscriminator(8, 2)(images).mean().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
