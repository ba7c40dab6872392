"""The whole evaluation: read and extract once, answer each question that is asked, write the report.

Run again after a kill it resumes: pixels, features and finished trainings are in the cache folder.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from m2d import __version__
from m2d.cluster.nodes import device_of_actor
from m2d.cluster.start import ray_cluster
from m2d.errors import CheckpointError, ConfigError, DataError, M2DError
from m2d.evaluation.classifiers.compare import DownstreamResult, Trials, scored_classes
from m2d.evaluation.classifiers.finetune import finetuned_site, finetuned_worth, measure_finetuned
from m2d.evaluation.classifiers.probe import chosen_c, measure_consistency, measure_downstream, probe_site, probe_worth
from m2d.evaluation.classifiers.site import SiteResult
from m2d.evaluation.classifiers.worth import WorthResult
from m2d.evaluation.features import Extraction, ray_pays
from m2d.evaluation.fidelity import measure_fidelity
from m2d.evaluation.images import (
    VIEWS,
    FeatureSet,
    ImageSet,
    Unanswerable,
    drawn_like,
    psnr_db,
    read_image_sets,
    reconstructions,
    rows_like,
)
from m2d.evaluation.memorization import measure_memorization
from m2d.evaluation.privacy import infer_membership, measure_privacy
from m2d.evaluation.provenance import near_copy_gate
from m2d.evaluation.report.page import Evaluation, print_evaluation, typicality, write_report
from m2d.evaluation.settings import EvaluateConfig
from m2d.experiment import read_mapping
from m2d.files.paths import checkpoint_folder, result_path
from m2d.files.progress import say
from m2d.generation.generator import pick_device
from m2d.generation.output import RECORD_NAME
from m2d.models.checkpoint import Checkpoint, checkpoint_sha256, load_checkpoint, read_info
from m2d.models.extractors import extractor_identity
from m2d.models.settings import FeatureExtractorConfig

KEPT = "evaluation_v1/trainings"  # in the cache folder: what finished trainings answered


def evaluate(config: EvaluateConfig) -> Path:
    """Answer config.parts and write evaluation.json, evaluation.html and the CSV tables. Returns their folder.

    A part that these images cannot answer leaves its reason in the notes, and the others are answered all the same;
    where none is left, that reason is the error. Raises ConfigError, DataError or CheckpointError, in one line, for
    what a user can fix.
    """
    began = time.monotonic()
    device = str(pick_device(config.device))
    config = config.in_this_place()
    place = config.generated or "."
    beside = "evaluation" if "://" in place else str(Path(place).expanduser().absolute() / "evaluation")
    output = Path(result_path("output", config.output or beside)).expanduser()
    found, notes = find_checkpoint(place, config.checkpoint)
    checkpoint = load_checkpoint(found, "cpu") if found else None
    sets = read_image_sets(config, checkpoint, notes)
    guide = _guide(config, checkpoint, notes)
    _refuse_pickers(place, config.independent_extractor, guide, notes)
    for name, images in zip(("training", "unseen", "generated"), sets.values()):
        counts = " ".join(f"{code} {count}" for code, count in images.counts.items())
        say(f"{name} images: {counts} ({images.source})")
    sides: dict[str, ImageSet] = {name: sets.pop(name) for name in ("known", "tested") if name in sets}
    train, test, generated = sets.values()
    sides = sides or {"known": train, "tested": test}
    say(f"evaluating at {generated.image_size} px on {device}")
    # One connection for all parts. Small sets on one machine are done before Ray has started.
    on_ray = ray_pays(config.num_actors, device, len(train) + len(generated))
    with ray_cluster(verbose=config.verbose) if on_ray else nullcontext():
        actors = config.num_actors if on_ray else 0
        extraction = Extraction(config.cache_dir, device, config.batch_size, actors, config.verbose)
        unanswered: list[str] = []

        def of_sets(images: Mapping[str, ImageSet], extractor: FeatureExtractorConfig) -> dict[str, FeatureSet]:
            return {name: extraction.of(one, extractor) for name, one in images.items()}

        def views_for_guide() -> dict[str, Any]:
            """Real images as they are and generated ones in eight views."""
            real = of_sets({"train": train, "test": test}, guide)
            views = extraction.features(generated, guide, views=range(VIEWS))
            return {**real, "generated_views": views, "generated": generated, "seed": config.seed}

        @contextmanager
        def asking(part: str) -> Iterator[None]:
            try:
                yield
            except Unanswerable as error:
                unanswered.append(f"{part} was not measured: {error}")

        parts = config.part_names(gpu=device != "cpu")
        networks: dict[str, Any] = {"device": device, "cache_dir": config.cache_dir, "batch_size": config.batch_size}
        redraw: Callable[[ImageSet], ImageSet] | None = None
        if checkpoint is not None and checkpoint.image_size == test.image_size:
            redraw = partial(reconstructions, checkpoint=checkpoint, **networks)
        elif checkpoint is not None:
            notes.append(
                f"no autoencoder floor: the checkpoint is of {checkpoint.image_size} px, the evaluation of "
                f"{test.image_size} px"
            )
        if config.preprocess and redraw is None:
            raise ConfigError(
                f"preprocess is {config.preprocess}, but its autoencoder cannot be used here: "
                + (f"it is of {checkpoint.image_size} px; set --image_size to it" if checkpoint else notes[0])
            )

        # 1. Fidelity, by an extractor that did not guide the model and by the one that did.
        fidelity, redrawn = [], None
        if "fidelity" in parts:
            redrawn = redraw(test) if redraw else None
            fidelity = [
                measure_fidelity(
                    **of_sets(sets, extractor),
                    reconstructions=extraction.of(redrawn, extractor) if redrawn else None,
                    circular=extractor.name == checkpoint.info.feature_extractor if checkpoint else None,
                    seed=config.seed,
                )
                for extractor in (config.independent_extractor, guide)
            ]

        # 2. Memorisation, in the guide's features: where a model would copy from is the space that it was shown.
        memorization = None
        if "memorization" in parts:
            with asking("memorisation"):
                memorization = measure_memorization(**views_for_guide())

        # 3. Downstream, in features that did not guide the model: those it was trained towards would take its side.
        independent = of_sets(sets, config.independent_extractor)
        of = partial(extraction.of, config=config.independent_extractor)
        downstream: list[DownstreamResult] = []
        through_autoencoder, worth, sites = None, list[WorthResult](), list[SiteResult]()
        c, folds, own = config.c, config.fold_count, config.finetune
        if on_ray and own.device is not None:  # each task has its own share of a GPU
            own = replace(own, device=device_of_actor(own.device))
        classifiers = config.classifier_names(gpu=device != "cpu") if "downstream" in parts else ()
        trials = Trials(
            seeds=range(config.seed, config.seed + config.seeds),
            resamples=config.bootstrap,
            ratios=config.ratio_list,
            seed=config.seed,
            kept=Path(config.cache_dir).expanduser() / KEPT,
            on_ray=on_ray,
        )
        repeats = range(config.seed, config.seed + config.repeats)
        of_folds = replace(trials, seeds=repeats) if folds > 1 else trials
        if config.setting == "site" and classifiers:  # another question: a site lacks the generator's training images
            asked = list[Callable[..., SiteResult]]()
            if "logistic" in classifiers:
                turned = extraction.features(sides["tested"], config.independent_extractor, views=range(1, VIEWS))
                given = of_sets(sides, config.independent_extractor)
                of_features = replace(of_folds, what="sites")
                asked.append(partial(probe_site, given, of(generated), c, of_features, turned=turned))
            if "finetune" in classifiers:
                of_pixels = replace(of_folds, what="sites, fine-tuned")
                asked.append(partial(finetuned_site, sides, generated, own, of_pixels))
            for share in config.site_shares:
                with asking(f"a site with {share:g} of the lesions"):
                    sites += [one(share=share, folds=folds) for one in asked]
            classifiers = ()
        through = dict[str, ImageSet]()
        if config.preprocess and redraw and classifiers:
            through = {name: redraw(images) for name, images in sides.items()}
        if "logistic" in classifiers:
            with asking("downstream"):
                of_features = replace(trials, what="logistic regressions")
                downstream.append(measure_downstream(**independent, c=c, trials=of_features))
                c = float(downstream[0].settings["c"] or 0)  # choosing it takes minutes
        if "finetune" in classifiers:
            what = "networks fine-tuned"
            with asking("downstream, fine-tuned,"):
                downstream.append(measure_finetuned(**sets, config=own, trials=replace(trials, what=what)))
                of_pixels = replace(of_folds, what=what)
                worth.append(finetuned_worth(sides, generated, own, of_pixels, folds=folds))
                if through:
                    worth.append(finetuned_worth(through, generated, own, of_pixels, folds=folds, original=sides))
        if "logistic" in classifiers and c is not None and downstream:
            redrawn_pool = None
            if redraw is not None:
                rows = rows_like(train.labels, generated.labels, config.seed)
                again = of(redraw(drawn_like([train], rows)))
                once = replace(trials, seeds=[config.seed], ratios=(), what="the same with reconstructions")
                through_autoencoder = measure_downstream(**independent | {"generated": again}, c=c, trials=once)
                labels = np.concatenate([images.labels for images in sides.values()])
                rows = np.sort(rows_like(labels, generated.labels, config.seed, times=2))
                redrawn_pool = rows, of(redraw(drawn_like(list(sides.values()), rows)))
            with asking("what they are worth"):
                of_features = replace(of_folds, what="what they are worth")
                probed = partial(probe_worth, generated=of(generated), c=c, trials=of_features, folds=folds)
                plain = of_sets(sides, config.independent_extractor)
                worth.insert(0, probed(plain, redrawn=redrawn_pool))
                if through:
                    worth.append(probed(of_sets(through, config.independent_extractor), original=plain))

        # 4. Consistency.
        consistency = None
        if "consistency" in parts:
            with asking("consistency"):
                scored_classes(train, test)
                c = c if c is not None else chosen_c(independent["train"], seed=config.seed)[0]
                consistency = measure_consistency(**independent, c=c, resamples=config.bootstrap, seed=config.seed)

        # 5. Privacy: what the checkpoint and its images give away of the lesions that it was trained on.
        privacy = None
        if "privacy" in parts:
            membership = None
            with asking("membership inference"):
                most, resamples = config.privacy_lesions, config.bootstrap
                membership = infer_membership(
                    train, test, checkpoint, **networks, most=most, resamples=resamples, seed=config.seed
                )
            with asking("privacy"):
                privacy = measure_privacy(**views_for_guide(), membership=membership)
        if not (fidelity or memorization or downstream or sites or consistency or privacy):
            raise DataError("; ".join(unanswered))
        notes += unanswered

        result = Evaluation(
            checkpoint=checkpoint.path if checkpoint else None,
            image_size=generated.image_size,
            device=device,
            images=[images.summary for images in sets.values()],
            reconstruction_psnr_db=psnr_db(test, redrawn) if redrawn else None,
            fidelity=fidelity,
            memorization=memorization,
            downstream=downstream,
            worth=worth,
            sites=sites,
            near_copy_gate=near_copy_gate(place) if sites else None,
            autoencoder_downstream=through_autoencoder,
            consistency=consistency,
            privacy=privacy,
            notes=notes,
            seed=config.seed,
            seconds=round(time.monotonic() - began, 1),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )
        typical = typicality(independent["train"], independent["generated"])
    write_report(result, output, sets, redrawn, typical)
    print_evaluation(result)
    print(f"evaluation.html, evaluation.json and CSV tables in {output} ({result.seconds:.0f} s)")
    return output


def _guide(config: EvaluateConfig, checkpoint: Checkpoint | None, notes: list[str]) -> FeatureExtractorConfig:
    """What guided the training, where it is known and its weights are here."""
    guide = config.feature_extractor or FeatureExtractorConfig()
    recorded = checkpoint.info.config.get("feature_extractor") if checkpoint else None
    if config.feature_extractor is None and isinstance(recorded, dict):
        try:
            guide = FeatureExtractorConfig(**{**recorded, "input_size": None})
        except (M2DError, TypeError) as error:
            notes.append(
                f"the extractor that guided the training cannot be used here ({error}); {guide.name} is taken instead"
            )
    if extractor_identity(guide)[1] == extractor_identity(config.independent_extractor)[1]:
        raise ConfigError(
            f"independent_extractor is {config.independent_extractor.name}, the same network as feature_extractor; "
            "name another one, as efficientnet-lite1 or timm:MODEL"
        )
    return guide


def record_of(generated: str) -> dict[str, Any]:
    """What `generate` noted beside its images; {}: they are other images than m2d's own, or at a URI."""
    with suppress(OSError):
        return read_mapping(Path(generated, RECORD_NAME)) or {}
    return {}


