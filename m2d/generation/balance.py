"""How many images each class lacks: counts of a dataset and a target in, images to make out. Light: no torch.

`--to max`: as many as the largest class has. `--to 300`: so many. `--to 0.5`: that share of the largest class.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from m2d.classes import CLASSES
from m2d.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

BalanceSplit = Literal["all", "train"]
BALANCE_SPLITS: tuple[str, ...] = get_args(BalanceSplit)
_SHARE = re.compile(r"(?:(?:ratio|x)\s*)?(\d+\.\d*|\.\d+)", re.IGNORECASE)
_MARKED = re.compile(r"(?:ratio|x)\s*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """What a class is filled up to: `images`, or `share` of the largest class; exactly one of them is set."""

    images: int | None = None
    share: float | None = None

    def resolve(self, largest: int) -> int:
        """Images that each class shall have where the largest one has `largest`; a share is rounded to the nearest."""
        if self.images is not None:
            return self.images
        assert self.share is not None
        return int(self.share * largest + 0.5)


def parse_target(to: str) -> Target:
    """`max`, a whole number of images, or a share of the largest class in (0, 1], such as `0.5`, with a point.

    The share is what imbalanced-learn calls a float `sampling_strategy`: images of the class over images of the largest
    one, afterwards. `x0.5` and `ratio 0.5` are other spellings of it; a whole number behind them is a share too, so
    `x1` is `max`. Raises ConfigError for anything else.
    """
    text = to.strip()
    if text.lower() == "max":
        return Target(share=1.0)
    if text.isascii() and text.isdigit() and int(text) > 0:
        return Target(images=int(text))
    matched = _SHARE.fullmatch(text) or _MARKED.fullmatch(text)
    if matched is not None and matched[1].isascii():
        share = float(matched[1])
        if 0 < share <= 1:
            return Target(share=share)
        raise ConfigError(
            f"to is {to}; a ratio is a share of the largest class, above 0 and at most 1 (0.5: half as many as it has)"
        )
    raise ConfigError(
        f"to is {to or '(empty)'}; it must be max (as many as the largest class), a whole number of images such as "
        "300, or a share of the largest class such as 0.5"
    )


def targets(counts: Mapping[str, int], to: str, classes: Iterable[str] | None = None) -> dict[str, int]:
    """Images to make of each class, in the order of CLASSES; 0 where it has enough, for no class is made smaller.

    counts: real images by class code. to: see `parse_target`; the largest class is one of all, asked for or not.
    classes: those to fill up, the others are left out of the answer; None takes the classes that have a real image
    (nothing can be learnt of one that has none, but it can be named).
    Raises ConfigError for a wrong `to`, DataError where there is no image at all.
    """
    target = parse_target(to)
    if not any(counts.values()):
        raise DataError("balance: the dataset holds no image of any class, so there is nothing to balance")
    asked = {code for code, count in counts.items() if count > 0} if classes is None else set(classes)
    wanted = target.resolve(max(counts.values()))
    return {code: max(0, wanted - counts.get(code, 0)) for code in CLASSES if code in asked}


def real_counts(catalog: "pa.Table", split: BalanceSplit = "all") -> dict[str, int]:
    """Real images of each class that count, all seven codes: of the whole dataset, or of its training split.

    "all" is what `--to 300` promises in plain words: 300 with the class's real images. Whoever trains on the training
    split alone and wants that one even takes "train"; the synthetic images are for training in either case.
    """
    from m2d.data.catalog import class_counts

    return class_counts(catalog, None if split == "all" else split)
