"""The only place that calls ray.init: joins the cluster that RAY_ADDRESS names or starts one here, quietly."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m2d.errors import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def ray_cluster(*, verbose: bool = False, min_cpus: float = 1.0) -> Iterator[None]:
    """A connection to Ray for the time of the block; one that exists already is used and left alone.

    min_cpus: logical CPUs that the caller will ask for at once. A cluster started here has at least so many, however
    few cores the machine has: they are a budget, and a small machine's workers share its cores.
    """
    quiet(verbose)
    import ray

    if ray.is_initialized():
        yield
        return
    joined = bool(os.environ.get("RAY_ADDRESS"))
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if joined:
        try:
            ray.init(address="auto", **options)
        except ConnectionError as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"RAY_ADDRESS: no Ray cluster answers at {os.environ['RAY_ADDRESS']} ({reason}); start one there, or "
                "unset RAY_ADDRESS to use this machine"
            ) from None
    else:
        _use_private_token()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # or Ray tells its makers; the user may want it to
        options["num_cpus"] = max(os.cpu_count() or 1, int(min_cpus + 0.999))
        # Without the dashboard, whose state API Train asks, stopped Tune trials never free their CPUs.
        options |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        try:
            ray.init(**options)
        except Exception:  # Ray gives its processes 30 s to start, whatever else the machine does; they are warm now
            logger.warning("Ray did not start in time; trying once more", exc_info=True)
            ray.shutdown()
            ray.init(**options)
    try:
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
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _use_private_token() -> None:
    """Ray's local clusters make an access token; keep it out of the home directory unless the user has one there."""
    home_token = Path.home() / ".ray" / "auth_token"
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ or home_token.is_file():
        return
    folder = Path(tempfile.mkdtemp(prefix="m2d-ray-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "auth_token"
    path.touch(mode=0o600)
    path.write_text(os.urandom(32).hex(), encoding="utf-8")
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
