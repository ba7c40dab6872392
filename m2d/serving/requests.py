"""What clients send and are told, and the planning of it: rows by the functions that plan `generate`'s runs.

Every value is checked here, so that what reaches an engine or a job can be made.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from m2d.classes import ClassSet
from m2d.diffusion.settings import Solver
from m2d.errors import ConfigError
from m2d.generation.plan import Mode, digest_of, plan_of, rows_of, sums_of, targets
from m2d.generation.references import Reference
from m2d.generation.settings import Feature, GenerateConfig
from m2d.serving.orders import JobOrder, ModelCard, Order
from m2d.serving.problems import Problem
from m2d.serving.settings import ServingLimits

if TYPE_CHECKING:
    from m2d.serving.uploads import Upload

_Word = Annotated[str, Field(min_length=1, max_length=200)]
_Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
_Count = Annotated[int, Field(ge=0)]
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}  # content of an answer
_COPIED = {"mode", "feature_temperature", "strength", "steps_between", "solver", "steps", "guidance_scale"}


class _Settings(BaseModel):
    """What images and jobs share: the model, and how noise becomes an image."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=False)

    model: _Word | None = Field(None, description="Name or first 8 or more hex digits of its hash; null: the default")
    mode: Mode = Field("standard", description="image2image needs `reference`, interpolate `reference_b` too")
    strength: float = Field(0.75, ge=0, le=1, description="image2image: 0 is the reference itself, 1 nothing of it")
    steps_between: int = Field(
        GenerateConfig.steps_between, ge=0, description="interpolate: images between the two references"
    )
    feature: Feature | None = Field(
        None, description="What guides besides the class; null: the reference's own where there is one, else the prior"
    )
    feature_temperature: float = Field(
        GenerateConfig.feature_temperature, ge=0, le=10, description="Spread of drawn features; 0: the class mean"
    )
    solver: Solver = Field(GenerateConfig.solver, description="heun runs the network twice a step")
    steps: int = Field(GenerateConfig.steps, ge=1, description="Of the solver, from noise to image")
    guidance_scale: float = Field(GenerateConfig.guidance_scale, ge=0, le=50, description="1: no guidance")
    guidance_interval: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        list(GenerateConfig.guidance_interval),
        min_length=2,
        max_length=2,
        description="Guided where low <= t <= high; t = 1 is noise",
    )


class ImageRequest(_Settings):
    """Images of one class, made at once."""

    label: _Word = Field(alias="class", description="Code, or English or Chinese name", examples=["MEL", "黑色素瘤"])
    count: int = Field(1, ge=1, description="Images; interpolate counts for itself")
    first: int = Field(0, ge=0, description="Index of the first image: image k of a seed is always the same")
    seed: _Seed | None = Field(None, description="null: drawn, and told in the answer")
    reference: str | None = Field(None, description="Base64 of a JPEG or PNG file; or a file of the form")
    reference_b: str | None = Field(None, description="interpolate: where the walk ends")
    partial_images: int = Field(0, ge=0, le=3, description="Previews of each image, in a stream")
    deadline_s: float | None = Field(None, gt=0, description="Seconds after which the request is given up")


