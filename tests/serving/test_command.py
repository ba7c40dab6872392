"""The command `serve`: what it refuses, the file that it writes, and a service of its own from start to end."""

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from cluster.job_cluster import await_that, job_cluster
from processes import descendants, end_all
from tiny_checkpoint import make_checkpoint, write_checkpoint

from m2d.cli import main, parse
from m2d.serving.command import deploy_file
from m2d.serving.deployment import gpu_shares, of_ours, signing_file, with_additions, write_addition
from m2d.serving.engine import describe
from m2d.serving.settings import ServeConfig
from tests.serving.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
STARTING_S = 240.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its experiment is called tiny."""
    return write_checkpoint(make_checkpoint(), tmp_path_factory.mktemp("runs") / "tiny" / "checkpoints" / "step_1000")


def test_a_checkpoint_may_be_named_more_than_once() -> None:
    assert parse("serve", ["--checkpoint", "A", "--checkpoint=B"]).checkpoint == ["A", "B"]
    assert parse("serve", ["--checkpoint", "[A, B]"]).checkpoint == ["A", "B"]


def test_flags_of_a_list_replace_a_files_list(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("checkpoint: [A, B]\nkeys: keys.json\n")
    config = parse("serve", ["--config", str(tmp_path / "serve.yaml"), "--checkpoint", "C"])
    assert (config.checkpoint, config.keys) == (["C"], "keys.json")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "PORT"], "error: port: the service cannot listen at 127.0.0.1:"),
        (["--host", "192.0.2.1", "--keys", "KEYS"], "error: host: the service cannot listen at 192.0.2.1:8000"),
        (["--host", "0.0.0.0"], "error: host is 0.0.0.0, which others may reach, and no key is asked for"),
        (["--keys", "nowhere.json"], "error: keys: "),
        (["--checkpoint", "nowhere"], "error: checkpoint: "),
        (["--tls_cert", "KEYS", "--tls_key", "KEYS"], "error: tls_cert: "),
        (["--sign", "KEYS"], "error: sign: "),
        (["--replicas", "many"], "error: replicas is many; "),
        (["--directory", "KEYS/below"], "error: directory: "),
    ],
    ids=[
        "port in use",
        "host not here",
        "open host",
        "no keys",
        "no checkpoint",
        "no certificate",
        "no signer",
        "replicas",
        "file",
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_before_anything_starts(
    arguments: list[str], told: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [word.replace("PORT", port).replace("KEYS", str(keys)) for word in arguments]
        places = ["--checkpoint", str(checkpoint)] if "--checkpoint" not in given else []
        places += ["--directory", str(tmp_path / "serving")] if "--directory" not in given else []
        with pytest.raises(SystemExit) as ended:
            main("serve", [*given, *places])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(told)
    assert said.count("\n") == 1


def test_a_self_made_certificate_is_made_once_for_the_service(tmp_path: Path) -> None:
    """All its replicas and jobs, and the service that is started next, read it from there."""
    config = ServeConfig(checkpoint=["A"], directory=str(tmp_path / "serving"), sign="self-made")
    Path(config.directory).mkdir()
    file = Path(str(signing_file(config)))
    made = file.read_bytes()
    assert (file.parent, file.stat().st_mode & 0o777) == (tmp_path / "serving", 0o600)
    assert signing_file(config) == str(file)
    assert file.read_bytes() == made
    assert signing_file(replace(config, sign=None)) is None


def test_the_file_for_serve_deploy_listens_where_it_was_asked_to(checkpoint: Path, tmp_path: Path) -> None:
    """What `serve build` writes listens to everybody."""
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import cli

    (tmp_path / "plain_application.py").write_text(
        "from ray import serve\n\n\n@serve.deployment\nclass A:\n    pass\n\n\nbuilt = A.bind()\n"
    )
    built = tmp_path / "built.yaml"
    CliRunner().invoke(cli, ["build", "plain_application:built", "-d", str(tmp_path), "-o", str(built)])
    assert yaml.safe_load(built.read_text())["http_options"]["host"] == "0.0.0.0"
    file = tmp_path / "serve.yaml"
    flags = ["--limits.steps", "7", "--replicas", "1-4", "--directory", str(tmp_path), "--port", "8123"]
    main("serve", ["--checkpoint", str(checkpoint), *flags, "--write_config", str(file)])
    written = yaml.safe_load(file.read_text())
    assert ServeDeploySchema.model_validate(written).http_options.host == "127.0.0.1"
    (application,) = written["applications"]
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(application["args"]))
    assert parse("serve", ["--config", str(tmp_path / "args.yaml")]) == parse(
        "serve", ["--checkpoint", str(checkpoint), *flags]
    )


def test_the_file_for_serve_deploy_has_the_certificate() -> None:
    config = ServeConfig(checkpoint=["/a"], host="::1", tls_cert="/cert.pem", tls_key="/key.pem")
    options = yaml.safe_load(deploy_file(config))["http_options"]
    assert (options["host"], options["ssl_certfile"], options["ssl_keyfile"]) == ("::1", "/cert.pem", "/key.pem")


@pytest.mark.parametrize(
    ("settings", "gpus", "shares"),
    [
        ({}, 0, (0, 0)),
        ({"device": "cpu"}, 2, (0, 0)),
        ({}, 3, (1, 1)),  # a replica, its successor, a job
        ({}, 2, (0.5, 1)),  # a GPU for the job, one for a replica and its successor
        ({}, 1, (0.33, 0.33)),
        ({"replicas": "1-4"}, 8, (0.5, 1)),
        ({"gpus_per_replica": 1}, 1, (1, 1)),  # as asked: a job waits for another node
        ({"gpus_per_replica": 0.5, "job_gpus": 0.25}, 1, (0.5, 0.25)),
        ({"gpus_per_replica": 1}, 0, (1, 1)),  # nodes are yet to come
    ],
)
def test_a_gpu_is_shared_where_there_are_not_enough(
    settings: dict[str, Any], gpus: float, shares: tuple[float, float]
) -> None:
    assert gpu_shares(ServeConfig(checkpoint=["a"], **settings), gpus) == shares


def test_an_operators_model_stays_until_the_configuration_has_a_newer_one(checkpoint: Path, tmp_path: Path) -> None:
    configured = describe(str(checkpoint), "tiny", "free")
    added, other = replace(configured, sha256="1" * 64), replace(configured, name="other", sha256="2" * 64)
    file = tmp_path / "models.json"
    assert with_additions([configured], file) == [configured]
    write_addition(file, [configured], added)
    write_addition(file, [configured], other)
    assert with_additions([configured], file) == [added, other]
    newer = replace(configured, sha256="3" * 64)
    assert with_additions([newer], file) == [newer, other]
    write_addition(file, [configured], replace(other, checkpoint="/gone"))
    assert with_additions([configured], file) == [added]


def test_metrics_of_two_nodes_are_one_group_each() -> None:
    node = "# HELP ray_m2d_orders of\n# TYPE ray_m2d_orders gauge\n"
    node += 'ray_m2d_orders{Version="2",model="a",replica="%s"} 1.0\n'
    other = "# HELP ray_node_mem used\n# TYPE ray_node_mem gauge\nray_node_mem 1.0\n"
    assert of_ours([node % "x" + other, other + node % "y"]).splitlines() == [
        "# HELP ray_m2d_orders of",
        "# TYPE ray_m2d_orders gauge",
        'ray_m2d_orders{model="a",replica="x"} 1.0',
        'ray_m2d_orders{model="a",replica="y"} 1.0',
    ]


# --- a service of its own ---------------------------------------------------------------------------------------------


@dataclass
class Running:
    """`python jobs/serve.py` at work."""

    process: "subprocess.Popen[str]"
    client: httpx.Client
    line: str  # what it says when it is ready


@contextmanager
def running(folder: Path, checkpoint: Path, *flags: str, verify: Any = True) -> Iterator[Running]:
    """Until the block ends, where it is killed if it has not ended."""
    port = str(free_port())
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "M2D_"))}
    environment = {"RAY_prestart_worker_first_driver": "0", "RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
    places = ["--checkpoint", str(checkpoint), "--directory", str(folder / "serving"), "--port", port]
    log = folder / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "serve.py"), *places, "--gates.enabled", "false", *flags],
            cwd=folder, env=inherited | environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    try:

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "(page, /docs, /v1)" in log.read_text()

        await_that(is_ready, STARTING_S, "the service starts")
        *_, line = log.read_text().splitlines()
        found = re.search(r"https?://\S+", line)
        assert found is not None
        with httpx.Client(base_url=found[0], verify=verify, timeout=60) as client:
            yield Running(process, client, line)
    finally:
        ours = [*descendants(of=process.pid)]
        process.kill()
        process.wait()
        end_all(ours, patience_s=5)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed, which makes a certificate")
def test_a_service_with_a_certificate_ends_after_what_is_under_way(checkpoint: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=M2D", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(cert))
    flags = ["--tls_cert", str(cert), "--tls_key", str(key)]
    with running(tmp_path, checkpoint, *flags, verify=context) as service:
        assert re.fullmatch(r"serving tiny at https://127\.0\.0\.1:\d+ \(page, /docs, /v1\)", service.line)
        assert service.client.get("/readyz").status_code == 200
        order = {"class": "MEL", "count": 16, "steps": 100}
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(service.client.post("/v1/images", json=order)))
        asking.start()
        time.sleep(0.5)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(120) == 0
        asking.join()
    assert len(answers[0].json()["images"]) == 16


@pytest.mark.processes
@pytest.mark.exhaustive
def test_a_job_of_a_killed_service_goes_on_with_the_next_and_makes_every_image_once(
    checkpoint: Path, tmp_path: Path
) -> None:
    order = {"counts": {"MEL": 200}, "steps": 50, "seed": 1}
    with running(tmp_path, checkpoint) as service:
        place = service.client.post("/v1/jobs", json=order).headers["Location"]

        def done() -> int:
            return int(service.client.get(place).json()["done"])

        await_that(lambda: 0 < done() < 200, 240, "the job is at work")
        before = {row["id"]: row["sha256"] for row in entries(service, place)}
        service.process.kill()
    assert 0 < len(before) < 200
    with running(tmp_path, checkpoint) as service:
        await_that(lambda: service.client.get(place).json()["state"] == "succeeded", 240, "the job ends")
        after = entries(service, place)
    assert sorted(row["id"] for row in after) == [f"MEL_{index:06}" for index in range(200)]
    assert {row["id"]: row["sha256"] for row in after if row["id"] in before} == before


def entries(service: Running, place: str) -> list[dict[str, Any]]:
    """All rows of a job's manifest so far."""
    found: list[dict[str, Any]] = []
    while True:
        page = json.loads(service.client.get(f"{place}/images", params={"first": len(found), "count": 1000}).text)
        found += page["data"]
        if page["next"] is None or not page["data"]:
            return found


