"""What a card tells of an evaluation.json. Light: no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2d.errors import ConfigError, first_line


@dataclass(frozen=True)
class Evaluated:
    """What of an evaluation.json a card tells."""

    verdicts: list[str]  # sentences, with their intervals
    lines: list[str]
    images: list[dict[str, Any]]  # of each set: name, images and lesions by class


def read_evaluation(file: Path) -> Evaluated:
    """Raises ConfigError for a file that is none."""
    try:
        return _evaluated(json.loads(file.expanduser().read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"evaluation: {file} cannot be read as an evaluation.json ({first_line(error)}); name another one"
        ) from None


def _evaluated(document: dict[str, Any]) -> Evaluated:
    verdicts = [f"{one['classifier']}: {one['verdict']['sentence']}" for one in document.get("worth") or []]
    verdicts = verdicts or [
        f"{one['classifier']}: {one['verdict']['sentence']}" for one in document.get("downstream") or []
    ]
    lines = []
    for fidelity in (document.get("fidelity") or [])[:1]:
        of_all = {row["comparison"]: row for row in fidelity["rows"] if row["label"] == "all"}
        said = {"generated": "generated images", "autoencoder": "reconstructions", "unseen": "unseen real images"}
        told = [
            f"{text} {of_all[name]['kernel_distance']:.3f} (standard error {of_all[name]['kernel_distance_se']:.3f})"
            for name, text in said.items()
            if name in of_all and of_all[name].get("kernel_distance") is not None
        ]
        lines += (
            [f"Kernel distance to the training images, features of {fidelity['extractor']}: {', '.join(told)}."]
            if told
            else []
        )
    consistency = document.get("consistency") or {}
    if made := consistency.get("mean_agreement"):
        real = consistency["mean_recall_of_real"]
        lines.append(
            "A classifier of real images finds the asked class in "
            f"{_share(made)} of the generated images, and the diagnosis in {_share(real)} of unseen real ones (means "
            "over the classes)."
        )
    if memorization := document.get("memorization"):
        lines.append(f"Memorisation: {memorization['verdict']}.")
    if privacy := document.get("privacy"):
        lines.append(f"Privacy of the training lesions: {privacy['verdict']}.")
    return Evaluated(verdicts, lines, document.get("images") or [])


def _share(estimate: dict[str, float]) -> str:
    return "{value:.0%} [{low:.0%}, {high:.0%}]".format(**estimate)
