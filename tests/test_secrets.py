"""No key gets into what a run writes down: URIs with credentials are refused, and code is copied without keys."""

import os
import pickle
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from ray.train.v2._internal.state.schema import _to_json_serializable_value
from tiny_run import TINY, write_images

import m2d
from m2d.cli import main
from m2d.errors import ConfigError
from m2d.experiment import BLANKED_LINE, back_up_code, code_without_keys
from m2d.files.paths import refuse_credentials
from m2d.training.telemetry import find_wandb_key

SECRET = "sw0rdfish"


WITH_SECRETS = [
    f"s3://AKIA:{SECRET}@bucket/ISIC",
    f"s3://AKIA:/{SECRET}/+x@bucket/ISIC",  # a slash that should have been quoted
    f"s3://:{SECRET}@bucket",
    f"https://{SECRET}@host/a",
    f"abfs://account:{SECRET}==@container/a",
    f"s3://bucket/a?region=eu&token={SECRET}",
    f"s3://bucket/a?{SECRET}",
    f"https://host/a?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}/2",
    f"s3://bucket/a?endpoint_override=http://key:{SECRET}@host",
]


@pytest.mark.parametrize("uri", WITH_SECRETS)
def test_a_uri_with_credentials_is_refused_and_the_environment_named(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"^data_root .*AWS_SECRET_ACCESS_KEY") as refusal:
        refuse_credentials("data_root", uri)
    assert SECRET not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "location",
    [
        "s3://bucket/ISIC?region=eu-west-1&endpoint_override=localhost:9000&scheme=http",
        "gs://anonymous@bucket/ISIC",
        "abfs://container@account.dfs.core.windows.net/ISIC",
        "hdfs://user@namenode:8020/ISIC",
        "http://localhost:8265/a@b",
        "file:///data/a:b@c",
        "/data/a@b/c?token=d",
    ],
)
def test_what_only_tells_where_a_store_is_may_be_in_a_uri(location: str) -> None:
    refuse_credentials("data_root", location)


