"""Fine-tuning learns what can be learned, alike with one seed, and in equal steps for every arm."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_sets import image_set

from m2d.classes import ISIC7
from m2d.errors import ConfigError, TrainingError
from m2d.evaluation.classifiers.compare import Trials, training_rows
from m2d.evaluation.classifiers.finetune import (
    FinetuneClassifier,
    _network,
    batches_of,
    finetuned_worth,
    learning_rate,
    measure_finetuned,
)
from m2d.evaluation.classifiers.worth import Word
from m2d.evaluation.images import ImageSet
from m2d.evaluation.settings import FinetuneConfig
from m2d.models.extractors import load_feature_extractor

MEL, NV = ISIC7.index("MEL"), ISIC7.index("NV")
TINY = FinetuneConfig(
    model="timm:test_resnet", pretrained=False, input_size=32, epochs=4, batch_size=8, learning_rate=3e-3, device="cpu"
)


def squares(name: str, count: int, seed: int, labels: tuple[int, int] = (MEL, NV)) -> ImageSet:
    """Noise at 24 px; red images are of the first class, blue ones of the second."""
    generator = np.random.default_rng(seed)
    of_second = np.arange(count) % 2
    pixels = generator.integers(0, 120, size=(count, 24, 24, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, 2 * of_second] += 100
    return image_set(np.array(labels)[of_second], name, pixels=pixels)


TRAIN, TEST, GENERATED = squares("train", 48, 0), squares("test", 30, 1), squares("generated", 40, 2)


def classifier(config: FinetuneConfig = TINY) -> FinetuneClassifier:
    return FinetuneClassifier.of(TRAIN, TEST, GENERATED, config)


def predict(arm: str, seed: int = 0, config: FinetuneConfig = TINY) -> np.ndarray:
    return classifier(config).predict(training_rows(arm, TRAIN.labels, GENERATED.labels, seed=seed), seed)


@pytest.fixture(scope="module")
def answer() -> np.ndarray:
    return predict("a")


def test_two_colours_are_told_apart_on_new_images_by_probabilities_of_seven_classes(answer: np.ndarray) -> None:
    assert np.array_equal(answer.argmax(axis=1), TEST.labels)
    assert answer.shape == (30, 7)
    assert answer.sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_generated_images_are_learned_from_too() -> None:
    """Synthetic images alone, with the colours of the real ones the other way round: all is turned."""
    turned = squares("generated", 40, 2, labels=(NV, MEL))
    judge = FinetuneClassifier.of(TRAIN, TEST, turned, TINY)
    called = judge.predict(training_rows("e", TRAIN.labels, turned.labels, seed=0), 0).argmax(axis=1)
    assert np.array_equal(called, np.where(TEST.labels == MEL, NV, MEL))


def test_the_seed_decides_the_answer_whatever_was_drawn_before(answer: np.ndarray) -> None:
    torch.rand(7)
    assert np.array_equal(predict("a"), answer)
    assert not np.allclose(predict("a", seed=1), answer, atol=1e-4)


def test_torch_is_deterministic_meanwhile_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = torch.nn.Conv2d.forward

    def recording(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        cudnn = torch.backends.cudnn
        seen.append((self.training, cudnn.enabled, cudnn.deterministic, cudnn.benchmark))
        return forward(self, images)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", recording)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    predict("a", config=replace(TINY, epochs=0.1))
    assert set(seen) == {(True, True, True, False), (False, True, True, False)}
    assert not torch.backends.cudnn.deterministic
    assert torch.equal(torch.rand(3), expected)


def test_every_arm_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes over 48 real images in batches of 8: 12."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (steps.append(1), step(self, *rest))[1])
    for arm in "abcde":
        predict(arm, config=replace(TINY, epochs=2))
        assert len(steps) == 12, arm
        steps.clear()


def test_class_weights_weigh_the_loss(answer: np.ndarray) -> None:
    """An image of weight 0 is never learned from: with the reds so, melanoma is about one class of seven for them."""
    rows = training_rows("b", TRAIN.labels, GENERATED.labels, seed=0)
    rows = replace(rows, weights=np.where(TRAIN.labels == MEL, 0.0, 2.0))
    red = TEST.labels == MEL
    unlearned = classifier().predict(rows, 0)[red, MEL].mean()
    assert unlearned < 0.3 < 0.6 < answer[red, MEL].mean()


def test_test_images_train_nothing(answer: np.ndarray) -> None:
    """Not even a batch norm's statistics: each is called as it is in the company of all others."""
    few = image_set(TEST.labels[:3], "test", pixels=TEST.pixels[:3])
    judge = FinetuneClassifier.of(TRAIN, few, GENERATED, TINY)
    alone = judge.predict(training_rows("a", TRAIN.labels, GENERATED.labels, seed=0), 0)
    assert alone == pytest.approx(answer[:3], abs=1e-5)


