"""One generation run, as the command line asks for it: plan, what is missing of it, execution, report."""

import collections.abc
import os
import sys
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from m2d.cluster.nodes import cluster_gpu, cluster_total, require_shared
from m2d.diffusion.feature_prior import WEAK_BELOW
from m2d.errors import ConfigError, M2DError
from m2d.files.paths import input_path, result_path
from m2d.files.progress import progress, say
from m2d.generation.formats import FORMATS
from m2d.generation.gate_training import GatesAtWork, prepare_gates
from m2d.generation.generator import Generator, pick_device, pick_feature
from m2d.generation.group import GeneratorSettings, GroupResult, GroupWriter, PlanGroups
from m2d.generation.journal import JOURNAL_NAME, PARTS, attempts_left
from m2d.generation.local import make_here
from m2d.generation.outputs import MANIFEST_NAME, PLAN_NAME, OutputFolder
from m2d.generation.plan import read_plan, write_plan
from m2d.generation.planning import Planned, dataset_catalog, make_plan
from m2d.generation.recipe import Recipe, default_output
from m2d.generation.references import load_reference_extractor
from m2d.generation.settings import Feature, GenerateConfig
from m2d.generation.summary import counts_and_rejections, missing_by_class, missing_text, write_sheet, write_strips
from m2d.models.checkpoint import Checkpoint, load_checkpoint
from m2d.models.extractors import FeatureExtractor
from m2d.models.precision import pick_precision
from m2d.models.settings import Precision

_RAY_PAYS_FROM = 512  # images on the CPUs of one machine; starting Ray and its actors costs about 15 s
_GROUP_BYTES = 128 * 2**20  # of pixels that a group may take in memory
MERGED_NAME = "merged_index.parquet"


def generate(config: GenerateConfig) -> Path:
    """Make the images that are missing, then manifest, contact sheet and counts. Returns the output folder.

    Raises an M2DError, in one line, for what a user can mend: a checkpoint, folder, plan or device that cannot be used,
    an output folder of other settings, a disk that is full, a batch that does not fit. What was finished stays.
    """
    config = _absolute(config)
    checkpoint = load_checkpoint(config.checkpoint, "cpu")
    feature = _feature(config, checkpoint)
    with ExitStack() as cluster:
        device, precision = _device(config, cluster)
        catalog = dataset_catalog(config, checkpoint.info) if _needs_catalog(config) else None
        planned = make_plan(config, feature, catalog)
        gates = prepare_gates(config, checkpoint, catalog, device)
        if "prior" in planned.features:
            if checkpoint.prior is None:
                pick_feature("prior", checkpoint)  # a plan asks for what the checkpoint lacks
            else:
                checkpoint.prior.require(planned.classes)
        recipe = Recipe.of(
            config,
            checkpoint_sha256=checkpoint.sha256,
            precision=precision,
            feature=feature,
            gates=gates.record,
            balance=planned.balance,
            plan=planned.digest,
        )
        root = Path(config.output or result_path("output", str(default_output(str(checkpoint.path), recipe))))
        if config.plan_only:
            _write_plan(root, planned.table)
            print(f"a plan of {planned.table.num_rows:,} images; run it with --plan {root / PLAN_NAME}")
            return root
        with OutputFolder.open(root, recipe) as folder:
            _write_plan(root, planned.table)
            run = _Run(config, checkpoint, planned, gates, folder, device, precision, cluster)
            run.finish()
            _merge(config, folder, catalog)
    return root


