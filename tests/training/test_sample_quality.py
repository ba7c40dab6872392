"""The measure that judges a run's samples: who is compared with whom."""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_checkpoint, make_prior

from m2d.classes import class_index
from m2d.errors import DataError
from m2d.training.features import FeatureSource
from m2d.training.settings import TrainConfig
from m2d.training.validation import RunState, SampleQuality, rows_of_each_class


def test_every_class_has_the_same_share() -> None:
    labels = np.array([0] * 50 + [3] * 50 + [6] * 50)
    rows = rows_of_each_class(labels, 30)
    assert np.bincount(labels[rows], minlength=7).tolist() == [10, 0, 0, 10, 0, 0, 10]
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_a_rare_class_gives_all_it_has() -> None:
    labels = np.array([0] * 50 + [3] * 4)
    rows = rows_of_each_class(labels, 20)
    assert np.bincount(labels[rows]).tolist() == [10, 0, 0, 4]


@pytest.mark.parametrize("labels", [[], [0, 0, 1]])
def test_no_more_images_than_there_are(labels: list[int]) -> None:
    assert len(rows_of_each_class(np.array(labels, dtype=np.int64), 100)) == len(labels)


def test_the_choice_is_the_same_each_time() -> None:
    labels = np.arange(200) % 7
    assert rows_of_each_class(labels, 70).tolist() == rows_of_each_class(labels, 70).tolist()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), DataError("no such class")])
def test_a_run_goes_on_where_no_samples_can_be_made(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def samples(*_: object) -> None:
        raise error

    plan = SimpleNamespace(config=SimpleNamespace(batch_size=8))
    state: Any = SimpleNamespace(samples=samples, plan=plan)
    info: Any = SimpleNamespace(step=7)
    with caplog.at_level(logging.WARNING):
        assert SampleQuality(state, np.array([0, 0, 1, 1]), 4).measure(info) == {}
    assert [record.getMessage().startswith("no kernel distance at step 7: ") for record in caplog.records] == [True]


def test_samples_of_a_run_are_made_in_its_batches() -> None:
    checkpoint, seen = make_checkpoint(), []
    plan: Any = SimpleNamespace(config=TrainConfig(data_root="d", batch_size=3), precision="no")
    networks: Any = SimpleNamespace(autoencoder=checkpoint.autoencoder)
    source = FeatureSource(torch.device("cpu"))
    state = RunState(plan, networks, checkpoint.denoiser, make_prior({"DF": 9, "MEL": 9}), None, source)
    checkpoint.denoiser.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    checkpoint.autoencoder.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    images, labels = state.samples(checkpoint.info, {"DF": 2, "MEL": 5})
    assert np.bincount(labels)[[class_index("DF"), class_index("MEL")]].tolist() == [2, 5]
    assert images.shape == (7, 16, 16, 3)
    assert max(seen) == 2 * 3, "twice where it is guided"
