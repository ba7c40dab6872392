"""The measure that judges a run's samples: who is compared with whom."""

import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint, make_prior

from m2d.classes import ISIC7
from m2d.errors import DataError
from m2d.models.checkpoint import Checkpoint
from m2d.training.features import FeatureSource
from m2d.training.settings import SavingConfig, TrainConfig
from m2d.training.validation import RunView, rows_of_each_class


@pytest.mark.parametrize(
    ("classes", "images", "chosen"),
    [
        ({0: 50, 3: 50, 6: 50}, 30, {0: 10, 3: 10, 6: 10}),
        ({0: 50, 3: 4}, 20, {0: 10, 3: 4}),  # a rare class gives all it has
        ({0: 2, 1: 1}, 100, {0: 2, 1: 1}),
        ({}, 100, {}),
    ],
)
def test_every_class_has_the_same_share_and_the_choice_is_the_same_each_time(
    classes: dict[int, int], images: int, chosen: dict[int, int]
) -> None:
    labels = np.repeat(np.array(list(classes), dtype=np.int64), list(classes.values()))
    rows = rows_of_each_class(labels, images)
    assert Counter(labels[rows].tolist()) == chosen
    assert rows.tolist() == sorted(set(rows.tolist())) == rows_of_each_class(labels, images).tolist()


def view_of(checkpoint: Checkpoint, labels: list[int], **settings: Any) -> RunView:
    config = TrainConfig(data_root="d", saving=SavingConfig(validation_samples=4), **settings)
    plan: Any = SimpleNamespace(config=config, precision="no", classes=ISIC7)
    networks: Any = SimpleNamespace(autoencoder=checkpoint.autoencoder)
    reader: Any = SimpleNamespace(labels=np.array(labels))
    prior, source = make_prior({"DF": 9, "MEL": 9}), FeatureSource(torch.device("cpu"))
    return RunView(plan, networks, checkpoint.denoiser, prior, torch.nn.Identity(), reader, source)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), DataError("no such class")])
def test_a_run_goes_on_where_no_samples_can_be_made(
    error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def samples(*_: object) -> None:
        raise error

    view, info = view_of(make_checkpoint(), [0, 0, 1, 1]), SimpleNamespace(step=7)
    monkeypatch.setattr(view, "samples", samples)
    with caplog.at_level(logging.WARNING):
        assert view.sample_quality(info) == {}  # type: ignore[arg-type]
    assert [record.getMessage().startswith("no kernel distance at step 7: ") for record in caplog.records] == [True]


def test_samples_of_a_run_are_made_in_its_batches() -> None:
    checkpoint, seen = make_checkpoint(), []
    checkpoint.denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    checkpoint.autoencoder.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images, labels = view_of(checkpoint, [], batch_size=3).samples(checkpoint.info, {"DF": 2, "MEL": 5})
    assert np.bincount(labels)[[ISIC7.index("DF"), ISIC7.index("MEL")]].tolist() == [2, 5]
    assert images.shape == (7, 16, 16, 3)
    assert max(seen) == 2 * 3, "twice where it is guided"
