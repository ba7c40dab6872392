"""One generation run, as the command line asks for it: plan, what is missing of it, execution, report."""

import collections.abc
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch
from joblib import cpu_count
from rich.console import Console

from m2d.cluster.nodes import cluster_gpu, cluster_total, require_shared
from m2d.diffusion.feature_prior import WEAK_BELOW
from m2d.errors import ConfigError, Incomplete, M2DError
from m2d.files.paths import input_path, require_outside, result_path
from m2d.files.progress import progress, say
from m2d.generation import output, provenance, workers
from m2d.generation.gates import GatesAtWork, prepare_gates, training_images
from m2d.generation.generator import Generator, pick_device, pick_feature, require_guide, require_prior
from m2d.generation.merge import write_merged_index
from m2d.generation.output import MANIFEST_NAME, PLAN_NAME, OutputFolder, Recipe
from m2d.generation.plan import Planned, dataset_catalog, make_plan, read_plan
from m2d.generation.provenance import Signing
from m2d.generation.settings import SELF_MADE, GenerateConfig
from m2d.models.checkpoint import Checkpoint, hold_checkpoint, load_checkpoint
from m2d.models.precision import pick_precision
from m2d.models.published import checkpoint_path
from m2d.models.settings import Precision

_RAY_PAYS_FROM = 512  # images on the CPUs of one machine; starting Ray and its actors costs about 15 s
_GROUP_BYTES = 128 * 2**20  # of pixels that a group may take in memory
MERGED_NAME = "merged_index.parquet"


def generate(config: GenerateConfig) -> Path:
    """Make the images that are missing, then manifest, contact sheet and counts. Returns the output folder.

    Raises an M2DError, in one line, for what a user can fix: a checkpoint, folder, plan or device that cannot be used,
    an output folder of other settings, a disk that is full, a batch that does not fit. What was finished stays.
    Raises Incomplete, at the end, where the gates left fewer images than were asked for.
    """
    config = _absolute(config)
    signing = provenance.signing_of(config.sign, config.sign_key)
    with hold_checkpoint(config.checkpoint) as path, ExitStack() as cluster:
        config = replace(config, checkpoint=path)
        checkpoint, guide = load_checkpoint(path, "cpu"), None
        if config.guide_checkpoint is not None:
            config = replace(config, guide_checkpoint=cluster.enter_context(hold_checkpoint(config.guide_checkpoint)))
            guide = load_checkpoint(str(config.guide_checkpoint), "cpu")
            require_guide(guide, checkpoint)
        asked = config.feature or (None if config.plan is not None else config.own_feature)  # a plan decides by row
        feature = pick_feature(asked, checkpoint)
        device, precision = _device(config, cluster)
        needs_catalog = (config.plan is None and config.mode == "balance") or config.merge
        catalog = dataset_catalog(config, checkpoint.info) if needs_catalog else None
        varied = config.plan is None and config.balance_from != "noise"
        training = training_images(config, checkpoint, catalog) if varied else None
        planned = make_plan(config, feature, catalog, checkpoint.info.classes, training)
        if config.sign is not None and planned.table["view"].null_count < len(planned.table):
            raise ConfigError(
                "sign: the plan holds flipped real images, and a manifest calls all synthetic; leave it out"
            )
        if training is not None:
            say(f"images made of {len(planned.lesions):,} training lesions of {training[1]}")
        gates = prepare_gates(config, checkpoint, catalog, device)
        if "prior" in planned.features:  # a plan may ask for what the checkpoint lacks
            require_prior(checkpoint).require(planned.classes)
        recipe = Recipe.of(
            config,
            checkpoint=checkpoint.sha256,
            precision=precision,
            feature=feature,
            gates=gates.record,
            balance=planned.balance,
            plan=planned.digest,
            classes=checkpoint.info.classes.codes,
            time_shift=float(config.time_shift or checkpoint.info.time_shift),
            guide=None if guide is None else guide.sha256,
            sign=config.sign if signing is None else signing.sha256,
        )
        default = output.results_of(str(checkpoint.path)) / "generated_images" / recipe.hash
        root = Path(config.output or result_path("output", str(default)))
        if config.output is None and not output.in_experiment(str(checkpoint.path)):
            say(f"output: {root}, as the checkpoint is in no experiment; name another place by --output")
        if config.plan_only:
            if not planned.table.num_rows:
                print(f"nothing to plan: no class lacks images for --to {config.to}")
                return root
            _write_plan(root, planned.table, only=True)
            print(f"a plan of {planned.table.num_rows:,} images; run it with --plan {root / PLAN_NAME}")
            return root
        with closing(OutputFolder(root, recipe)) as folder:
            _write_plan(root, planned.table)
            run = _Run(config, checkpoint, guide, planned, gates, folder, device, precision, cluster, signing)
            lack = run.finish()
            if config.merge and config.data_root is not None:
                write_merged_index(config.data_root, catalog, root / MANIFEST_NAME, root / MERGED_NAME)
    if lack:
        raise Incomplete(f"incomplete: {lack}")
    return root


