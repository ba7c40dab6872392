"""Which images a probe is fitted on and which it is tested on, and that no lesion stands on both sides."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2d.classes import CLASSES
from m2d.data.catalog import read_catalog, scan_dataset
from m2d.data.prepared import prepared_folder, reusable_catalog
from m2d.errors import ConfigError, DataError
from m2d.evaluation.cls_features import ImageFile
from m2d.evaluation.settings import ProbeConfig
from m2d.files.progress import progress

NAMED = 3  # of the shared lesions or images


@dataclass(frozen=True)
class ProbeImages:
    """One side of the probe: rows of a catalog and where their files are."""

    catalog: pa.Table  # m2d.data.catalog.CATALOG_SCHEMA
    data_root: str
    source: str  # in words, for the reader

    def __len__(self) -> int:
        return int(self.catalog.num_rows)

    @property
    def files(self) -> list[ImageFile]:
        """The image of each row."""
        paths, hashes = self.catalog["path"].to_pylist(), self.catalog["sha256"].to_pylist()
        return [ImageFile(self.data_root, path, sha256) for path, sha256 in zip(paths, hashes)]

    @property
    def labels(self) -> np.ndarray:
        """Class index of each row, int64 [N]."""
        return np.array([CLASSES.index(code) for code in self.catalog["label"].to_pylist()], dtype=np.int64)

    @property
    def lesions(self) -> np.ndarray:
        """Lesion id of each row, [N]."""
        return np.array(self.catalog["lesion_id"].to_pylist(), dtype=object)

    def without(self, hashes: Iterable[str]) -> "ProbeImages":
        """The rows whose image is not one of these."""
        gone = pc.is_in(self.catalog["sha256"], value_set=pa.array(list(hashes), pa.string()))
        return ProbeImages(self.catalog.filter(pc.invert(gone)), self.data_root, self.source)


def train_and_test(config: ProbeConfig) -> tuple[ProbeImages, ProbeImages]:
    """What to fit on and what to test on.

    Raises ConfigError for a data_root that is none, DataError for a catalog or a dataset that cannot be used, and where
    both sides share a lesion or an image.
    """
    root = _folder(config.data_root, "data_root")
    if config.train_catalog is not None and config.test_catalog is not None:
        test_root = root if config.test_data_root is None else _folder(config.test_data_root, "test_data_root")
        train = ProbeImages(read_catalog(config.train_catalog), root, f"all of {config.train_catalog}")
        test = ProbeImages(read_catalog(config.test_catalog), test_root, f"all of {config.test_catalog}")
    else:
        whole = _scanned(root, config) if config.train_catalog is None else read_catalog(config.train_catalog)
        source = config.train_catalog or root
        train, test = (
            ProbeImages(whole.filter(pc.equal(whole["split"], split)), root, f"{split} split of {source}")
            for split in ("train", "test")
        )
    for name, side in (("train", train), ("test", test)):
        check_classes(name, side)
    _check_apart(train, test)
    return train, test


def check_classes(name: str, side: ProbeImages) -> None:
    """Raises DataError unless a side holds images of two classes at least."""
    classes = sorted(set(side.catalog["label"].to_pylist()))
    if len(classes) < 2:
        found = f"only images of {classes[0]}" if classes else "no image"
        raise DataError(
            f"probe: the {name} side ({side.source}) holds {found}; it needs two classes at least. "
            "Give more images, or another split by --data.test_fraction and --data.split_seed."
        )


def _check_apart(train: ProbeImages, test: ProbeImages) -> None:
    """A lesion seen in training is recognised, not diagnosed: accuracy on it says nothing about new patients."""
    for column, what, advice in (
        ("lesion_id", "lesion", "leave its images out of one; if it is not the same lesion, rename it in metadata.csv"),
        ("sha256", "image", "leave it out of one"),
    ):
        shared = sorted(set(train.catalog[column].to_pylist()) & set(test.catalog[column].to_pylist()))
        if shared:
            names = ", ".join(shared[:NAMED]) + (", ..." if len(shared) > NAMED else "")
            plural = "s" if len(shared) > 1 else ""
            raise DataError(
                f"probe: train ({train.source}) and test ({test.source}) share {len(shared)} {what}{plural}: {names}; "
                f"{advice}"
            )


def _scanned(root: str, config: ProbeConfig) -> pa.Table:
    """The catalog of data_root: that of setup_data where it is still right, otherwise of a new scan."""
    prepared = reusable_catalog(prepared_folder(config.cache_dir, root), root, config.data)
    if prepared is not None:
        return prepared
    with progress("scanning images") as shown:
        scan = scan_dataset(root, config.data, shown.show)
    if scan.rejected.num_rows:
        first = scan.rejected.slice(0, 1).to_pylist()[0]
        print(
            f"{scan.rejected.num_rows} files were rejected, the first: {first['path']}: {first['reason']}",
            file=sys.stderr,
        )
    return scan.catalog


def _folder(data_root: str | None, setting: str) -> str:
    if data_root is None:
        raise ConfigError(f"{setting} is not set; name the folder that holds the class folders by --{setting}")
    if "://" in data_root:
        return data_root
    if not Path(data_root).expanduser().is_dir():
        raise ConfigError(f"{setting}: {data_root} is not a folder; name the one that holds the class folders")
    return os.path.expanduser(data_root)
