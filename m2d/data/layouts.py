"""What a dataset says of its images: label, lesion, split and more, in whichever layout it was published.

A table is recognised by its columns and a class folder by its name; no other name of a file or folder matters.
Called by m2d.data.catalog, which reads the images themselves. Source of the columns: the published tables of HAM10000,
of the ISIC challenges 2016 to 2024, of MILK10k and of isic-cli.
"""

import csv
import io
import json
import os
import posixpath
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from m2d.classes import NAMED, ClassSet, class_set_of, named_class_set
from m2d.data.settings import DataConfig
from m2d.errors import DataError
from m2d.files.atomic import csv_text
from m2d.files.storage import files_below, one_line, open_storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
REPORT = "evaluation.json"  # a folder that holds one is what `evaluate` leaves beside class folders
REPORT_FILES = {  # the tables and pictures that it may hold
    *(f"{name}.csv" for name in (
        "classes", "copies", "downstream", "fidelity", "memorization", "privacy", "site_counts", "sites", "worth",
    )),
    *(f"{name}.png" for name in (
        "confusion", "differences", "generated", "kernel_distance", "kernel_distance_guide", "least_typical",
        "most_typical", "nearest_pairs", "ratios", "ratios_finetune", "reconstructions", "unseen",
    )),
}  # fmt: skip
FACTS = ("age", "sex", "site", "skin_tone")  # what a catalog keeps of a table beside labels, lesions and splits