@dataclass
class _Run:
    """What a run has decided, and how it goes on from there."""

    config: GenerateConfig
    checkpoint: Checkpoint
    guide: Checkpoint | None
    planned: Planned
    gates: GatesAtWork
    folder: OutputFolder
    device: str
    precision: Precision
    cluster: ExitStack  # holds Ray's connection, once it is needed
    signing: Signing | None  # a self-made one once it is needed
    generator: Generator | None = None

    def finish(self) -> str:
        """Make what is missing and report what is there. Returns what is still missing, and why; "" for nothing."""
        folder, plan = self.folder, self.planned.table
        for line in folder.mended[:10]:
            say(f"output: {line}; it is made again")
        rounds = output.attempts_left(plan, folder.journal, self.config.gates.max_attempts if self.gates.names else 1)
        missing = sum(table.num_rows for table in rounds)
        say(
            f"generating {missing:,} of {plan.num_rows:,} images on {self.device} (precision {self.precision}, feature "
            f"{' and '.join(sorted(self.planned.features)) or 'none'}, gates {', '.join(self.gates.names) or 'off'})"
        )
        prior = self.checkpoint.prior if "prior" in self.planned.features else None
        weak = [code for code in self.planned.classes if prior is not None and code in prior.weak]
        if weak:
            say(
                f"warning: fewer than {WEAK_BELOW} training images stand behind the features of {', '.join(weak)}; "
                "look at these images before you use them (the manifest marks them feature_weak)"
            )
        if missing and self.gates.build is not None:
            self.gates.build()
        if missing and self.config.sign == SELF_MADE:
            try:
                self.signing = provenance.self_made(folder.root.absolute())
            except OSError as error:
                raise output.cannot_write(folder.root, error) from None
        began = time.monotonic()
        try:
            kept = self._make(rounds, missing)
        except BaseException:
            with suppress(M2DError):  # a disk that is full is full for the manifest too; what is done is in the journal
                folder.settle(plan)
            raise
        missing_of = folder.settle(plan)
        if not missing_of:
            provenance.forget_key(folder.root)
        new = f"{kept:,} new" + (f", {kept / (time.monotonic() - began):.1f} images/s" if kept else "")
        return self._report(new, weak, missing_of)

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
                with closing(self._results(table, attempts)) as results:
                    for result in results:
                        kept += result.kept
                        rejected.update(result.rejected)
                        shown.advance(result.kept)
        return kept

    def _results(self, table: pa.Table, attempts: int) -> collections.abc.Generator[workers.GroupResult, None, None]:
        size, features = self._group_size(), self.gates.need_features
        groups = [table.slice(first, size) for first in range(0, table.num_rows, size)]
        writer = workers.GroupWriter(
            root=self.folder.root.absolute(),
            recipe=self.folder.recipe,
            gates=self.gates.config,
            gate_reference=self.gates.reference,
            weak_classes=frozenset(self.checkpoint.prior.weak if self.checkpoint.prior else ()),
            own_images=self.gates.of_lesions(self.planned.lesions),
            signing=self.signing,
        )
        with_extractor = features or "reference" in self.planned.features
        load = partial(workers.load_generator, self.config, self.folder.recipe, self.precision, with_extractor)
        if not groups:
            return
        if not self._on_ray():
            self.generator = self.generator or load(self.device, self.checkpoint, self.gates.extractor, self.guide)
            yield from workers.make_here(self.generator, groups, attempts, writer, features=features)
            return
        _connect(self.cluster, self.config)
        read = {"checkpoint": str(self.checkpoint.path), "data_root": self.config.data_root or ""}
        read |= {"guide_checkpoint": self.config.guide_checkpoint or "", "masks": self.config.masks or ""}
        require_shared(written={"output": str(self.folder.root)}, read=read)
        pool = workers.pick_pool(self.config.num_actors, self.config.gpus_per_actor, self.device, len(groups))
        each = f"{pool.gpus:g} GPU" if pool.gpus else f"{pool.threads} CPU threads"
        say(f"attempt {attempts + 1}: images left {table.num_rows:,}, up to {pool.most} actors on Ray, {each} each")
        yield from workers.make_on_ray(load, pool, groups, attempts, writer, features=features)

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
            return cpu_count() > 1 and images >= _RAY_PAYS_FROM
        return self.config.device is None and torch.cuda.device_count() > 1

    def _group_size(self) -> int:
        """Images a group: those of a batch, or of a shard."""
        batch = self.config.batch_size
        if self.config.format == "folder":
            return batch
        in_memory = _GROUP_BYTES // (3 * self.checkpoint.image_size**2)
        return max(batch, min(self.config.shard_images, in_memory) // batch * batch)

    def _report(self, new: str, weak: list[str], missing: Counter[str]) -> str:
        # matplotlib costs a second
        from m2d.generation.contact_sheet import counts_and_rejections, what_they_are, write_pictures

        folder, plan, classes = self.folder, self.planned.table, self.checkpoint.info.classes
        rejections = folder.rejections()
        title, caption, kind = "M2D synthetic dermoscopy", f"{what_they_are(plan)}. {self._caption(weak)}", "synthetic"
        if pc.any(pc.is_valid(plan["view"])).as_py():
            title, kind = "Real images, flipped and turned", "flipped"
            caption = "Patients' images, as a control of synthetic ones."
        strips = write_pictures(folder, plan, title=title, caption=caption, classes=classes)
        made = Counter(folder.accepted["class"].to_pylist())
        counts = counts_and_rejections(self.planned.before, made, rejections, missing, classes, kind)
        Console(file=sys.stdout).print(counts)
        if not plan.num_rows:
            print(f"nothing to make: no class lacks images for --to {self.config.to}; {MANIFEST_NAME} in {folder.root}")
            return ""
        lost = missing.total()
        earlier = made.total() - (plan.num_rows - lost)
        new += f"; {earlier:,} others are from earlier runs" if earlier else ""
        print(
            f"{plan.num_rows - lost:,} images ({new}), {MANIFEST_NAME} and contact_sheet.png"
            f"{f', {strips} strips' if strips else ''} in {folder.root}",
            flush=True,
        )
        if not missing:
            return ""
        reasons = {
            code: [f"{why} {n}" for (of, why), n in sorted(rejections.items()) if of == code] for code in missing
        }
        each = [f"{code} {missing[code]} ({', '.join(reasons[code])})" for code in missing]
        other = "look at the gates' settings"
        if self.config.mode == "image2image" and any(why == "near_copy" for _, why in rejections):
            other = "vary training images by --mode balance --balance_from real, which spares an image's own lesion"
        return (
            f"{lost:,} of {plan.num_rows:,} images are missing, rejected {self.config.gates.max_attempts} times each: "
            f"{', '.join(each)}; raise --gates.max_attempts, or {other}"
        )

    def _caption(self, weak: list[str]) -> str:
        checkpoint, recipe = self.checkpoint, self.folder.recipe
        guided = {
            "none": "the class alone, no feature",
            "reference": "features of the reference images",
            "prior": f"features drawn from the class prior at temperature {recipe.feature_temperature or 0:g}"
            + (f" (few images of {', '.join(weak)})" if weak else ""),
        }
        low, high = recipe.guidance_interval
        shift = "" if recipe.time_shift == 1 else f" shifted by {recipe.time_shift:g}"
        away = "" if self.guide is None else f", away from step {self.guide.step:,}"
        how = (
            f"{recipe.solver}, {recipe.steps} steps{shift}; guidance {recipe.guidance_scale:g} at t in "
            f"[{low:g}, {high:g}]{away}; {guided[recipe.feature]}; seed {recipe.seed}"
        )
        return (
            f"Checkpoint {checkpoint.sha256[:12]}, step {checkpoint.step:,}; "
            f"{'rows of a plan' if self.config.plan else how}; {checkpoint.image_size} x {checkpoint.image_size} px."
        )


def _absolute(config: GenerateConfig) -> GenerateConfig:
    """Ray's processes may start in another directory, so local paths become absolute here."""
    names = ["init_images", "masks", "reference_images", "reference_images_b", "data_root", "catalog", "plan"]
    names += ["extractor_weights", "sign_key"] + ["sign"] * (config.sign != SELF_MADE)
    places = {name: input_path(name, getattr(config, name)) for name in names}
    places["checkpoint"] = checkpoint_path("checkpoint", config.checkpoint)
    places["guide_checkpoint"] = checkpoint_path("guide_checkpoint", config.guide_checkpoint)
    places["output"] = result_path("output", config.output)
    require_outside(places["data_root"], output=places["output"])
    local = {name: place for name, place in places.items() if place is not None and "://" not in place}
    return replace(config, **{name: os.path.abspath(os.path.expanduser(place)) for name, place in local.items()})


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

    joined = bool(os.environ.get("RAY_ADDRESS"))
    actors = config.num_actors or cpu_count()
    # A cluster of our own gets room for a writer beside the actors; a given one is taken as it is.
    cluster.enter_context(ray_cluster(verbose=config.verbose, min_cpus=1.0 if joined else actors + workers.WRITER_CPUS))


def _write_plan(root: Path, plan: pa.Table, *, only: bool = False) -> None:
    """plan.parquet, for a person to read. One that was edited and not run yet is not thrown away.

    only: nothing is run after it; then the plan of what was made here is not replaced by another one either.
    """
    path = root / PLAN_NAME
    begun = any((root / name).exists() for name in (output.PARTS, output.JOURNAL_NAME))
    another = False
    if path.exists() and (only or not begun):
        with suppress(ConfigError):
            another = not read_plan(path).equals(plan)
    if another:
        why = "images here were made by it" if begun else "was it edited?"
        raise ConfigError(
            f"output: {path} is not the plan of these settings ({why}); run it with --plan {path}, delete it, "
            "or name another --output"
        )
    output.write_rows(path, plan)
