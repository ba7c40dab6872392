"""The whole evaluation: read and extract once, answer each question that is asked, write the report.

What `python jobs/evaluate.py` does. Run again after a kill it goes on: pixels, features and finished trainings are in
the cache folder.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from m2d import __version__
from m2d.cluster.nodes import device_of_actor
from m2d.cluster.start import ray_cluster
from m2d.errors import ConfigError, DataError, M2DError
from m2d.evaluation.autoencoder_floor import drawn_like, psnr_db, reconstructions
from m2d.evaluation.consistency import measure_consistency
from m2d.evaluation.downstream import measure_downstream
from m2d.evaluation.downstream_jobs import Classifier, Job, Runner, run_here, run_on_ray
from m2d.evaluation.downstream_result import DownstreamResult
from m2d.evaluation.evaluate_settings import EvaluateConfig
from m2d.evaluation.evaluation import Evaluation, ImageCounts
from m2d.evaluation.extraction import RAY_PAYS_FROM, Extraction
from m2d.evaluation.feature_set import FeatureSet, ImageSet
from m2d.evaluation.fidelity import FidelityResult, measure_fidelity
from m2d.evaluation.finetune import measure_finetuned
from m2d.evaluation.finetune_settings import FinetuneConfig
from m2d.evaluation.image_sets import ImageSets, read_image_sets
from m2d.evaluation.memorization import measure_memorization
from m2d.evaluation.memorization_result import MemorizationResult
from m2d.evaluation.provenance import find_checkpoint
from m2d.evaluation.realism import typicality
from m2d.evaluation.report import print_evaluation, write_report
from m2d.files.paths import result_path
from m2d.files.progress import progress
from m2d.generation.generator import pick_device
from m2d.models.checkpoint import Checkpoint, load_checkpoint
from m2d.models.extractors import extractor_identity
from m2d.models.settings import FeatureExtractorConfig

VIEWS = 8  # of m2d.data.views: flips and quarter turns
KEPT = "evaluation_v1/trainings"  # in the cache folder: what finished trainings answered


def evaluate(config: EvaluateConfig) -> Path:
    """Answer config.parts and write evaluation.json, evaluation.html and the CSV tables. Returns their folder.

    Raises ConfigError, DataError or CheckpointError, in one line, for what a user can mend.
    """
    began = time.monotonic()
    device = str(pick_device(config.device))
    config = config.in_this_place()
    output = Path(result_path("output", str(_output(config))))
    place, notes = find_checkpoint(config.generated or ".", config.checkpoint)
    checkpoint = load_checkpoint(place, "cpu") if place else None
    sets = read_image_sets(config, (place, checkpoint.info) if place and checkpoint else None)
    notes += sets.notes
    guide = _guide(config, checkpoint, notes)
    for name, side in (("training", sets.train), ("unseen", sets.test), ("generated", sets.generated)):
        counts = " ".join(f"{code} {count}" for code, count in side.counts.items())
        print(f"{name} images: {counts} ({side.source})", file=sys.stderr)
    print(f"evaluating at {sets.generated.image_size} px on {device}", file=sys.stderr, flush=True)
    with ExitStack() as cluster:
        on_ray = _uses_ray(config, device, sets)
        if on_ray:
            cluster.enter_context(ray_cluster(verbose=config.verbose))
        run = _Run(config, device, sets, checkpoint, guide, notes, on_ray)
        result = run.evaluation(began, place)
        write_report(result, output, sets, run.redrawn, run.typicality)
    print_evaluation(result)
    print(f"evaluation.html, evaluation.json and CSV tables in {output} ({result.seconds:.0f} s)")
    return output


class _Run:
    """What the parts share. A part that cannot be computed leaves its reason in the notes, and the others go on."""

    def __init__(
        self,
        config: EvaluateConfig,
        device: str,
        sets: ImageSets,
        checkpoint: Checkpoint | None,
        guide: FeatureExtractorConfig,
        notes: list[str],
        on_ray: bool,
    ) -> None:
        self.config, self.device, self.sets, self.notes, self.on_ray = config, device, sets, notes, on_ray
        self.guide, self.independent = guide, config.independent_extractor
        self.keys = {one: extractor_identity(one)[0] for one in (guide, self.independent)}
        # A model's own extractor judges it kindly: it was trained towards that space.
        self.circular = {
            one: one.name == checkpoint.info.feature_extractor if checkpoint else None for one in self.keys
        }
        self.extraction = Extraction(
            cache_dir=config.cache_dir,
            device=device,
            batch_size=config.batch_size,
            num_actors=config.num_actors if on_ray else 0,
            verbose=config.verbose,
        )
        self._known: dict[tuple[str, FeatureExtractorConfig], FeatureSet] = {}
        self.checkpoint = self._usable(checkpoint)
        self.psnr_db: float | None = None
        self.redrawn = self._reconstructions()
        self.c = config.c  # chosen by the first part that needs it, which takes minutes
        self.typicality: np.ndarray | None = None

    def evaluation(self, began: float, place: str | None) -> Evaluation:
        """All parts in turn."""
        fidelity = self._fidelity() if "fidelity" in self.config.part_names else []
        memorization = self._memorization() if "memorization" in self.config.part_names else None
        downstream = self._downstream() if "downstream" in self.config.part_names else []
        through_autoencoder = self._through_autoencoder() if downstream else None
        consistency = None
        if "consistency" in self.config.part_names:
            consistency = measure_consistency(
                train=self._features(self.sets.train, self.independent),
                test=self._features(self.sets.test, self.independent),
                generated=self._features(self.sets.generated, self.independent),
                c=self.c,
                resamples=self.config.bootstrap,
                seed=self.config.seed,
            )
        self.typicality = typicality(
            self._features(self.sets.train, self.independent), self._features(self.sets.generated, self.independent)
        )
        return Evaluation(
            checkpoint=place,
            image_size=self.sets.generated.image_size,
            device=self.device,
            images=[ImageCounts.of(side) for side in (self.sets.train, self.sets.test, self.sets.generated)],
            reconstruction_psnr_db=self.psnr_db,
            fidelity=fidelity,
            memorization=memorization,
            downstream=downstream,
            autoencoder_downstream=through_autoencoder,
            consistency=consistency,
            notes=self.notes,
            seed=self.config.seed,
            seconds=round(time.monotonic() - began, 1),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )

    def _usable(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint, if its autoencoder takes images of this size."""
        size = self.sets.test.image_size
        if checkpoint is not None and checkpoint.image_size != size:
            self.notes.append(
                f"no autoencoder floor: the checkpoint is of {checkpoint.image_size} px, the evaluation of {size} px"
            )
            return None
        return checkpoint

    def _reconstructions(self) -> ImageSet | None:
        if self.checkpoint is None or "fidelity" not in self.config.part_names:
            return None
        redrawn = self._redraw(self.sets.test)
        self.psnr_db = psnr_db(self.sets.test, redrawn)
        return redrawn

    def _redraw(self, images: ImageSet) -> ImageSet:
        assert self.checkpoint is not None, "the caller has looked"
        return reconstructions(
            images,
            self.checkpoint,
            device=self.device,
            cache_dir=self.config.cache_dir,
            batch_size=self.config.batch_size,
        )

    def _through_autoencoder(self) -> DownstreamResult | None:
        """The logistic comparison with reconstructions of training images in place of the generated ones."""
        if self.checkpoint is None or "logistic" not in self.config.classifier_names(gpu=self.device != "cpu"):
            return None
        redrawn = self._redraw(drawn_like(self.sets.train, self.sets.generated, self.config.seed))
        cls = self.extraction.features(redrawn, self.independent)[0]
        return measure_downstream(
            train=self._features(self.sets.train, self.independent),
            test=self._features(self.sets.test, self.independent),
            generated=FeatureSet(redrawn, self.keys[self.independent], cls),
            seeds=(self.config.seed,),
            resamples=self.config.bootstrap,
            c=self.c,
            seed=self.config.seed,
            run=self._trainings("the same with reconstructions"),
        )

    def _features(self, images: ImageSet, extractor: FeatureExtractorConfig) -> FeatureSet:
        name = (images.name, extractor)
        if name not in self._known:
            cls = self.extraction.features(images, extractor)[0]
            self._known[name] = FeatureSet(images, self.keys[extractor], cls)
        return self._known[name]

    def _fidelity(self) -> list[FidelityResult]:
        return [
            measure_fidelity(
                train=self._features(self.sets.train, extractor),
                test=self._features(self.sets.test, extractor),
                generated=self._features(self.sets.generated, extractor),
                reconstructions=self._features(self.redrawn, extractor) if self.redrawn is not None else None,
                circular=self.circular[extractor],
                seed=self.config.seed,
            )
            for extractor in (self.independent, self.guide)
        ]

    def _memorization(self) -> MemorizationResult | None:
        """In the guide's features: where a model would copy from is the space that it was shown."""
        try:
            return measure_memorization(
                train=self._features(self.sets.train, self.guide),
                test=self._features(self.sets.test, self.guide),
                generated_views=self.extraction.features(self.sets.generated, self.guide, views=range(VIEWS)),
                generated=self.sets.generated,
                seed=self.config.seed,
            )
        except DataError as error:
            self.notes.append(f"memorisation was not measured: {error}")
            return None

    def _downstream(self) -> list[DownstreamResult]:
        """In features that did not guide the model: those it was trained towards would take its side."""
        sets, config = self.sets, self.config
        names = config.classifier_names(gpu=self.device != "cpu")
        shared: dict[str, Any] = {
            "seeds": tuple(range(config.seed, config.seed + config.seeds)),
            "resamples": config.bootstrap,
            "ratios": config.ratio_list,
            "seed": config.seed,
        }
        results = []
        if "logistic" in names:
            results.append(
                measure_downstream(
                    train=self._features(sets.train, self.independent),
                    test=self._features(sets.test, self.independent),
                    generated=self._features(sets.generated, self.independent),
                    c=config.c,
                    run=self._trainings("logistic regressions"),
                    **shared,
                )
            )
            self.c = cast(float, results[0].settings["c"])
        if "finetune" in names:
            results.append(
                measure_finetuned(
                    train=sets.train,
                    test=sets.test,
                    generated=sets.generated,
                    config=_of_tasks(config.finetune) if self.on_ray else config.finetune,
                    run=self._trainings("networks fine-tuned"),
                    **shared,
                )
            )
        return results

    def _trainings(self, what: str) -> Runner:
        """Side by side on Ray where it is there, else one after the other; with a bar, and kept as they finish."""
        kept = Path(self.config.cache_dir).expanduser() / KEPT

        def run(classifier: Classifier, jobs: Sequence[Job]) -> list[np.ndarray]:
            with progress(what, len(jobs), unit="trainings") as shown:
                if self.on_ray:
                    return run_on_ray(classifier, jobs, kept=kept, on_done=shown.show)
                return run_here(classifier, jobs, kept=kept, on_done=shown.show)

        return run


