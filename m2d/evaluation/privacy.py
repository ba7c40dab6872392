"""Privacy: does the model, or do its images, give away which lesions it was trained on?

Memorisation looks for copies among the generated images; this asks the checkpoint itself. Both need unseen lesions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m2d.data.features import read_cls, write_cls
from m2d.data.store import pieces
from m2d.diffusion.interpolant import interpolate, velocity_target
from m2d.errors import CheckpointError, ConfigError, M2DError
from m2d.evaluation.images import (
    ALL_ROWS,
    RECONSTRUCTED_AT_ONCE,
    FeatureSet,
    ImageSet,
    Unanswerable,
    batch_fits,
    class_counts,
    thumbnail_views,
    trained_on,
)
from m2d.files.progress import progress
from m2d.generation.references import load_reference_extractor
from m2d.metrics.bootstrap import Estimate, resampled_weights
from m2d.metrics.neighbours import Standardizer, at_least_median, nearest_in_views
from m2d.metrics.scores import told_apart
from m2d.models.autoencoder import coded_at_once, from_uint8
from m2d.models.checkpoint import Checkpoint
from m2d.models.extractors import FeatureExtractor

FOLDER = "evaluation_v1/privacy"  # in the cache; the number goes up when the way from pixels to an error changes
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the path from data (0) to noise (1)
LEVEL = 0.01  # false alarms at which lesions are called
FEWEST = 10  # lesions of each side, and of a class for an interval of its own
DENOISER, AUTOENCODER, BLIND = "velocity error", "autoencoder's error", "no model"
_WIDER = 1.35  # half an interval, so that one of six statistics passes by chance in 2.5 % of cases (Bonferroni)
NOISE_SEED = 20261126
_KEPT_AT_ONCE = 256  # images


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Training lesions told from as many unseen ones."""

    auc: Estimate  # chance that a training image's score is above an unseen one's; 0.5: told by nothing
    found: Estimate | None  # share of training lesions called where 1 % of unseen ones are; None: fewer than 99 of them
    lesions: int  # of each side

    @property
    def succeeds(self) -> bool:
        """By the area or by the share, lesions are told better than by guessing."""
        return _above(self.auc, 0.5) or (self.found is not None and _above(self.found, LEVEL))


@dataclass(frozen=True, kw_only=True)
class Membership:
    """Loss-based membership inference. Plain numbers."""

    condition: str  # what the U-Net was told: the class and the feature of the image, or the class
    lesions: dict[str, int]  # of each side, by class
    attacks: dict[str, Attack]  # by velocity error, autoencoder's error, and by the pictures alone, without a model
    classes: dict[str, dict[str, Attack]]  # of classes with at least 10 lesions on each side
    times: dict[str, float]  # AUC of the velocity error at each time alone
    resamples: int
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class PrivacyResult:
    """Plain numbers, for evaluation.json."""

    extractor: str
    verdict: str
    found: bool  # by the velocity error or the autoencoder's, or by where generated images lie
    membership: Membership | None  # None: the notes of the evaluation say why
    lesions: dict[str, int]  # of each side that generated images were compared with, by class
    nearer: dict[str, Estimate]  # by space, share of generated images nearer to a training lesion; 0.5: no sign


