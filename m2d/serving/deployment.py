"""The service on Ray Serve: replicas that hold models, the jobs, and the HTTP side as an application of three parts.

    Ingress  the HTTP side in a process of its own, one replica: it counts who asks for how much
    Models   replicas with checkpoints in memory; a model that is asked for is loaded where it is not, see Engine
    Jobs     large orders, one replica: it holds the folder of jobs and starts the bulk pipeline for each

`serve deploy` imports `app_builder` from here, and m2d.serving.command starts it on a cluster of its own.
"""

import asyncio
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import ray
import requests
import yaml
from joblib import cpu_count
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import metrics
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from m2d.arguments import parse_arguments
from m2d.classes import ClassSet
from m2d.cluster.nodes import cluster_total, device_of_actor
from m2d.errors import ConfigError, M2DError
from m2d.files.atomic import write_whole
from m2d.files.paths import absolute, checkpoint_folder, input_path, result_path
from m2d.files.progress import say
from m2d.generation.output import experiment_of, in_experiment
from m2d.generation.provenance import self_made, signing_of
from m2d.generation.settings import SELF_MADE, GenerateConfig
from m2d.models.published import checkpoint_path, own_name
from m2d.serving.jobs import Jobs, make_images
from m2d.serving.orders import Event, ModelCard, Order, Overloaded
from m2d.serving.settings import ServeConfig, is_loopback, replica_range

if TYPE_CHECKING:
    from m2d.serving.engine import Engine

Handle = DeploymentHandle[Any]
logger = logging.getLogger(__name__)
NAME = "m2d"  # of the application
ADDITIONS = "models.json"  # in the service's directory: what an operator has added
ANSWER_S = 2.0  # in which a replica that has nothing to load answers
EXPORTER_S = 5.0  # in which a node's exporter of metrics answers
REPORT_EVERY_S = 1.0
MARGIN_S = 30.0  # beyond the longest request, for a replica that is to end
FAMILIES = tuple(f"ray_{name}_" for name in ("m2d", "serve_deployment", "serve_replica", "serve_num", "serve_http"))
_NOISE = re.compile(r'(?:Component|SessionName|Version|otel_scope_\w+)="[^"]*",?')  # labels that are always the same
IMAGES_OF_A_REQUEST = 4  # a guess: requests that fill a replica's batch