class OpenAIRequest(BaseModel):
    """The fields of OpenAI's images.generate; seed, steps and guidance_scale are extensions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=32_000, examples=["a dermoscopic image of melanoma", "黑色素瘤"])
    model: _Word | None = None
    n: int | None = Field(1, ge=1)
    size: _Word | None = Field("auto", description="auto, or the model's own, such as 128x128")
    response_format: Literal["b64_json"] | None = "b64_json"
    output_format: Literal["png"] | None = "png"
    output_compression: Literal[100] | None = None
    background: Literal["auto", "opaque"] | None = "auto"
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    user: str | None = Field(None, description="Taken and not used, as the four below")
    safety_identifier: str | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["low", "auto"] | None = None
    seed: _Seed | None = None
    steps: int = Field(GenerateConfig.steps, ge=1)
    guidance_scale: float = Field(GenerateConfig.guidance_scale, ge=0, le=50)


class Balance(BaseModel):
    """A dataset that is to be filled up."""

    model_config = ConfigDict(extra="forbid", strict=True)

    have: dict[_Word, _Count] = Field(description="Images there are, by class", examples=[{"NV": 5700, "DF": 96}])
    to: str = Field("max", description="max, a number of images, or a share of the largest class such as 0.5")


class JobRequest(_Settings):
    """Many images of any classes; exactly one of counts and balance, or mode interpolate with its class."""

    counts: dict[_Word, _Count] | None = Field(None, description="Images by class", examples=[{"DF": 500}])
    balance: Balance | None = None
    label: _Word | None = Field(None, alias="class", description="interpolate: the class of the references")
    seed: _Seed = 0


class ModelRequest(BaseModel):
    """A checkpoint to serve."""

    model_config = ConfigDict(extra="forbid", strict=True)

    checkpoint: str = Field(min_length=1, max_length=1000, description="Folder below the service's --checkpoints_root")
    name: str | None = Field(
        None, pattern=r"^[\w.+-]{1,100}$", description="What requests call it; null: its experiment's name"
    )


class ModelTold(BaseModel):
    """Which checkpoint made an image."""

    id: str
    sha256: str
    step: int


class ImageTold(BaseModel):
    """A finished image."""

    index: int = Field(description="Place in the request, from 0")
    id: str = Field(examples=["MEL_000000"])
    label: str = Field(alias="class")
    seed: int = Field(description="Of its noise")
    b64_png: str = Field(description="Base64 of the PNG, whose text chunks say what it is and from what")
    manifest: dict[str, Any] = Field(description="Its row of the manifest that `generate` writes")


class RefusedTold(BaseModel):
    """An image that the gates refused at each attempt."""

    index: int
    reason: str
    attempts: int


class GatesTold(BaseModel):
    """What the images were held against."""

    at_work: list[str]
    near_copy: bool = Field(description="Whether copies of training images were looked for")


class ImagesTold(BaseModel):
    """The answer of POST /v1/images as JSON."""

    id: str
    seed: int = Field(description="Of the request: ask with it again for the same images")
    model: ModelTold
    created: int
    synthetic: Literal[True]
    notice: str
    gates: GatesTold
    images: list[ImageTold]
    refused: list[RefusedTold]


class OpenAIImage(BaseModel):
    """An image, in OpenAI's shape; what is beyond that is told to other clients."""

    b64_json: str
    id: str
    label: str = Field(alias="class")
    seed: int


class OpenAIAnswer(BaseModel):
    """The answer of OpenAI's images.generate."""

    created: int
    data: list[OpenAIImage]
    background: Literal["opaque"]
    output_format: Literal["png"]
    size: str
    seed: int
    model: ModelTold
    synthetic: Literal[True]
    notice: str
    refused: list[RefusedTold]


class ClassTold(BaseModel):
    """A class of a model."""

    code: str
    name: str
    chinese_name: str
    colour: str


class ModelEntry(BaseModel):
    """A checkpoint that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["m2d"]
    sha256: str
    step: int
    stage: str
    image_size: int
    classes: list[ClassTold]
    extractor: str
    has_prior: bool
    modes: list[Mode]
    size_bytes: int
    licence: str
    default: bool


class ModelList(BaseModel):
    """All checkpoints that are served, the default first."""

    object: Literal["list"]
    data: list[ModelEntry]


def model_told(card: ModelCard, *, default: bool) -> dict[str, Any]:
    """A ModelEntry. Where the checkpoint lies is not told."""
    shown = ("sha256", "step", "stage", "image_size", "extractor", "has_prior", "size_bytes", "licence", "created")
    names = ("code", "name", "chinese_name", "colour")
    return {
        "id": card.name,
        "object": "model",
        "owned_by": "m2d",
        **{name: getattr(card, name) for name in shown},
        "classes": [{name: getattr(one, name) for name in names} for one in card.classes.diagnoses],
        "modes": ["standard", "image2image", *(["interpolate"] if card.has_extractor else [])],
        "default": default,
    }


def body_of(kind: type[BaseModel], *files: str, many: bool = False) -> dict[str, Any]:
    """A route's `openapi_extra`: JSON of this kind, or a form with it as `request` and with these files.

    The kind's schema is in the document by `schemas`.
    """
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if files:
        one = {"type": "array", "items": BINARY["schema"]} if many else BINARY["schema"]
        properties = {"request": schema, **dict.fromkeys(files, one)}
        form = {"type": "object", "properties": properties, "required": ["request"], "additionalProperties": False}
        encoding = {"request": {"contentType": "application/json"}}
        content["multipart/form-data"] = {"schema": form, "encoding": encoding}
    return {"requestBody": {"required": True, "content": content}}


def schemas(limits: ServingLimits) -> dict[str, Any]:
    """Of all that clients send, by name, with this service's limits in them."""
    kinds = (ImageRequest, OpenAIRequest, JobRequest, ModelRequest)
    _, document = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    found: dict[str, Any] = document["$defs"]
    for kind, counted in (("ImageRequest", "count"), ("OpenAIRequest", "n"), ("JobRequest", None)):
        properties = found[kind]["properties"]
        properties["steps"]["maximum"] = limits.steps
        if counted is not None:
            number = properties[counted].get("anyOf", [properties[counted]])[0]
            number["maximum"] = limits.images
    return found


