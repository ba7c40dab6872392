"""U-REPA's projector: every cell by itself first, then up to the extractor's grid, tokens row by row."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from m2d.models.settings import ProjectorConfig
from m2d.models.unet import AlignmentProjector


def passing_projector(channels: int) -> AlignmentProjector:
    """Each layer hands its input on, so the output is silu(silu(x)) of each cell."""
    projector = AlignmentProjector(channels, ProjectorConfig(hidden_dim=channels), channels)
    for layer in projector.layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
            nn.init.zeros_(layer.bias)
    return projector


def test_tokens_stand_row_by_row() -> None:
    middle = torch.arange(4.0).view(1, 1, 2, 2)
    assert_close(passing_projector(1)(middle, 4), F.silu(F.silu(torch.arange(4.0))).view(1, 4, 1))


def test_cells_are_projected_before_they_are_upsampled() -> None:
    """Bilinear from two cells to four goes 1/4 and 3/4 of the way between silu(silu(.)) of them."""
    left, right = -4.0, 8.0
    middle = torch.tensor([[left, right], [left, right]]).view(1, 1, 2, 2)
    a, b = F.silu(F.silu(torch.tensor([left, right]))).tolist()
    row = torch.tensor([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b])
    assert_close(passing_projector(1)(middle, 16).view(4, 4), row.expand(4, 4))


def test_it_gives_the_extractors_grid_and_dimension() -> None:
    assert AlignmentProjector(8, ProjectorConfig(hidden_dim=16), 5)(torch.zeros(2, 8, 4, 4), 49).shape == (2, 49, 5)


def test_a_middle_that_is_finer_than_the_grid_is_brought_down() -> None:
    assert AlignmentProjector(8, ProjectorConfig(hidden_dim=16), 5)(torch.zeros(2, 8, 8, 8), 16).shape == (2, 16, 5)


def test_conv3x3_weighs_a_cell_and_its_neighbours_by_one_kernel() -> None:
    """A kernel that takes the left neighbour off each cell: [a b; c d] becomes [a b-a; c d-c]; beyond the edge is 0."""
    projector = AlignmentProjector(1, ProjectorConfig(kind="conv3x3"), 1)
    (layer,) = projector.layers
    with torch.no_grad():
        layer.bias.fill_(10.0)
        layer.weight.copy_(torch.tensor([[0.0, 0, 0], [-1, 1, 0], [0, 0, 0]]).view(1, 1, 3, 3))
    a, b, c, d = 1.0, 3.0, 7.0, 5.0
    tokens = projector(torch.tensor([[a, b], [c, d]]).view(1, 1, 2, 2), 4)
    assert_close(tokens, torch.tensor([a, b - a, c, d - c]).view(1, 4, 1) + 10.0)