_TABLE_SUFFIXES = (".csv", ".tab", ".tsv", ".txt", ".jsonl", "")
_SPLITS = {  # folder or value -> split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_DEBRIS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}  # what Windows, macOS and Synology leave behind
_MASK = re.compile(r"_(segmentation|superpixels?|mask|attribute_\w+)$", re.IGNORECASE)
_MISSING = {"", "na", "n/a", "nan", "none", "null", "unknown"}
_COLUMNS = {  # role -> names that published tables use, the most telling first
    "image": ("isic_id", "image_id", "image_name", "img_id", "image", "file_name", "filename", "image_path"),
    "lesion": ("lesion_id",),
    "label": ("target", "dx", "diagnosis_1", "diagnosis", "diagnostic", "class", "label", "benign_malignant"),
    "split": ("split",),
    "image_type": ("image_type",),
    "age": ("age_approx", "age_approximate", "age"),
    "sex": ("sex", "gender"),
    "site": ("anatom_site_general", "anatom_site_general_challenge", "localization", "site", "region"),
    "skin_tone": ("skin_tone_class", "fitzpatrick_skin_type", "fitspatrick", "fitzpatrick"),
}
_BINARY = {"0": "benign", "1": "malignant"}  # what `target` means in ISIC 2020 and 2024


class File(NamedTuple):
    """A file of a dataset: path within the root with forward slashes, size in bytes, time of change."""

    path: str
    size: int | None
    mtime_ns: int | None


@dataclass
class Entry:
    """One image as its dataset describes it."""

    path: str
    label: str | None = None  # class code
    lesions: set[str] = field(default_factory=set)  # what the tables call its lesion; empty: not known
    split: str | None = None  # the published one
    facts: dict[str, str] = field(default_factory=dict)  # those of FACTS that a table has, in its words


@dataclass(frozen=True)
class Layout:
    """What was found below a root."""

    classes: ClassSet
    entries: list[Entry]  # each with a label, by class and path
    rejected: list[tuple[str, str]]  # path, reason
    said: list[str]  # one fact a line, for the first lines of output


class _UnknownLabels(DataError):
    """A label or a folder is no class of the set."""


def read_layout(
    filesystem: fs.FileSystem, root: str, shown: str, config: DataConfig, classes: ClassSet | None = None
) -> Layout:
    """Find the images below root, and what folders and tables say of them.

    shown: root as the user wrote it. classes: those of a checkpoint or of another catalog; None: by data.classes. A
    class folder goes before a table. Raises DataError where root cannot be listed, no image has a label, a table is of
    other images, or a label is no class and neither mapped (data.class_map) nor dropped (data.drop).
    """
    files, rejected = list_files(filesystem, root, shown)
    sets: Iterable[ClassSet] = NAMED.values()
    if classes is not None:
        sets = [classes]
    elif config.classes == "folders":
        sets = [_folder_classes(files, config)]
    elif config.classes is not None:
        sets = [named_class_set(config.classes)]
    refused: _UnknownLabels | None = None
    for one in sets:
        try:
            return _read_layout(filesystem, root, shown, config, one, files, list(rejected))
        except _UnknownLabels as error:
            refused = refused or error
    raise refused or AssertionError("there is no set of classes")


def _folder_classes(files: list[File], config: DataConfig) -> ClassSet:
    """Of the folders that hold images, below those of a split."""
    words: set[str] = set()
    for file in files:
        stem, suffix = posixpath.splitext(file.path)
        folders = file.path.split("/")[:-1]
        if suffix.lower() in IMAGE_SUFFIXES and not _MASK.search(stem) and folders:
            words.add(folders[1] if len(folders) > 1 and folders[0].casefold() in _SPLITS else folders[0])
    dropped = _words(config.drop)
    return class_set_of(sorted({config.class_map.get(word, word) for word in words if word.casefold() not in dropped}))


def _words(listed: str | None) -> set[str]:
    return {word.strip().casefold() for word in (listed or "").split(",")} - {""}


def _read_layout(
    filesystem: fs.FileSystem,
    root: str,
    shown: str,
    config: DataConfig,
    classes: ClassSet,
    files: list[File],
    rejected: list[tuple[str, str]],
) -> Layout:
    entries: list[Entry] = []
    may_be_tables: list[str] = []  # not below a class folder, of a table's suffix or none
    masks = 0
    for path in (file.path for file in files):
        stem, suffix = posixpath.splitext(path)
        split, label = _folders(path, config, classes)
        if suffix.lower() in IMAGE_SUFFIXES and _MASK.search(stem):
            masks += 1
        elif suffix.lower() in IMAGE_SUFFIXES:
            entries.append(Entry(path, label, split=split if label else None))
        elif label:
            known = " ".join(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
            rejected.append((path, f"the suffix {suffix or '(none)'} is not one of {known}"))
        elif suffix.lower() in _TABLE_SUFFIXES:
            may_be_tables.append(path)
    shards = sum(file.path.endswith((".parquet", ".tar")) for file in files)
    if shards and not entries:
        raise DataError(
            f"data_root: {shown} holds no image, but {shards:,} .parquet or .tar files; unpack them first: "
            f"jobs/setup_data.py --import_from {shown} --data_root FOLDER"
        )
    said = [f"left out: {masks:,} masks and superpixels"] if masks else []

    by_key: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        key = image_key(entry.path)
        for name in {key, posixpath.basename(key)}:
            by_key[name].append(entry)
    places = [(filesystem, posixpath.join(root, path), path) for path in may_be_tables]
    if config.table is not None:
        places.append((*open_storage(config.table), config.table))
    tables = [table for place in places for table in _read_table(*place, shown, by_key, config, classes, said)]

    entries = _dermoscopic(entries, tables, config, said)
    _assign_lesions(entries, tables, shown, said)
    entries = _assign_labels(entries, tables, shown, config, classes, said)
    for entry in entries:
        for table in tables:
            for name in FACTS:
                if value := table.value(entry.path, name):
                    entry.facts.setdefault(name, value)
            entry.split = entry.split or _SPLITS.get(table.value(entry.path, "split").casefold())
    if classes.name != "isic7":
        said.insert(0, f"classes: {classes.name}, {' '.join(classes.codes)}")
    order = {code: place for place, code in enumerate(classes.codes)}
    return Layout(classes, sorted(entries, key=lambda entry: (order[str(entry.label)], entry.path)), rejected, said)


def list_files(filesystem: fs.FileSystem, root: str, shown: str) -> tuple[list[File], list[tuple[str, str]]]:
    """All files below root by path but hidden ones, debris, reports; and (path, reason) of names that cannot be used.

    A link to a folder is followed once, real folders first, and never to a folder that holds root.
    Raises DataError where root is missing, a file, or cannot be listed.
    """
    try:
        kind = filesystem.get_file_info(root).type
        if kind != fs.FileType.Directory:
            what = "does not exist" if kind == fs.FileType.NotFound else "is a file"
            raise DataError(f"data_root: {shown} {what}; give the folder that holds the images")
        if isinstance(filesystem, fs.LocalFileSystem):
            files, broken = _walk(root)
        else:
            found = files_below(filesystem, root)
            files = [File(posixpath.relpath(entry.path, root), entry.size, entry.mtime_ns) for entry in found]
            broken = []
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data_root: {shown} cannot be listed ({one_line(error)}); check access to it") from error
    reports = {posixpath.dirname(file.path) for file in files if posixpath.basename(file.path) == REPORT} - {""}
    files = [file for file in files if posixpath.dirname(file.path) not in reports]
    return sorted(file for file in files if not any(map(is_debris, file.path.split("/")))), sorted(broken)


def sources(filesystem: fs.FileSystem, root: str, shown: str, config: DataConfig) -> list[File]:
    """All files that `read_layout` and a scan may depend on, data.table and a data.classes of one's own among them."""
    files, _ = list_files(filesystem, root, shown)
    known = (*IMAGE_SUFFIXES, *_TABLE_SUFFIXES)
    used = [file for file in files if "/" in file.path or posixpath.splitext(file.path)[1].lower() in known]
    if not any(file.path == "metadata.csv" for file in used):  # as an earlier M2D counted it, whose catalogs stay good
        used.append(File("metadata.csv", None, None))
    own_classes = None if config.classes in (None, "folders", *NAMED) else config.classes
    for place in filter(None, (config.table, own_classes)):
        elsewhere, path = open_storage(place)
        info = elsewhere.get_file_info(path)
        used.append(File(place, info.size, info.mtime_ns))
    return used


def is_debris(name: str) -> bool:
    """Whether a file or folder of this name is hidden or left behind by an operating system."""
    return name.startswith(".") or name.casefold() in _DEBRIS


def image_key(name: str) -> str:
    """What tables call an image: no suffix, no `_downsampled`, one letter case; folders stay."""
    return without_image_suffix(name.strip().replace("\\", "/")).casefold().removesuffix("_downsampled")


def without_image_suffix(name: str) -> str:
    """ISIC_1 for ISIC_1.jpg: tables name images either way."""
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _walk(root: str) -> tuple[list[File], list[tuple[str, str]]]:
    files: list[File] = []
    broken: list[tuple[str, str]] = []
    real_root = os.path.realpath(root)
    seen: set[str] = set()
    folders: list[str] = [""]
    links: list[str] = []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen or (folder and os.path.commonpath([real, real_root]) == real):
            continue
        seen.add(real)
        for entry in sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name):
            path = posixpath.join(folder, entry.name)
            try:
                path.encode()
                if is_debris(entry.name):
                    continue
                if entry.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif stat.S_ISREG((found := entry.stat()).st_mode):
                    files.append(File(path, found.st_size, found.st_mtime_ns))
            except UnicodeEncodeError:
                broken.append((os.fsencode(path).decode(errors="backslashreplace"), "its name is not UTF-8; rename it"))
            except OSError as error:
                broken.append((path, f"cannot be read: {error.strerror or one_line(error)}"))
    return files, broken


def _folders(path: str, config: DataConfig, classes: ClassSet) -> tuple[str | None, str | None]:
    """Published split and class code, by the first folders of a path."""
    parts = path.split("/")[:-1]
    split = _SPLITS.get(parts[0].casefold()) if len(parts) > 1 else None
    return split, classes.find(parts[1 if split else 0], own=config.class_map) if parts else None


@dataclass
class _Table:
    """One table: what its columns mean, and which of its rows is of which image."""

    name: str
    roles: dict[str, int]  # role -> column
    one_hot: dict[int, str]  # column -> diagnosis; empty where the labels are no one-hot columns
    levels: list[int]  # columns of a diagnosis from general to specific; empty likewise
    rest: tuple[str, ...] = ()  # the diagnosis of a row without a 1
    first_ids: list[str] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)  # path of an image -> its row
    labels_of_lesion: dict[str, tuple[str, ...]] = field(default_factory=dict)  # where it names lesions, not images

    @property
    def has_labels(self) -> bool:
        return bool(self.one_hot) or "label" in self.roles

    def value(self, path: str, role: str) -> str:
        """A cell of an image's row; "" where it has no row or the cell says that nothing is known."""
        return _cell(self.rows.get(path, []), self.roles.get(role))

    def label(self, row: list[str]) -> tuple[str, ...]:
        """The diagnosis in the table's words, from general to specific; () where the row has none."""
        if self.one_hot:
            hot = [word for place, word in self.one_hot.items() if float(_cell(row, place) or 0) == 1]
            return (" + ".join(hot),) if hot else self.rest  # two at once are no class, and are listed as such
        if self.levels:
            return tuple(cell for place in self.levels if (cell := _cell(row, place)))
        cell = _cell(row, self.roles.get("label"))
        return tuple(part.strip() for part in cell.split(":")) if cell else ()


