"""Which images an evaluation compares: real training images, unseen real ones, generated ones; decoded to one size.

Every part (fidelity, memorization, downstream, consistency, privacy) is a function of the ImageSet and FeatureSet
defined here.
"""

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from m2d.classes import ISIC7, ClassSet, named_class_set
from m2d.data.catalog import classes_of, read_catalog, said_of, scan_dataset
from m2d.data.decode import decode_resized, probe_image
from m2d.data.layouts import read_layout
from m2d.data.reader import decode_unchanged
from m2d.data.settings import DataConfig
from m2d.data.store import prepared_folder, reusable_catalog
from m2d.errors import CheckpointError, ConfigError, DataError
from m2d.evaluation.provenance import METADATA_NAME, made_from_others, rows_beside
from m2d.evaluation.settings import EvaluateConfig
from m2d.files.atomic import cache_file
from m2d.files.progress import progress
from m2d.files.storage import inside, open_storage
from m2d.generation.gates import unit_view
from m2d.generation.output import MANIFEST_NAME, PARTS, RECORD_NAME, experiment_of
from m2d.generation.plan import data_config_of
from m2d.generation.references import read_references
from m2d.metrics.neighbours import NEAR_DUPLICATE, near_duplicates, nearest_in_views, thumbnails
from m2d.models.autoencoder import coded_at_once, from_uint8, to_uint8
from m2d.models.checkpoint import Checkpoint, read_info

NAMED = 3  # of shared lesions or unreadable files
PIXELS = "evaluation_v1/pixels"  # in the cache folder; the number goes up when the way from a file to pixels changes
CONTACT_SHEET = "contact_sheet.png"  # lies beside the class folders of m2d's own runs
RECONSTRUCTED_AT_ONCE = 32
VIEWS = 8  # of m2d.data.views: flips and quarter turns
_IMAGES_AT_ONCE = 256
_SHAPES = 3
_THREADS = 16

# Images as unit vectors, one function for each view in which they are known: rows -> float32 [len(rows), D].
Views = Sequence[Callable[[slice | np.ndarray], torch.Tensor]]
ALL_ROWS = slice(None)


Images = TypeVar("Images", bound="ImageSet")


class Unanswerable(DataError):
    """A question that these images cannot answer; others can be."""


@dataclass(frozen=True)
class Copy:
    """A generated image that is, or nearly is, a real image which is no training image."""

    generated: str  # path
    real: str
    distance: float | None  # of the thumbnails, see NEAR_DUPLICATE; None: the same file


@dataclass(frozen=True)
class ImageSet:
    """Images that were decoded to one size. N images of S x S pixels."""

    name: str  # train, test, generated, reconstructions: as the report calls it
    source: str  # where from, in words
    sha256: tuple[str, ...]  # N; of the file's bytes, or of the pixels where there is no file
    paths: tuple[str, ...]  # N; as a person finds the file
    labels: np.ndarray  # int64 [N], index into the codes of `classes`
    # object [N]; equal values are one lesion; a generated image is a group of its own, or of the lesion that it varies
    groups: np.ndarray
    pixels: np.ndarray  # uint8 [N, S, S, 3], perhaps mapped from a file: take rows, never all at once
    classes: ClassSet = ISIC7  # of the real training images, the same on every side
    copies: tuple[Copy, ...] = ()  # of generated images
    skins: np.ndarray | None = None  # object [N]; of generated images the lesion whose skin each took, "" for none

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> int:
        """S."""
        return int(self.pixels.shape[1])

    @property
    def counts(self) -> dict[str, int]:
        """Images of each class that has some, in the order of the set."""
        return class_counts(self.labels, self.classes)

    def rows(self, label: int) -> np.ndarray:
        """Row numbers of a class, int64 [n]."""
        return np.flatnonzero(self.labels == label)

    @property
    def summary(self) -> dict[str, Any]:
        """For evaluation.json."""
        lesions = lesion_counts(self.labels, self.groups, self.classes)
        return {"name": self.name, "source": self.source, "images": self.counts, "lesions": lesions}


@dataclass(frozen=True, kw_only=True)
class FeatureSet(ImageSet):
    """Images with the `cls` features of one extractor."""

    extractor: str  # m2d.models.extractors.base.FeatureExtractor.key
    cls: np.ndarray  # float32 [N, D], as the extractor gives them: not standardised


