"""How M2D reaches Ray, without starting any: what is set, what is refused, what is left alone."""

import http.server
import json
import os
import re
import signal
import stat
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._common.usage.usage_lib import usage_stats_enabled
from ray._common.utils import get_default_ray_temp_dir
from ray._private.services import canonicalize_bootstrap_address

from m2d.cluster import start as cluster
from m2d.cluster.start import quiet, ray_cluster
from m2d.errors import ConfigError


class PretendedRay:
    """Remembers what it was asked, in place of ray.init and its friends."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}  # of the last ray.init
        self.shutdowns = 0
        self.initialized = False
        self.cpus = 100.0
        self.dashboard_url: str | None = None
        self.blocked: set[signal.Signals] = set()  # by its processes, which inherit it

    def init(self, **options: Any) -> SimpleNamespace:
        self.options, self.blocked = options, signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return SimpleNamespace(dashboard_url=self.dashboard_url)

    def shutdown(self) -> None:
        self.shutdowns += 1


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PretendedRay:
    """No cluster to join, no token in the home directory, an empty /tmp; what the code sets is undone."""
    for name in (
        "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_DATA_DISABLE_PROGRESS_BARS",
        "RAY_USAGE_STATS_ENABLED", "RAY_TMPDIR", "RAY_DATA_LOG_LEVEL",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = PretendedRay()
    monkeypatch.setattr(ray, "is_initialized", lambda: made.initialized)
    monkeypatch.setattr(ray, "init", made.init)
    monkeypatch.setattr(ray, "shutdown", made.shutdown)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": made.cpus})
    return made


@pytest.fixture
def named_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")


def test_a_cluster_of_our_own_has_the_cpus_that_were_asked_for_and_is_for_this_machine_alone(
    pretended: PretendedRay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "_sends_token", lambda: False)
    with ray_cluster(min_cpus=99.5):
        pass
    assert pretended.options["num_cpus"] == 100
    assert pretended.options["dashboard_host"] == "127.0.0.1"
    assert capsys.readouterr().err == ""  # it is warned of a cluster that was joined alone


def test_a_closed_terminal_does_not_end_the_processes_of_a_run_that_saves(pretended: PretendedRay) -> None:
    """They are in the driver's process group, to which the kernel sends SIGHUP."""
    with ray_cluster():
        assert signal.SIGHUP in pretended.blocked
        assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_no_cluster_that_somebody_wrote_into_tmp_is_joined(
    pretended: PretendedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray takes for an address where it is given ours, on a machine whose /tmp/ray names another's."""
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: "10.6.6.6:6379")
    assert canonicalize_bootstrap_address(None) == "10.6.6.6:6379"
    with ray_cluster():
        pass
    assert canonicalize_bootstrap_address(pretended.options["address"]) is None


def test_rays_files_are_for_the_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "LONGEST_FOLDER", 1000)
    with ray_cluster():
        folder = Path(get_default_ray_temp_dir()).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.is_relative_to(tmp_path)


def test_a_folder_of_that_name_which_is_anothers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"m2d-ray-{os.getuid()}").symlink_to("/")
    monkeypatch.setattr(cluster, "LONGEST_FOLDER", 1000)
    with pytest.raises(ConfigError, match=r"^TMPDIR: .*a link or another user's[^\n]*$"), ray_cluster():
        pass


def test_rays_files_are_where_the_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/theirs")
    with ray_cluster():
        assert os.environ["RAY_TMPDIR"] == "/theirs"


@pytest.mark.parametrize("letter", ["t", "é"])
def test_sockets_find_room_however_long_tmpdir_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, letter: str) -> None:
    """A socket's path has 107 bytes, Ray's own and multiprocessing's, which the dashboard's processes use."""
    long = tmp_path / (letter * 40) / (letter * 40)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with ray_cluster():
        session = Path(get_default_ray_temp_dir()) / "session_2026-11-26_00-43-29_123456_1234567/sockets/plasma_store"
        assert len(os.fsencode(session)) <= 107
        assert len(os.fsencode(os.environ["TMPDIR"])) + len("/pymp-xxxxxxxx/listener-xxxxxxxx") <= 107
        assert stat.S_IMODE(Path(os.environ["RAY_TMPDIR"]).stat().st_mode) == 0o700


