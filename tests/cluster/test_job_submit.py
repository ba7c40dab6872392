"""`ray job submit` end to end, on a head of the test's own: both forms, refusals, access, stopping."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from cluster.job_cluster import CPUS, JobCluster, await_that, copy_repository, job_cluster
from tiny_run import TINY, write_images

from m2d.demo.dataset import write_demo_dataset
from m2d.experiment import list_experiments
from m2d.models.checkpoint import load_checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = ("python", "jobs/train.py")
DEMO = [
    "--preset", "demo", "--max_steps", "2", "--num_workers", "1", "--perceptual.kind", "features",
    "--saving.validation_images", "8", "--feature_extractor.statistics_images", "16", "--telemetry.pictures", "false",
]  # fmt: skip
SUBMITTED_VERSION = "0.0.0+submitted"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    with job_cluster(tmp_path_factory.mktemp("jobs")) as started:
        write_demo_dataset(started.repository / "images", total=70)
        yield started


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: neither the head's directory nor the submitted one."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def submitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to submit whose m2d can be told from the head's."""
    folder = copy_repository(tmp_path_factory.mktemp("submitted") / "m2d")
    (folder / "m2d" / "__init__.py").write_text(f'__version__ = "{SUBMITTED_VERSION}"\n')
    return folder


@pytest.fixture(scope="module")
def trained(cluster: JobCluster, elsewhere: Path) -> "CompletedProcess[str]":
    """`ray job submit -- python jobs/train.py`, as typed, with relative paths."""
    places = ["--data_root", "images", "--experiments_dir", "experiments"]
    return cluster.ray("job", "submit", "--", *TRAIN, *DEMO, *places, cwd=elsewhere)


def test_a_job_trains_in_the_directory_where_the_head_was_started(
    trained: "CompletedProcess[str]", cluster: JobCluster
) -> None:
    assert trained.returncode == 0, trained.stdout
    (experiment,) = list_experiments(str(cluster.repository / "experiments"))
    assert experiment.info()["state"] == "done"
    assert load_checkpoint(experiment.checkpoints / "best", "cpu").step == 2


def test_a_job_in_a_copy_runs_the_submitted_code(
    cluster: JobCluster, submitted: Path, elsewhere: Path, tmp_path: Path
) -> None:
    images = str(write_images(tmp_path / "images"))
    places = ["--data_root", images, "--experiments_dir", str(tmp_path / "experiments")]
    done = cluster.ray(
        "job", "submit", "--working-dir", str(submitted), "--", *TRAIN, *TINY, "--max_steps", "1", *places,
        cwd=elsewhere,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (experiment,) = list_experiments(str(tmp_path / "experiments"))
    assert experiment.info()["versions"]["m2d"] == SUBMITTED_VERSION
    assert load_checkpoint(experiment.checkpoints / "best", "cpu").step == 1


def test_results_in_a_copy_are_refused_and_the_command_fails(
    cluster: JobCluster, submitted: Path, elsewhere: Path
) -> None:
    places = ["--data_root", str(cluster.repository / "images"), "--experiments_dir", "lost"]
    done = cluster.ray("job", "submit", "--working-dir", str(submitted), "--", *TRAIN, *DEMO, *places, cwd=elsewhere)
    assert done.returncode == 1, done.stdout
    assert re.search(r"^error: experiments_dir: lost would be in this job's copy .*M2D_STORAGE", done.stdout, re.M)
    assert "Traceback" not in done.stdout
    assert list(cluster.session.rglob("lost")) == []


@pytest.mark.exhaustive
def test_a_job_in_a_copy_finds_what_an_earlier_one_left_in_the_storage(
    trained: "CompletedProcess[str]", cluster: JobCluster, submitted: Path, elsewhere: Path
) -> None:
    (experiment,) = list_experiments(str(cluster.repository / "experiments"))
    in_storage = json.dumps({"env_vars": {"M2D_STORAGE": str(cluster.repository)}})
    what = ["--classes", "DF", "--num_samples", "1", "--steps", "2", "--num_actors", "1", "--gates.enabled", "false"]
    done = cluster.ray(
        "job", "submit", "--working-dir", str(submitted), "--runtime-env-json", in_storage, "--",
        "python", "jobs/generate.py", "--checkpoint", f"experiments/{experiment.name}/checkpoints/best", *what,
        cwd=elsewhere,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert len(list((experiment.path / "generated_images").glob("*/DF/*.png"))) == 1


def test_a_job_lists_the_experiments(trained: "CompletedProcess[str]", cluster: JobCluster, elsewhere: Path) -> None:
    (experiment,) = list_experiments(str(cluster.repository / "experiments"))
    done = cluster.ray("job", "submit", "--", "python", "jobs/experiments.py", "list", "--json", cwd=elsewhere)
    assert done.returncode == 0, done.stdout
    assert f'"name": "{experiment.name}"' in done.stdout


def test_without_the_token_nobody_submits(cluster: JobCluster, elsewhere: Path, tmp_path: Path) -> None:
    assert cluster.get("/api/jobs/", cluster.token)[0] == 200
    assert cluster.get("/api/jobs/", None)[0] == 401
    assert cluster.get("/api/jobs/", "0" * 64)[0] == 403
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    trace = tmp_path / "trace"
    done = cluster.ray("job", "submit", "--", "touch", str(trace), cwd=elsewhere, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert done.returncode != 0
    assert not trace.exists()


def test_a_stopped_job_ends_its_actors_and_leaves_a_checkpoint(
    cluster: JobCluster, elsewhere: Path, tmp_path: Path
) -> None:
    assert cluster.living_actors() == []
    images, experiments = str(write_images(tmp_path / "images")), tmp_path / "experiments"
    endless = ["--epochs", "100000", "--saving.every_steps", "5", "--num_workers", "1"]
    places = ["--data_root", images, "--experiments_dir", str(experiments)]
    name = "endless"
    begun = cluster.ray(
        "job", "submit", "--no-wait", "--submission-id", name, "--", *TRAIN, *TINY, *endless, *places, cwd=elsewhere
    )
    assert begun.returncode == 0, begun.stdout
    complete = "*/checkpoints/step_*/complete.json"
    await_that(lambda: list(experiments.glob(complete)), 240, "a first checkpoint")
    assert {"TrainController", "RayTrainWorker", "JobSupervisor"} <= set(cluster.living_actors())

    stopped = cluster.ray("job", "stop", name, cwd=elsewhere)
    assert stopped.returncode == 0, stopped.stdout
    assert cluster.job_status(name) == "STOPPED"
    await_that(lambda: not cluster.living_actors(), 60, "its actors end")
    await_that(lambda: cluster.free_cpus() == CPUS, 60, "its CPUs come back")
    (experiment,) = list_experiments(str(experiments))
    assert not experiment.is_running
    # What was done when the stop came is in a checkpoint of its own.
    info = experiment.info()
    assert (info["state"], info["error"]) == ("stopped", None)
    last = json.loads((experiment.path / "metrics" / "train.jsonl").read_text().splitlines()[-1])["step"]
    newest = max(experiments.glob(complete)).parent
    assert load_checkpoint(newest, "cpu").step == last
    shutil.rmtree(experiments)