def pick_model(models: Sequence[ModelCard], name: str | None) -> ModelCard:
    """The model that a request names, the first where it names none. Raises Problem (404, 503)."""
    if not models:
        raise Problem(503, "no model is loaded yet; ask again", headers={"Retry-After": "5"})
    if name is None:
        return models[0]
    for card in models:
        if card.name == name or (re.fullmatch("[0-9a-f]{8,64}", name) and card.sha256.startswith(name)):
            return card
    if name == "default":  # OpenAI's clients must name one
        return models[0]
    raise Problem(404, f"model {name} is not served; there are {', '.join(card.name for card in models)}")


def find_class(word: str, classes: ClassSet, field: str = "class") -> str:
    """The code of a class given by its code or one of its names. Raises ConfigError."""
    code = classes.find(word)
    if code is None:
        raise ConfigError(f"{field}: {word} is no class of this model; choose one of {' '.join(classes.codes)}")
    return code


def class_in(prompt: str, classes: ClassSet) -> str:
    """The code of the one class that a sentence names. Raises ConfigError."""
    if (whole := classes.find(prompt)) is not None:
        return whole
    found, rest = [], prompt
    for one in sorted(classes.diagnoses, key=lambda one: -len(one.chinese_name)):  # has no spaces between its words
        if not one.chinese_name.isascii() and one.chinese_name in rest:
            found.append(one.code)
            rest = rest.replace(one.chinese_name, " ")
    words = re.findall(r"[\w+'-]+", rest)
    while words:
        longest = min(len(words), 8)
        named = ((n, classes.find(" ".join(words[:n]))) for n in range(longest, 0, -1))
        length, code = next(((n, code) for n, code in named if code is not None), (1, None))
        found += [] if code is None else [code]
        words = words[length:]
    if len(set(found)) != 1:
        named_ones = f"names {' and '.join(dict.fromkeys(found))}" if found else "names no class of this model"
        choice = ", ".join(f"{one.code} ({one.name}, {one.chinese_name})" for one in classes.diagnoses)
        raise ConfigError(f"prompt: it {named_ones}; name one of {choice}")
    return found[0]


def plan_images(
    request: ImageRequest,
    card: ModelCard,
    uploads: Mapping[str, Sequence[Upload]],
    limits: ServingLimits,
    order_id: str,
) -> Order:
    """The order of a request, its seed drawn where it has none. Raises ConfigError or Problem (422)."""
    code = find_class(request.label, card.classes)
    count = request.steps_between + 2 if request.mode == "interpolate" else request.count
    name = "steps_between + 2" if request.mode == "interpolate" else "count"
    _require_within(name, count, limits.images, "images a request; POST /v1/jobs takes more")
    _require_within("first + count", request.first + count, limits.job_images)
    _require_within("deadline_s", request.deadline_s or 0, limits.deadline_s)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed  # exact in JavaScript, too
    references = _references(request, code, uploads, ("reference", "reference_b"))
    config = _config(request, card, seed, limits, code, count)
    table = plan_of(config, cast(Feature, config.feature), {code: request.first + count}, references)
    if request.mode != "interpolate":
        table = table.slice(request.first)
    sums = sums_of(references)
    return Order(
        id=order_id,
        model=card,
        config=config,
        rows=tuple(rows_of(table)),
        plan=digest_of(table, sums) if sums else None,
        uploads={one.name: one.content for files in uploads.values() for one in files},
        previews=request.partial_images,
        deadline=time.time() + min(request.deadline_s or limits.deadline_s, limits.deadline_s),
    )