def picked_by(generated: str) -> list[dict[str, Any]]:
    """What `evaluate pick` noted of itself beside the images, the last pick last; empty: they are a whole run's."""
    return list(record_of(generated).get("pick", []))


def _refuse_pickers(
    generated: str, independent: FeatureExtractorConfig, guide: FeatureExtractorConfig, notes: list[str]
) -> None:
    """Raise ConfigError where the images were picked by the network that is to judge them; a note for the guide."""
    for by in picked_by(generated):
        if by.get("weights_sha256") == extractor_identity(independent)[1]:
            raise ConfigError(
                f"independent_extractor is {independent.name}, by which the images of {generated} were picked; name "
                "another one, as efficientnet-lite1 or timm:MODEL"
            )
        if by.get("weights_sha256") == extractor_identity(guide)[1]:
            notes.append(f"the images were picked by {guide.name}: by its features they look better than they are")


def find_checkpoint(generated: str, asked: str | None) -> tuple[str | None, list[str]]:
    """The folder of the checkpoint that made the images, or None, and lines for the report.

    asked: what the user names; it must then be the one that the images' record names, where there is a record. Without
    it the experiment around the images is searched, where m2d's own runs leave them. Raises CheckpointError for a
    folder that is no checkpoint, ConfigError for one that did not make the images.
    """
    record = record_of(generated)
    recorded = record.get("recipe", record).get("checkpoint")
    unknown = "no autoencoder floor, and whether the generator saw the test images is not known"
    if asked is not None:
        asked = checkpoint_folder(asked)
        read_info(asked)
        sha256 = checkpoint_sha256(Path(asked))
        if recorded not in (None, sha256):
            raise ConfigError(
                f"checkpoint: {asked} ({sha256[:12]}) did not make the images in {generated}, {recorded[:12]} "
                "did; name that one, or leave --checkpoint out"
            )
        return asked, [] if recorded else [f"{generated} does not say what made it; {asked} is taken on trust"]
    if recorded is None:
        return None, [f"{generated} does not say what made it and no --checkpoint is given: {unknown}"]
    around = (Path(generated).resolve().parent.parent / "checkpoints").glob("*/")
    for directory in sorted(around, key=lambda path: (path.name != "best", path.name)):
        with suppress(CheckpointError, OSError):  # one that is being written, or is of another version
            read_info(directory)
            if checkpoint_sha256(directory) == recorded:
                return str(directory), []
    return None, [
        f"checkpoint {recorded[:12]}, which made the images, was not found around them: {unknown}; name it by "
        "--checkpoint"
    ]