def _cell(row: list[str], place: int | None) -> str:
    cell = row[place].strip() if place is not None and place < len(row) else ""
    return "" if cell.casefold() in _MISSING else cell


def _read_table(
    filesystem: fs.FileSystem,
    path: str,
    name: str,
    root: str,
    by_key: dict[str, list[Entry]],
    config: DataConfig,
    classes: ClassSet,
    said: list[str],
) -> list[_Table]:
    """The table in a file, or none where the file is no table of images; a .csv that is not used is said."""
    telling = name.lower().endswith(".csv") or name == config.table
    shown = name if name == config.table else f"{name} in {root}"

    def unused(why: str) -> list[_Table]:
        if telling:
            said.append(f"not used: {name} ({why})")
        return []

    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            content = stream.read()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if name.lower().endswith(".jsonl"):
            text = csv_text([json.loads(line) for line in text.splitlines() if line.strip()])
        text = text.lstrip()
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        header = next(csv.reader([text.partition("\n")[0]], delimiter=delimiter), [])
        known = {*_COLUMNS["image"], *_COLUMNS["lesion"]}
        if name != config.table and len(header) > 2 and not known & {cell.strip().casefold() for cell in header}:
            # Kaggle's HAM10000 has tables of a column for each pixel, which would fill the memory.
            return unused("no column names its images")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [row + [""] * (len(header) - len(row)) for row in reader if any(map(str.strip, row))]
    except (OSError, pa.ArrowException, ValueError, csv.Error) as error:
        if telling:
            raise DataError(f"{shown} cannot be read ({one_line(error)}); save it as CSV in UTF-8") from error
        return []
    if not rows:
        return unused("an empty file")
    names = [cell.strip().casefold() for cell in rows[0]]
    roles = {role: names.index(known) for role in _COLUMNS for known in reversed(_COLUMNS[role]) if known in names}
    if name == config.table:
        for role, column in config.columns.items():
            if column.strip().casefold() not in names:
                raise DataError(f"data.columns.{role}: {shown} has no column {column}; found: {', '.join(rows[0])}")
            roles[role] = names.index(column.strip().casefold())
    if "image" not in roles and len(names) == 2 and image_key(rows[0][0]) in by_key:  # ISIC 2016 writes no header
        names, roles = ["image", "target"], {"image": 0, "label": 1}
        rows.insert(0, names)
    one_hot = {
        place: column.strip()
        for place, column in enumerate(rows[0])
        if names[place] == "unk" or any(one.find(column, own=config.class_map) for one in (classes, *NAMED.values()))
    }
    cells = {row[place].strip() for row in rows[1:] for place in one_hot if place < len(row)}
    if (
        len(one_hot) < 2
        or not cells <= {"0", "1", "0.0", "1.0"}
        or (name == config.table and "label" in config.columns)
    ):
        one_hot = {}
    levels = [names.index(f"diagnosis_{level}") for level in range(1, 6) if f"diagnosis_{level}" in names]
    table = _Table(name, roles, one_hot, levels if roles.get("label") in levels else [])
    if set(names) & {"melanoma", "seborrheic_keratosis"} and len(one_hot) == 2:
        table.rest = ("nevus",)  # ISIC 2017 has columns for two of its three classes
    if names[roles.get("label", 0)] == "target":
        if len(rows) > 2 and len({row[roles["label"]] for row in rows[1:]}) == 1:  # a challenge's sample submission
            said.append(f"not used: {name} (every target in it is {rows[1][roles['label']]})")
            return []
        for row in rows[1:]:
            row[roles["label"]] = _BINARY.get(row[roles["label"]].strip().removesuffix(".0"), row[roles["label"]])

    if "image" not in roles:
        if "lesion" in roles and table.has_labels:
            table.labels_of_lesion = {_cell(row, roles["lesion"]): table.label(row) for row in rows[1:]}
            return [table]
        return unused("no column names its images")
    if not table.has_labels and len(roles) == 1:
        return unused("no column of labels, lesions or splits")
    table.first_ids = [row[roles["image"]] for row in rows[1:3]]
    folder = posixpath.dirname(name).casefold()
    for number, row in enumerate(rows[1:], 2):
        key = image_key(_cell(row, roles["image"]))
        for place in (posixpath.join(folder, key), key, posixpath.basename(key)):
            for entry in by_key.get(place, ()):
                first = table.rows.setdefault(entry.path, row)
                before, lesion = (_cell(one, roles.get("lesion")) for one in (first, row))
                if before and lesion and before != lesion:
                    image = _cell(row, roles["image"])
                    raise DataError(
                        f"{shown} gives {image} two lesions, {before} and {lesion} (row {number}); keep one"
                    )
                if lesion and not before:
                    table.rows[entry.path] = row
            if place in by_key:
                break
    return [table]


