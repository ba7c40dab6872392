"""Fine-tuning learns what can be learned, alike with one seed, and in equal steps for every arm."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_sets import image_set
from torch.func import functional_call
from torchvision.transforms import functional as by_torchvision

from m2d.classes import ISIC7
from m2d.errors import ConfigError, TrainingError
from m2d.evaluation.classifiers.compare import Job, TrainingRows, Trials, training_rows
from m2d.evaluation.classifiers.finetune import (
    RECIPES,
    FinetuneClassifier,
    _network,
    auxiliary_norms,
    batches_of,
    finetuned_worth,
    jittered,
    learning_rate,
    loss_of,
    measure_finetuned,
    recipe_batches,
    share_of,
)
from m2d.evaluation.classifiers.worth import Word
from m2d.evaluation.images import ImageSet
from m2d.evaluation.settings import FinetuneConfig, Recipe
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
    """A pass over 48 real images in batches of 8: 6."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (steps.append(1), step(self, *rest))[1])
    for arm, recipe in [*((arm, "mix") for arm in "abcde"), *(("d", recipe) for recipe in RECIPES)]:
        predict(arm, config=replace(TINY, epochs=1, recipe=recipe))  # type: ignore[arg-type]
        assert len(steps) == 6, (arm, recipe)
        steps.clear()


def test_class_weights_count(answer: np.ndarray) -> None:
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
    config = replace(TINY, epochs=1, recipe="replace", share=0.4)
    trials = Trials(seeds=[0, 1], resamples=100)
    result = measure_finetuned(train=TRAIN, test=TEST, generated=GENERATED, config=config, trials=trials)
    assert result.settings["steps"] == 6
    assert {arm: one.trainings for arm, one in result.arms.items()} == dict.fromkeys("abcde", 2)
    worth = finetuned_worth({"known": TRAIN, "tested": TEST}, GENERATED, config, trials)
    assert (worth.shares, worth.gains) == ([0.4, 0.4], {})
    assert worth.verdict.word in get_args(Word)


def test_what_preprocessing_changes_is_told_against_the_original_images() -> None:
    """On grey ones two classes are one: half of the balanced accuracy."""
    grey = [replace(one, sha256=(), pixels=np.full_like(one.pixels, 99)) for one in (TRAIN, TEST)]
    trials = Trials(seeds=range(1), resamples=100)
    judge = partial(finetuned_worth, {"known": TRAIN, "tested": TEST}, GENERATED, TINY, trials)
    clear, alone = judge(original={"known": grey[0], "tested": grey[1]}), judge()
    changed = {row: one["balanced_accuracy"].value for row, one in clear.minus_original.items()}
    assert changed == pytest.approx(dict.fromkeys(changed, 0.5), abs=1e-9)
    assert len(changed) == 4
    assert clear.differences == alone.differences


def test_a_network_that_diverges_is_an_error() -> None:
    with pytest.raises(TrainingError, match="lower learning_rate"):
        predict("a", config=replace(TINY, learning_rate=1e30))


def test_each_pass_shows_images_as_often_as_they_weigh_and_all_eight_views_are_shown() -> None:
    alike = np.full(10, 0.3)
    shown = np.concatenate([numbers for numbers, _ in batches_of(alike, 4, 5, seed=0)]).reshape(2, 10)
    assert [sorted(one) for one in shown.tolist()] == [list(range(10))] * 2
    weighted = [numbers.tolist() for numbers, _ in batches_of(np.array([0, 2, 2, 0, 1.0]), 5, 1000, seed=0)]
    assert {tuple(sorted(one)) for one in weighted} == {(1, 1, 2, 2, 4)}
    views = np.concatenate([views for _, views in batches_of(alike, 10, 20, seed=0)])
    assert set(views.tolist()) == set(range(8))