def app_builder(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: `args` are settings of ServeConfig, as `serve --write_config FILE` writes them."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(args, file)
        file.flush()
        config = parse_arguments(ServeConfig, ["--config", file.name], prog="serve", description="")
    config = resolved(config)
    return application(config, described(config))


def resolved(config: ServeConfig) -> ServeConfig:
    """With whole paths, which mean the same in every process; see m2d.files.paths for those of a job of Ray."""
    inputs = ["keys", "checkpoints_root", "extractor_weights", "tls_cert", "tls_key", "sign_key"]
    inputs += [] if config.sign == SELF_MADE else ["sign"]
    return replace(
        config,
        checkpoint=[absolute(checkpoint_path("checkpoint", path)) for path in config.checkpoint],
        directory=absolute(result_path("directory", config.directory)),
        **{name: absolute(input_path(name, getattr(config, name))) for name in inputs},
    )


def described(config: ServeConfig) -> list[ModelCard]:
    """The cards of the configured checkpoints, named by their experiments. Raises CheckpointError."""
    cards: list[ModelCard] = []
    for path in config.checkpoint:
        card = describe(config, path, None)
        if any(card.name == other.name for other in cards):  # of one run
            card = replace(card, name=f"{card.name}-{Path(card.checkpoint).name}")
        cards.append(card)
    return cards


def describe(config: ServeConfig, path: str, name: str | None) -> ModelCard:
    """A checkpoint's card. name: None: its experiment's, or its own outside of one. Raises CheckpointError."""
    from m2d.serving import engine

    own = experiment_of(path).name if in_experiment(path) else own_name(path)
    return engine.describe(path, name or own, config.licence, config.extractor_weights)


def application(config: ServeConfig, cards: Sequence[ModelCard], threads: int | None = None) -> serve.Application:
    """Of a resolved config. threads: of torch in a replica on a CPU; None: all cores but one, which answers HTTP.

    Raises ConfigError for a GPU that the cluster does not have, and for a certificate that cannot sign.
    """
    config = replace(config, sign=signing_file(config))
    gpus, job_gpus = gpu_shares(config, cluster_total("GPU"))
    if not gpus and config.device not in (None, "cpu"):
        raise ConfigError(f"device is {config.device}, and the Ray cluster has no GPU; name cpu, or add a node")
    config = replace(config, device=device_of_actor(config.device or "cuda") if gpus else "cpu")
    least, most = replica_range(config.replicas)
    waiting, threads = config.limits.queued_images, threads or max(1, (cpu_count() - 1) // most)
    each = f"{gpus:g} GPU each, {job_gpus:g} for a job" if gpus else f"{threads} CPU threads each, one for a job"
    say(f"models on {config.replicas} replicas: {each}")
    if least == most:
        count: dict[str, Any] = {"num_replicas": most}
    else:
        target = max(1, config.batch_size // IMAGES_OF_A_REQUEST)
        scale = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=target)
        count = {"autoscaling_config": scale}
    shared: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.limits.deadline_s + MARGIN_S,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_timeout_s": 60.0,  # a machine that computes on all its cores answers late
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=5),
        "max_constructor_retry_count": 3,
    }
    replica = type("Models", (Replica,), {"engine": serve.multiplexed(Replica.engine, config.models_per_replica)})
    models = serve.deployment(
        name="Models",
        max_ongoing_requests=waiting + 16,  # each waits for at least an image, except those that ask for news
        max_queued_requests=waiting + 16,
        max_surge_percent=100,
        ray_actor_options={"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1},
        **count,
        **shared,
    )(replica).bind(config, list(cards), threads)
    light: dict[str, Any] = {"max_ongoing_requests": 1000, "max_queued_requests": 1000}
    light |= {"ray_actor_options": {"num_cpus": 0}, **shared}
    jobs = serve.deployment(name="Jobs", **light)(JobsReplica).bind(config, job_gpus)
    ingress = serve.deployment(name="Ingress", max_surge_percent=100, **light)(serve.ingress()(Ingress))
    return ingress.bind(config, list(cards), models, jobs)


def signing_file(config: ServeConfig) -> str | None:
    """What signs the images of all replicas and jobs; a self-made certificate is made once for the directory."""
    signing = signing_of(config.sign, config.sign_key)
    if config.sign == SELF_MADE:
        try:
            signing = self_made(Path(config.directory))
        except OSError as error:
            raise ConfigError(f"directory: {config.directory} cannot be written ({error.strerror})") from None
    return None if signing is None else str(signing.chain)


def gpu_shares(config: ServeConfig, gpus: float) -> tuple[float, float]:
    """GPUs of (a replica, a job's generator) in a cluster that has so many; (0, 0) computes on CPUs.

    Without a setting a GPU is shared where there are not enough for each replica, the one that follows it in an update,
    and a job; a job that would not fit beside the replicas shares as they do.
    """
    if config.device == "cpu" or not (gpus or config.gpus_per_replica):
        return 0.0, 0.0
    _, most = replica_range(config.replicas)
    share = config.gpus_per_replica
    if not share:
        together = ceil((2 * most + 1) / gpus)
        share = 1.0 if together == 1 else floor(100 / together) / 100
    fits = gpus - most * share >= config.job_gpus
    return share, config.job_gpus if fits else min(share, config.job_gpus)


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Resident:
    """A model in a replica's memory."""

    engine: "Engine"
    users: int = 0

    def __del__(self) -> None:
        """Serve calls it, in a thread, when another model takes the place, and waits."""
        while self.users:
            time.sleep(0.05)
        self.engine.close()


class Replica:
    """Checkpoints in memory, those used last. What goes wrong for a user is an answer, not raised: Serve would log it.

    `application` makes `engine` multiplexed, for which the class alone is asked.
    """

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, cards: Sequence[ModelCard], threads: int
    ) -> None:
        """Loads the default model."""
        import torch

        _log_here()
        torch.set_num_threads(threads)
        if config.device == "cpu":
            os.nice(4)  # /healthz comes first
        self._config = config
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="m2d-device")
        self._cards: dict[str, ModelCard] = {}
        self._residents = WeakSet[_Resident]()
        self._broken: str | None = None
        self._meters = _Meters()
        self._reporting = asyncio.create_task(self._report())
        default, *_ = with_additions(cards, Path(config.directory) / ADDITIONS)
        error = await self.load(default)
        if error is not None:
            raise error

    async def engine(self, sha256: str) -> _Resident:
        """A model that `_cards` knows. Loading does not stop the passes of the others."""
        from m2d.serving.engine import Engine

        engine = await asyncio.to_thread(Engine.load, self._cards[sha256], self._config, self._executor)
        self._residents.add(resident := _Resident(engine))
        return resident

    async def draw(self, order: Order) -> AsyncIterator[Event | M2DError]:
        """See Engine.draw; the M2DError that this raises comes last."""
        from torch import AcceleratorError

        began, resident = time.monotonic(), None
        try:
            self._cards[order.model.sha256] = order.model
            resident = await self.engine(order.model.sha256)
            resident.users += 1
            async with aclosing(resident.engine.draw(order)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
            self._meters.latency.observe(time.monotonic() - began, {"model": order.model.name})
        except M2DError as error:
            yield error
        except AcceleratorError as error:  # the process can no longer use its GPU
            self._broken = str(error)
            yield Overloaded("the GPU failed, and the replica is replaced; ask again", MARGIN_S)
        finally:
            if resident is not None:
                resident.users -= 1

    async def load(self, card: ModelCard) -> M2DError | None:
        """Have a model in memory."""
        self._cards[card.sha256] = card
        try:
            await self.engine(card.sha256)
        except M2DError as error:
            return error
        return None

    async def describe(self, path: str, name: str | None) -> ModelCard | M2DError:
        """See `describe`; here torch is loaded."""
        try:
            return await asyncio.to_thread(describe, self._config, path, name)
        except M2DError as error:
            return error

    async def is_loaded(self) -> bool:
        """Asked of a replica that has started."""
        return True

    async def stats(self) -> dict[str, dict[str, float]]:
        """Of each model in memory, by its name."""
        return {resident.engine.card.name: resident.engine.stats() for resident in self._residents}

    async def check_health(self) -> None:
        """Serve replaces a replica where this raises."""
        if self._broken is not None:
            raise RuntimeError(self._broken)

    async def _report(self) -> None:
        while True:
            self._meters.report(await self.stats())
            await asyncio.sleep(REPORT_EVERY_S)


class _Meters:
    """Numbers of a replica for Prometheus, by model."""

    def __init__(self) -> None:
        meters: dict[str, tuple[Any, str, str]] = {
            "waiting": (metrics.Gauge, "waiting_images", "images that wait for a batch"),
            "orders": (metrics.Gauge, "orders", "requests under way"),
            "batch_fill": (metrics.Gauge, "batch_fill", "share of the batch size that the last passes used"),
            "gpu_memory_bytes": (metrics.Gauge, "gpu_memory_bytes", "memory of the GPU that the replica holds"),
            "images": (metrics.Counter, "images", "images made and kept"),
            "passes": (metrics.Counter, "passes", "batches that went through the solver"),
            "pass_seconds": (metrics.Counter, "pass_seconds", "seconds that these took"),
        }
        self._meters = {
            stat: kind(f"m2d_{name}", description=told, tag_keys=("model",))
            for stat, (kind, name, told) in meters.items()
        }
        self.latency = metrics.Histogram(
            "m2d_request_seconds",
            description="from a request's arrival at the replica to its last image",
            boundaries=[0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600],
            tag_keys=("model",),
        )
        self._told: dict[str, dict[str, float]] = {}

    def report(self, stats: Mapping[str, Mapping[str, float]]) -> None:
        """stats: of the models that are loaded now; one that has gone has none of anything."""
        gone = {model: dict.fromkeys(before, 0.0) for model, before in self._told.items() if model not in stats}
        for model, found in {**gone, **stats}.items():
            tags, before = {"model": model}, self._told.get(model, {})
            for stat, meter in self._meters.items():
                more = found[stat] - before.get(stat, 0.0)
                if isinstance(meter, metrics.Gauge):
                    meter.set(found[stat], tags)
                elif more > 0:  # of a model that was loaded again, since then
                    meter.inc(more, tags)
        self._told = {model: dict(found) for model, found in stats.items()}


def _log_here() -> None:
    """M2D's lines go to the log files that Ray keeps of this process."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("m2d").setLevel(logging.INFO)


# --- jobs -------------------------------------------------------------------------------------------------------------


class JobsReplica:
    """The jobs of all owners."""

    async def __init__(self, config: ServeConfig, job_gpus: float) -> None:  # type: ignore[misc]
        _log_here()
        self._config, self._gpus = config, job_gpus
        self._jobs = Jobs(config.jobs_folder, self._run, limits=config.limits)
        await self._jobs.start()

    async def __del__(self) -> None:
        """Serve awaits it when the replica is to end."""
        await self._jobs.stop()

    async def ask(self, what: str, *arguments: Any) -> Any:
        """What a method of Jobs answers, or the error that is its caller's."""
        try:
            return await getattr(self._jobs, what)(*arguments)
        except (M2DError, KeyError) as error:
            return error

    async def archive(self, job_id: str, owner: str) -> AsyncIterator[bytes | KeyError]:
        """See Jobs.archive."""
        try:
            async with aclosing(self._jobs.archive(job_id, owner)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
        except KeyError as error:
            yield error

    async def _run(self, config: GenerateConfig, sha256: str, log: Path) -> None:
        """m2d.serving.jobs.Run in an actor, which ends with this process and starts the pipeline's own actors."""
        config = replace(config, sign=self._config.sign, sign_key=self._config.sign_key)
        if self._gpus:
            most = max(1, int(cluster_total("GPU") / self._gpus))
            config = replace(config, device="cuda", num_actors=most, gpus_per_actor=self._gpus)
        else:
            config = replace(config, device="cpu", num_actors=0)
        actor: Any = ray.remote(num_cpus=0 if self._gpus else 1)(JobActor).remote()
        ended = actor.run.remote(config, sha256, log)
        try:
            error = await ended
        except RayActorError as lost:
            logger.warning("job %s: its process is gone: %s", log.parent.name, lost)
            raise M2DError("the process that makes the images is gone; the service's log says more") from None
        finally:
            ray.kill(actor)
            with suppress(RayActorError):
                await actor.__ray_ready__.remote()  # raises once it is gone
        if error is not None:
            raise error


class JobActor:
    """Where a job's `generate` runs."""

    def run(self, config: GenerateConfig, sha256: str, log: Path) -> M2DError | None:
        """The error that is the user's, if any."""
        os.nice(10)  # who waits for an answer comes first
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # the GPUs are the cluster's, not this node's
        with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                make_images(config, sha256)
            except M2DError as error:
                return error
        return None


# --- the HTTP side ----------------------------------------------------------------------------------------------------


class Ingress:
    """The HTTP side, whose application Serve asks for below."""

    def __init__(self, config: ServeConfig, cards: Sequence[ModelCard], models: Handle, jobs: Handle) -> None:
        """Raises ConfigError where Serve listens for others and no key is asked for."""
        _log_here()
        client: Any = _get_global_client()
        host = client.http_config.host
        if config.keys is None and not is_loopback(host):
            raise ConfigError(f"http_options.host is {host}, which others may reach; name a file of keys in args.keys")
        self._config = config
        self._service = RayService(config, cards, models, jobs)

    def __serve_build_asgi_app__(self) -> Any:
        from m2d.serving.app import create_app

        return create_app(self._service, self._config, behind_serve=True)


@contextmanager
def _reached() -> Iterator[None]:
    """What Serve raises where nobody can take a request now."""
    try:
        yield
    except BackPressureError as error:
        raise Overloaded("as many requests wait as may; ask again", error.retry_after_s or 1.0) from None
    except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
        logger.warning("no replica: %s", error)
        raise Overloaded("the replica that had this request is gone; ask again", 5.0) from None


async def _streamed(call: Callable[[], Any]) -> AsyncIterator[Any]:
    """What a replica yields, or the error that is its caller's. Closing the iterator cancels the call."""
    answers = call()
    try:
        with _reached():
            async for answer in answers:
                if isinstance(answer, (M2DError, KeyError)):
                    raise answer
                yield answer
    finally:
        answers.cancel()


class RayService:
    """The Service of m2d.serving.drawing, over Serve's handles."""

    def __init__(self, config: ServeConfig, cards: Sequence[ModelCard], models: Handle, jobs: Handle) -> None:
        """cards: of the configured checkpoints."""
        self.jobs = cast(Jobs, RemoteJobs(jobs))
        self._config, self._models = config, models
        self._additions = Path(config.directory) / ADDITIONS
        self._configured = list(cards)
        self._cards = with_additions(cards, self._additions)
        self._adding = asyncio.Lock()

    async def models(self) -> list[ModelCard]:
        """All that are served, the default first."""
        return list(self._cards)

    async def add_model(self, checkpoint: str, name: str | None = None) -> ModelCard:
        """Serve a checkpoint; see Service."""
        path = confined(self._config.checkpoints_root, checkpoint)
        async with self._adding:
            with _reached():
                card = await self._models.describe.remote(path, name)
                if isinstance(card, M2DError):
                    raise card
                loading = self._models.broadcast("load", card)
                errors = [error for error in await loading.results_async() if error is not None]
            if errors:
                raise errors[0]
            await asyncio.to_thread(write_addition, self._additions, self._configured, card)
            self._cards = with_additions(self._configured, self._additions)
        return card

    async def is_ready(self) -> bool:
        """Whether a replica has started. Replicas that start with the first request are not started by asking."""
        if replica_range(self._config.replicas)[0] == 0:
            return True
        answer: Any = self._models.is_loaded.remote()
        try:
            with _reached():
                return bool(await asyncio.wait_for(answer, ANSWER_S))
        except (TimeoutError, Overloaded):
            answer.cancel()
            return False

    def draw(self, order: Order) -> AsyncIterator[Event]:
        """What becomes of an order; closing the iterator gives it up. Raises an M2DError."""
        models = self._models.options(stream=True, multiplexed_model_id=order.model.sha256)
        return _streamed(partial(models.draw.remote, order))

    async def metrics(self) -> str:
        """What the nodes' exporters have of this application, at most some seconds old."""
        nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"]]
        urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
        return of_ours(await asyncio.gather(*(asyncio.to_thread(_fetch, url) for url in urls)))


def _fetch(url: str) -> str:
    with requests.Session() as session:
        session.trust_env = False  # no proxy
        try:
            return session.get(url, timeout=EXPORTER_S).text
        except requests.RequestException as error:
            logger.warning("no metrics of %s (%s)", url, error)
            return ""


def of_ours(texts: Sequence[str]) -> str:
    """Of texts in Prometheus's format M2D's metrics and Serve's of requests, each in one group as the format asks."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split()[2]
            if family.startswith(FAMILIES):
                lines = groups.setdefault(family, [])
                if not line.startswith("#") or line not in lines:
                    lines.append(_NOISE.sub("", line))
    return "".join(f"{line}\n" for lines in groups.values() for line in lines)


def confined(root: str | None, checkpoint: str) -> str:
    """The directory below `root` that an operator names, `best` resolved. Raises ConfigError."""
    if root is None:
        raise ConfigError("checkpoint: this service takes no more; it was started without --checkpoints_root")
    try:
        path = Path(checkpoint_folder(str(Path(root) / checkpoint))).resolve()
        inside = path.is_relative_to(Path(root).resolve())
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise ConfigError("checkpoint: name a directory below the service's --checkpoints_root, relative to it")
    return str(path)


def with_additions(cards: Sequence[ModelCard], file: Path) -> list[ModelCard]:
    """The configured models, or what an operator has put in their places, then those that he has added.

    A configured checkpoint that is another one than when it was replaced is newer, and counts.
    """
    try:
        additions = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return list(cards)
    found = {card.name: card for card in cards}
    for name, entry in additions.items():
        card = ModelCard(**(entry["card"] | {"classes": ClassSet.from_dict(entry["card"]["classes"])}))
        known = found.get(name)
        if not Path(card.checkpoint).is_dir():
            logger.warning("%s is not there any more, and is not served: %s", name, card.checkpoint)
        elif known is None or known.sha256 == entry["instead_of"]:
            found[name] = card
    return list(found.values())


def write_addition(file: Path, configured: Sequence[ModelCard], card: ModelCard) -> None:
    """Keep a card for with_additions. Raises ConfigError where the disk refuses."""
    try:
        additions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        instead_of = next((known.sha256 for known in configured if known.name == card.name), None)
        additions[card.name] = {"card": asdict(card), "instead_of": instead_of}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(additions, indent=1))
    except OSError as error:
        raise ConfigError(f"directory: {file} cannot be written ({error.strerror})") from None


class RemoteJobs:
    """What m2d.serving.jobs.Jobs has for its callers: each of its methods is asked of the Jobs deployment."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __getattr__(self, what: str) -> Any:
        return partial(self._ask, what)

    def archive(self, job_id: str, owner: str) -> AsyncIterator[bytes]:
        """See Jobs.archive."""
        return _streamed(partial(self._handle.options(stream=True).archive.remote, job_id, owner))

    async def _ask(self, what: str, *arguments: Any) -> Any:
        with _reached():
            answer = await self._handle.ask.remote(what, *arguments)
        if isinstance(answer, (M2DError, KeyError)):
            raise answer
        return answer
