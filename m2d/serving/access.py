"""API keys: who calls, and how many images a caller may have. Also the command `serve keys`."""

import hashlib
import hmac
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from m2d.errors import ConfigError
from m2d.files.atomic import write_whole
from m2d.serving.problems import Problem
from m2d.serving.settings import KeysConfig, ServeConfig

logger = logging.getLogger(__name__)
USAGE = "usage.json"  # in the service's directory: images of each key on the current day


@dataclass
class Caller:
    """Whom a request is from."""

    name: str
    is_operator: bool
    images: int = 0  # that this request has spent


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key as the file has it: nothing that would let anybody use it."""

    salt: str
    hash: str
    operator: bool = False
    images_per_minute: int | None = None
    images_per_day: int | None = None
    created: str = ""


class Access:
    """A FastAPI dependency that gives the Caller; without a file of keys everybody is the operator."""

    def __init__(self, config: ServeConfig, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._rate = config.limits.images_per_minute
        self._usage = Path(config.directory).expanduser() / USAGE
        self._file = None if config.keys is None else Path(config.keys).expanduser()
        self._keys = {} if self._file is None else read_keys(self._file)
        self._stamp = self._file and _stamp(self._file)
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> images left, and when that was
        self._day, self._used = _read_usage(self._usage)

    async def __call__(
        self,
        request: Request,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> Caller:
        """Raises a problem 401, the same for no key and for a wrong one."""
        if self._file is None:
            caller = Caller("local", is_operator=True)
        else:
            self._read_again()
            name = self._owner(credentials.credentials if credentials else "")
            if name is None:
                raise _unknown()
            caller = Caller(name, self._keys[name].operator)
        request.state.caller = caller
        return caller

    def spend(self, caller: Caller, images: int, *, at_once: bool = True) -> None:
        """Count images that are about to be made. Raises a problem 429 that names the limit.

        at_once: a job's images, False, come as there is room for them: the rate does not hold for them, the quota does.
        """
        if self._file is not None:
            key = self._keys.get(caller.name)
            if key is None:  # removed since the request came
                raise _unknown()
            rate = key.images_per_minute or self._rate
            left = self._left(caller.name, rate)
            # More than the bucket holds is for a full one, which then owes the rest.
            lacking = min(images, rate) - left
            if at_once and lacking > 0:
                raise _too_many(f"{rate} images a minute", rate, lacking * 60 / rate)
            quota, used = key.images_per_day, self._used_today(caller.name)
            if quota is not None and used + images > quota:
                text = f"{quota} images a day, of which {max(0, quota - used)} are left until midnight UTC"
                raise _too_many(text, quota, 86400 - self._now() % 86400)
            self._count(caller.name, images, images if at_once else 0, rate)
        caller.images += images

    def refund(self, caller: Caller, images: int, *, at_once: bool = True) -> None:
        """Give back images that were spent and not made."""
        if self._file is not None and caller.name in self._keys:
            rate = self._keys[caller.name].images_per_minute or self._rate
            self._count(caller.name, -images, -images if at_once else 0, rate)
        caller.images -= images

    def _read_again(self) -> None:
        """Follow the file, so that a key counts, or counts no more, without a restart."""
        assert self._file is not None
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._file)
        except ConfigError as error:
            logger.error("%s; the keys as they were still count", error)

    def _owner(self, key: str) -> str | None:
        """Each key is compared, and in constant time: how long it takes tells nothing of which one, or how much."""
        owner = None
        for name, entry in self._keys.items():
            if hmac.compare_digest(_hash(entry.salt, key), entry.hash):
                owner = name
        return owner

    def _left(self, name: str, rate: int) -> float:
        left, then = self._buckets.get(name, (float(rate), self._now()))
        return min(rate, left + max(0.0, self._now() - then) * rate / 60)

    def _used_today(self, name: str) -> int:
        today = datetime.fromtimestamp(self._now(), UTC).date().isoformat()
        if today != self._day:
            self._day, self._used = today, {}
        return self._used.get(name, 0)

    def _count(self, name: str, images: int, at_once: int, rate: int) -> None:
        self._buckets[name] = (min(rate, self._left(name, rate) - at_once), self._now())
        self._used[name] = max(0, self._used_today(name) + images)
        try:
            self._usage.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._usage, json.dumps({"day": self._day, "images": self._used}), durable=False)
        except OSError as error:  # of a full disk, say: images can be made, and are counted until a restart
            logger.error("%s cannot be written (%s)", self._usage, error.strerror)


def read_keys(path: Path) -> dict[str, Key]:
    """Name -> key. Raises ConfigError."""
    try:
        return {name: Key(**entry) for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError as error:
        raise ConfigError(f"keys: {path} is not there; make it by `serve keys add NAME --keys {path}`") from error
    except (OSError, AttributeError, TypeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no file that `serve keys add` wrote"
        raise ConfigError(f"keys: {path} cannot be read ({reason})") from error


def keys_command(config: KeysConfig) -> None:
    """The command `serve keys add NAME`, `list` or `remove NAME`. A new key is printed once and kept nowhere."""
    path = Path(config.keys).expanduser()
    action, name = (*config.words, "")[:2]
    keys = read_keys(path) if path.exists() or action != "add" else {}
    if action == "list":
        for each, entry in keys.items():
            limits = {"images a minute": entry.images_per_minute, "images a day": entry.images_per_day}
            said = [f"{limit} {unit}" for unit, limit in limits.items() if limit is not None]
            print("  ".join([each, "operator" if entry.operator else "user", f"since {entry.created}", *said]))
        return
    if action == "remove":
        if name not in keys:
            raise ConfigError(f"{path} has no key named {name}; it has: {' '.join(keys) or 'none'}")
        del keys[name]
        _write_keys(path, keys)
        print(f"{name} is removed")
        return
    if name in keys:
        raise ConfigError(f"{path} has a key named {name} already; remove it first, or take another name")
    key, salt = f"m2d_{secrets.token_urlsafe(32)}", secrets.token_hex(16)
    keys[name] = Key(
        salt=salt,
        hash=_hash(salt, key),
        operator=config.operator,
        images_per_minute=config.images_per_minute,
        images_per_day=config.images_per_day,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _write_keys(path, keys)
    print(key)


def _write_keys(path: Path, keys: dict[str, Key]) -> None:
    before = os.umask(0o077)  # for the user alone from its first moment on
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({name: asdict(key) for name, key in keys.items()}, indent=1))
    except OSError as error:
        raise ConfigError(f"keys: {path} cannot be written ({error.strerror})") from error
    finally:
        os.umask(before)


def _hash(salt: str, key: str) -> str:
    # Slow hashes are for passwords, which can be guessed; these keys are 256 random bits.
    return hashlib.sha256(f"{salt}{key}".encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read_usage(path: Path) -> tuple[str, dict[str, int]]:
    try:
        usage: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return str(usage["day"]), {str(name): int(images) for name, images in usage["images"].items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return "", {}


def _unknown() -> Problem:
    text = "no valid API key; send the header Authorization: Bearer KEY"
    return Problem(401, text, {"WWW-Authenticate": "Bearer"})


def _too_many(text: str, limit: int, wait_s: float) -> Problem:
    return Problem(429, f"this key may have {text}", {"Retry-After": str(max(1, math.ceil(wait_s)))}, limit=limit)