def _uses_ray(config: EvaluateConfig, device: str, sets: ImageSets) -> bool:
    """One connection for all parts. Small sets on one machine are done before Ray has started."""
    if config.num_actors is not None:
        return config.num_actors > 0
    if os.environ.get("RAY_ADDRESS") or (device != "cpu" and torch.cuda.device_count() > 1):
        return True
    return device == "cpu" and len(sets.train) + len(sets.generated) >= RAY_PAYS_FROM


def _of_tasks(config: FinetuneConfig) -> FinetuneConfig:
    """The same for Ray's tasks, each of which has its own share of a GPU."""
    return config if config.device is None else replace(config, device=device_of_actor(config.device))


def _guide(config: EvaluateConfig, checkpoint: Checkpoint | None, notes: list[str]) -> FeatureExtractorConfig:
    """What guided the training, where it is known and its weights are here."""
    if config.feature_extractor is not None:
        guide = config.feature_extractor
    else:
        guide = FeatureExtractorConfig()
        recorded = checkpoint.info.config.get("feature_extractor") if checkpoint else None
        if isinstance(recorded, dict):
            try:
                guide = FeatureExtractorConfig(**{**recorded, "input_size": None})
            except (M2DError, TypeError) as error:
                notes.append(
                    f"the extractor that guided the training cannot be used here ({error}); {guide.name} is taken "
                    "instead"
                )
    if extractor_identity(guide)[1] == extractor_identity(config.independent_extractor)[1]:
        raise ConfigError(
            f"independent_extractor is {config.independent_extractor.name}, the same network as feature_extractor; "
            "name another one, as efficientnet-lite1 or timm:MODEL"
        )
    return guide


def _output(config: EvaluateConfig) -> Path:
    if config.output is not None:
        return Path(config.output).expanduser()
    generated = config.generated or "."
    if "://" in generated:
        return Path("evaluation")
    return Path(generated).expanduser().absolute() / "evaluation"