def _dermoscopic(entries: list[Entry], tables: list[_Table], config: DataConfig, said: list[str]) -> list[Entry]:
    """Without the clinical photographs of a dataset that has both, as MILK10k, unless they are asked for."""
    kinds = {path: table.value(path, "image_type").casefold() for table in tables for path in table.rows}
    if config.clinical or not any(kind.startswith("dermoscop") for kind in kinds.values()):
        return entries
    kept = [entry for entry in entries if not kinds.get(entry.path, "").startswith("clinical")]
    if len(kept) < len(entries):
        said.append(f"left out: {len(entries) - len(kept):,} clinical photographs (--data.clinical true takes them)")
    return kept


def _assign_lesions(entries: list[Entry], tables: list[_Table], shown: str, said: list[str]) -> None:
    tables = [table for table in tables if "lesion" in table.roles and "image" in table.roles]
    for entry in entries:
        entry.lesions = {lesion for table in tables if (lesion := table.value(entry.path, "lesion"))}
    known = sum(bool(entry.lesions) for entry in entries)
    _refuse_strangers(tables, entries, known, shown)
    names = [table.name for table in tables if table.rows]
    if not known:
        said.append(
            "lesions: no table names them, so each image counts as a lesion of its own, and one lesion may be on both "
            "sides of the split"
        )
        return
    lesions = len({min(entry.lesions) for entry in entries if entry.lesions})
    said.append(f"lesions: {', '.join(names)}, {known:,} of {len(entries):,} images, {lesions:,} lesions")
    if known < len(entries):
        said.append(
            f"WARNING: {len(entries) - known:,} images have no lesion there; each counts as a lesion of its own"
        )


