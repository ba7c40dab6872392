"""What the U-Net is told: a class, and a feature that can be left out or blurred by noise."""

import torch
from torch.testing import assert_close

from m2d.classes import NUM_CLASSES
from m2d.models.settings import ConditioningConfig
from m2d.models.unet import ConditionEncoder

DIM, TOKENS, WIDTH = 6, 3, 16
LABELS = torch.tensor([0, 4, 6])


def encoder() -> ConditionEncoder:
    torch.manual_seed(0)
    return ConditionEncoder(ConditioningConfig(context_dim=WIDTH, feature_tokens=TOKENS), DIM)


def features(seed: int = 1) -> torch.Tensor:
    return torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(seed))


def test_there_is_one_class_token_and_k_feature_tokens() -> None:
    assert encoder()(LABELS).shape == encoder()(LABELS, features()).shape == (3, 1 + TOKENS, WIDTH)


def test_every_class_and_the_null_class_has_a_token_of_its_own() -> None:
    tokens = encoder()(torch.arange(NUM_CLASSES + 1))[:, 0]
    assert len(torch.unique(tokens, dim=0)) == NUM_CLASSES + 1


def test_the_class_does_not_touch_the_feature_tokens() -> None:
    network, cls = encoder(), features()
    assert_close(network(LABELS, cls)[:, 1:], network(LABELS.flip(0), cls)[:, 1:])


def test_a_dropped_feature_equals_no_feature() -> None:
    network = encoder()
    dropped = network(LABELS, features(), drop_feature=torch.tensor([True, False, True]))
    assert_close(dropped[[0, 2]], network(LABELS)[[0, 2]], rtol=0, atol=0)
    assert_close(dropped[1], network(LABELS, features())[1], rtol=0, atol=0)


def test_a_dropped_feature_still_gives_every_parameter_a_gradient() -> None:
    """DDP waits for all of them."""
    network = encoder()
    network(LABELS, features(), drop_feature=torch.ones(3, dtype=torch.bool)).sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_noise_of_level_zero_changes_nothing() -> None:
    network = encoder()
    noisy = network(LABELS, features(), noise=features(2), noise_level=torch.zeros(3))
    assert_close(noisy, network(LABELS, features()), rtol=0, atol=0)


def test_the_noise_level_is_told_even_where_the_noise_happens_to_be_zero() -> None:
    network = encoder()
    told = network(LABELS, features(), noise=torch.zeros(3, DIM), noise_level=torch.ones(3))
    assert not torch.allclose(told, network(LABELS, features()))


def test_noise_is_scaled_in_standardised_units() -> None:
    """mean + std with noise n at level 0.5 is the clean feature mean + std * (1 + 0.5 n)."""
    network, noise = encoder(), features(2)
    mean, std = torch.arange(DIM).float(), torch.arange(1, DIM + 1).float()
    network.set_statistics(mean, std)
    torch.nn.init.zeros_(network.noise_level_embedding[2].weight)  # the level's own token is tested above
    level = torch.full((3,), 0.5)
    noisy = network(LABELS, (mean + std).expand(3, -1), noise=noise, noise_level=level)
    assert_close(noisy, network(LABELS, mean + std * (1 + 0.5 * noise)))


def test_statistics_standardise_the_feature() -> None:
    standard, raw = encoder(), encoder()
    mean, std = torch.arange(DIM).float(), torch.arange(1, DIM + 1).float()
    standard.set_statistics(mean, std)
    assert_close(standard(LABELS, features() * std + mean), raw(LABELS, features()))


def test_a_constant_feature_does_not_divide_by_zero() -> None:
    network = encoder()
    network.set_statistics(torch.ones(DIM), torch.zeros(DIM))
    assert torch.isfinite(network(LABELS, torch.ones(3, DIM))).all()


def test_statistics_travel_with_the_weights() -> None:
    source, target = encoder(), encoder()
    source.set_statistics(torch.full((DIM,), 3.0), torch.full((DIM,), 2.0))
    target.load_state_dict(source.state_dict())
    assert_close(target(LABELS, features()), source(LABELS, features()), rtol=0, atol=0)
