"""Figures of the evaluation report: charts as PNG bytes, and the nearest pairs. Knows results, no files and no HTML."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from m2d.data.views import apply_view
from m2d.evaluation.classifiers.compare import DownstreamResult
from m2d.evaluation.classifiers.probe import ConsistencyResult
from m2d.evaluation.classifiers.worth import WorthResult
from m2d.evaluation.fidelity import AUTOENCODER, FLOOR, GENERATED, UNSEEN, FidelityResult
from m2d.evaluation.images import ImageSet
from m2d.evaluation.memorization import Pair
from m2d.metrics.scores import LOWER_IS_BETTER
from m2d.plots.charts import confusion_map
from m2d.plots.style import FAINT, INK, drawn, new_figure
from m2d.plots.tiles import shortened

COMPARISONS = {
    GENERATED: "generated",
    AUTOENCODER: "autoencoder floor",
    UNSEEN: "unseen real images",
    FLOOR: "real against real",
}
SCORES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "macro_auprc": "macro AUPRC",
    "melanoma_auprc": "melanoma AUPRC",
    "expected_calibration_error": "calibration error",
}
_DRAWN = {  # marker and colour
    GENERATED: ("D", "#D55E00"),
    AUTOENCODER: ("s", "#E69F00"),
    UNSEEN: ("o", "#0072B2"),
    FLOOR: (".", "#56B4E9"),
}
_RULES_SHOWN = {
    "primary": "at equal priors, against oversampling", "argmax": "the old rule, which compares thresholds"
}  # fmt: skip
_GOOD, _BAD, _OPEN, _ALARM = "#0072B2", "#D55E00", FAINT, "#B00020"
VIEW_NAMES = (
    "as it is", "mirrored", "upside down", "half turn", "quarter turn", "3/4 turn", "transposed", "anti-transposed",
)  # fmt: skip
_TITLE = 44  # characters of a chart's title in a line
_COLUMNS, _TILE, _GAP, _MARGIN, _STRIPE, _LINE = 8, 148, 18, 36, 8, 19  # pixels; eight columns are 1,382 wide
_CAPTION = (
    "Above: generated, in the view in which it comes nearest. Below: the training image. The stripe has the class's "
    "colour.",
    "Distances run from 0 (a copy) to 2. Real images of different lesions rarely come under the limit; red: this pair "
    "does.",
)


@drawn
def kernel_distances(result: FidelityResult) -> Figure:
    """Each class's kernel distance to the training images, beside what real images and the decoder reach."""
    labels = list(dict.fromkeys(row.label for row in result.rows if row.label))
    figure = new_figure(9, 1.2 + 0.45 * len(labels))
    axes = figure.subplots()
    present = [name for name in COMPARISONS if name in result.comparisons]
    for offset, name in zip(np.linspace(-0.24, 0.24, len(present)), present, strict=True):
        points = [
            (row.kernel_distance, labels.index(row.label) + offset, 1.96 * (row.kernel_distance_se or 0))
            for row in result.rows
            if row.comparison == name and row.label and row.kernel_distance is not None
        ]
        if points:
            marker, colour = _DRAWN[name]
            x, y, error = zip(*points, strict=True)
            bars = axes.errorbar(x, y, xerr=error, fmt=marker, color=colour, markersize=7, capsize=2)
            bars.set_label(COMPARISONS[name])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("kernel distance to the training images; 0 = the same, 95 % intervals")
    axes.grid(visible=False, axis="y")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=4)
    return figure


@drawn
def differences(results: Sequence[WorthResult]) -> Figure:
    """What adding the synthetic images changes, by score and rule, with intervals; blue better, orange worse."""
    figure = new_figure(10, 1.0 + 2.8 * len(results))
    grid = figure.subplots(len(results), 2, squeeze=False, sharex=True)
    for row, result in enumerate(results):
        for axes, (rule, title) in zip(grid[row], _RULES_SHOWN.items(), strict=True):
            minus = result.differences[rule]
            names = [name for name in SCORES if name in minus]
            for y, name in enumerate(names):
                one = minus[name]
                better, worse = (one.below, one.above) if name in LOWER_IS_BETTER else (one.above, one.below)
                colour = _GOOD if better else _BAD if worse else _OPEN
                spread = [[one.value - one.low], [one.high - one.value]]
                axes.errorbar(one.value, y, xerr=spread, fmt="o", color=colour, capsize=3)
            axes.set_yticks(range(len(names)), [SCORES[name] for name in names])
            axes.invert_yaxis()
            axes.axvline(0, color=INK, linewidth=0.8)
            axes.grid(visible=False, axis="y")
            axes.set_title(f"{fill(result.classifier, _TITLE)}\n{title}", fontsize=10)
            axes.locator_params(axis="x", nbins=6)
            axes.set_xlabel("change by adding synthetic images")
    return figure


