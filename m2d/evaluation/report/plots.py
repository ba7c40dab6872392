"""Figures of the evaluation report, as PNG bytes. Knows results, no files and no HTML."""

from collections.abc import Sequence

import numpy as np

from m2d.evaluation.classifiers.compare import DownstreamResult
from m2d.evaluation.consistency import ConsistencyResult
from m2d.evaluation.fidelity import AUTOENCODER, FLOOR, GENERATED, UNSEEN, FidelityResult
from m2d.metrics.scores import LOWER_IS_BETTER
from m2d.plots.charts import confusion_map
from m2d.plots.style import FAINT, INK, new_figure, png, styled

NAMES = {
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
_GOOD, _BAD, _OPEN = "#0072B2", "#D55E00", FAINT


@styled()
def kernel_distances(result: FidelityResult) -> bytes:
    """Each class's kernel distance to the training images, beside what real images and the decoder reach."""
    labels = list(dict.fromkeys(row.label for row in result.rows if row.label))
    figure = new_figure(9, 1.2 + 0.45 * len(labels))
    axes = figure.subplots()
    present = [name for name in NAMES if name in result.comparisons]
    for offset, name in zip(np.linspace(-0.24, 0.24, len(present)), present, strict=True):
        points = [
            (row.kernel_distance, labels.index(row.label) + offset, 1.96 * (row.kernel_distance_se or 0))
            for row in result.rows
            if row.comparison == name and row.label and row.kernel_distance is not None
        ]
        if points:
            marker, colour = _DRAWN[name]
            x, y, error = zip(*points, strict=True)
            axes.errorbar(
                x,
                y,
                xerr=error,
                fmt=marker,
                color=colour,
                markersize=7,
                capsize=2,
                label=NAMES[name],
            )
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("kernel distance to the training images; 0 = the same, 95 % intervals")
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=4)
    return png(figure)


@styled()
def differences(results: Sequence[DownstreamResult]) -> bytes:
    """What adding the synthetic images changes, by score and control, with intervals; blue better, orange worse."""
    figure = new_figure(10, 1.0 + 2.6 * len(results))
    grid = figure.subplots(len(results), 2, squeeze=False, sharex=True)
    for row, result in enumerate(results):
        sides = ((result.minus_c, "against oversampling (c)"), (result.minus_b, "against class weights (b)"))
        for axes, (minus, title) in zip(grid[row], sides, strict=True):
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
            axes.set_title(f"{result.classifier}\n{title}", fontsize=10)
            axes.set_xlabel("change by adding synthetic images")
    return png(figure)


@styled()
def ratio_curve(result: DownstreamResult) -> bytes:
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
    return png(figure)


@styled()
def confusions(result: ConsistencyResult) -> bytes:
    """Of generated images and of unseen real ones, side by side; rows sum to 100 %."""
    figure = new_figure(11, 4.6)
    one, other = figure.subplots(1, 2)
    confusion_map(one, result.confusion, "generated images", "asked for", counts=False)
    confusion_map(other, result.confusion_of_real, "unseen real images", "diagnosed", counts=False)
    return png(figure)