@dataclass(frozen=True)
class Listed:
    """Images that are known and not yet decoded."""

    name: str
    source: str
    root: str  # of the paths: a folder or a URI
    rows: pa.Table  # a row each: path (relative to root), sha256, label (class code), lesion_id; perhaps more
    classes: ClassSet = ISIC7

    def __getitem__(self, column: str) -> list[str]:
        return self.rows[column].to_pylist()

    def where(self, kept: np.ndarray) -> "Listed":
        """Those of a mask, bool [N]."""
        return replace(self, rows=self.rows.filter(pa.array(kept)))

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 [N]."""
        return np.array([self.classes.index(code) for code in self["label"]], dtype=np.int64)

    @property
    def fields(self) -> dict[str, Any]:
        """Those of an ImageSet but for the pixels."""
        paths, groups = tuple(inside(self.root, path) for path in self["path"]), np.array(self["lesion_id"], object)
        own = {"name": self.name, "source": self.source, "classes": self.classes, "sha256": tuple(self["sha256"])}
        return {**own, "paths": paths, "labels": self.labels, "groups": groups}


def together(*sets: Images) -> Images:
    """The images of several sets, one after the other: of feature sets the features, of others the pixels."""
    if len(sets) == 1:
        return sets[0]
    columns = ("labels", "groups", "cls" if isinstance(sets[0], FeatureSet) else "pixels")
    joined: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in sets]) for name in columns}
    joined |= {name: tuple(chain(*(getattr(one, name) for one in sets))) for name in ("sha256", "paths")}
    return replace(sets[-1], **joined)


def class_counts(labels: np.ndarray, classes: ClassSet) -> dict[str, int]:
    """Images of each class that has some, from class indices int64 [N]."""
    counted = np.bincount(labels, minlength=len(classes))
    return {code: int(n) for code, n in zip(classes.codes, counted, strict=True) if n}


def lesion_counts(labels: np.ndarray, groups: np.ndarray, classes: ClassSet) -> dict[str, int]:
    """Lesions of each class that has images."""
    return {code: len(set(groups[labels == classes.index(code)].tolist())) for code in class_counts(labels, classes)}


# --- listing --------------------------------------------------------------------------------------------------------


def read_image_sets(config: EvaluateConfig, checkpoint: Checkpoint | None, notes: list[str]) -> dict[str, ImageSet]:
    """List, check and decode: train, test (real, unseen: see below) and generated.

    With folds also `tested`, the images of all lesions that the generator has not seen, and `known`, the others, where
    there are some. For a site the training split is never among the first, for it counts as the generator's where no
    checkpoint is known, and generated images that started from others than training images are left out.

    checkpoint: the one that made the images, where it is known. notes: gain a line for what is left out, and the like.
    A test lesion is left out where the generator, or a checkpoint that its training started from, has seen it: a file
    or a lesion of the train split of their own catalogs, wherever the data lies now; and where one of its images looks
    the same as a training image. Raises ConfigError or DataError in one line: a folder that cannot be
    used, classes that no real image has, lesions or images on both sides, no test image left.
    """
    real, generated_root = class_folder(config.real, "real"), class_folder(config.generated, "generated")
    _require_one_run(generated_root)
    data = config.data or (data_config_of(checkpoint.info) if checkpoint else DataConfig())
    catalogs = _catalogs_of(checkpoint, notes) if checkpoint else {}
    train, test, whole, files = _real_sides(config, real, data, checkpoint, catalogs, notes)
    check_apart(train, test, "real")
    test = _unseen(test, catalogs.values(), notes)
    generated = _generated(generated_root, data, train.classes, notes)
    if config.setting == "site":
        generated = _of_training_images(generated, train, catalogs.values(), notes)
    known, made = (list(class_counts(side.labels, side.classes)) for side in (train, generated))
    if unknown := [code for code in made if code not in known]:
        raise DataError(
            f"generated: {generated.source} holds images of {' '.join(unknown)}, the real training images are of "
            f"{' '.join(known)}; leave those folders out, or name real images of all classes"
        )
    if lacking := [code for code in known if code not in made]:
        notes.append(f"no generated image of {' '.join(lacking)}: these classes keep their real images alone")
    size = config.image_size
    if size is None:  # the shorter side of the first image; a generator makes all of one size
        filesystem, root = open_storage(generated.root)
        with filesystem.open_input_file(posixpath.join(root, generated["path"][0])) as file:
            size = min(probe_image(file.read(), max_pixels=data.max_pixels))
    # Many a pipeline stretches photographs to squares: those of the commonest shapes are told by it too.
    ratios = Counter(round(row["width"] / row["height"], 2) for row in test.rows.to_pylist())
    shapes = [1.0, *(ratio for ratio, _ in ratios.most_common(_SHAPES) if ratio != 1)]
    decode = partial(_decode, size=size, cache_dir=config.cache_dir, max_pixels=data.max_pixels, notes=notes)
    sets = {side.name: decode(side) for side in (train, test, generated)}

    def unlike(side: Listed, images: ImageSet, trained: ImageSet) -> ImageSet:
        alike = near_copies(images, trained)[0] >= 0
        twins = np.isin(side["sha256"], np.array(images.sha256)[alike])
        return decode(_without(side, twins, "look the same as training images", notes)) if alike.any() else images

    sets["test"] = unlike(test, sets["test"], sets["train"])
    trained: ImageSet | None = sets["train"]
    tested = sets["test"]
    if config.fold_count > 1:
        if whole is not None:
            left = _unseen(whole, catalogs.values(), notes)
            if (checkpoint or config.setting == "site") and not catalogs:
                split = np.array(whole["split"]) == "train"
                left = _without(whole, split, "may have been trained on by the generator", notes)
            left = replace(left, name="tested")
            seen = replace(whole, name="known").where(~np.isin(whole["path"], left["path"]))
            trained, tested = decode(seen) if len(seen.rows) else None, decode(left)
            tested = unlike(left, tested, trained) if trained else tested
        sets |= {"tested": _one_lesion_if_alike(tested)} | ({"known": trained} if trained else {})
    lesions = [*test["lesion_id"], *(str(lesion) for lesion in tested.groups)]
    of_tests = np.isin(generated["lesion_id"], lesions) | np.isin(generated["skin_lesion_id"], lesions)
    if of_tests.any():
        generated = generated.where(~of_tests)
        if not len(generated.rows):
            raise DataError(f"generated: all images of {generated.root} are variations of lesions that are tested")
        notes.append(f"left out {of_tests.sum():,} generated images, variations of lesions that are tested")
        sets["generated"] = decode(generated)
    copies = _copies(trained, tested, sets["generated"], shapes, files, notes)
    sets["generated"] = replace(sets["generated"], copies=copies)
    return sets


def _one_lesion_if_alike(images: ImageSet) -> ImageSet:
    """Lesions with images that look the same are one, so that no fold parts them."""
    names, lesion = np.unique(images.groups.astype(str), return_inverse=True)
    views = thumbnail_views(images)
    pairs = np.array(near_duplicates((view(ALL_ROWS) for view in views), views[0](ALL_ROWS)), np.int64).reshape(-1, 2)
    links = coo_array((np.ones(len(pairs)), tuple(lesion[pairs].T)), shape=(len(names), len(names)))
    joined = connected_components(links, directed=False)[1]
    _, first = np.unique(joined, return_index=True)
    return replace(images, groups=names[first][joined[lesion]].astype(object))


def class_folder(folder: str | None, setting: str) -> str:
    """A place of class folders that a setting names. Raises ConfigError for none, or for a path that is no folder."""
    if folder is None:
        raise ConfigError(f"{setting} is not set; name the folder that holds the class folders by --{setting}")
    if "://" not in folder and not Path(folder).expanduser().is_dir():
        raise ConfigError(f"{setting}: {folder} is not a folder; name the one that holds the class folders")
    return os.path.expanduser(folder)


def catalog_of(
    root: str,
    data: DataConfig,
    cache_dir: str,
    notes: list[str],
    classes: ClassSet | None = None,
    whose: str = "the checkpoint",
) -> pa.Table:
    """That of setup_data where it is still right, otherwise of a new scan; what was left out goes to the notes.

    classes: the set that the other side is of, and whose it is; None: the data's own. Raises DataError where the images
    here are of another set.
    """
    prepared = reusable_catalog(prepared_folder(cache_dir, root), root, data)
    if prepared is not None and (classes is None or classes_of(prepared).codes == classes.codes):
        return prepared
    try:
        with progress(f"scanning {root}") as shown:
            scan = scan_dataset(root, data, shown.show, classes)
    except DataError:
        if classes is not None:  # which is found by names and tables alone
            require_same(read_layout(*open_storage(root), root, data).classes, root, classes, whose)
        raise
    notes += _left_out([(row["path"], row["reason"]) for row in scan.rejected.to_pylist()], f"files of {root}")
    return scan.catalog


def require_same(own: ClassSet, place: str, other: ClassSet, whose: str) -> None:
    """Raises DataError where two sides are of different sets of classes."""
    if own.codes != other.codes:
        raise DataError(
            f"classes: {place} is of {own.name} ({' '.join(own.codes)}), {whose} of {other.name} "
            f"({' '.join(other.codes)}); name images of one set on every side, or map theirs with --data.class_map"
        )


def unknown_lesions(*catalogs: pa.Table) -> list[str]:
    """The line that says so where no table named the lesions, for every report that rests on the split."""
    said = [line for catalog in catalogs for line in said_of(catalog) if line.startswith("lesions: no table")]
    return list(dict.fromkeys(said))


def check_apart(train: Listed, test: Listed, setting: str) -> None:
    """A lesion seen in training is recognised, not diagnosed: a score on it says nothing about new patients."""
    for what, column in (("lesion", "lesion_id"), ("image", "sha256")):
        shared = sorted(set(train[column]) & set(test[column]))
        if shared:
            names = ", ".join(text[:16] for text in shared[:NAMED]) + (", ..." if len(shared) > NAMED else "")
            many = len(shared) > 1
            raise DataError(
                f"{setting}: {len(shared):,} {what}{'s' if many else ''} of the test images ({test.source}) "
                f"{'are' if many else 'is'} among the training images ({train.source}) too: {names}; leave them out of "
                "one"
            )


def trained_on(checkpoint: Checkpoint) -> set[str] | None:
    """The sha256 of what its run, and those whose checkpoints that started from, trained on; None: not known."""
    catalogs = _catalogs_of(checkpoint, []).values()
    return {sha256 for one in catalogs for sha256 in _of_split(one, "train", "sha256")} if catalogs else None


def _of_split(catalog: pa.Table, split: str, column: str) -> list[str]:
    return catalog.filter(pc.equal(catalog["split"], split))[column].to_pylist()


def _catalogs_of(checkpoint: Checkpoint, notes: list[str]) -> dict[Path, pa.Table]:
    """By file, of the run that wrote the checkpoint and of those whose checkpoints that one started from."""
    found, place, config = {}, checkpoint.path, checkpoint.info.config
    while place:
        file = Path(experiment_of(place), "cache", "catalog.parquet")
        if file.is_file():
            found[file] = read_catalog(str(file))
        else:
            notes.append(f"whether the generator saw the test images is not known: {file} is not there")
        place, config = str(config.get("init_checkpoint") or ""), {}
        with suppress(CheckpointError):  # it is gone; where its run's catalog is not, that is read all the same
            config = read_info(place).config if place else {}
    return found


def _unseen(test: Listed, catalogs: Iterable[pa.Table], notes: list[str]) -> Listed:
    """Without what the runs of these catalogs trained on; of what they only chose a checkpoint by, a note tells."""
    seen = {split: np.zeros(len(test.rows), dtype=bool) for split in ("train", "val")}
    for catalog in catalogs:
        # Without a table a lesion is called as its file, and files of two datasets may have one name.
        for column in ("sha256",) if unknown_lesions(catalog, test.rows) else ("sha256", "lesion_id"):
            for split, mask in seen.items():
                mask |= np.isin(test[column], _of_split(catalog, split, column))
    if validated := np.count_nonzero(seen["val"] & ~seen["train"]):
        notes.append(
            f"the generator's training chose its best checkpoint by {validated:,} of {len(test.rows):,} test images"
        )
    return _without(test, seen["train"], "were trained on by the generator (the catalog of its run)", notes)


def _without(test: Listed, seen: np.ndarray, why: str, notes: list[str]) -> Listed:
    """Without the lesions of which an image was seen: bool [N]. Raises DataError where no image is left."""
    lesions = np.array(test["lesion_id"])
    gone = np.isin(lesions, lesions[seen])
    if not gone.any():
        return test
    left = test.where(~gone)
    if not len(left.rows):
        raise DataError(
            f"real: none of {len(gone):,} test images ({test.source}) is unseen, for they, or others of their lesions, "
            f"{why}; name other images by --real"
        )
    lost = [code for code in class_counts(test.labels, test.classes) if code not in left["label"]]
    notes.append(
        f"left out {gone.sum():,} of {len(gone):,} test images, for they, or others of their lesions, {why}"
        + (f"; none of {' '.join(lost)} is left" if lost else "")
    )
    return left


def _of_training_images(generated: Listed, train: Listed, catalogs: Iterable[pa.Table], notes: list[str]) -> Listed:
    """Without what was made from real images that the generator was not trained on. Raises DataError for none left."""
    trained = {*train["sha256"], *(sha256 for one in catalogs for sha256 in _of_split(one, "train", "sha256"))}
    foreign = made_from_others(generated.root, generated["sha256"], trained)
    if not foreign.any():
        return generated
    first = generated["path"][int(foreign.argmax())]
    what = (
        f"{foreign.sum():,} of {len(foreign):,} generated images, {first} for one, were made from real images that the "
        "generator was not trained on; a site or its test may hold their lesions"
    )
    if foreign.all():
        raise DataError(f"generated: {what}; generate from training images, or without input images")
    notes.append(f"left out {what}")
    return generated.where(~foreign)


def _copies(
    train: ImageSet | None,
    test: ImageSet,
    generated: ImageSet,
    shapes: Sequence[float],
    files: Mapping[str, str],
    notes: list[str],
) -> tuple[Copy, ...]:
    """Of real images that are not in training: any file of `files` (sha256 -> path), any look of a test image.

    Looks of training images are for m2d.evaluation.memorization; here their files are counted.
    """
    rows, distances = near_copies(generated, test, shapes)
    trained, found = set(train.sha256 if train else ()), []
    for path, sha256, row, distance in zip(generated.paths, generated.sha256, rows.tolist(), distances.tolist()):
        if sha256 in files and sha256 not in trained:
            found.append(Copy(path, files[sha256], None))
        elif row >= 0:
            found.append(Copy(path, test.paths[row], distance))
    if found:
        first = f"{found[0].generated} of {found[0].real}"
        notes.append(
            f"{len(found):,} of {len(generated):,} generated images are copies of unseen real images, as the same file "
            f"or by their look, {first} for one; copies.csv names all, and whether they help cannot be said"
        )
    if same := sum(sha256 in trained for sha256 in generated.sha256):
        notes.append(f"{same:,} of {len(generated):,} generated images are training images, byte for byte")
    return tuple(found)


def near_copies(images: ImageSet, bank: ImageSet, shapes: Sequence[float] = (1.0,)) -> tuple[np.ndarray, np.ndarray]:
    """Which image of the bank each one looks the same as, turned or not: int64 [N], -1 for none; and how far it is.

    shapes: width / height of what may have been stretched to a square. An image without contrast is no one's copy.
    """
    views = [view for shape in shapes for view in thumbnail_views(images, shape)]
    distances, rows = nearest_in_views((view(ALL_ROWS) for view in views), thumbnail_views(bank)[0](ALL_ROWS))
    nearest, view = distances.min(dim=1)
    alike = (nearest < NEAR_DUPLICATE) & views[0](ALL_ROWS).any(dim=1)
    return torch.where(alike, rows.gather(1, view[:, None])[:, 0], -1).numpy(), nearest.numpy()


def thumbnail_views(images: ImageSet, shape: float = 1.0) -> Views:
    """In eight views, for a turned image has the turned thumbnail; of the centre of what was stretched from a shape."""
    top, left = (round(images.image_size * max(0, 1 - share) / 2) for share in (shape, 1 / shape))
    centre = slice(top, images.image_size - top), slice(left, images.image_size - left)
    parts = [slice(one, one + _IMAGES_AT_ONCE) for one in range(0, len(images), _IMAGES_AT_ONCE)]  # may be in a file
    cells = np.concatenate([thumbnails(images.pixels[part, *centre]) for part in parts])
    return [lambda rows, view=view: unit_view(cells[rows], view) for view in range(VIEWS)]  # type: ignore[misc]


def _real_sides(
    config: EvaluateConfig,
    real: str,
    data: DataConfig,
    checkpoint: Checkpoint | None,
    catalogs: Mapping[Path, pa.Table],
    notes: list[str],
) -> tuple[Listed, Listed, Listed | None, dict[str, str]]:
    """Two folders, or the splits of one: as the checkpoint's own run split it, where that is known.

    Then, of one folder, all splits together; and of every real image that is known, here or in a catalog, the sha256
    and the path.
    """
    wanted = checkpoint.info.classes if checkpoint else None
    if wanted is not None and data.classes not in (None, "folders"):
        require_same(named_class_set(str(data.classes)), f"--data.classes {data.classes}", wanted, "the checkpoint")
    if config.train is not None:
        root = class_folder(config.train, "train")
        train = catalog_of(root, data, config.cache_dir, notes, wanted)
        classes = classes_of(train)
        test = catalog_of(real, data, config.cache_dir, notes, classes, f"--train {root}")
        notes += unknown_lesions(train, test)
        sides = (
            Listed("train", f"all of {root}", root, train, classes),
            Listed("test", f"all of {real}", real, test, classes),
        )
        return *sides, None, _files(*catalogs.values(), test)
    own = Path(experiment_of(checkpoint.path), "cache", "catalog.parquet") if checkpoint else Path()
    recorded = str(checkpoint.info.config.get("data_root") or "") if checkpoint else ""
    same = recorded == real or ("://" not in recorded + real and os.path.realpath(recorded) == os.path.realpath(real))
    if checkpoint and config.data is None and recorded and same and own in catalogs:
        catalog = catalogs[own]
        require_same(classes_of(catalog), str(own), checkpoint.info.classes, "the checkpoint")
        notes.append("split of the real images: the checkpoint's own")
    else:
        catalog = catalog_of(real, data, config.cache_dir, notes, wanted)
        if checkpoint is None:
            notes.append(
                f"split of the real images: by lesion, seed {data.split_seed}, {data.test_fraction:.0%} for the test; "
                "whether the generator saw the test images is not known (no --checkpoint)"
            )
    notes += unknown_lesions(catalog)
    whole, split = Listed("test", f"all of {real}", real, catalog, classes_of(catalog)), np.array(catalog["split"])
    train, test = (replace(whole, name=k, source=f"{k} split of {real}").where(split == k) for k in ("train", "test"))
    if empty := [side.name for side in (train, test) if not len(side.rows)]:
        raise DataError(f"real: {real} has no image in its {empty[0]} split; add lesions, or set --data.test_fraction")
    return train, test, whole, _files(*catalogs.values(), catalog)


def _files(*catalogs: pa.Table) -> dict[str, str]:
    """The sha256 and the path of each image."""
    return {row["sha256"]: row["path"] for one in catalogs for row in one.select(("sha256", "path")).to_pylist()}


def _require_one_run(root: str) -> None:
    """Raises DataError for a folder of runs, an experiment for one, and for a run that has not ended."""
    if "://" in root or Path(root, RECORD_NAME).is_file():
        if Path(root, PARTS).is_dir():
            raise DataError(f"generated: {root} is of a run that has not ended; finish it by the same generate command")
        return
    records = (Path(root).glob(f"{way}/{RECORD_NAME}") for way in ("*", "generated_images/*"))
    if runs := sorted(str(file.parent) for found in records for file in found):
        raise DataError(f"generated: {root} holds runs of generate; name one, as --generated {' or '.join(runs)}")


def _generated(root: str, data: DataConfig, classes: ClassSet, notes: list[str]) -> Listed:
    """Every image counts, copies too: a generator that repeats itself must be seen to."""
    remote = "://" in root
    inner = [] if remote else sorted(path.name for path in Path(root).iterdir())
    if not remote and not any(classes.find(name, own=data.class_map) for name in inner):
        raise DataError(
            f"generated: {root} has no class folder (found: {', '.join(inner[:NAMED]) or 'nothing'}); only --format "
            "folder can be evaluated"
        )
    references = read_references(
        root, known=classes, class_map=data.class_map, setting="generated", max_pixels=data.max_pixels
    )
    notes += _left_out([one for one in references.rejected if one[0] != CONTACT_SHEET], "generated files")
    images = [image for code in classes.codes for image in references.by_class.get(code, ())]
    repeated = len(images) - len({image.sha256 for image in images})
    if repeated:
        notes.append(f"{repeated:,} generated images are exact repeats of other generated ones; all are counted")
    base = root if remote else os.path.abspath(root)
    columns_of_run = ("sha256", "lesion_id", "skin_lesion_id", "mode", "reference")
    rows = rows_beside(root, MANIFEST_NAME, *columns_of_run) or rows_beside(root, METADATA_NAME, *columns_of_run)
    # The lesion that m2d's own run varied for an image, and the one whose skin it took; "" for none.
    varied = {row["sha256"]: (row["lesion_id"] or "", row["skin_lesion_id"] or "") for row in rows}
    of = [varied.get(image.sha256, ("", "")) for image in images]
    began = {row["sha256"] for row in rows if row["mode"] in ("image2image", "interpolate") and not row["reference"]}
    if unnamed := sum(image.sha256 in began and not lesion for image, (lesion, _) in zip(images, of, strict=True)):
        notes.append(f"{unnamed:,} generated images began from real ones of unnamed lesions, which may be tested")
    columns = {
        "path": [image.path if remote else os.path.relpath(image.path, base) for image in images],
        "sha256": [image.sha256 for image in images],
        "label": [image.label for image in images],
        "lesion_id": [lesion or f"generated {number}" for number, (lesion, _) in enumerate(of)],
        "skin_lesion_id": [skin for _, skin in of],
    }
    return Listed("generated", f"all of {root}", base, pa.table(columns), classes)


def _left_out(rejected: Sequence[tuple[str, str]], what: str) -> list[str]:
    notes = [f"left out {path}: {reason}" for path, reason in rejected[:NAMED]]
    return [*notes, f"left out {len(rejected):,} unusable {what} in all"] if len(rejected) > NAMED else notes


# --- pixels ---------------------------------------------------------------------------------------------------------


def _decode(side: Listed, size: int, cache_dir: str, max_pixels: int, notes: list[str]) -> ImageSet:
    """The images at size x size. What cannot be read any more is left out with the reason."""
    paths, sha256 = side["path"], side["sha256"]
    failures: dict[int, str] = {}

    def fill(out: np.ndarray) -> None:
        storage, to_pixels = open_storage(side.root), partial(decode_resized, size=size, max_pixels=max_pixels)
        with progress(f"reading {side.name} images", len(out)) as shown, ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda path, digest: decode_unchanged(storage, path, digest, to_pixels), paths, sha256)
            for row, image in enumerate(found):
                if isinstance(image, str):
                    failures[row] = f"{paths[row]}: {image}"
                else:
                    out[row] = image
                shown.advance(1)
        if failures:
            raise _Unreadable

    try:
        pixels = stored_pixels(cache_dir, sha256, (len(sha256), size, size, 3), fill)
    except _Unreadable:
        first = failures[min(failures)]
        if len(failures) == len(paths):
            raise DataError(f"{side.name}: no image of {side.source} can be read; the first: {first}") from None
        notes.append(f"{len(failures):,} {side.name} images cannot be read, the first: {first}")
        kept = ~np.isin(np.arange(len(paths)), list(failures))
        return _decode(side.where(kept), size, cache_dir, max_pixels, notes)
    skins = np.array(side["skin_lesion_id"], dtype=object) if "skin_lesion_id" in side.rows.column_names else None
    return ImageSet(**side.fields, pixels=pixels, skins=skins)


class _Unreadable(Exception):
    """Some images could not be decoded; the rest is tried again."""


def pixels_sha256(pixels: np.ndarray) -> tuple[str, ...]:
    """Of each of the images [N, S, S, 3], hex."""
    return tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in pixels)


def stored_pixels(
    cache_dir: str, named: Sequence[str], shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> np.ndarray:
    """uint8 [N, S, S, 3], mapped from a file of the cache; `fill` writes it where it is not there.

    named: all that the pixels depend on besides their size, as the sha256 of each image.
    """
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:20]
    path = Path(cache_dir).expanduser().absolute() / PIXELS / f"{shape[1]}px_{digest}.npy"
    if not path.is_file():
        with cache_file(path) as unfinished:
            out = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            fill(out)
            out.flush()
    pixels = np.load(path, mmap_mode="r")
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"cache: {path} is not what its name says; delete it, then run again")
    return pixels


# --- reconstructions: no sample can be better than its decoder ------------------------------------------------------


@torch.inference_mode()
def reconstructions(
    images: ImageSet, checkpoint: Checkpoint, *, device: str, cache_dir: str, batch_size: int | None = None
) -> ImageSet:
    """Real images after encoding (the posterior's mean) and decoding, as uint8 of the same size.

    images: at the checkpoint's image size. batch_size: at most so many at once; None: 32. Of large images it is fewer.
    They are kept by checkpoint and pixels. Raises ConfigError for a batch that does not fit the device.
    """
    autoencoder = checkpoint.autoencoder.to(device)
    size = min(batch_size or RECONSTRUCTED_AT_ONCE, coded_at_once(images.image_size))

    def fill(out: np.ndarray) -> None:
        with progress(f"reconstructing {images.name}", len(images)) as shown:
            for first in range(0, len(images), size):
                part = slice(first, first + size)
                x = from_uint8(torch.from_numpy(np.array(images.pixels[part])).to(device).permute(0, 3, 1, 2))
                with batch_fits(size, device):
                    y = autoencoder.decode(autoencoder.encode(x).mode())
                out[part] = to_uint8(y)
                shown.advance(len(x))

    named = f"reconstructed by {checkpoint.sha256}", *pixels_sha256(images.pixels)
    pixels = stored_pixels(cache_dir, named, images.pixels.shape, fill)
    source = f"reconstructions of {images.source} by checkpoint {checkpoint.sha256[:12]}"
    return replace(images, name="reconstructions", source=source, sha256=pixels_sha256(pixels), pixels=pixels)


@contextmanager
def batch_fits(size: int, device: str) -> Iterator[None]:
    """Raises ConfigError where the batch does not fit the device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"batch_size {size} does not fit the memory of {device}; try --batch_size {max(1, size // 2)} "
            "(the result stays the same)"
        ) from None


