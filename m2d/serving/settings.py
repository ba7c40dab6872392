"""Settings of the service. Light on purpose: the command line reads them before anything else."""

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from m2d.errors import ConfigError
from m2d.generation.settings import GateConfig, require_sign
from m2d.models.settings import Precision


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """What one request, one key and the whole service may ask for; beyond it the answer says what the limit is."""

    images: int = 16  # of a request; larger orders are jobs
    steps: int = 100  # of the solver
    queued_images: int = 256  # asked for and not made yet, of all requests; beyond it a request is answered 503
    upload_bytes: int = 20 * 2**20  # of a request with its reference images
    upload_pixels: int = 50_000_000  # of the reference images of a request; decoding takes up to 15 bytes for each
    deadline_s: float = 600.0  # from a request's arrival to its last image; a request may ask for less
    job_images: int = 100_000  # of a job
    jobs: int = 20  # of a key, waiting or running
    images_per_minute: int = 600  # of a key that has no rate of its own

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"limits.{name} is {value}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Which checkpoints to serve, where, and on how many replicas."""

    checkpoint: list[str]  # directories, or as generate takes them; may be given more than once, the first is default
    host: str = "127.0.0.1"  # address to listen on; any other than this machine's own needs a file of keys
    port: int = 8000  # to listen on
    replicas: str = "1"  # of the models: a number, or a range such as 1-4 or 0-4 to follow the load
    gpus_per_replica: float | None = None  # None: one where there is any, a fraction shares it
    models_per_replica: int = 2  # checkpoints in memory at once; the one not used for longest goes
    batch_size: int = 32  # images at once, of whichever requests
    batch_wait_s: float = 0.01  # how long an idle model waits for more requests to share the first batch
    device: str | None = None  # None: cuda where there is one, otherwise cpu
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that has it, otherwise no
    extractor_weights: str | None = None  # file of the feature extractor's weights; None: where training had it
    directory: str = "./serving"  # jobs, their images and what keys have used; kept when the service ends
    keys: str | None = None  # file of API keys (serve keys add NAME); None: no key is asked for, on loopback alone
    checkpoints_root: str | None = None  # folder in which an operator may name new checkpoints; None: none may be
    job_gpus: float = 1.0  # GPUs of a job's generator, where there are any
    cors_origins: list[str] = field(default_factory=list)  # other sites whose pages may call this API
    tls_cert: str | None = None  # file of the certificate chain; with tls_key: HTTPS
    tls_key: str | None = None  # file of its private key
    sign: str | None = None  # self-made, or a PEM file of your certificate chain: a C2PA manifest in each image
    sign_key: str | None = None  # PEM file of its private key; None: it is in the same file
    licence: str = "the licence of the training images applies"  # said of each model
    write_config: str | None = None  # write a file for `serve deploy` and stop
    verbose: bool = False  # show Ray's own messages
    gates: GateConfig = field(default_factory=GateConfig)
    limits: ServingLimits = field(default_factory=ServingLimits)

    def __post_init__(self) -> None:
        if not self.checkpoint or not all(self.checkpoint):
            raise ConfigError("checkpoint is empty; name a checkpoint directory")
        least = {"port": 1, "models_per_replica": 1, "batch_size": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        for name in ("batch_wait_s", "gpus_per_replica", "job_gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value}; it must be a number of at least 0")
        if self.port > 65535:
            raise ConfigError(f"port is {self.port}; it must be at most 65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together; give both, or neither")
        require_sign(self.sign, self.sign_key)
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"host is {self.host}, which others may reach, and no key is asked for; make one by `serve keys add "
                "NAME --keys FILE` and name --keys FILE, or keep --host 127.0.0.1"
            )
        replica_range(self.replicas)

    @property
    def jobs_folder(self) -> Path:
        """Where jobs and their images are."""
        return Path(self.directory).expanduser() / "jobs"


@dataclass(frozen=True, kw_only=True)
class KeysConfig:
    """API keys: `serve keys add NAME`, `serve keys list`, `serve keys remove NAME`."""

    words: list[str]  # add NAME, list, or remove NAME; the words without a flag
    keys: str = "./serving/keys.json"  # the file that ServeConfig.keys names
    operator: bool = False  # add: may also load checkpoints
    images_per_minute: int | None = None  # add: None: limits.images_per_minute of the service
    images_per_day: int | None = None  # add: of a day in UTC; None: as many as the rate allows

    def __post_init__(self) -> None:
        action, *names = self.words or [""]
        if action not in ("add", "list", "remove") or len(names) != (action != "list"):
            raise ConfigError("say `serve keys add NAME`, `serve keys list` or `serve keys remove NAME`")
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
                raise ConfigError(f"name is {name!r}; up to 64 of A-Z a-z 0-9 . _ -, the first a letter or a digit")
        for limit in ("images_per_minute", "images_per_day"):
            value = getattr(self, limit)
            if value is not None and value < 1:
                raise ConfigError(f"{limit} is {value}; it must be at least 1")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own, which nobody else reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def replica_range(replicas: str) -> tuple[int, int]:
    """(least, most) of `2`, `1-4` or `0-4`; equal where the number is fixed. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", replicas.strip())
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if not 0 <= least <= most or most < 1:
        raise ConfigError(f"replicas is {replicas}; it must be a number such as 2, or a range such as 1-4 or 0-4")
    return least, most