def test_the_default_starts_from_the_wheels_weights_and_a_new_layer_for_seven_classes() -> None:
    network = _network(FinetuneConfig(input_size=32), 7).network
    packaged = load_feature_extractor("efficientnet-lite0").network.state_dict()
    for name, tensor in network.state_dict().items():
        if name.startswith("classifier."):
            assert len(tensor) == 7
        else:
            assert torch.equal(tensor, packaged[name]), name
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_whole_comparison_runs() -> None:
    config = replace(TINY, epochs=1)
    trials = Trials(seeds=[0, 1], resamples=100)
    result = measure_finetuned(train=TRAIN, test=TEST, generated=GENERATED, config=config, trials=trials)
    assert result.settings["steps"] == 6
    assert {arm: one.trainings for arm, one in result.arms.items()} == dict.fromkeys("abcde", 2)
    worth = finetuned_worth(train=TRAIN, test=TEST, generated=GENERATED, config=config, trials=trials)
    assert (worth.shares, worth.gains) == ([0.25, 0.25], {})
    assert worth.verdict.word in get_args(Word)


def test_what_preprocessing_changes_is_told_against_the_original_images() -> None:
    """On grey ones two classes are one: half of the balanced accuracy."""
    grey = [replace(one, sha256=(), pixels=np.full_like(one.pixels, 99)) for one in (TRAIN, TEST)]
    trials = Trials(seeds=range(1), resamples=100)
    judge = partial(finetuned_worth, generated=GENERATED, config=TINY, trials=trials)
    clear, alone = judge(train=TRAIN, test=TEST, original=(grey[0], grey[1])), judge(train=TRAIN, test=TEST)
    changed = {row: one["balanced_accuracy"].value for row, one in clear.minus_original.items()}
    assert changed == pytest.approx(dict.fromkeys(changed, 0.5), abs=1e-9)
    assert len(changed) == 4
    assert clear.differences == alone.differences


def test_a_network_that_diverges_is_an_error() -> None:
    with pytest.raises(TrainingError, match="lower learning_rate"):
        predict("a", config=replace(TINY, learning_rate=1e30))


def test_each_pass_shows_every_image_once_and_all_eight_views_are_shown() -> None:
    shown = np.concatenate([numbers for numbers, _ in batches_of(10, 4, 5, seed=0)]).reshape(2, 10)
    assert [sorted(one) for one in shown.tolist()] == [list(range(10))] * 2
    views = np.concatenate([views for _, views in batches_of(10, 10, 20, seed=0)])
    assert set(views.tolist()) == set(range(8))


def test_the_learning_rate_rises_then_falls_as_a_cosine() -> None:
    config = FinetuneConfig(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(config, step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert (rates[10], rates[30]) == pytest.approx((1.0, 0.5))  # half way down
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_settings_and_images_shape_the_identity() -> None:
    other = FinetuneClassifier.of(squares("others", 48, 0), TEST, GENERATED, TINY)
    identities = {classifier().identity, classifier(replace(TINY, epochs=7)).identity, other.identity}
    assert len(identities) == 3
    assert classifier().identity == classifier().identity


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"warmup": 1.0}, "warmup"),
        ({"batch_size": 1}, "batch_size"),
        ({"model": "panderm-base", "weights": "x.pth"}, "finetune.model"),
        ({"pretrained": False}, "pretrained"),
        ({"input_size": 40}, "multiple of 32"),
    ],
)
def test_settings_that_cannot_be_are_named(changed: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FinetuneConfig(**changed)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_in_mixed_precision_it_learns_too() -> None:
    answer = predict("a", config=replace(TINY, device=None))
    assert np.array_equal(answer.argmax(axis=1), TEST.labels)