def rows_like(labels: np.ndarray, generated: np.ndarray, seed: int, times: int = 1) -> np.ndarray:
    """Of classes int64 [N] rows without repeats: `times` as many of each as were generated, or all that there are."""
    generator = np.random.default_rng(seed)
    made, counts = np.unique(generated, return_counts=True)
    drawn = [generator.permutation(np.flatnonzero(labels == k))[: times * n] for k, n in zip(made, counts)]
    return np.concatenate(drawn)


def drawn_like(sides: Sequence[ImageSet], rows: np.ndarray) -> ImageSet:
    """These rows of the sets, which count one after the other, ascending where there are several.

    Each is a group of its own, as a generated image is.
    """
    ends = np.cumsum([len(one) for one in sides])
    own = np.split(rows, np.searchsorted(rows, ends[:-1]))
    taken = list(zip(sides, (part - end + len(one) for one, part, end in zip(sides, own, ends)), strict=True))
    labels, pixels = (
        np.concatenate([getattr(one, name)[part] for one, part in taken]) for name in ("labels", "pixels")
    )
    source = f"{len(rows):,} images of {' and '.join(one.source for one in sides)}"
    return ImageSet("real images", source, (), (), labels, rows.astype(object), pixels, sides[-1].classes)


def psnr_db(images: ImageSet, redrawn: ImageSet) -> float:
    """Mean over the images of the peak signal-to-noise ratio, in decibels."""
    difference = images.pixels.astype(np.float32) - redrawn.pixels.astype(np.float32)
    squared = np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean(10 * np.log10(255.0**2 / np.maximum(squared, 1e-8))))