@pytest.mark.parametrize("setting", ["data_root", "experiments_dir", "init_checkpoint"])
def test_a_run_with_a_key_in_a_uri_begins_nowhere(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_images(tmp_path / "data")
    places = {"data_root": str(data), "experiments_dir": "runs"} | {setting: f"{data.as_uri()}?token={SECRET}"}
    with pytest.raises(SystemExit, match="2"):
        main("train", [*TINY, *(f"--{name}={place}" for name, place in places.items())])
    shown = capsys.readouterr()
    assert shown.err.startswith(f"error: {setting} is a URI with credentials")
    assert SECRET not in shown.out + shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


WANDB_KEY = "0123456789" * 4


@pytest.fixture
def no_wandb_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home directory without a .netrc, and an environment without a key; wandb reads both again."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()


@pytest.mark.parametrize("place", ["environment", "netrc"])
def test_the_drivers_wandb_key_reaches_the_worker_and_is_shown_nowhere(
    place: str, no_wandb_key: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid:8080")
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    else:
        (tmp_path / ".netrc").write_text(f"machine wandb.invalid login user password {WANDB_KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
    found = find_wandb_key(pytest.fail)
    assert found is not None
    shown = _to_json_serializable_value(
        {"plan": 1, "wandb": found}
    )  # what Ray's dashboard shows of a worker's arguments
    assert WANDB_KEY not in f"{shown} {found} {found!r}"
    monkeypatch.setenv("WANDB_API_KEY", "of the node")
    monkeypatch.delenv("WANDB_BASE_URL")
    pickle.loads(pickle.dumps(found)).use()  # noqa: S301
    assert (os.environ["WANDB_API_KEY"], os.environ["WANDB_BASE_URL"]) == (WANDB_KEY, "http://wandb.invalid:8080")


def test_a_machine_without_a_wandb_key_is_told_so_in_one_line(no_wandb_key: None) -> None:
    warnings: list[str] = []
    assert find_wandb_key(warnings.append) is None
    (warning,) = warnings
    assert "WANDB_API_KEY" in warning
    assert "\n" not in warning


ONLINE_AT_A_TERMINAL = """
import logging, sys
from pathlib import Path
from m2d.training.telemetry import Wandb
logging.basicConfig(filename=sys.argv[1] + "/messages", level="WARNING")
run = Wandb(Path(sys.argv[1]), "m2d-tests", "tiny_20250101_000000", "online", {})
run.scalars(1, {"loss": 0.5})
run.finish(None)
"""


@pytest.mark.slow
def test_a_worker_without_a_wandb_key_asks_nobody_and_keeps_the_run_offline(no_wandb_key: None, tmp_path: Path) -> None:
    """At a terminal, where wandb would ask, and be waited for."""
    ours, its = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_SILENT": "false", "TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, "-c", ONLINE_AT_A_TERMINAL, str(tmp_path)]
    started = subprocess.Popen(program, stdin=its, stdout=subprocess.PIPE, stderr=its, env=environment)
    try:
        assert started.wait(timeout=120) == 0
    finally:
        started.kill()
        os.close(ours)
        os.close(its)
    assert "kept offline (No API key configured" in (tmp_path / "messages").read_text()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


KEYS = {
    "an AWS key id": 'client = connect("AKIA' + "Q7" * 8 + '")',
    "a GitHub token": 'TOKEN = "ghp_' + "a1B2" * 9 + '"',
    "a Hugging Face token": 'login("hf_' + "a1B2" * 9 + '")',
    "wandb's": 'os.environ["WANDB_API_KEY"] = "' + "0123456789" * 4 + '"',
    "wandb's as an argument": 'wandb.login(key="' + "0123456789abcdef0123" * 2 + '")',
    "a password": 'db_password: str = "c0rrect-horse-battery"',
    "a header": '"access_token": "x9y8z7w6v5u4t3"',
    "a URI": 'root = "s3://key:w0rdw0rd@bucket/a"',
}


@pytest.mark.parametrize("line", KEYS.values(), ids=KEYS.keys())
def test_a_key_typed_into_code_is_left_out_of_the_copy(line: str) -> None:
    patch = f"@@ -1 +1,2 @@\n import os\n+    {line}\n"
    assert code_without_keys(patch) == (f"@@ -1 +1,2 @@\n import os\n+    {BLANKED_LINE}\n", [3])


@pytest.mark.parametrize(
    "line",
    [
        'for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):',
        'token = os.environ["WANDB_API_KEY"]',
        'TOKEN_FILE = "/home/ray/.ray/auth_token"',
        'sha256 = "' + "0123456789abcdef" * 4 + '"',
        "feature_tokens: int = 4  # of the context",
    ],
)
def test_a_line_that_only_speaks_of_keys_stays(line: str) -> None:
    assert code_without_keys(line) == (line, [])


def test_a_private_key_is_left_out_to_its_last_line() -> None:
    kind = "RSA PRIVATE KEY"  # in one piece this file would be found too
    code = f'a = 1\nkey = """-----BEGIN {kind}-----\nMIIE\n-----END {kind}-----"""\nb = 2\n'
    assert code_without_keys(code) == (f"a = 1\n{BLANKED_LINE}\n{BLANKED_LINE}\n{BLANKED_LINE}\nb = 2\n", [2, 3, 4])


def test_the_projects_own_code_is_kept_as_it_is() -> None:
    """Whoever looks for keys also finds what is none; here it finds nothing."""
    root = Path(m2d.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parent / "bench").rglob("*.py"), *(root.parent / "jobs").rglob("*.py")]
    assert len(sources) > 100
    assert [path.name for path in sources if code_without_keys(path.read_text())[1]] == []


def test_a_script_with_a_key_is_backed_up_without_it_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "mine.py"
    script.write_bytes(b"# caf\xe9\n" + KEYS["wandb's"].encode() + b"\nprint(1)\n")
    monkeypatch.setattr("sys.argv", [str(script)])
    (tmp_path / "backup").mkdir()
    back_up_code(tmp_path / "backup")
    kept = (tmp_path / "backup" / "mine.py").read_bytes()
    assert kept == f"# caf\xe9\n{BLANKED_LINE}\nprint(1)\n".encode("latin-1")
    assert "mine.py:2" in caplog.text
