"""`experiments clean`: what would go and why the rest stays, the question, and the removal."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2d.errors import ExperimentError
from m2d.experiments.clean_plan import CleanPlan, Removal, plan_caches, plan_experiments
from m2d.experiments.removal import remove
from m2d.experiments.settings import CleanConfig
from m2d.experiments.wording import STATE_STYLES, open_console, print_json, size_text, time_text


def clean_command(config: CleanConfig) -> None:
    """Remove old experiments, or caches, and say what was removed.

    Raises ExperimentError where it cannot ask, the root is remote or not there, or the disk refuses.
    """
    if "://" in config.experiments_dir:
        raise ExperimentError(
            "experiments_dir: clean works on folders of this machine, where it can tell what runs; "
            "remove remote experiments with the tool of your storage"
        )
    plan = plan_caches(config) if config.caches else plan_experiments(config)
    console = Console(quiet=True) if config.json else open_console()
    _print_plan(console, plan, config)
    removed: list[Removal] = []
    refused: list[tuple[Removal, str]] = []
    if plan.removals and not config.dry_run and _agreed(console, plan, config):
        for removal in plan.removals:
            reason = remove(removal)
            if reason is None:
                removed.append(removal)
                console.print(f"removed {removal.label}", markup=False)
            else:
                refused.append((removal, reason))
                console.print(Text(f"left alone: {removal.label}: {reason}", "yellow"))
        console.print(f"freed {size_text(_total(removed))}")
    if config.json:
        print_json(_as_values(plan, removed, refused, dry_run=config.dry_run))


def _print_plan(console: Console, plan: CleanPlan, config: CleanConfig) -> None:
    for name, reason in plan.kept:
        console.print(Text(f"stays: {name}: {reason}", "dim"))
    if not plan.removals:
        console.print("nothing to remove")
        return
    verb = "would remove" if config.dry_run else "to remove"
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in (verb, "frees", "what it is"):
        table.add_column(title, justify="right" if title == "frees" else "left", overflow="fold")
    for removal in plan.removals:
        table.add_row(Text(removal.label), size_text(removal.size), _what(removal))
    table.add_row("in all", size_text(_total(plan.removals)), "", style="bold")
    console.print(table)


def _what(removal: Removal) -> Text:
    if removal.record is None:
        return Text("left by a clean that was cut off", "dim")
    text = Text(removal.record.state, STATE_STYLES[removal.record.state])
    text.append(f", started {time_text(removal.record.started)}", "not bold default")
    if removal.generated:
        text.append(f", {size_text(removal.generated)} of generated images", "yellow")
    return text


def _agreed(console: Console, plan: CleanPlan, config: CleanConfig) -> bool:
    if config.yes:
        return True
    if not sys.stdin.isatty():
        raise ExperimentError("clean asks first and there is no terminal to answer on; add --yes, or --dry_run to look")
    one, many = ("cache", "caches") if config.caches else ("directory", "directories")
    count = len(plan.removals)
    question = f"Remove {count} {one if count == 1 else many}, {size_text(_total(plan.removals))}? [y/N] "
    console.print(question, end="", markup=False)
    try:
        answer = input().strip().lower()
    except EOFError:
        answer = ""
    if answer in ("y", "yes"):
        return True
    console.print("nothing was removed")
    return False


def _total(removals: Sequence[Removal]) -> int:
    return sum(removal.size for removal in removals)


def _as_values(
    plan: CleanPlan, removed: Sequence[Removal], refused: Sequence[tuple[Removal, str]], *, dry_run: bool
) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "to_remove": [{"name": removal.label, "bytes": removal.size} for removal in plan.removals],
        "removed": [removal.label for removal in removed],
        "freed_bytes": _total(removed),
        "left_alone": [{"name": removal.label, "reason": reason} for removal, reason in refused],
        "kept": [{"name": name, "reason": reason} for name, reason in plan.kept],
    }
