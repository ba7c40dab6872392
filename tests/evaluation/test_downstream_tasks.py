"""Ray tasks give what this process gives, keep what is done, and hand on what a user can mend."""

import os
from pathlib import Path

import numpy as np
import pytest

from m2d.classes import class_index
from m2d.errors import DataError
from m2d.evaluation.arms import TrainingRows, training_rows
from m2d.evaluation.downstream import ProbeClassifier
from m2d.evaluation.downstream_jobs import Job, run_here, run_on_ray
from m2d.evaluation.images import FeatureSet, ImageSet

MEL, NV = class_index("MEL"), class_index("NV")

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def clouds(name: str, counts: dict[int, int], seed: int) -> FeatureSet:
    labels = np.repeat(list(counts), list(counts.values()))
    cls = np.random.default_rng(seed).normal(size=(len(labels), 9)) + np.eye(7, 9)[labels]
    ids = tuple(f"{name}-{number}" for number in range(len(labels)))
    images = ImageSet(
        name, "memory", ids, ids, labels, np.array(ids, dtype=object), np.zeros((len(ids), 1, 1, 3), np.uint8)
    )
    return FeatureSet(images, "clouds", cls.astype(np.float32))


PROBE = ProbeClassifier(
    clouds("train", {MEL: 10, NV: 60}, 0), clouds("test", {MEL: 20, NV: 30}, 1), clouds("generated", {MEL: 25}, 2), 0.1
)


def jobs(classifier: ProbeClassifier, arms: str = "abcd") -> list[Job]:
    labels = classifier.train.labels, classifier.generated.labels
    return [Job.of(classifier, training_rows(arm, *labels, seed=0), 0) for arm in arms]


class _ByProcess(ProbeClassifier):
    """Answers with the number of the process that asks."""

    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        return np.full((1, 7), os.getpid())


class _Refusing(ProbeClassifier):
    def predict(self, rows: TrainingRows, seed: int) -> np.ndarray:
        raise DataError("test: 3 of these lesions have no name; give them one")


def test_tasks_give_what_this_process_gives_and_keep_it(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    remote = run_on_ray(PROBE, jobs(PROBE), kept=tmp_path, on_done=lambda *one: told.append(one))
    for one, other in zip(remote, run_here(PROBE, jobs(PROBE))):
        assert one == pytest.approx(other, abs=1e-6)
    assert told == [(done, 4) for done in range(5)]
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(job.digest for job in jobs(PROBE))


def test_jobs_run_in_other_processes_and_kept_ones_do_not_run(tmp_path: Path) -> None:
    judge = _ByProcess(PROBE.train, PROBE.test, PROBE.generated, 0.1)
    (first,) = run_on_ray(judge, jobs(judge, "a"), kept=tmp_path)
    assert first[0, 0] != os.getpid()
    assert np.array_equal(run_here(judge, jobs(judge, "a"), kept=tmp_path)[0], first)


def test_an_error_that_a_user_can_mend_comes_through_as_one_line() -> None:
    judge = _Refusing(PROBE.train, PROBE.test, PROBE.generated, 0.1)
    with pytest.raises(DataError, match=r"^test: 3 of these lesions have no name; give them one$"):
        run_on_ray(judge, jobs(judge, "ab"))