def test_the_learning_rate_rises_then_falls_as_a_cosine() -> None:
    config = FinetuneConfig(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(config, step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert (rates[10], rates[30]) == pytest.approx((1.0, 0.5))  # half way down
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_settings_and_images_shape_the_identity() -> None:
    other = FinetuneClassifier.of(squares("others", 48, 0), TEST, GENERATED, TINY)
    digests = [digest_of(one) for one in (classifier(), classifier(replace(TINY, epochs=7)), other)]
    assert len(set(digests)) == 3
    assert digest_of(classifier()) == digests[0]


def digest_of(judge: FinetuneClassifier, arm: str = "a") -> str:
    return Job.of(judge, training_rows(arm, TRAIN.labels, GENERATED.labels, seed=0), 0).digest


def test_a_finished_training_is_used_again_where_neither_recipe_nor_generated_images_are_in_it() -> None:
    other = FinetuneClassifier.of(TRAIN, TEST, squares("others", 40, 2), TINY)
    judges = [classifier(), classifier(replace(TINY, recipe="replace")), classifier(replace(TINY, share=0.5)), other]
    different = {arm: len({digest_of(judge, arm) for judge in judges}) for arm in "abcde"}
    assert different == {"a": 1, "b": 1, "c": 1, "d": 4, "e": 2}
    lent = TrainingRows(np.arange(6), np.arange(0), np.ones(6), reference=np.arange(4))  # two are offered, by recipe
    assert len({Job.of(judge, lent, 0).digest for judge in judges[:3]}) == 3


# --- recipes ----------------------------------------------------------------------------------------------------------

# 30 nevi, 10 melanomas and 20 synthetic ones, which hold a quarter of the melanomas' weight: 0.125 each.
FEW = TrainingRows(np.arange(40), np.arange(20), np.repeat([1, 0.75, 0.125], [30, 10, 20]))
OF_FEW = np.repeat([NV, MEL, MEL], [30, 10, 20])


def shown_by(recipe: Recipe, batch_size: int, steps: int, rows: TrainingRows = FEW) -> np.ndarray:
    """Numbers [steps, B]."""
    config = replace(TINY, recipe=recipe, batch_size=batch_size)
    return np.stack([numbers for numbers, _ in recipe_batches(rows, OF_FEW, config, steps, seed=0)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_real_images_that_are_offered_come_as_generated_ones_do(recipe: Recipe) -> None:
    """The same images, in one set with the real ones: every batch stays the same, and so does what is learned."""
    config = replace(TINY, recipe=recipe, epochs=1)
    lent = replace(FEW, real=np.arange(60), generated=FEW.generated[:0], reference=np.arange(40))
    for one, other in zip(*(recipe_batches(rows, OF_FEW, config, 30, seed=0) for rows in (FEW, lent)), strict=True):
        assert all(np.array_equal(*both) for both in zip(one, other, strict=True))

    rows = training_rows("d", TRAIN.labels, GENERATED.labels, seed=0)
    pixels, labels = (np.concatenate([getattr(one, k) for one in (TRAIN, GENERATED)]) for k in ("pixels", "labels"))
    pool = FinetuneClassifier.of(image_set(labels, "pool", pixels=pixels), TEST, GENERATED, config)
    lent = replace(rows, real=np.arange(88), generated=rows.generated[:0], reference=np.arange(48))
    assert np.array_equal(pool.predict(lent, 0), predict("d", config=config))


def kinds_of(numbers: np.ndarray) -> list[float]:
    """Shares of nevi, melanomas and synthetic melanomas in all images shown."""
    return (np.bincount(np.digitize(numbers, [30, 40]).ravel(), minlength=3) / numbers.size).tolist()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(recipe: Recipe) -> None:
    answer = predict("d", config=replace(TINY, recipe=recipe))
    assert np.array_equal(answer.argmax(axis=1), TEST.labels)


def test_synthetic_images_come_as_often_as_their_share_says() -> None:
    """A pass over 60 images is 45 nevi, 11 or 12 melanomas and 3 or 4 synthetic ones, every one of these in turn."""
    passes = shown_by("mix", 6, 1000).reshape(100, 60)
    counts = {tuple(np.bincount(np.digitize(one, [30, 40])).tolist()) for one in passes}
    assert counts == {(45, 11, 4), (45, 12, 3)}
    assert kinds_of(passes) == pytest.approx([30 / 40, 7.5 / 40, 2.5 / 40], abs=0.005)
    assert set(passes[passes >= 40].tolist()) == set(range(40, 60))


def test_auxiliary_batch_norms_see_as_many_images_of_each_kind_in_every_batch() -> None:
    """Of 16 images one is a synthetic one by its weight: two, for the norms. With half of the weight they are 8."""
    assert ((shown_by("auxiliary_bn", 16, 120) >= 40).sum(axis=1) == 2).all()
    half = replace(FEW, weights=np.repeat([0.25, 0.75, 0.75], [30, 10, 20]))
    numbers = shown_by("auxiliary_bn", 16, 120, half)
    assert (np.sort(numbers >= 40) == [False] * 8 + [True] * 8).all()
    assert kinds_of(numbers) == pytest.approx([1 / 4, 1 / 4, 1 / 2], abs=0.02)


def test_in_a_batch_with_norms_apart_synthetic_images_weigh_exactly_their_share() -> None:
    """Though they are half of its images."""
    assert FEW.share == pytest.approx(2.5 / 40)
    logits, labels = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    weights = torch.tensor([0.45, 0.45, 0.05, 0.05])
    assert loss_of(logits, labels, 2, 0.1).item() == pytest.approx((each * weights).sum().item())
    assert loss_of(logits, labels, 4, 0.1).item() == pytest.approx(each.mean().item())


def test_two_phases_are_balanced_synthetic_images_then_real_ones_alone() -> None:
    """Twice as many synthetic melanomas as nevi are shown equally often. Real ones come as often as their class."""
    rows = TrainingRows(np.arange(40), np.arange(30), np.ones(70))
    labels = np.concatenate([OF_FEW, np.repeat(NV, 10)])
    config = replace(TINY, recipe="two_phase", share=0.25, batch_size=6)
    numbers = [one for one, _ in recipe_batches(rows, labels, config, 20, seed=0)]
    first, rest = np.concatenate(numbers[:5]), np.concatenate(numbers[5:])
    assert np.bincount(labels[first], minlength=7)[[NV, MEL]].tolist() == [15, 15]
    assert first.min() == 40
    assert np.bincount(labels[rest], minlength=7)[[NV, MEL]] / len(rest) == pytest.approx([40 / 70, 30 / 70], abs=0.01)
    assert rest.max() < 40


def test_after_two_phases_turned_labels_of_synthetic_images_are_forgotten() -> None:
    turned = squares("generated", 40, 2, labels=(NV, MEL))
    judge = FinetuneClassifier.of(TRAIN, TEST, turned, replace(TINY, recipe="two_phase", share=0.2, epochs=8))
    called = judge.predict(training_rows("d", TRAIN.labels, turned.labels, seed=0), 0).argmax(axis=1)
    assert np.array_equal(called, TEST.labels)


def test_auxiliary_batch_norms_take_the_statistics_of_their_own_images() -> None:
    """A tenth of a batch's mean is taken over: of images of 2 and of 10."""
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(1))
    apart = auxiliary_norms(network)
    for _ in range(2):
        network(torch.full((3, 1, 2, 2), 2.0))
        functional_call(network, apart, torch.full((5, 1, 2, 2), 10.0))
    assert network[0].running_mean.item() == pytest.approx(0.9 * 0.2 + 0.2)  # type: ignore[union-attr, operator]
    assert apart["0.running_mean"].item() == pytest.approx(0.9 * 1 + 1)
    assert [name for name, one in apart.items() if one.requires_grad] == ["0.weight", "0.bias"]


def test_synthetic_images_leave_no_trace_in_the_statistics_that_are_tested() -> None:
    """Without learning, all that a training changes is the statistics of batch norms."""
    white = replace(GENERATED, pixels=np.full_like(GENERATED.pixels, 255))

    def answer(recipe: Recipe, generated: ImageSet) -> np.ndarray:
        config = replace(TINY, epochs=1, recipe=recipe, learning_rate=1e-30)
        rows = training_rows("d", TRAIN.labels, generated.labels, seed=0)
        return FinetuneClassifier.of(TRAIN, TEST, generated, config).predict(rows, 0)

    assert np.array_equal(answer("auxiliary_bn", white), answer("auxiliary_bn", GENERATED))
    assert not np.allclose(answer("mix", white), answer("mix", GENERATED), atol=1e-4)


def test_a_network_without_batch_norms_has_no_auxiliary_ones() -> None:
    with pytest.raises(ConfigError, match="no batch norms"):
        classifier(replace(TINY, model="timm:test_vit", recipe="auxiliary_bn"))


@pytest.mark.parametrize(
    ("changed", "share"),
    [({}, 0.25), ({"recipe": "auxiliary_bn"}, 0.25), ({"recipe": "replace"}, 0.5), ({"share": 0.1}, 0.1)],
)
def test_the_share_is_set_or_the_recipes_own(changed: dict[str, object], share: float) -> None:
    assert share_of(replace(TINY, **changed)) == share  # type: ignore[arg-type]


def test_colours_change_as_by_torchvision_for_each_image_on_its_own() -> None:
    images = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 255
    factors = 0.5 + torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    made = jittered(images, 0.5, torch.Generator().manual_seed(1))
    for number, (brightness, contrast, saturation) in enumerate(factors.T.tolist()):
        expected = by_torchvision.adjust_brightness(images[number] / 255, brightness)
        expected = by_torchvision.adjust_contrast(expected, contrast)
        expected = by_torchvision.adjust_saturation(expected, saturation)
        torch.testing.assert_close(made[number], expected * 255, atol=1e-2, rtol=0)


def test_colours_are_jittered_in_the_arm_of_real_images_too_unless_told_not_to(answer: np.ndarray) -> None:
    plain = predict("a", config=replace(TINY, color_jitter=0))
    assert not np.allclose(plain, answer, atol=1e-4)


def test_of_a_pool_what_is_asked_for_is_called_and_steps_are_by_its_own_training_images(answer: np.ndarray) -> None:
    """Training and test images in one set: rows 0 to 47 train, three of the others are called."""
    pixels = np.concatenate([TRAIN.pixels, TEST.pixels])
    pool = image_set(np.concatenate([TRAIN.labels, TEST.labels]), "pool", pixels=pixels)
    judge = FinetuneClassifier.of(pool, pool, GENERATED, TINY)
    rows = training_rows("a", TRAIN.labels, GENERATED.labels, seed=0)
    rows = replace(rows, reference=np.arange(48), asked=48 + np.array([1, 4, 29]))
    assert judge.predict(rows, 0) == pytest.approx(answer[[1, 4, 29]], abs=1e-5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"warmup": 1.0}, "warmup"),
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 3, "recipe": "auxiliary_bn"}, "batch_size"),
        ({"share": 1.0}, "share"),
        ({"color_jitter": 1.0}, "color_jitter"),
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