def _assign_labels(
    entries: list[Entry], tables: list[_Table], shown: str, config: DataConfig, classes: ClassSet, said: list[str]
) -> list[Entry]:
    """Gives every entry its class; the entries that have one."""
    tables = [table for table in tables if table.has_labels]
    dropped = _words(config.drop)
    unknown: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    unlabelled: list[Entry] = []
    moved = covered = 0
    for entry in entries:
        answers = {table.name: table.label(table.rows[entry.path]) for table in tables if entry.path in table.rows}
        answers |= {
            table.name: table.labels_of_lesion[lesion]
            for table in tables
            for lesion in entry.lesions
            if lesion in table.labels_of_lesion
        }
        labels: dict[str, str] = {}  # class -> table
        terms: tuple[str, ...] = ()
        for name, answer in answers.items():
            terms = answer or terms
            code = classes.find(*answer, own=config.class_map) if answer else None
            if code is not None:
                labels.setdefault(code, name)
        covered += bool(terms)
        if entry.label is not None:
            moved += bool(labels) and entry.label not in labels
        elif len(labels) > 1:
            (one, first), (other, second) = list(labels.items())[:2]
            raise DataError(f"{entry.path} is {one} in {first} and {other} in {second}; correct one of them")
        elif terms and {terms[-1].casefold(), ": ".join(terms).casefold()} & dropped:
            left_out[terms[-1]] += 1
        elif labels:
            entry.label = next(iter(labels))
        elif terms:
            unknown[": ".join(terms)] += 1
        elif named := {part.casefold() for part in entry.path.split("/")[:-1]} & dropped:
            left_out[min(named)] += 1
        else:
            unlabelled.append(entry)
    in_folders = sum(entry.label is not None for entry in entries) if not tables else 0
    _refuse_strangers([table for table in tables if "image" in table.roles], entries, max(covered, in_folders), shown)
    if unknown:
        listed = ", ".join(f"{word} ({count:,})" for word, count in unknown.most_common(12))
        word = unknown.most_common(1)[0][0].rpartition(": ")[2]
        raise _UnknownLabels(
            f"labels that are no class, with their images: {listed}; known: {' '.join(classes.codes)}. Map them "
            f"(--data.class_map.'{word}' CODE) or leave them out (--data.drop '{word}')"
        )
    folders = sorted({entry.path.split("/")[0] for entry in unlabelled if "/" in entry.path})
    labelled = [entry for entry in entries if entry.label is not None]
    if not labelled or (folders and not covered):
        more = ", ..." if len(folders) > 8 else ""
        found = f"found: {', '.join(folders[:8])}{more}" if folders else "found no folder"
        what = "has folders that are no class" if labelled else "has no class folder and no table of labels"
        raise _UnknownLabels(
            f"data_root: {shown} {what}; expected some of {' '.join(classes.codes)}, {found}. Map yours with "
            "--data.class_map, name a table with --data.table, or move them out of data_root."
        )
    names = [table.name for table in tables if table.rows or table.labels_of_lesion]
    if covered:
        said.insert(0, f"labels: {', '.join(names)}, {covered:,} of {len(entries):,} images")
    for word, count in left_out.items():
        said.append(f"left out: {count:,} images of {word} (data.drop)")
    if unlabelled:
        said.append(f"WARNING: left out {len(unlabelled):,} images without a label, {unlabelled[0].path} for one")
    if moved:
        said.append(f"WARNING: {moved:,} images lie in another class folder than the table says; the folder counts")
    return labelled


def _refuse_strangers(tables: list[_Table], entries: list[Entry], covered: int, shown: str) -> None:
    """A table of other images is a mistake, unless the other tables speak for every image."""
    for table in tables:
        if not table.rows and covered < len(entries):
            theirs, ours = ", ".join(table.first_ids), ", ".join(posixpath.basename(one.path) for one in entries[:2])
            raise DataError(
                f"{table.name} names none of the {len(entries):,} images in {shown}: it has {theirs}, the images are "
                f"{ours}; give the table of these images, or move this one away"
            )
