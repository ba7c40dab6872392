"""Tables of the evaluation: rows for the CSV files and, the same rows, for the page. Knows results alone."""

from collections.abc import Iterable

from m2d.classes import CLASSES
from m2d.evaluation.downstream_result import DownstreamResult, Estimate
from m2d.evaluation.evaluation import Evaluation
from m2d.evaluation.fidelity import FidelityResult
from m2d.evaluation.memorization import MemorizationResult
from m2d.evaluation.report_plots import NAMES, SCORES

Row = dict[str, str | int | float | None]
_METRICS = (
    "kernel_distance", "kernel_distance_se", "frechet_distance", "precision", "recall", "density", "coverage",
    "vendi_reference", "vendi_other",
)  # fmt: skip
OVERALL = "all"


def fidelity_rows(results: Iterable[FidelityResult]) -> list[Row]:
    """A row for each extractor, class and comparison."""
    return [
        {
            "extractor": one.extractor, "class": row.label or OVERALL, "comparison": NAMES[row.comparison],
            "n_reference": row.n_reference, "n_other": row.n_other, "n_matched": row.n_matched,
            **{name: getattr(row, name) for name in _METRICS},
            "left_out": "; ".join(sorted(set(row.left_out.values()))),
        }
        for one in results
        for label, row_of in one.side_by_side.items()
        for row in row_of.values()
    ]  # fmt: skip


def memorization_rows(result: MemorizationResult) -> list[Row]:
    """A row for each class, and overall."""
    rows: list[Row] = []
    for code, one in [(OVERALL, result.overall), *result.classes.items()]:
        made = one.generated["either"]
        unseen = one.test["either"] if one.test is not None else None
        rows.append(
            {
                "class": code, "images": made.images, "share": made.value,
                "share_low": made.low, "share_high": made.high,
                "share_of_unseen_real": None if unseen is None else unseen.value,
                "unseen_low": None if unseen is None else unseen.low,
                "unseen_high": None if unseen is None else unseen.high,
                **{f"nearness_{space}": value for space, value in one.nearness.items()},
                "flagged": "yes" if one.flagged else "no",
            }
        )  # fmt: skip
    return rows


def downstream_rows(results: Iterable[DownstreamResult]) -> list[Row]:
    """A row for each classifier, arm (or difference) and score."""
    rows: list[Row] = []
    for result in results:
        sides = [(letter, arm.scores) for letter, arm in result.arms.items()]
        sides += [("d - b", result.minus_b), ("d - c", result.minus_c)]
        for one in result.ratios:
            sides += [(f"d at ratio {one.ratio:g}", one.synthetic), (f"c at ratio {one.ratio:g}", one.oversampled)]
            sides += [(f"d - c at ratio {one.ratio:g}", one.minus_c)]
        for arm, scores in sides:
            rows += [{"classifier": result.classifier, "arm": arm, "score": name, **_spread(value)}
                     for name, value in scores.items()]  # fmt: skip
    return rows


def class_rows(result: Evaluation) -> list[Row]:
    """A row for each class with the main numbers of every part: what a reader compares classes by."""
    counts = {side.name: side for side in result.images}
    rows: list[Row] = []
    for code in CLASSES:
        if code not in counts["train"].images:
            continue
        row: Row = {"class": code}
        for name, side in counts.items():
            row[f"{name}_images"] = side.images.get(code, 0)
        for one in result.fidelity[:1]:
            for name, found in one.side_by_side.get(code, {}).items():
                row[f"kernel_distance_{name}"] = found.kernel_distance
        if result.memorization is not None and code in result.memorization.classes:
            row["near_copy_share"] = result.memorization.classes[code].generated["either"].value
        for found_arms in result.downstream[:1]:
            for letter, arm in found_arms.arms.items():
                estimate = arm.scores.get(f"recall_{code}")
                row[f"recall_{letter}"] = None if estimate is None else estimate.value
        if result.consistency is not None and code in result.consistency.agreement:
            row["class_agreement"] = result.consistency.agreement[code].value
        rows.append(row)
    heads = list(dict.fromkeys(name for row in rows for name in row))
    return [{head: row.get(head) for head in heads} for row in rows]


def score_table(result: DownstreamResult) -> list[list[str]]:
    """For the page: a row for each arm and difference, its main scores with intervals as text."""
    names = [name for name in SCORES if name in result.minus_c]
    table = [["trained on", "images", *[SCORES[name] for name in names]]]
    for letter, arm in result.arms.items():
        texts = [_text(arm.scores[name]) if name in arm.scores else "" for name in names]
        table.append([f"{letter}: {arm.description}", f"{sum(arm.images.values()):,}", *texts])
    for what, minus in (("d - b", result.minus_b), ("d - c", result.minus_c)):
        table.append([what, "", *[minus[name].signed for name in names]])
    return table


def recall_table(result: DownstreamResult) -> list[list[str]]:
    """For the page: recall of each class by arm."""
    codes = [code for code in CLASSES if code in result.test]
    table = [["trained on", *[f"{code} ({result.test[code]})" for code in codes]]]
    for letter, arm in result.arms.items():
        found = [arm.scores.get(f"recall_{code}") for code in codes]
        table.append([f"{letter}: {arm.description}", *["" if one is None else _text(one) for one in found]])
    return table


def _spread(one: Estimate) -> Row:
    return {"value": one.value, "low": one.low, "high": one.high}


def _text(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"  # the page breaks the line before the bracket
