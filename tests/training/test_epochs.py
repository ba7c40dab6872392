"""Which images an epoch shows: each of them once, wherever a run was stopped and however many workers resumed it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import records, tiny_config
from torch import Tensor
from torch.testing import assert_close

from m2d.data.order import Share, StreamOrder
from m2d.experiment import Experiment
from m2d.training import trainer
from m2d.training.run import RunPlan, Stopped
from m2d.training.settings import TrainConfig
from m2d.training.trainer import train

EPOCH, BATCH = 7, 8  # steps, and of how many of the 56 training images
# Workers, images of a micro-batch, micro-batches of a step: the same step of 12 images each time.
DIVISIONS = [(1, 12, 1), (2, 6, 1), (3, 4, 1), (1, 4, 3), (2, 3, 2), (3, 2, 2)]


@pytest.mark.parametrize("train_images", [48, 56], ids=["4 steps an epoch", "4.67 steps an epoch"])
def test_every_epoch_shows_the_unbroken_runs_images_whoever_takes_its_steps(train_images: int) -> None:
    """Stopped and resumed by other workers ten times: in mid-epoch, at an epoch's last step, and one after it."""
    stops, last = [0, 3, 4, 5, 8, 11, 12, 13, 14, 19, 24], 28
    order = StreamOrder(np.arange(train_images) % 7, balance="natural", views=8, seed=3)
    seen = np.concatenate(
        [
            order.lookup(rows_of_step(step, DIVISIONS[part % len(DIVISIONS)], begin, train_images))[0]
            for part, (begin, end) in enumerate(zip(stops, [*stops[1:], last], strict=True))
            for step in range(begin, end)
        ]
    )
    np.testing.assert_array_equal(seen, order.lookup(np.arange(last * 12))[0])
    for start in range(0, len(seen) - train_images + 1, train_images):
        assert sorted(seen[start : start + train_images]) == list(range(train_images))


def rows_of_step(step: int, division: tuple[int, int, int], begin: int, train_images: int) -> np.ndarray:
    """The stream rows of one step of a run that resumed at step `begin`, over all its workers."""
    workers, batch_size, accumulation = division
    config = TrainConfig(num_workers=workers, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    plan = RunPlan(
        config=config, experiment=Experiment(Path("none")), world_size=workers, train_images=train_images,
        precision="no", perceptual="features",
    )  # fmt: skip
    turns = plan.turns_from(begin, workers)[(step - begin) * accumulation :][:accumulation]
    return np.concatenate([plan.share(rank, workers).rows(turn) for turn in turns for rank in range(workers)])


class WatchedLink(trainer._LocalLink):
    """Notes the images of each micro-batch, and asks the run to stop after a step."""

    seen: dict[int, list[int]] = {}  # noqa: RUF012
    stop_after: int | None = None
    _done = 0

    def images(self, share: Share, turns: range) -> Iterator[dict[str, Tensor]]:
        self._done = turns.start
        for number, batch in enumerate(super().images(share, turns), start=turns.start):
            self.seen[number] = batch["catalog_rows"].tolist()
            yield batch

    def preempted(self) -> bool:
        """Asked once a step."""
        self._done += 1
        if self._done == self.stop_after:
            signal.raise_signal(signal.SIGTERM)
        return False


@pytest.mark.slow
def test_a_run_stopped_at_an_epochs_last_step_begins_the_next_epoch(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_LocalLink", WatchedLink)
    settings = ["--max_steps", str(2 * EPOCH), "--data.balance", "natural", "--saving.keep_last", "5"]
    settings += ["--batch_size", str(BATCH)]

    def run(folder: Path, stop_after: int | None) -> dict[int, list[int]]:
        monkeypatch.setattr(WatchedLink, "seen", {})
        monkeypatch.setattr(WatchedLink, "stop_after", stop_after)
        train(tiny_config(data_root, folder, *settings))
        return WatchedLink.seen

    expected = run(tmp_path / "unbroken", None)
    with pytest.raises(Stopped, match=f"stopped at step {EPOCH} of {2 * EPOCH}"):
        run(tmp_path / "broken", EPOCH)
    before = {number: rows for number, rows in WatchedLink.seen.items() if number < EPOCH}  # it reads two ahead
    after = run(tmp_path / "broken", None)
    for epoch in (before, after):
        assert len(epoch) == EPOCH
        assert sorted(row for rows in epoch.values() for row in rows) == list(range(BATCH * EPOCH))
    assert before | after == expected
    one, other = (weights(tmp_path / name, 2 * EPOCH) for name in ("unbroken", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def weights(experiments: Path, step: int) -> dict[str, Tensor]:
    (checkpoint,) = experiments.glob(f"run_*/checkpoints/step_{step:08d}")
    return load_file(checkpoint / "training" / "denoiser.safetensors")


@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_run_resumed_by_two_and_by_three_workers_takes_the_steps_of_the_unbroken_one(
    ray_cluster: None, data_root: Path, tmp_path: Path
) -> None:
    """12 images a step. Ray's stream itself refuses other rows than the plan's; what was made of them is held here."""
    settings = ["--max_steps", "18", "--data.balance", "natural", "--saving.every_steps", "100"]
    whole = train(tiny_config(data_root, tmp_path / "unbroken", *settings, "--batch_size", "12"))
    for workers, stop_after in ((1, 5), (2, 11), (3, None)):
        division = ["--num_workers", str(workers), "--batch_size", str(12 // workers)]
        config = tiny_config(data_root, tmp_path / "broken", *settings, *division)
        if stop_after is None:
            broken = train(config)
        else:
            stopping = StopAfter(tmp_path / "broken", stop_after)
            with pytest.raises(Stopped):
                train(config)
            stopping.join()
    assert [record["step"] for record in records(broken.path)] == list(range(1, 19))
    for one, other in zip(records(whole.path), records(broken.path), strict=True):
        assert_close(losses(other), losses(one), rtol=1e-3, atol=1e-5)


def losses(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("loss/")}


class StopAfter(threading.Thread):
    """SIGTERM to this process once the run has made a step."""

    def __init__(self, experiments: Path, step: int) -> None:
        super().__init__(daemon=True)
        self.experiments, self.step = experiments, step
        self.start()

    def run(self) -> None:
        while not any(record["step"] >= self.step for run in self.experiments.glob("run_*") for record in records(run)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)