@dataclass
class _Run:
    """What a run has decided, and how it goes on from there."""

    config: GenerateConfig
    checkpoint: Checkpoint
    planned: Planned
    gates: GatesAtWork
    folder: OutputFolder
    device: str
    precision: Precision
    cluster: ExitStack  # holds Ray's connection, once somebody asked for it
    generator: Generator | None = None

    def finish(self) -> None:
        """Make what is missing and tell what is there."""
        folder, plan = self.folder, self.planned.table
        for line in folder.mended[:10]:
            say(f"output: {line}; it is made again")
        max_attempts = self.config.gates.max_attempts if self.gates.names else 1
        rounds = attempts_left(plan, folder.journal, max_attempts)
        missing = sum(table.num_rows for table in rounds)
        say(
            f"generating {missing:,} of {plan.num_rows:,} images on {self.device} (precision {self.precision}, feature "
            f"{' and '.join(sorted(self.planned.features)) or 'none'}, gates {self.gates.text})"
        )
        weak = self._weak_classes()
        if weak:
            say(
                f"warning: fewer than {WEAK_BELOW} training images stand behind the features of {', '.join(weak)}; "
                "look at these images before you use them (the manifest marks them feature_weak)"
            )
        if missing and self.gates.build is not None:
            self.gates.build()
        began = time.monotonic()
        try:
            kept = self._make(rounds, missing)
        except BaseException:
            with suppress(M2DError):  # a disk that is full is full for the manifest too; what is done is in the journal
                folder.settle()
            raise
        seconds = time.monotonic() - began
        folder.settle()
        self._report(kept, seconds, weak)

    def _make(self, rounds: list[pa.Table], missing: int) -> int:
        """Round k makes attempt k of all rows that need it; returns how many images were kept."""
        kept, rejected = 0, set[str]()
        with progress("generating", missing) as shown:
            for attempts, waiting in enumerate(rounds):
                table = waiting
                if rejected:  # in the plan's order, so that an interrupted run goes on with the same groups
                    ids = pa.array(rejected.union(waiting["id"].to_pylist()), pa.string())
                    table = self.planned.table.filter(pc.is_in(self.planned.table["id"], ids))
                rejected = set()
                if not table.num_rows:
                    continue
                groups = PlanGroups(table, attempts, self._group_size())
                with closing(self._results(groups)) as results:
                    for result in results:
                        images = sum(result.kept.values())
                        kept += images
                        rejected.update(result.rejected)
                        shown.advance(images)
        return kept

    def _results(self, groups: PlanGroups) -> collections.abc.Generator[GroupResult, None, None]:
        writer = GroupWriter(
            root=self.folder.root.absolute(),
            format=self.config.format,
            settings=self.folder.recipe.to_json(),
            checkpoint=self.checkpoint.sha256,
            precision=self.precision,
            gates=self.gates.config,
            gate_reference=self.gates.reference,
            weak_classes=frozenset(self.checkpoint.prior.weak if self.checkpoint.prior else ()),
        )
        if not self._on_ray():
            if self.generator is None:
                self.generator = Generator(
                    self.checkpoint,
                    batch_size=self.config.batch_size,
                    device=self.device,
                    mixed_precision=self.precision,
                    extractor=self._extractor(),
                    compile=self.config.compile,
                    compile_mode=self.config.compile_mode,
                )
            yield from make_here(self.generator, groups, writer, features=self.gates.need_features)
            return
        from m2d.generation.bulk import make_on_ray, pick_pool

        _connect(self.cluster, self.config)
        read = {"checkpoint": str(self.checkpoint.path), "data_root": self.config.data_root or ""}
        require_shared(written={"output": str(self.folder.root)}, read=read)
        pool = pick_pool(
            num_actors=self.config.num_actors,
            gpus_per_actor=self.config.gpus_per_actor,
            device=self.device,
            groups=len(groups),
        )
        say(f"attempt {groups.attempts + 1}: images left {groups.plan.num_rows:,}, {pool.text}")
        settings = GeneratorSettings(
            checkpoint=self.checkpoint.path,
            sha256=self.checkpoint.sha256,
            batch_size=self.config.batch_size,
            mixed_precision=self.precision,
            compile=self.config.compile,
            compile_mode=self.config.compile_mode,
            with_extractor=self._needs_extractor(),
            extractor_weights=self.config.extractor_weights,
        )
        yield from make_on_ray(settings, pool, groups, writer, features=self.gates.need_features)

    def _on_ray(self) -> bool:
        """Whether actors make the images. The same for a run that goes on as for one that begins: by the whole plan."""
        asked, images = self.config.num_actors, self.planned.table.num_rows
        if asked is not None:
            return asked > 0
        if self.device != "cpu" and not torch.cuda.is_available():
            return True  # the GPUs are those of other machines
        if images <= self._group_size():
            return False
        if os.environ.get("RAY_ADDRESS") or self.config.gpus_per_actor is not None:
            return True
        if self.device == "cpu":
            return (os.cpu_count() or 1) > 1 and images >= _RAY_PAYS_FROM
        return self.config.device is None and torch.cuda.device_count() > 1

    def _group_size(self) -> int:
        """Images a group: those of a batch, or of a shard."""
        batch = self.config.batch_size
        if not FORMATS[self.config.format].sharded:
            return batch
        in_memory = _GROUP_BYTES // (3 * self.checkpoint.image_size**2)
        return max(batch, min(self.config.shard_images, in_memory) // batch * batch)

    def _needs_extractor(self) -> bool:
        return self.gates.need_features or "reference" in self.planned.features

    def _extractor(self) -> FeatureExtractor | None:
        if not self._needs_extractor():
            return None
        return self.gates.extractor or load_reference_extractor(self.checkpoint, self.config.extractor_weights)

    def _weak_classes(self) -> list[str]:
        if self.checkpoint.prior is None or "prior" not in self.planned.features:
            return []
        weak = self.checkpoint.prior.weak
        return [code for code in self.planned.classes if code in weak]

    def _report(self, kept: int, seconds: float, weak: list[str]) -> None:
        folder, plan = self.folder, self.planned.table
        rejections = folder.rejections()
        missing = missing_by_class(plan, folder.accepted["id"].to_pylist())
        write_sheet(folder, plan, title="M2D synthetic dermoscopy", caption=self._caption(weak))
        strips = write_strips(folder, plan)
        Console(file=sys.stdout).print(counts_and_rejections(self.planned.before, folder.made(), rejections, missing))
        if missing:
            say(
                f"warning: {sum(missing.values()):,} of {plan.num_rows:,} images are missing, rejected "
                f"{self.config.gates.max_attempts} times each: {missing_text(missing, rejections)}; raise "
                "--gates.max_attempts, or look at the gates' settings"
            )
        there = plan.num_rows - sum(missing.values())
        speed = f", {kept / seconds:.1f} images/s" if kept else ""
        more = f", {strips} strips" if strips else ""
        print(
            f"{there:,} images ({kept:,} new{speed}), {MANIFEST_NAME} and contact_sheet.png{more} in {folder.root}",
            flush=True,
        )

    def _caption(self, weak: list[str]) -> str:
        checkpoint, recipe = self.checkpoint, self.folder.recipe
        how = (
            "rows of a plan"
            if self.config.plan
            else f"{recipe.solver}, {recipe.steps} steps; guidance {recipe.guidance_scale:g} at t in "
            f"[{recipe.guidance_interval[0]:g}, {recipe.guidance_interval[1]:g}]; "
            f"{_feature_text(recipe, weak)}; seed {recipe.seed}"
        )
        return (
            f"Synthetic images, not patients. Checkpoint {checkpoint.sha256[:12]}, step {checkpoint.step:,}; "
            f"{how}; {checkpoint.image_size} x {checkpoint.image_size} px."
        )


def _absolute(config: GenerateConfig) -> GenerateConfig:
    """Ray's processes may start in another directory, so local paths become absolute here."""
    names = ("checkpoint", "init_images", "reference_images", "reference_images_b", "data_root", "catalog", "plan")
    given: dict[str, str | None] = {
        name: input_path(name, getattr(config, name)) for name in (*names, "extractor_weights")
    }
    given["output"] = result_path("output", config.output)
    places = {
        name: os.path.abspath(os.path.expanduser(place))
        for name, place in given.items()
        if place is not None and "://" not in place
    }
    return replace(config, **places)  # type: ignore[arg-type]


def _feature(config: GenerateConfig, checkpoint: Checkpoint) -> Feature:
    """What guides the images, decided; a plan decides for each row by itself."""
    if config.plan is None and config.feature is None and config.mode in ("image2image", "interpolate"):
        return "reference"
    return pick_feature(config.feature, checkpoint)


def _device(config: GenerateConfig, cluster: ExitStack) -> tuple[str, Precision]:
    """Where images are made, and in which precision; on a cluster the GPUs of its nodes count, not the driver's."""
    elsewhere = bool(os.environ.get("RAY_ADDRESS")) and config.num_actors != 0
    if elsewhere and config.device in (None, "cuda") and not torch.cuda.is_available():
        _connect(cluster, config)
        if cluster_total("GPU"):
            return "cuda", config.mixed_precision or cluster_gpu().precision
    device = pick_device(config.device)
    return str(device), pick_precision(config.mixed_precision, device)


def _connect(cluster: ExitStack, config: GenerateConfig) -> None:
    """To Ray, once a run."""
    from m2d.cluster.start import ray_cluster
    from m2d.generation.bulk import WRITER_CPUS

    joined = bool(os.environ.get("RAY_ADDRESS"))
    actors = config.num_actors or os.cpu_count() or 1
    # A cluster of our own gets room for a writer beside the actors; a given one is taken as it is.
    cluster.enter_context(ray_cluster(verbose=config.verbose, min_cpus=1.0 if joined else actors + WRITER_CPUS))


def _needs_catalog(config: GenerateConfig) -> bool:
    return (config.plan is None and config.mode == "balance") or config.merge


def _write_plan(root: Path, plan: pa.Table) -> None:
    """plan.parquet, for a person to read. One that somebody edited and did not run yet is not thrown away."""
    path = root / PLAN_NAME
    if path.exists() and not (root / PARTS).exists() and not (root / JOURNAL_NAME).exists():
        try:
            edited = not read_plan(path).equals(plan)
        except ConfigError:
            edited = False
        if edited:
            raise ConfigError(
                f"output: {path} is not the plan of these settings (was it edited?); run it with --plan {path}, "
                "delete it, or name another --output"
            )
    write_plan(plan, path)


def _merge(config: GenerateConfig, folder: OutputFolder, catalog: pa.Table | None) -> None:
    if not config.merge:
        return
    from m2d.generation.merge import write_merged_index

    assert config.data_root is not None, "settings have seen to it"
    assert catalog is not None, "merge reads the catalog"
    merged = write_merged_index(config.data_root, catalog, folder.root / MANIFEST_NAME, folder.root / MERGED_NAME)
    left_out = f", {len(merged.left_out)} made from val or test images left out" if merged.left_out else ""
    print(
        f"{sum(merged.real.values()):,} real and {sum(merged.synthetic.values()):,} synthetic images{left_out} in "
        f"{merged.parquet}"
    )


def _feature_text(recipe: Recipe, weak: list[str]) -> str:
    if recipe.feature == "none":
        return "the class alone, no feature"
    if recipe.feature == "reference":
        return "features of the reference images"
    rough = f" (few images of {', '.join(weak)})" if weak else ""
    return f"features drawn from the class prior at temperature {recipe.feature_temperature:g}{rough}"
