"""The only place that calls ray.init: joins the cluster that RAY_ADDRESS names or starts one here, quietly."""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2d.cluster.nodes import wait_for_nodes
from m2d.errors import ConfigError, first_line
from m2d.files.paths import private_folder
from m2d.files.progress import say

logger = logging.getLogger(__name__)
DASHBOARD_S = 3.0  # in which it answers, or is not asked
LONGEST_FOLDER = 36  # bytes: a socket's path has 107, of which Ray's session takes up to 71
LONGEST_TMPDIR = 75  # bytes: multiprocessing adds /pymp-xxxxxxxx/listener-xxxxxxxx


@contextmanager
def ray_cluster(
    *,
    verbose: bool = False,
    min_cpus: float = 1.0,
    bundles: Sequence[Mapping[str, float]] = (),
    wait_s: float = 0.0,
) -> Iterator[None]:
    """A connection to Ray for the time of the block; one that exists already is used and left alone.

    min_cpus: logical CPUs that the caller will ask for at once. A cluster started here has at least so many, however
    few cores the machine has: they are a budget, and a small machine's workers share its cores. bundles, wait_s: what
    each worker needs of one node, and how long a cluster that was joined may take to bring nodes with it.
    """
    quiet(verbose)
    import ray
    from joblib import cpu_count

    if ray.is_initialized():
        yield
        return
    joined = bool(os.environ.get("RAY_ADDRESS"))
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if joined:
        try:
            context = ray.init(address="auto", **options)
        except ConnectionError as error:
            raise ConfigError(
                f"RAY_ADDRESS: no Ray cluster answers at {os.environ['RAY_ADDRESS']} ({first_line(error)}); "
                "start one there, or unset RAY_ADDRESS to use this machine"
            ) from None
        _warn_if_open(getattr(context, "dashboard_url", None))
    else:
        _use_private_token()
        _use_private_folder()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray reports to its makers; the user may want it to
        # Without an address Ray would first look into /tmp/ray, where everybody can write, for a cluster to join.
        options["address"] = "local"
        options["num_cpus"] = max(cpu_count(), int(min_cpus + 0.999))
        # Without the dashboard, whose state API Train asks, stopped Tune trials never free their CPUs.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        # Ray's processes end with the driver, which may still save when its terminal is closed; they inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            ray.init(**options)
        except Exception as error:
            if "AF_UNIX" in str(error):
                raise ConfigError(
                    f"RAY_TMPDIR: {os.environ['RAY_TMPDIR']} is too long a path for Ray's sockets; name one of up to "
                    f"{LONGEST_FOLDER} bytes, or unset it"
                ) from None
            # It gives its processes 30 s to start, whatever else the machine does; they are warm now.
            logger.warning("Ray did not start (%s); trying once more", first_line(error), exc_info=verbose)
            ray.shutdown()
            try:
                ray.init(**options)
            except Exception as again:
                raise ConfigError(
                    f"Ray did not start on this machine, nor at a second try ({first_line(again)}); run again when "
                    f"the machine is less busy; its logs are under {os.environ['RAY_TMPDIR']}"
                ) from again
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        if joined and wait_s > 0:
            wait_for_nodes(bundles, wait_s, logger.warning)
        if ray.cluster_resources().get("CPU", 0) < min_cpus:
            raise ConfigError(
                f"the Ray cluster has {ray.cluster_resources().get('CPU', 0):g} CPUs and the run needs {min_cpus:g}; "
                "lower --num_workers or add a node"
            )
        yield
    finally:
        ray.shutdown()


def quiet(verbose: bool) -> None:
    """Ray's bars and chatter go to its log files only, unless asked for. Set before Ray is imported."""
    if verbose:
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "INFO")  # at DEBUG two logs that nobody trims grow by 0.5 GB a day
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _warn_if_open(dashboard: str | None) -> None:
    """One line where the cluster that was joined lets everybody in. dashboard: HOST:PORT, None where it has none.

    Also for a cluster on 127.0.0.1: Ray's GCS listens on every address of the machine whatever the node's is.
    """
    if not _sends_token() or _answers_without_token(dashboard):  # without a token we would not have been let in
        say(
            f"WARNING: the Ray cluster at {os.environ['RAY_ADDRESS']} asks for no token, so everybody who reaches its "
            "ports can run code as you and read your images; start its nodes with RAY_AUTH_MODE=token and a token "
            "(docs/security.md)"
        )


def _sends_token() -> bool:
    try:
        from ray._private.authentication.authentication_utils import is_token_auth_enabled
    except ImportError:  # no part of Ray's public interface
        return True
    return bool(is_token_auth_enabled())


def _answers_without_token(dashboard: str | None) -> bool:
    """Whether the dashboard says that Ray asks for no token; one that cannot be asked says nothing."""
    import requests

    if not dashboard:
        return False
    with requests.Session() as session:
        session.trust_env = False  # no proxy
        try:
            found = session.get(f"http://{dashboard}/api/authentication_mode", timeout=DASHBOARD_S).json()
        except (OSError, ValueError):
            return False
    return isinstance(found, dict) and found.get("authentication_mode") == "disabled"


def _use_private_folder() -> None:
    """Ray's logs and sockets, elsewhere than in /tmp/ray, where everybody can read and write."""
    if "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = str(private_folder("ray", LONGEST_FOLDER))
    # The dashboard's processes meet at a socket of Python's in TMPDIR, whose path has the same limit.
    if len(os.fsencode(os.environ.get("TMPDIR", ""))) > LONGEST_TMPDIR:
        os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"]


def _use_private_token() -> None:
    """Ray's local clusters make an access token; keep it out of the home directory unless the user has one there."""
    is_there = os.path.isfile(os.path.expanduser("~/.ray/auth_token"))  # never raises, whosever that home may be
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or is_there:
        return
    folder = Path(tempfile.mkdtemp(prefix="m2d-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "auth_token"
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex(), encoding="utf-8")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
