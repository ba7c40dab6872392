"""How M2D reaches Ray, without starting any: what is set, what is refused, what is left alone."""

import http.server
import json
import os
import stat
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from m2d.cluster import start as cluster
from m2d.cluster.start import quiet, ray_cluster
from m2d.errors import ConfigError


class PretendedRay:
    """Remembers what it was asked, in place of ray.init and its friends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, cpus: float = 4.0, initialized: bool = False) -> None:
        self.init_options: list[dict[str, Any]] = []
        self.shutdowns = 0
        self.cpus = cpus
        self.dashboard_url: str | None = None
        monkeypatch.setattr(ray, "is_initialized", lambda: initialized)
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", self.shutdown)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": self.cpus})

    def init(self, **options: Any) -> SimpleNamespace:
        self.init_options.append(options)
        return SimpleNamespace(dashboard_url=self.dashboard_url)

    def shutdown(self) -> None:
        self.shutdowns += 1


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster to join, no token in the home directory, an empty /tmp; what the code sets is undone."""
    for name in (
        "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_DATA_DISABLE_PROGRESS_BARS",
        "RAY_USAGE_STATS_ENABLED", "RAY_TMPDIR",
    ):  # fmt: skip
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_cluster_of_our_own_has_the_cpus_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch, cpus=100)
    with ray_cluster(min_cpus=99.5):
        pass
    assert pretended.init_options[0]["num_cpus"] == 100


def test_no_cluster_that_somebody_wrote_into_tmp_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray takes for an address where it is given ours, on a machine whose /tmp/ray names another's."""
    from ray._private.services import canonicalize_bootstrap_address

    pretended = PretendedRay(monkeypatch)
    monkeypatch.setattr("ray._private.utils.read_ray_address", lambda *_: "10.6.6.6:6379")
    assert canonicalize_bootstrap_address(None) == "10.6.6.6:6379"
    with ray_cluster():
        pass
    assert canonicalize_bootstrap_address(pretended.init_options[0]["address"]) is None


def test_rays_files_are_for_the_user_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    PretendedRay(monkeypatch)
    monkeypatch.setattr(cluster, "LONGEST_FOLDER", 1000)
    with ray_cluster():
        folder = Path(get_default_ray_temp_dir()).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.is_relative_to(tmp_path)


def test_a_folder_of_that_name_which_is_anothers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PretendedRay(monkeypatch)
    (tmp_path / f"m2d-ray-{os.getuid()}").symlink_to("/")
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR: .*a link or another user's[^\n]*$"), ray_cluster():
        pass


@pytest.mark.parametrize("why", ["the user named one", "sockets there would have too long names"])
def test_rays_files_are_left_where_they_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: str) -> None:
    PretendedRay(monkeypatch)
    if why == "the user named one":
        monkeypatch.setattr(cluster, "LONGEST_FOLDER", 1000)
        monkeypatch.setenv("RAY_TMPDIR", "/theirs")
    else:
        monkeypatch.setattr(cluster, "LONGEST_FOLDER", len(str(tmp_path)))
    with ray_cluster():
        assert os.environ.get("RAY_TMPDIR") == ("/theirs" if why == "the user named one" else None)


def test_a_cluster_of_our_own_is_seen_by_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch)
    with ray_cluster():
        pass
    assert pretended.init_options[0]["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("chosen", [None, "1"])
def test_ray_tells_its_makers_nothing_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """As Ray itself decides it, in a cluster of our own."""
    from ray._common.usage.usage_lib import usage_stats_enabled

    PretendedRay(monkeypatch)
    if chosen is not None:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", chosen)
    with ray_cluster():
        assert usage_stats_enabled() is (chosen is not None)


def test_it_is_shut_down_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch)
    with pytest.raises(RuntimeError, match="inside"), ray_cluster():
        raise RuntimeError("inside")
    assert pretended.shutdowns == 1


def test_a_connection_that_exists_is_used_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch, initialized=True)
    with ray_cluster():
        pass
    assert (pretended.init_options, pretended.shutdowns) == ([], 0)


def test_a_named_cluster_is_joined_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with ray_cluster():
        pass
    assert pretended.init_options[0]["address"] == "auto"
    assert "num_cpus" not in pretended.init_options[0]


def test_a_named_cluster_that_is_too_small_is_refused_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedRay(monkeypatch, cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with (
        pytest.raises(ConfigError, match="has 2 CPUs and the run needs 3; lower --num_workers"),
        ray_cluster(min_cpus=3),
    ):
        pass
    assert pretended.shutdowns == 1


def test_a_named_cluster_that_does_not_answer_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    PretendedRay(monkeypatch)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:6379") as refusal, ray_cluster():
        pass
    assert "\n" not in str(refusal.value)


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers as Ray's does, or in another way."""

    answer = b'{"authentication_mode": "disabled"}'

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/authentication_mode" else 401)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    ("mode", "we_send_one", "warned"),
    [
        ("disabled", True, True),
        ("token", True, False),
        ("<html>", True, False),
        ("token", False, True),
        (None, True, False),
    ],
    ids=["open", "closed", "something else answers", "we were let in without a token", "no dashboard"],
)
def test_a_cluster_that_asks_for_no_token_is_warned_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str | None,
    we_send_one: bool,
    warned: bool,
) -> None:
    pretended = PretendedRay(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(cluster, "_sends_token", lambda: we_send_one)
    monkeypatch.setattr(Dashboard, "answer", json.dumps({"authentication_mode": mode}).encode())
    if mode == "<html>":
        monkeypatch.setattr(Dashboard, "answer", b"<html>")
    with http.server.HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pretended.dashboard_url = f"127.0.0.1:{server.server_port}" if mode else None
        with ray_cluster():
            pass
        server.shutdown()
    told = capsys.readouterr().err
    assert ("asks for no token" in told and "RAY_AUTH_MODE=token" in told) is warned
    assert told.count("\n") == int(warned)


def test_a_cluster_of_our_own_is_not_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PretendedRay(monkeypatch)
    monkeypatch.setattr(cluster, "_sends_token", lambda: False)
    with ray_cluster():
        pass
    assert capsys.readouterr().err == ""


def test_the_access_token_is_for_the_user_alone_and_not_in_the_home_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    PretendedRay(monkeypatch)
    with ray_cluster():
        path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert len(bytes.fromhex(path.read_text())) == 32
    assert list((tmp_path / "home").iterdir()) == []


def test_a_token_that_the_user_has_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PretendedRay(monkeypatch)
    (tmp_path / "home" / ".ray").mkdir()
    (tmp_path / "home" / ".ray" / "auth_token").write_text("theirs")
    with ray_cluster():
        assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_bars_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(verbose=True)
    assert "RAY_DATA_DISABLE_PROGRESS_BARS" not in os.environ
    quiet(verbose=False)
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
