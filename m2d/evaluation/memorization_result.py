"""What the measurement of memorisation says, as plain numbers. memorization.py makes it, the report shows it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of near-copies with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Shares of near-copies by space: "features", "thumbnails" or "either"."""

    generated: dict[str, Share]
    test: dict[str, Share] | None  # what honest images show by chance; None: no unseen image to compare with
    flagged: bool  # the interval of `generated["either"]` lies wholly above that of `test["either"]`
    # Median of distance / median distance of unseen images of the same class, both in as many views; honest: about 1.
    nearness: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class SpaceSummary:
    """Distances 1 - cosine, in [0, 2], to the nearest training image; medians over images, each in its best view."""

    limit: float  # up to this, an image tried as often as real images are is a near-copy; the shares count by it
    strict_limit: float  # up to this, a generated image is one in the best of its views; the lists go by it
    level: float  # share of honest images at or under the limit, and at most that at or under the strict one
    calibration_images: int  # training images whose distance to another lesion is known
    calibration_median: float
    test_median: float
    generated_median: float
    test_same_class: float  # share whose nearest training image has their class
    generated_same_class: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A generated image and its nearest training image, by the space in which it is nearest for the strict limit."""

    generated_row: int
    train_row: int
    generated_path: str
    train_path: str
    generated_class: str
    train_class: str
    view: int  # m2d.data.views of the generated image in which they meet
    found_by: str  # the space
    distances: dict[str, float]  # by space, of this pair in this view
    share_of_limit: float  # distance / strict limit in that space; at most 1: a near-copy

    @property
    def near_copy(self) -> bool:
        """Whether it is at or under the strict limit."""
        return self.share_of_limit <= 1


@dataclass(frozen=True, kw_only=True)
class MemorizationResult:
    """Plain numbers, for evaluation.json."""

    extractor: str
    quantile: float
    flagged: bool  # overall or in a class
    verdict: str
    overall: Comparison  # over the classes that unseen images have too
    classes: dict[str, Comparison]  # code -> of every class with generated images
    spaces: dict[str, SpaceSummary]
    near_copies: list[int]  # rows of generated images at or under a strict limit, for a person to look at
    worst: list[Pair]  # nearest first
    omitted: dict[str, str]  # class -> why it is left out
