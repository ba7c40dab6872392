"""`ray job submit` end to end, on a head of the test's own: both forms, refusals, access, stopping."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from cluster.job_cluster import CPUS, JobCluster, await_that, copy_repository, job_cluster
from tiny_run import TINY, tiny_config, write_images

from m2d.experiment import list_experiments
from m2d.models.checkpoint import load_checkpoint
from m2d.training.trainer import train

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = ("python", "jobs/train.py")
SUBMITTED_VERSION = "0.0.0+submitted"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    with job_cluster(tmp_path_factory.mktemp("jobs")) as started:
        write_images(started.repository / "images")
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
    """`ray job submit -- python jobs/train.py`, as typed, with relative paths. The latent stage, without a stream."""
    joint = train(tiny_config(cluster.repository / "images", cluster.repository / "joint", "--max_steps", "1"))
    start = (joint.checkpoints / "best").relative_to(cluster.repository)
    stage = ["--stage", "latent", "--init_checkpoint", str(start), "--data.views", "1", "--max_steps", "2"]
    places = ["--data_root", "images", "--experiments_dir", "experiments", "--num_workers", "1"]
    return cluster.ray("job", "submit", "--", *TRAIN, *TINY, *stage, *places, cwd=elsewhere)


def test_a_job_trains_in_the_directory_where_the_head_was_started(
    trained: "CompletedProcess[str]", cluster: JobCluster
) -> None:
    assert trained.returncode == 0, trained.stdout
    (experiment,) = list_experiments(str(cluster.repository / "experiments"))
    assert experiment.info()["state"] == "done"
    best = load_checkpoint(experiment.checkpoints / "best", "cpu")
    assert (best.info.stage, best.step) == ("latent", 2)


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


def test_without_the_token_nobody_submits(cluster: JobCluster, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert cluster.get("/api/jobs/", cluster.token)[0] == 200
    for token, refused in ((None, 401), ("0" * 64, 403)):
        assert cluster.get("/api/jobs/", token)[0] == refused
        assert cluster.get("/api/jobs/", token, posted={"entrypoint": f"touch {trace}"})[0] == refused
    assert not trace.exists()


def test_a_job_in_a_copy_runs_the_submitted_code_and_stopped_ends_its_actors_and_leaves_a_checkpoint(
    cluster: JobCluster, submitted: Path, elsewhere: Path, tmp_path: Path
) -> None:
    assert cluster.living_actors() == []
    images, experiments = str(cluster.repository / "images"), tmp_path / "experiments"
    endless = ["--epochs", "100000", "--saving.every_steps", "5", "--num_workers", "1"]
    command = shlex.join([*TRAIN, *TINY, *endless, "--data_root", images, "--experiments_dir"])
    name = "endless"
    as_given = ["--no-wait", "--submission-id", name, "--working-dir", str(submitted)]
    both = f"{command} lost; echo exit $?; exec {command} {experiments}"
    begun = cluster.ray("job", "submit", *as_given, "--", "sh", "-c", both, cwd=elsewhere)
    assert begun.returncode == 0, begun.stdout
    complete = "*/checkpoints/step_*/complete.json"
    await_that(lambda: list(experiments.glob(complete)), 240, "a first checkpoint")
    said = cluster.get(f"/api/jobs/{name}/logs", cluster.token)[1]["logs"]
    assert re.search(r"^error: experiments_dir: lost would be in this job's copy .*M2D_STORAGE.*\nexit 2$", said, re.M)
    assert "Traceback" not in said
    assert list(cluster.session.rglob("lost")) == []
    assert {"TrainController", "RayTrainWorker", "JobSupervisor"} <= set(cluster.living_actors())

    # As `ray job stop` asks, which takes seconds to start, and the run the cores meanwhile.
    assert cluster.get(f"/api/jobs/{name}/stop", cluster.token, posted={}) == (200, {"stopped": True})
    await_that(lambda: cluster.job_status(name) == "STOPPED", 240, "it stops")
    await_that(lambda: not cluster.living_actors(), 240, "its actors end")
    await_that(lambda: cluster.free_cpus() == CPUS, 240, "its CPUs come back")
    (experiment,) = list_experiments(str(experiments))
    assert not experiment.is_running
    # What was done when the stop came is in a checkpoint of its own.
    info = experiment.info()
    assert (info["versions"]["m2d"], info["state"], info["error"]) == (SUBMITTED_VERSION, "stopped", None)
    last = json.loads((experiment.path / "metrics" / "train.jsonl").read_text().splitlines()[-1])["step"]
    newest = max(experiments.glob(complete)).parent
    assert load_checkpoint(newest, "cpu").step == last
    shutil.rmtree(experiments)