@pytest.mark.processes
@pytest.mark.exhaustive
def test_a_submitted_job_serves_until_it_is_stopped_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Relative places of results begin where the head was started; a service of other HTTP options is refused."""
    port = str(free_port())
    with job_cluster(tmp_path) as cluster:
        words = ["python", "jobs/serve.py", "--checkpoint", str(checkpoint), "--gates.enabled", "false"]
        submit = ["job", "submit", "--submission-id", "served", "--no-wait", "--", *words, "--port", port]
        assert cluster.ray(*submit, cwd=tmp_path).returncode == 0
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def is_ready() -> bool:
                assert cluster.job_status("served") in ("PENDING", "RUNNING"), cluster.ray(
                    "job", "logs", "served", cwd=tmp_path
                ).stdout
                with suppress(httpx.TransportError):
                    return client.get("/readyz").status_code == 200
                return False

            await_that(is_ready, STARTING_S, "the service answers")
            assert client.post("/v1/images", json={"class": "MEL", "steps": 2}).status_code == 200
        assert (cluster.repository / "serving" / "jobs").is_dir()
        other = cluster.ray("job", "submit", "--", *words, "--port", "1", cwd=tmp_path)
        assert f"error: Serve already runs on this cluster with port {port}; " in other.stdout
        cluster.ray("job", "stop", "served", cwd=tmp_path)
        await_that(lambda: cluster.living_actors() == [], 240, "no actor is left")