def measure_privacy(
    *,
    train: FeatureSet,
    test: FeatureSet,
    generated_views: Sequence[np.ndarray],
    generated: ImageSet,
    membership: Membership | None,
    seed: int,
) -> PrivacyResult:
    """Which share of the generated images has its nearest real image in training, of equally many on both sides.

    generated_views: cls float32 [N, D] of the generated images in each view of m2d.data.views. Features are compared as
    measure_memorization compares them, and thumbnails. Of each class as many lesions are drawn of both sides, an image
    each. A real image that is the nearest one of many generated images is one trial (Kish's effective number, in
    Wilson's interval), for it may be a training image by chance. Raises Unanswerable for fewer than ten lesions a side.
    """
    rows = equal_sides(train, test, seed=seed)
    order = np.random.default_rng(seed).permutation(2 * len(rows[0]))  # equal distances are no one's advantage
    trained = order < len(rows[0])
    standard = Standardizer.of(train.cls, at_least_median)

    def share(views: Sequence[Tensor], banks: Sequence[Tensor]) -> Estimate:
        distances, nearest = nearest_in_views(views, torch.cat(list(banks))[torch.from_numpy(order)])
        best = nearest.gather(1, distances.argmin(dim=1, keepdim=True))[:, 0].numpy()
        votes = np.bincount(best, minlength=len(order)).astype(float)
        return Estimate.of_share(float(votes[trained].sum() / votes.sum()), float(votes.sum() ** 2 / (votes @ votes)))

    sides = [(train, rows[0]), (test, rows[1])]
    nearer = {
        "features": share(
            [standard.unit(cls) for cls in generated_views], [standard.unit(one.cls[some]) for one, some in sides]
        ),
        "thumbnails": share(
            [view(ALL_ROWS) for view in thumbnail_views(generated)],
            [thumbnail_views(one)[0](some) for one, some in sides],
        ),
    }
    attacks = membership.attacks if membership else {}
    return PrivacyResult(
        extractor=train.extractor,
        verdict=_verdict(attacks, nearer),
        found=_found(attacks, nearer),
        membership=membership,
        lesions=class_counts(train.labels[rows[0]], train.classes),
        nearer=nearer,
    )


