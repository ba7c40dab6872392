"""What to do next with an experiment, with the exact command."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from m2d.experiments.measures import seconds_left
from m2d.experiments.record import FINISHED, TRAIN, Record
from m2d.experiments.wording import duration_text
from m2d.files.paths import copy_around

BLANKED = "***"  # of m2d.files.storage.without_secrets


def next_step(record: Record, all_records: Sequence[Record]) -> tuple[str, str | None]:
    """(what to do in one sentence, the command for it or None). all_records: of the same root, oldest first."""
    checkpoint = _checkpoint(record)
    if record.state == "running":
        left = seconds_left(record, record.files.last_record(TRAIN))
        return "it is training" + (f"; about {duration_text(left)} left" if left is not None else ""), None
    if record.state == "unknown":
        return "its record says running; if it is not, its command goes on with it", resume_command(record)
    if record.state == "broken":
        if checkpoint:
            return f"{record.problem}; it cannot be resumed, its checkpoint still generates", _generate(checkpoint)
        return f"{record.problem}; nothing can be done with it, and clean removes it in its turn", None
    if record.state in FINISHED:
        why = "" if record.state == "done" else "a --fresh run took its place; "
        if checkpoint is None:
            return f"{why}it holds no checkpoint", None
        return f"{why}its {'best ' if checkpoint.endswith('best') else ''}checkpoint generates", _generate(checkpoint)
    return _go_on(record, all_records)


def resume_command(record: Record) -> str | None:
    """The command of the record as a shell takes it, without --fresh; None where the record has none.

    For a job that ran in a copy it is to be given in the directory that was submitted.
    """
    recorded = record.info.get("command")
    if not isinstance(recorded, str) or not recorded.strip():
        return None
    try:
        words = _without_fresh(shlex.split(recorded))
    except ValueError:
        return recorded
    script = Path(words[0])
    if script.name == "__main__.py":
        start = ["python", "-m", script.parent.name]
    elif script.suffix == ".py":
        start = ["python", words[0]]
    else:
        start = [script.name]
    command, folder = shlex.join([*start, *words[1:]]), record.info.get("cwd")
    if not isinstance(folder, str):
        return command
    if copy_around(Path(folder)) is not None:  # nobody can go back there; the submitted directory is not on record
        return f"ray job submit --working-dir . -- {command}"
    return f"cd {shlex.quote(folder)} && {command}"


def _go_on(record: Record, all_records: Sequence[Record]) -> tuple[str, str | None]:
    """For one that is neither running nor finished. A command goes on with the newest such of its name."""
    rivals = [r for r in all_records if r.family == record.family and r.state not in (*FINISHED, "broken")]
    if rivals and rivals[-1].name != record.name:
        newer = f"its command would go on with {rivals[-1].name}, the newest unfinished one of this name"
        checkpoint = _checkpoint(record)
        if checkpoint is None:
            return f"{newer}; this one holds no checkpoint", None
        return f"{newer}; this one's checkpoint still generates", _generate(checkpoint)
    command = resume_command(record)
    if command is None:
        return "its command was not recorded; repeat it to go on", None
    notes = []
    if record.info.get("cwd") is None:
        notes.append("in the folder it was started in")
    if BLANKED in command:
        notes.append(f"with your keys where {BLANKED} stands")
    where = f" ({', '.join(notes)})" if notes else ""
    if record.state == "failed":
        return f"no checkpoint yet: its command begins at step 0 again{where}", command
    return f"its command goes on at step {record.checkpoint_step:,}{where}", command


def _checkpoint(record: Record) -> str | None:
    """The best checkpoint, or the newest."""
    if not record.checkpoints:
        return None
    root = record.experiment.remote or str(record.experiment.path)
    best = record.best
    if best is None or best[0] not in record.checkpoints:
        return f"{root}/checkpoints/{record.checkpoints[-1]}"
    return f"{root}/checkpoints/{best[0] if record.experiment.remote else 'best'}"  # stores know no links


def _generate(checkpoint: str) -> str:
    return shlex.join(["python", "-m", "m2d", "generate", "--checkpoint", checkpoint])


def _without_fresh(words: list[str]) -> list[str]:
    """--fresh would begin anew instead of going on."""
    kept: list[str] = []
    skip = False
    for word, following in zip(words, [*words[1:], ""]):
        if skip:
            skip = False
        elif word.partition("=")[0] == "--fresh":
            skip = "=" not in word and bool(following) and not following.startswith("-")
        else:
            kept.append(word)
    return kept
