"""Which images train, which validate and which test: by lesion, stratified by class, seeded.

Own allocation instead of scikit-learn's StratifiedGroupKFold: that one cuts k equal folds, so fractions are multiples
of 1/k; it balances images, not lesions; it may leave a class of few lesions out of training; and its answer depends on
the order of the rows.
"""

import hashlib
from collections import Counter, defaultdict

import pyarrow as pa


def assign_splits(catalog: pa.Table, *, val_fraction: float, test_fraction: float, seed: int) -> pa.Table:
    """The catalog with its `split` column set to train, val or test.

    Fractions are of the lesions of each class; val and test meet them to within one lesion. All images of a lesion
    share its split, also where they carry different labels. A class of few lesions fills train first, then val, then
    test, one lesion each; a split whose fraction is 0 stays empty. Every lesion has a seeded rank of its own and test
    takes the first ones: so the order of the rows has no influence, and the test lesions of a class stay the same under
    another val_fraction, as long as both leave it a lesion to train on.
    Raises ValueError for fractions that are negative or leave nothing to train on.
    """
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must be >= 0, their sum < 1")
    lesion_ids = catalog["lesion_id"].to_pylist()
    lesions_of: dict[str, set[str]] = defaultdict(set)  # label -> its lesions
    for label, lesion in zip(catalog["label"].to_pylist(), lesion_ids, strict=True):
        lesions_of[label].add(lesion)
    split_of: dict[str, str] = {}
    # Rare classes first: they can least afford that another class has placed the lesions that both share.
    for label in sorted(lesions_of, key=lambda label: (len(lesions_of[label]), label)):
        lesions = lesions_of[label]
        wanted = _allocate(len(lesions), val_fraction, test_fraction)
        placed = Counter(split_of[lesion] for lesion in lesions if lesion in split_of)
        free = sorted((lesion for lesion in lesions if lesion not in split_of), key=lambda lesion: _rank(lesion, seed))
        kept_for_train = 0 if placed["train"] else 1
        for split in ("test", "val"):
            count = min(max(0, wanted[split] - placed[split]), max(0, len(free) - kept_for_train))
            split_of.update(dict.fromkeys(free[:count], split))
            free = free[count:]
        split_of.update(dict.fromkeys(free, "train"))
    splits = pa.array([split_of[lesion] for lesion in lesion_ids], pa.string())
    if "split" not in catalog.column_names:
        return catalog.append_column("split", splits)
    return catalog.set_column(catalog.column_names.index("split"), "split", splits)


def _allocate(lesions: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    """Lesions of one class for val and test: the nearest whole number, at least one, while one is left to train."""
    counts = {"val": _nearest(lesions * val_fraction), "test": _nearest(lesions * test_fraction)}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        if fraction > 0:
            counts[split] = max(counts[split], 1)
    while sum(counts.values()) > max(lesions - 1, 0):
        counts["val" if counts["val"] > counts["test"] else "test"] -= 1
    return counts


def _nearest(share: float) -> int:
    return int(share + 0.5 + 1e-9)  # halves go up, also where the product fell just short of one


def _rank(lesion: str, seed: int) -> tuple[bytes, str]:
    return hashlib.sha256(f"{seed}:{lesion}".encode()).digest(), lesion
