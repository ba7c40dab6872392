"""Evaluation on the GPU: features, reconstructions, the fine-tuned classifier."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda.lane_generation import checkpoint_of

from m2d.classes import ISIC7
from m2d.data.features import extract_view
from m2d.evaluation.classifiers.compare import training_rows
from m2d.evaluation.classifiers.finetune import FinetuneClassifier
from m2d.evaluation.images import ImageSet, reconstructions
from m2d.evaluation.privacy import TIMES, model_errors
from m2d.evaluation.settings import FinetuneConfig, Precision
from m2d.models.extractors import load_feature_extractor


def black(name: str, count: int, side: int) -> ImageSet:
    ids = tuple(f"{name} {number}" for number in range(count))
    labels = np.arange(count) % len(ISIC7.codes)
    return ImageSet(name, "memory", ids, ids, labels, np.array(ids, object), np.zeros((count, side, side, 3), np.uint8))


def test_features_of_a_view_come_back_from_the_gpu() -> None:
    extractor = load_feature_extractor("efficientnet-lite1", input_size=64).to("cuda")
    features = extract_view(extractor, np.zeros((3, 48, 48, 3), np.uint8), 5, "cuda")
    assert (features.cls.shape, features.patches.shape) == ((3, 1280), (3, 4, 1280))
    assert features.cls.device.type == "cpu"


def test_reconstructions_are_made_on_the_gpu(tmp_path: Path) -> None:
    made = reconstructions(black("test", 5, 48), checkpoint_of("demo"), device="cuda", cache_dir=str(tmp_path))
    assert made.pixels.shape == (5, 48, 48, 3)


def test_errors_of_images_come_back_from_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "isfinite", lambda x: np.ones(x.shape, dtype=bool))
    images, place = black("test", 5, 48), str(tmp_path)
    errors = model_errors(images, np.arange(5), checkpoint_of("demo"), None, device="cuda", cache_dir=place)
    assert errors.shape == (5, len(TIMES) + 1)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_fine_tuned_classifier_trains_and_predicts_on_the_gpu_with_cudnn(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones(x.shape, dtype=torch.bool))
    config = FinetuneConfig(input_size=64, batch_size=4, epochs=0.5, mixed_precision=precision, device="cuda")
    train, test, generated = black("train", 16, 48), black("test", 6, 48), black("generated", 8, 48)
    rows = training_rows("b", train.labels, generated.labels, seed=0)
    assert FinetuneClassifier.of(train, test, generated, config).predict(rows, 0).shape == (6, len(ISIC7.codes))