@drawn
def ratio_curve(result: DownstreamResult) -> Figure:
    """Balanced accuracy of real + synthetic and of its oversampled control against the synthetic : real ratio."""
    figure = new_figure(7, 3.4)
    axes = figure.subplots()
    ratios = [one.ratio for one in result.ratios]
    for label, scores, colour in (
        ("real + synthetic (d)", [one.synthetic for one in result.ratios], _BAD),
        ("real oversampled alike (c)", [one.oversampled for one in result.ratios], _GOOD),
    ):
        found = [score["balanced_accuracy"] for score in scores]
        axes.plot(ratios, [one.value for one in found], "o-", color=colour, label=label)
        axes.fill_between(ratios, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.15)
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("synthetic images for each real one")
    axes.set_ylabel("balanced accuracy")
    axes.legend()
    return figure


@drawn
def confusions(result: ConsistencyResult) -> Figure:
    """Of generated images and of unseen real ones, side by side; rows sum to 100 %."""
    height = max(4.6, 1.6 + 0.3 * len(result.classes))
    figure = new_figure(max(11, 2.3 * height), height)
    one, other = figure.subplots(1, 2)
    confusion_map(one, result.confusion, "generated images", "asked for", result.classes, counts=False)
    confusion_map(other, result.confusion_of_real, "unseen real images", "diagnosed", result.classes, counts=False)
    return figure


def nearest_pairs(pairs: Sequence[Pair], generated: ImageSet, train: ImageSet) -> Image.Image:
    """A page of the nearest pairs of generated and training images, eight to a row, for a person to judge.

    generated, train: the sets that the pairs' rows count in. Small images are enlarged by a whole factor, pixel for
    pixel, so that nothing is shown that is not there; large ones are reduced.
    """
    block = 2 * _TILE + 7 + 5 * _LINE + _GAP
    top = _MARGIN + 40 + _LINE * len(_CAPTION) + _GAP
    width = 2 * _MARGIN + _COLUMNS * (_TILE + _GAP) - _GAP
    page = Image.new("RGB", (width, top + -(-len(pairs) // _COLUMNS) * block + _MARGIN - _GAP), "white")
    draw, face = ImageDraw.Draw(page), ImageFont.load_default(15)
    title = f"The {len(pairs)} generated images nearest to a training image" if len(pairs) > 1 else "The nearest pair"
    draw.text((_MARGIN, _MARGIN), title, fill=INK, font=ImageFont.load_default(24))
    for number, line in enumerate(_CAPTION):
        draw.text((_MARGIN, _MARGIN + 40 + _LINE * number), line, fill=FAINT, font=face)
    for number, pair in enumerate(pairs):
        x = _MARGIN + number % _COLUMNS * (_TILE + _GAP)
        y = top + number // _COLUMNS * block
        above = apply_view(np.asarray(generated.pixels[pair.generated_row]), pair.view)
        _paste(page, above, x, y, generated.classes.colours[pair.generated_class])
        _paste(
            page, np.asarray(train.pixels[pair.train_row]), x, y + _TILE + 7, train.classes.colours[pair.train_class]
        )
        same = pair.generated_class == pair.train_class
        # Of a long code as much as the column has room for.
        one, other = (shortened(code, face, 100 if same else 64) for code in (pair.generated_class, pair.train_class))
        classes = f"both {one}" if same else f"{one}, {other}"
        # The space that found the pair comes first: its distance is the one that the limit is for.
        spaces = sorted(pair.distances, key=lambda name: name != pair.found_by)
        lines = [
            (f"{number + 1}: {classes}", INK),
            *((f"{name} {_short(pair.distances[name])}", INK) for name in spaces),
            (f"{_short(pair.share_of_limit)} x its limit", _ALARM if pair.near_copy else FAINT),
            (VIEW_NAMES[pair.view], FAINT),
        ]
        for row, (text, colour) in enumerate(lines):
            draw.text((x, y + 2 * _TILE + 11 + _LINE * row), text, fill=colour, font=face)
    return page


def _paste(page: Image.Image, image: np.ndarray, x: int, y: int, colour: str) -> None:
    side, room = image.shape[0], _TILE - _STRIPE
    shown, how = (side * (room // side), Image.Resampling.NEAREST) if side <= room else (room, Image.Resampling.LANCZOS)
    top = y + (_TILE - shown) // 2
    page.paste(colour, (x, top, x + _STRIPE, top + shown))
    page.paste(Image.fromarray(np.ascontiguousarray(image)).resize((shown, shown), how), (x + _STRIPE, top))


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}" if value > 0 else "0"