def plan_job(
    request: JobRequest, card: ModelCard, uploads: Mapping[str, Sequence[Upload]], limits: ServingLimits
) -> JobOrder:
    """A job's order; rows name uploads as `references`. Raises ConfigError, DataError or Problem (422)."""
    given = [name for name in ("counts", "balance", "label") if getattr(request, name) is not None]
    wanted = ["label"] if request.mode == "interpolate" else ["counts"] if "counts" in given else ["balance"]
    if given != wanted:
        raise ConfigError(
            "class: mode interpolate needs the class of its references, and neither counts nor balance"
            if request.mode == "interpolate"
            else "counts: give the images to make of each class, or balance, and not both; class is for interpolate"
        )
    if request.balance is not None:
        counts = targets(_by_code(request.balance.have, card.classes, "balance.have"), request.balance.to)
    elif request.label is not None:
        counts = {find_class(request.label, card.classes): 0}
    else:
        counts = _by_code(request.counts or {}, card.classes, "counts")
    codes = [code for code, count in counts.items() if count] or list(counts)
    if request.mode != "standard" and len(codes) != 1:
        raise ConfigError(
            f"counts: the references are of one class, and counts has {' '.join(codes)}; order each alone"
        )
    references = _references(request, codes[0] if codes else "", uploads, ("references", "references_b"))
    total = sum(counts.values())
    if request.mode == "interpolate":
        total = (request.steps_between + 2) * max(len(images[codes[0]]) for images in references)
    _require_within("counts", total, limits.job_images, "images a job")
    if total == 0:
        raise ConfigError("counts: there is nothing to make; ask for at least one image")
    config = _config(request, card, request.seed, limits, ",".join(codes), max(*counts.values(), 1))
    return JobOrder(
        model=card,
        config=config,
        rows=tuple(rows_of(plan_of(config, cast(Feature, config.feature), counts, references))),
        uploads={one.name: one.content for files in uploads.values() for one in files},
        request=request.model_dump(mode="json", by_alias=True, exclude_unset=True),
    )


def _by_code(counts: Mapping[str, int], classes: ClassSet, field: str) -> dict[str, int]:
    """In the order of the classes, as `generate` plans them."""
    found: dict[str, int] = {}
    for word, count in counts.items():
        code = find_class(word, classes, field)
        if code in found:
            raise ConfigError(f"{field}: {code} is there twice, as {word} too; keep one")
        found[code] = count
    return {code: found[code] for code in classes.codes if code in found}


def _require_within(name: str, value: float, limit: float, unit: str = "") -> None:
    if value > limit:
        raise Problem(422, f"{name} is {value:g}; the limit is {limit:g} {unit}".rstrip(), limit=limit)


def _references(
    request: _Settings, code: str, uploads: Mapping[str, Sequence[Upload]], fields: tuple[str, str]
) -> list[dict[str, tuple[Reference, ...]]]:
    """By class, those of each field that the mode needs, which are all that may be there."""
    needed = {"standard": 0, "image2image": 1, "interpolate": 2}[request.mode]
    for field, files in uploads.items():
        if field not in fields:
            raise ConfigError(f"{field}: not known here; give {' and '.join(fields[:needed]) or 'none'}")
        if len(files) > 1 and isinstance(request, ImageRequest):
            raise ConfigError(f"{field}: {len(files)} images came, one is needed; a job takes many")
    for place, field in enumerate(fields):
        if bool(uploads.get(field)) != (place < needed):
            what = "needs an image" if place < needed else "takes none"
            raise ConfigError(f"{field}: mode {request.mode} {what} there")
    return [
        {code: tuple(Reference(path=one.name, label=code, sha256=one.name.partition(".")[0]) for one in uploads[field])}
        for field in fields[:needed]
    ]


def _config(
    request: _Settings, card: ModelCard, seed: int, limits: ServingLimits, codes: str, count: int
) -> GenerateConfig:
    """The settings by which `generate` makes the same. feature is decided as it decides."""
    _require_within("steps", request.steps, limits.steps)
    low, high = request.guidance_interval
    by_default: Feature = "reference" if request.mode != "standard" else "prior" if card.has_prior else "none"
    feature = request.feature or by_default
    if feature == "prior" and not card.has_prior:
        raise ConfigError(f"feature: {card.name} has no feature prior; leave it out, or ask for none")
    if feature == "reference" and request.mode != "standard" and not card.has_extractor:
        instead = "" if request.mode == "interpolate" else "; ask for feature prior or none"
        raise ConfigError(f"feature: the extractor of {card.name} ({card.extractor}) is not here{instead}")
    folders = {"image2image": ("init_images",), "interpolate": ("reference_images", "reference_images_b")}
    copied = _COPIED - ({"strength"} if request.mode != "image2image" else set())
    own: dict[str, Any] = request.model_dump(include=copied) | dict.fromkeys(folders.get(request.mode, ()), "uploads")
    return GenerateConfig(
        checkpoint=card.checkpoint,
        classes=codes,
        num_samples=count,
        seed=seed,
        feature=feature,
        guidance_interval=(low, high),
        **own,
    )
