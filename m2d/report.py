"""report.html of an experiment: one self-contained page of what was trained on what, how it went, and what came out."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from m2d.classes import DIAGNOSES
from m2d.experiment import Experiment
from m2d.training.telemetry import MetricsLog

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1000px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: left }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums }} img {{ max-width: 100% }}
.swatch {{ display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid #888 }}
.note {{ background: #fff6dd; padding: .5rem .8rem; border-left: 4px solid #e69f00; margin: .4rem 0 }}
.wide {{ overflow-x: auto }}
</style>
<h1>{title}</h1><p>{summary}</p>{notes}
<h2>Synthetic samples</h2><p>{samples_text}</p>
<img alt="synthetic samples, a row for each class" src="{samples}">
<h2>Training</h2><img alt="loss curves" src="{curves}">
<h2>Validation</h2><div class="wide"><table>{validation}</table></div>
<h2>Images by class</h2><div class="wide"><table>{counts}</table></div>
<h2>Versions</h2><p>{versions}</p></html>
"""
CURVES = {
    "VAE": ("loss/reconstruction", "loss/perceptual"),
    "U-Net": ("loss/diffusion", "loss/alignment", "loss/manifold"),
    "learning rate": ("learning_rate/autoencoder", "learning_rate/denoiser"),
}


def write_report(experiment: Experiment, samples: Path) -> Path:
    """Write report.html into the experiment. samples: the folder of a generation run, with its contact sheet."""
    info = experiment.info()
    metrics = experiment.path / "metrics"
    curves = _curves(MetricsLog(metrics, "train").read())
    (experiment.path / "visualizations" / "curves.png").write_bytes(curves)
    dataset = info["dataset"]
    page = PAGE.format(
        title=html.escape(f"M2D: {experiment.name}"),
        summary=html.escape(
            f"{info['total_steps']} steps on {info['device']}, {info['precision']}, "
            f"on {dataset['images']} images ({dataset['rejected']} files rejected, "
            f"{dataset['duplicates']} duplicates left out)."
        ),
        notes="".join(f'<p class="note">{html.escape(line)}</p>' for line in info.get("degraded", [])),
        samples_text=html.escape(_samples_text(samples)),
        samples=_embed((samples / "contact_sheet.png").read_bytes()),
        curves=_embed(curves),
        validation=_validation_rows(MetricsLog(metrics, "validation").read()),
        counts=_count_rows(dataset["counts"]),
        versions=html.escape(", ".join(f"{name} {version}" for name, version in info["versions"].items() if version)),
    )
    path = experiment.path / "report.html"
    path.write_text(page, encoding="utf-8")
    experiment.publish("report.html")
    return path


def _samples_text(samples: Path) -> str:
    recipe = json.loads((samples / "generation.json").read_text(encoding="utf-8"))
    settings = recipe.get("recipe", recipe)
    known = ("solver", "steps", "guidance_scale", "guidance_interval", "feature", "feature_temperature", "seed")
    return "Settings: " + ", ".join(f"{key} {settings[key]}" for key in known if key in settings)


def _curves(records: list[dict[str, Any]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), label=name.partition("/")[2])
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _validation_rows(records: list[dict[str, Any]]) -> str:
    columns = {
        "val/psnr_db": "reconstruction PSNR (dB)",
        "val/perceptual": "perceptual distance",
        "val/velocity_mse": "velocity error (averaged U-Net)",
    }
    head = "<tr><th>step</th>" + "".join(f"<th>{label}</th>" for label in columns.values()) + "</tr>"
    rows = [
        f'<tr><td class="n">{record["step"]}</td>'
        + "".join(f'<td class="n">{record[name]:.3f}</td>' if name in record else "<td></td>" for name in columns)
        + "</tr>"
        for record in records
    ]
    return head + "".join(rows)


def _count_rows(counts: dict[str, dict[str, int]]) -> str:
    head = "<tr><th>class</th>" + "".join(f"<th>{split}</th>" for split in counts) + "</tr>"
    rows = []
    for diagnosis in DIAGNOSES:
        numbers = "".join(f'<td class="n">{counts[split][diagnosis.code]}</td>' for split in counts)
        swatch = f'<span class="swatch" style="background:{diagnosis.colour}"></span>'
        rows.append(f"<tr><td>{swatch}{diagnosis.code} {html.escape(diagnosis.name)}</td>{numbers}</tr>")
    return head + "".join(rows)


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