def infer_membership(
    train: ImageSet,
    test: ImageSet,
    checkpoint: Checkpoint | None,
    *,
    device: str,
    cache_dir: str,
    batch_size: int | None = None,
    most: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
) -> Membership:
    """Guess which images the checkpoint was trained on by how well it knows them, and tell how often that is right.

    train, test: at the checkpoint's image size. most: lesions of each side. Of each class as many lesions are drawn of
    both sides, an image each. An image's score is the mean over TIMES of its negative log squared error of the
    velocity, under noise that is the same for all images, told class and feature as in training; each time's logs are
    standardised within the class, both sides together, so that no class's difficulty is taken for membership. In the
    same way by the autoencoder's squared error from the posterior's mean, and, as a control, by the differences of
    neighbouring pixels, which know no model: where these tell the sides apart, the split does (arXiv 2406.16201).
    Intervals are from resamples of lesions within class and side. Sources: Yeom et al. (arXiv 1709.01604) for the
    loss, Carlini et al. (arXiv 2112.03570) for the rate at few false alarms, Matsumoto et al. (arXiv 2302.03262) for
    diffusion models. Raises Unanswerable without a checkpoint, for another image size, or for too few lesions.
    """
    if checkpoint is None:
        raise Unanswerable("no checkpoint is known that made the images; name it by --checkpoint")
    if checkpoint.image_size != train.image_size:
        raise Unanswerable(
            f"the checkpoint is of {checkpoint.image_size} px, the evaluation of {train.image_size} px; set "
            f"--image_size {checkpoint.image_size}"
        )
    notes, trained = list[str](), trained_on(checkpoint)
    if trained is None:
        notes.append("that the checkpoint was trained on these training images is taken on trust")
    members = np.ones(len(train), bool) if trained is None else np.isin(train.sha256, list(trained))
    if not members.any():
        raise Unanswerable(f"the checkpoint was trained on none of the training images ({train.source})")
    rows = equal_sides(train, test, members, most=most, seed=seed)
    extractor = _extractor(checkpoint, notes)
    found = [
        model_errors(images, of_side, checkpoint, extractor, device=device, cache_dir=cache_dir, batch_size=batch_size)
        for images, of_side in zip((train, test), rows, strict=True)
    ]
    velocity, redrawn = np.split(np.concatenate(found).astype(np.float64), [len(TIMES)], axis=1)
    errors = {
        DENOISER: velocity,
        AUTOENCODER: redrawn,
        BLIND: np.concatenate([_roughness(*side) for side in zip((train, test), rows, strict=True)]),
    }
    labels = np.concatenate([train.labels[rows[0]], test.labels[rows[1]]])
    of_train = np.arange(len(labels)) < len(rows[0])
    weights = resampled_weights(2 * labels + of_train, np.arange(len(labels)), resamples=resamples, seed=seed)
    weights = weights.astype(np.float64)

    def attack(score: np.ndarray, some: np.ndarray) -> Attack:
        """some: bool [n], the images to tell apart."""
        area, called = told_apart(score[some], of_train[some], weights[:, some], LEVEL)
        share = None if np.isnan(called[0]) else Estimate.of(called)
        return Attack(auc=Estimate.of(area), found=share, lesions=int(some.sum()) // 2)

    lesions = class_counts(train.labels[rows[0]], train.classes)
    scores = {name: familiarity(one, labels) for name, one in errors.items()}
    everything = np.ones(len(labels), bool)
    alone = [told_apart(familiarity(one, labels), of_train, weights[:1], LEVEL)[0][0] for one in velocity.T[..., None]]
    return Membership(
        condition="class and feature" if extractor else "class",
        lesions=lesions,
        attacks={name: attack(score, everything) for name, score in scores.items()},
        classes={
            name: {
                code: attack(score, labels == train.classes.index(code))
                for code, count in lesions.items()
                if count >= FEWEST
            }
            for name, score in scores.items()
        },
        times={f"{time:g}": float(area) for time, area in zip(TIMES, alone, strict=True)},
        resamples=resamples,
        notes=notes,
    )


def equal_sides(
    train: ImageSet, test: ImageSet, members: np.ndarray | None = None, *, most: int | None = None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 [n] of train and [n] of test: of each class equally many lesions, drawn, an image of each.

    members: bool [N], training images that may be drawn; None: all. most: lesions of a side, shared by the classes as
    their sizes are, at least one of each. Raises Unanswerable for fewer than ten lesions.
    """
    allowed = [np.ones(len(train), bool) if members is None else members, np.ones(len(test), bool)]
    drawn: list[list[np.ndarray]] = []
    for label in np.intersect1d(train.labels[allowed[0]], test.labels).tolist():
        of_class = []
        for side, (images, usable) in enumerate(zip((train, test), allowed, strict=True)):
            rows = np.flatnonzero((images.labels == label) & usable)
            rows = np.random.default_rng([seed, label, side]).permutation(rows)
            _, first = np.unique(images.groups[rows].astype(str), return_index=True)
            of_class.append(rows[np.sort(first)])
        count = min(map(len, of_class))
        drawn.append([rows[:count] for rows in of_class])
    total = sum(len(rows) for rows, _ in drawn)
    if total < FEWEST:
        raise Unanswerable(
            f"training ({train.source}) and unseen images ({test.source}) have {total} lesions a side in classes that "
            f"both show; at least {FEWEST} are needed"
        )
    if most is not None and total > most:
        counts = [max(1, len(rows) * most // total) for rows, _ in drawn]
        drawn = [[rows[:count] for rows in of_class] for count, of_class in zip(counts, drawn, strict=True)]
    one, other = (np.concatenate(side) for side in zip(*drawn, strict=True))
    return one, other


def familiarity(errors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How much better than others of its class an image is known: float64 [n], the mean over T errors [n, T]."""
    logs = np.log(np.maximum(errors, 1e-12))
    for label in np.unique(labels):
        of_class = labels == label
        deviation = logs[of_class].std(axis=0)
        logs[of_class] = (logs[of_class] - logs[of_class].mean(axis=0)) / np.where(deviation > 1e-9, deviation, 1)
    return np.asarray(-logs.mean(axis=1))


@torch.inference_mode()
def model_errors(
    images: ImageSet,
    rows: np.ndarray,
    checkpoint: Checkpoint,
    extractor: FeatureExtractor | None,
    *,
    device: str,
    cache_dir: str,
    batch_size: int | None = None,
) -> np.ndarray:
    """Mean squared errors float32 [n, len(TIMES) + 1] of these images: of the velocity at each time, then redrawn.

    Latents are posterior means; pixels are in [-1, 1]. extractor: of the feature that the U-Net is told; None: it is
    told the class alone. batch_size: see `reconstructions`. They are kept by checkpoint, pixels and class, 256 images
    at a time. Raises ConfigError for a batch that does not fit the device, CheckpointError for errors that are no
    numbers.
    """
    told = "feature" if extractor else "class"
    folder = Path(cache_dir).expanduser() / FOLDER / f"{checkpoint.sha256[:16]}-{told}"
    labels = images.labels[rows]
    ids = [
        hashlib.sha256(images.pixels[row].tobytes() + b"%d" % label).hexdigest()
        for row, label in zip(rows, labels, strict=True)
    ]
    known = read_cls(folder, ids)
    missing = np.array([place for place in range(len(rows)) if ids[place] not in known], dtype=np.int64)
    autoencoder, denoiser = checkpoint.autoencoder.to(device), checkpoint.denoiser.to(device)
    extractor = extractor.to(device) if extractor else None
    size = min(batch_size or RECONSTRUCTED_AT_ONCE, coded_at_once(images.image_size))
    noises = torch.randn(len(TIMES), *checkpoint.latent_shape, generator=torch.Generator().manual_seed(NOISE_SEED)).to(
        device
    )

    def errors_of(part: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(np.stack([images.pixels[row] for row in rows[part]])).to(device).permute(0, 3, 1, 2)
        targets = from_uint8(pixels)
        latents = autoencoder.encode(targets).mode()
        columns = [(autoencoder.decode(latents).float() - targets).square().flatten(1).mean(dim=1)]
        clean = denoiser.normalize(latents.float())
        cls = extractor(extractor.preprocess(pixels)).cls.float() if extractor else None
        context = denoiser.context(torch.from_numpy(labels[part]).to(device), cls)
        for time, noise in zip(TIMES, noises, strict=True):
            t, noise = torch.full((len(part),), time, device=device), noise.expand_as(clean)
            velocity = denoiser.velocity(interpolate(clean, noise, t), t, context).float()
            columns.append((velocity - velocity_target(clean, noise)).square().flatten(1).mean(dim=1))
        return torch.stack([*columns[1:], columns[0]], dim=1)

    with progress(f"errors on {images.name} images", len(missing)) as shown:
        for kept in pieces(missing, _KEPT_AT_ONCE):
            with batch_fits(size, device):
                found = torch.cat([errors_of(part) for part in pieces(kept, size)]).cpu().numpy()
            if not np.isfinite(found).all():
                raise CheckpointError(f"checkpoint: {checkpoint.path} gives errors that are no numbers; take another")
            write_cls(folder, checkpoint.path, [ids[place] for place in kept], found)
            known |= {ids[place]: error for place, error in zip(kept, found, strict=True)}
            shown.advance(len(kept))
    return np.stack([known[digest] for digest in ids])


def _extractor(checkpoint: Checkpoint, notes: list[str]) -> FeatureExtractor | None:
    """Whose features the U-Net was told in training; None with a note where it cannot be had here."""
    try:
        extractor = load_reference_extractor(checkpoint)
        if checkpoint.info.extractor_key not in ("", extractor.key):
            raise ConfigError(f"its weights here give {extractor.key}, the run had {checkpoint.info.extractor_key}")
    except M2DError as error:
        notes.append(f"the U-Net was told the class alone, for its extractor cannot be used here ({error})")
        return None
    return extractor


def _roughness(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """Mean squared difference of neighbouring pixels, float64 [n, 1]."""
    found = [
        sum(np.square(np.diff(images.pixels[row].astype(float), axis=axis)).mean() for axis in (0, 1)) for row in rows
    ]
    return np.array(found)[:, None]


def _found(attacks: dict[str, Attack], nearer: dict[str, Estimate]) -> bool:
    """The control, which knows no model, finds nothing of the model's."""
    by_model = [attack.succeeds for name, attack in attacks.items() if name != BLIND]
    return any(by_model) or any(_above(share, 0.5) for share in nearer.values())


def _above(one: Estimate, chance: float) -> bool:
    return one.value - _WIDER * (one.value - one.low) > chance


def _verdict(attacks: dict[str, Attack], nearer: dict[str, Estimate]) -> str:
    """One sentence."""
    parts = []
    for name in (DENOISER, AUTOENCODER) if attacks else ():
        one, share = attacks[name], attacks[name].found
        called = f" and finds {share.percent} of them at 1 % false alarms" if share else ""
        parts.append(f"the {name} ranks training lesions before unseen ones with an AUC of {one.auc}{called}")
    shares = " and ".join(f"{share.percent} by {space}" for space, share in nearer.items())
    parts.append(f"{shares} of the generated images are nearer to training lesions than to as many unseen ones")
    told = "training lesions can be told" if _found(attacks, nearer) else "no training lesion's membership was shown"
    control = attacks.get(BLIND)
    aside = ""
    if control is not None and control.succeeds:
        aside = f"; without any model pictures alone reach {control.auc}, so the split itself gives some away"
    return f"{told}: {'; '.join(parts)}{aside}"
