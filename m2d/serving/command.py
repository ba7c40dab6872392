"""The command `serve`: the service on a Ray cluster until it is told to end, or the file for `serve deploy`."""

import errno
import logging
import os
import signal
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from m2d.cluster.nodes import require_shared
from m2d.cluster.start import quiet, ray_cluster
from m2d.errors import ConfigError, M2DError, first_line
from m2d.files.atomic import write_whole
from m2d.files.paths import result_path
from m2d.files.progress import say
from m2d.generation.provenance import signing_of
from m2d.serving.access import read_keys
from m2d.serving.settings import ServeConfig, replica_range

LOOK_EVERY_S = 2.0
KEEP_ALIVE_S = 75  # a proxy in front reuses its connections for a minute; who closes first must not be we
_OWN = ("write_config", "verbose")  # settings of the command alone


def serve_command(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are then finished. Raises an M2DError, in one line."""
    quiet(config.verbose)  # before Ray is imported
    from m2d.serving.deployment import described, resolved

    config = resolved(config)
    _require_usable(config)
    if config.write_config is not None:
        path = Path(result_path("write_config", config.write_config)).expanduser()
        write_whole(path, deploy_file(config))
        print(f"{path}: start the service on a cluster by `serve deploy {path}`")
        return
    if not os.environ.get("RAY_ADDRESS"):
        _require_free(config)  # a cluster's own Serve may listen there
    cards = described(config)
    signal.signal(signal.SIGTERM, _end)
    say(f"starting Ray and the service, which loads {cards[0].name}: a minute, more on a busy machine")
    with ray_cluster(verbose=config.verbose, min_cpus=_logical_cpus(config)):
        signal.signal(signal.SIGTERM, _end)  # Ray has set its own
        read = {f"checkpoint ({card.name})": card.checkpoint for card in cards}
        require_shared(written={"directory": config.directory}, read=read)
        _start(config)
        from ray import serve

        from m2d.serving.deployment import NAME, application

        threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
        try:
            try:
                serve.run(application(config, cards, threads), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise ConfigError(f"the service did not start: {_reason(error)}") from None
            host = f"[{config.host}]" if ":" in config.host else config.host
            url = f"{'http' if config.tls_cert is None else 'https'}://{host}:{config.port}"
            print(f"serving {', '.join(card.name for card in cards)} at {url} (page, /docs, /v1)", flush=True)
            while NAME in serve.status().applications:
                time.sleep(LOOK_EVERY_S)
            raise M2DError("the service was ended by another command")
        finally:
            _drain(config)


def deploy_file(config: ServeConfig) -> str:
    """A config for `serve deploy`: where to listen, and these settings for m2d.serving.deployment.app_builder.

    Serve's own default, and what `serve build` writes, is to listen to everybody.
    """
    defaults = {field.name: getattr(ServeConfig, field.name, None) for field in fields(config)}
    settings = {name: value for name, value in asdict(config).items() if value != defaults[name] or name == "host"}
    for name in ("gates", "limits"):
        by_default = asdict(type(getattr(config, name))())
        settings[name] = {key: value for key, value in settings[name].items() if value != by_default[key]}
    settings = {name: value for name, value in settings.items() if name not in _OWN and value not in ({}, [])}
    document = {
        "proxy_location": "EveryNode",
        "http_options": http_options(config),
        "applications": [
            {
                "name": "m2d",
                "import_path": "m2d.serving.deployment:app_builder",
                "route_prefix": "/",
                "args": settings,
            }
        ],
    }
    said = (
        "# Written by `python -m m2d serve --write_config`. `serve deploy` takes it. args: settings of the service.\n"
    )
    return said + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def http_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's HTTPOptions."""
    options = {"host": config.host, "port": config.port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    if config.tls_cert is not None:
        options |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    return options


def _require_usable(config: ServeConfig) -> None:
    """Raise ConfigError for files that cannot be used, before anything is started."""
    signing_of(config.sign, config.sign_key)
    if config.keys is not None:
        read_keys(Path(config.keys))
    if config.tls_cert is not None:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_cert, config.tls_key)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or first_line(error)
            raise ConfigError(
                f"tls_cert: {config.tls_cert} and tls_key {config.tls_key} cannot be used ({reason})"
            ) from None
    try:
        Path(config.directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"directory: {config.directory} cannot be made ({error.strerror})") from None


def _logical_cpus(config: ServeConfig) -> float:
    """Room for each replica and the one that follows it in an update, and for a job."""
    return 1.0 if os.environ.get("RAY_ADDRESS") else 2 * replica_range(config.replicas)[1] + 2


def _start(config: ServeConfig) -> None:
    """Serve itself, where it does not run yet. Raises ConfigError."""
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    logging.getLogger("ray.serve").setLevel(logging.INFO if config.verbose else logging.ERROR)
    wanted = HTTPOptions(**http_options(config))
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        names = ("host", "port", "ssl_certfile", "ssl_keyfile")
        found = client.http_config
        others = [f"{name} {getattr(found, name)}" for name in names if getattr(found, name) != getattr(wanted, name)]
        if others:
            raise ConfigError(
                f"Serve already runs on this cluster with {', '.join(others)}; ask for the same, or end it by "
                "`serve shutdown`"
            )
        return
    _require_free(config)
    serve.start(http_options=wanted)


def _require_free(config: ServeConfig) -> None:
    """Raise ConfigError where nobody can listen at host and port of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        reason = "another program does already" if is_taken else first_line(error)
        name = "port" if is_taken or error.errno == errno.EACCES else "host"
        raise ConfigError(
            f"{name}: the service cannot listen at {config.host}:{config.port} ({reason}); name another --{name}"
        ) from None


def _reason(error: RuntimeError) -> str:
    """The M2DError's line in what Serve says of a replica that did not start, or Serve's own first line."""
    lines = str(error).strip().splitlines()
    ours = [line for line in lines if line.startswith("m2d.") and "Error: " in line]
    return ours[-1].partition(": ")[2] if ours else lines[0]


def _drain(config: ServeConfig) -> None:
    """End the application, and Serve with it where nothing else is served."""
    from ray import serve

    from m2d.serving.deployment import NAME

    signal.signal(signal.SIGTERM, _end)
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    say(f"ending: requests under way have {config.limits.deadline_s:g} s, or until the next signal")
    deadline = time.monotonic() + config.limits.deadline_s
    while NAME in serve.status().applications and time.monotonic() < deadline:
        with suppress(TimeoutError):  # Serve waits for a minute
            serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()


def _end(*_: Any) -> None:
    raise SystemExit(0)
