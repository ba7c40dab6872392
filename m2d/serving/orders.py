"""What the parts of the service say to each other: models, orders, what becomes of an order, and jobs.

Plain data, cheap to pickle: it crosses Ray between the HTTP side and the replicas that hold a model.
Nothing heavy is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from m2d.classes import ClassSet
from m2d.errors import M2DError
from m2d.generation.plan import PlanRow
from m2d.generation.settings import GenerateConfig

JobState = Literal["queued", "running", "succeeded", "incomplete", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A checkpoint that is served, as GET /v1/models tells it."""

    name: str  # how requests call it: its experiment's name
    checkpoint: str  # its directory, which every node sees; not told to clients
    sha256: str  # over everything that shapes an image
    step: int
    stage: str
    image_size: int  # pixels a side
    classes: ClassSet
    extractor: str  # that guided its training
    has_prior: bool  # it can draw features
    has_extractor: bool  # it can take features of uploaded images
    size_bytes: int  # of the weights that are loaded
    created: int  # Unix time of the checkpoint
    licence: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """Images that one request asks for."""

    id: str  # of the request
    model: ModelCard
    config: GenerateConfig  # the settings by which `generate` would make the same images
    rows: tuple[PlanRow, ...]  # as `generate` plans them; references are names of `uploads`
    plan: str | None = None  # digest of the rows where uploads decide, see generation.output.Recipe
    uploads: Mapping[str, bytes] = field(default_factory=dict)  # SHA-256 and suffix -> an image file that was checked
    previews: int = 0  # of each image, on the way to it
    deadline: float | None = None  # Unix time at which what is not made yet is given up


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an order is: solver steps of its images, done and in all (a refused attempt adds to both)."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What an image looks like so far."""

    index: int  # place in the order's rows
    number: int  # from 0 to previews - 1
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished image."""

    index: int
    png: bytes  # with the text chunks that `generate` writes
    entry: dict[str, Any]  # its row of the manifest, JOURNAL_SCHEMA without `accepted`; path is CLASS/ID.png
    gates: tuple[str, ...]  # that were at work, see generation.gates.active_gates


@dataclass(frozen=True, kw_only=True)
class Refused:
    """An image that the gates refused at each attempt."""

    index: int
    reason: str
    attempts: int


Event = Progress | Preview | Drawn | Refused


class Overloaded(M2DError):
    """The service has as much to do as it may; the same request may succeed later."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(M2DError):
    """An order was given up at its deadline."""


@dataclass(frozen=True, kw_only=True)
class JobOrder:
    """A job's plan, made as `generate` would make it."""

    model: ModelCard
    config: GenerateConfig  # without output and plan, which the job has in its own folder
    rows: tuple[PlanRow, ...]
    uploads: Mapping[str, bytes] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)  # what the client sent, to be told again


class JobTold(BaseModel):
    """A job."""

    model_config = ConfigDict(frozen=True)

    id: str  # not to be guessed
    object: Literal["job"] = "job"
    state: JobState
    model: str
    sha256: str = Field(description="of the checkpoint")
    counts: dict[str, int] = Field(description="images by class")
    total: int
    done: int
    created: float = Field(description="Unix time, as the two below")
    started: float | None
    finished: float | None
    images_per_second: float | None = Field(description="since it was last started")
    seconds_left: float | None
    detail: str | None = Field(description="why it failed or is incomplete")
    request: dict[str, Any] = Field(description="what was ordered")


class JobConflict(M2DError):
    """An idempotency key came again with another order."""


class TooManyJobs(M2DError):
    """The key has as many unfinished jobs as it may."""