def test_a_folder_of_the_users_that_is_too_long_for_sockets_is_refused_once(
    pretended: PretendedRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /theirs/ray/x")

    monkeypatch.setenv("RAY_TMPDIR", "/theirs")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: /theirs is too long [^\n]*$"), ray_cluster():
        pass


@pytest.mark.parametrize("failures", [1, 2])
def test_a_machine_too_busy_for_ray_is_tried_twice_and_then_said_in_one_line(
    pretended: PretendedRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int
) -> None:
    left = iter(range(failures))

    def start(**options: Any) -> SimpleNamespace:
        if next(left, None) is not None:
            raise Exception("The current node timed out during startup.\nThis could happen because")
        return pretended.init(**options)

    monkeypatch.setattr(ray, "init", start)
    pattern = r"^Ray did not start on this machine, nor at a second try \(The current node timed out [^\n]*$"
    with pytest.raises(ConfigError, match=pattern) if failures == 2 else nullcontext(), ray_cluster():
        pass
    (record,) = caplog.records
    assert re.fullmatch("Ray did not start .*; trying once more", record.getMessage())
    assert record.exc_info in (None, False), "Ray's traceback is in its logs"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no process to cores")
def test_a_cluster_of_our_own_has_the_cores_that_this_process_may_use(pretended: PretendedRay) -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with ray_cluster():
            assert pretended.options["num_cpus"] == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("chosen", [None, "1"])
def test_ray_tells_its_makers_nothing_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """As Ray itself decides it, in a cluster of our own."""
    if chosen is not None:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", chosen)
    with ray_cluster():
        assert usage_stats_enabled() is (chosen is not None)


def test_it_is_shut_down_after_an_error_too(pretended: PretendedRay) -> None:
    with pytest.raises(RuntimeError, match="inside"), ray_cluster():
        raise RuntimeError("inside")
    assert pretended.shutdowns == 1


def test_a_connection_that_exists_is_used_and_left(pretended: PretendedRay) -> None:
    pretended.initialized = True
    with ray_cluster():
        pass
    assert (pretended.options, pretended.shutdowns) == ({}, 0)


def test_a_named_cluster_is_joined_as_it_is(pretended: PretendedRay, named_cluster: None) -> None:
    with ray_cluster():
        pass
    assert pretended.options["address"] == "auto"
    assert "num_cpus" not in pretended.options


def test_a_named_cluster_that_is_too_small_is_refused_and_left(pretended: PretendedRay, named_cluster: None) -> None:
    pretended.cpus = 2
    with pytest.raises(ConfigError, match=r"2 CPUs .* 3; lower --num_workers"), ray_cluster(min_cpus=3):
        pass
    assert pretended.shutdowns == 1


def test_a_named_cluster_that_does_not_answer_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, named_cluster: None
) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=r"^RAY_ADDRESS: [^\n]*10\.0\.0\.1:6379[^\n]*$"), ray_cluster():
        pass


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's does, or in another way."""

    answer = b""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/authentication_mode" else 401)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "we_send_one", "warned"),
    [
        (json.dumps({"authentication_mode": "disabled"}), True, True),
        (json.dumps({"authentication_mode": "token"}), True, False),
        ("<html>", True, False),
        (json.dumps({"authentication_mode": "token"}), False, True),
        (None, True, False),
    ],
    ids=["open", "closed", "something else answers", "we were let in without a token", "no dashboard"],
)
def test_a_cluster_that_asks_for_no_token_is_warned_of_in_one_line(
    pretended: PretendedRay,
    named_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str | None,
    we_send_one: bool,
    warned: bool,
) -> None:
    monkeypatch.setattr(cluster, "_sends_token", lambda: we_send_one)
    monkeypatch.setattr(Dashboard, "answer", (answer or "").encode())
    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pretended.dashboard_url = f"127.0.0.1:{server.server_port}" if answer else None
        with ray_cluster():
            pass
        server.shutdown()
    told = capsys.readouterr().err
    assert ("asks for no token" in told and "RAY_AUTH_MODE=token" in told) is warned
    assert told.count("\n") == int(warned)


def test_the_access_token_is_for_the_user_alone_and_not_in_the_home_directory(tmp_path: Path) -> None:
    with ray_cluster():
        path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(bytes.fromhex(path.read_text())) == 32
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize("home", ["/not-ours/\0", "/nowhere", ""], ids=["no path", "not there", "empty"])
def test_a_home_that_cannot_be_read_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    with ray_cluster():
        assert "RAY_AUTH_TOKEN_PATH" in os.environ


def test_a_token_that_the_user_has_is_used(tmp_path: Path) -> None:
    (tmp_path / "home" / ".ray").mkdir()
    (tmp_path / "home" / ".ray" / "auth_token").write_text("theirs")
    with ray_cluster():
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_bars_and_logs_of_debugging_are_off_unless_asked_for() -> None:
    quiet(verbose=True)
    assert not {"RAY_DATA_DISABLE_PROGRESS_BARS", "RAY_DATA_LOG_LEVEL"} & os.environ.keys()
    quiet(verbose=False)
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["RAY_DATA_LOG_LEVEL"] == "INFO"
