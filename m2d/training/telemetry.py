"""What a run reports: JSON lines, CSV and PNG always, wandb and TensorBoard where asked, lines on the driver's console.

The first worker holds one `Telemetry` and tells it everything; the report and the `Console` read what it wrote. The
only module that knows wandb.
"""

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from m2d.errors import first_line
from m2d.experiment import Experiment
from m2d.files.atomic import csv_text, whole_records, write_whole
from m2d.files.progress import in_notebook
from m2d.training.settings import TrainConfig, as_dict

logger = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]
# wandb's own process writes blocks of 32 KiB and dies with ours, so an offline file lacks what came last; a record
# takes about 1 KiB. Online it has been sent.
OFFLINE_FORGETS = 100
LONGEST_RECORD = 2**16  # bytes; a step's are about 1 KiB
PLAIN_SECONDS = 15.0  # between two plain lines of progress
SHOWN = {f"loss/{name}": name for name in ("diffusion", "reconstruction", "alignment", "perceptual")} | {
    "images_per_s": "images/s"
}


class MetricsLog:
    """metrics/NAME.jsonl, one line a record, and the same as NAME.csv."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"

    def resume_at(self, step: int) -> None:
        """Drop records of steps that will be taken again (after `step`)."""
        kept = [record for record in self.read() if record["step"] <= step]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the record of a step, with the time."""
        self.append({"step": step, "time": round(time.time(), 3), **values})

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record, which has its `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole record."""
        return whole_records(self.path.read_bytes()) if self.path.is_file() else []

    def last(self) -> dict[str, Any] | None:
        """The newest whole record, without those before it, of which a long run has hundreds of thousands."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_RECORD))
            return next(reversed(whole_records(file.read())), None)
        return None

    def write_csv(self) -> None:
        """The records as a table; a column for every name that occurs."""
        self.path.with_suffix(".csv").write_text(csv_text(self.read()), encoding="utf-8", newline="")


class Preparing:
    """What the first worker does before the first step, once a second at most; the driver's `Console` shows it."""

    def __init__(self, experiment: Path, *, leads: bool = True) -> None:
        """leads: False: of another worker, which tells nothing."""
        self.log = MetricsLog(experiment / "logs", "preparing")
        self._leads, self._told = leads, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """So much of `what` is done."""
        if self._leads and (done >= total or time.monotonic() - self._told >= 1):
            self._told = time.monotonic()
            self.log.append({"step": 0, "time": round(time.time(), 3), "what": what, "done": done, "total": total})


class Telemetry:
    """One voice of a run: records in metrics/, pictures in visualizations/, and the same to every sink.

    A sink never raises: a lost connection must not stop training. `forgets`: how many records of each kind a killed
    process may have lost although the sink was told them.
    """

    def __init__(self, folder: Path, sinks: "Sequence[Wandb | TensorBoard]" = ()) -> None:
        """folder: the experiment's."""
        self.folder = folder
        self.sinks = list(sinks)
        names = ("train", "validation", "gradients", "features")
        self.logs = {name: MetricsLog(folder / "metrics", name) for name in names}
        self.histograms = MetricsLog(folder / "metrics", "histograms")

    @classmethod
    def of(cls, config: TrainConfig, experiment: Experiment) -> "Telemetry":
        """What a run asked for: records and pictures, and wandb and TensorBoard as its settings say."""
        sinks: list[Wandb | TensorBoard] = []
        if config.use_wandb:
            info = experiment.info()
            known = {name: info.get(name) for name in ("dataset", "feature_extractor", "versions", "git", "degraded")}
            wandb = Wandb(
                experiment.path,
                config.wandb_project,
                experiment.name,
                config.wandb_mode,
                {**as_dict(config), **known},
                finish_timeout_s=config.telemetry.finish_timeout_s,
                group=config.wandb_group,
            )
            sinks.append(wandb)
        if config.telemetry.tensorboard:
            sinks.append(TensorBoard(experiment.path))
        return cls(experiment.path, sinks)

    def resume_at(self, step: int) -> None:
        """Drop records of steps that will be taken again (after `step`); repeat the last ones to sinks that forget."""
        for log in [*self.logs.values(), self.histograms]:
            log.resume_at(step)
        for sink in self.sinks:
            if not sink.forgets:
                continue
            first = 0  # step of which something may be lost
            for log in self.logs.values():
                records = log.read()[-sink.forgets :]
                first = max(first, records[0]["step"] if len(records) == sink.forgets else 0)
                for record in records:
                    sink.scalars(record["step"], {k: v for k, v in record.items() if k not in ("step", "time")})
            for record in self.histograms.read()[-sink.forgets :]:
                sink.histogram(**{name: record[name] for name in ("step", "name", "counts", "edges")})
            for path in sorted((self.folder / "visualizations").glob("*/step_*.png")):
                if first <= (taken := int(path.stem.removeprefix("step_"))) <= step:
                    sink.picture(taken, path.parent.name, path.read_bytes(), "")

    def scalars(self, log: str, step: int, values: dict[str, float]) -> None:
        """Append a record to metrics/LOG.jsonl."""
        self.logs[log].write(step, values)
        for sink in self.sinks:
            sink.scalars(step, values)

    def picture(self, step: int, name: str, image: Image.Image | bytes, caption: str = "") -> Path:
        """Keep a picture as visualizations/NAME/step_00000042.png. image: a Pillow image, or a PNG's bytes."""
        if isinstance(image, Image.Image):
            image.save(buffer := io.BytesIO(), format="PNG")
            image = buffer.getvalue()
        path = self.folder / "visualizations" / name / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, image)
        for sink in self.sinks:
            sink.picture(step, name, image, caption)
        return path

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Counts [n] between edges [n + 1], kept in metrics/histograms.jsonl."""
        self.histograms.append({"step": step, "name": name, "counts": list(counts), "edges": list(edges)})
        for sink in self.sinks:
            sink.histogram(step, name, counts, edges)

    def flush(self) -> None:
        """Before a checkpoint is kept, whose steps are not taken again."""
        for sink in self.sinks:
            sink.flush()

    def finish(self, best: Path | None = None) -> None:
        """Write the tables, and let every sink send what is left. best: a checkpoint for those that keep one."""
        for log in self.logs.values():
            if log.read():
                log.write_csv()
        for sink in self.sinks:
            sink.finish(best)


@dataclass(frozen=True, repr=False)
class WandbKey:
    """The driver's key for wandb and the server it is for, on their way to the first worker, on whichever node that is.

    Part of the worker's arguments, which go through Ray's object store. Its text is without the key, for Ray shows the
    text of a train loop's configuration.
    """

    key: str
    base_url: str

    def __repr__(self) -> str:
        return "WandbKey(***)"  # a base URL may hold a password

    def use(self) -> None:
        """Let wandb in this process have it. The driver's wins over the node's: who starts a run owns it."""
        os.environ["WANDB_API_KEY"], os.environ["WANDB_BASE_URL"] = self.key, self.base_url


def find_wandb_key(warn: Callable[[str], None]) -> WandbKey | None:
    """What wandb would find on this machine: in WANDB_API_KEY, its settings or ~/.netrc. Warns where there is none."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    user_and_key = get_netrc_auth(settings.base_url) or ("", "")
    key = os.environ.get("WANDB_API_KEY") or settings.api_key or user_and_key[1]
    if key:
        return WandbKey(key, settings.base_url)
    warn(
        "wandb has no key on this machine, so the run is kept offline unless the first worker's node has one; run "
        "`wandb login` here, set WANDB_API_KEY, or use --wandb_mode offline"
    )
    return None


class Wandb:
    """A wandb run that never stops training: a failure is reported once, and wandb is off from then on.

    The run's id is the experiment's name, so a resumed experiment continues the same run. Its horizontal axis is
    `step`, ours: wandb's own counter refuses steps that are taken again after a restart.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        mode: Mode,
        config: dict[str, Any],
        finish_timeout_s: float = 120.0,
        connect_timeout_s: float = 30.0,
        group: str | None = None,
    ) -> None:
        """folder: the experiment's, which gets a wandb/. An online run that cannot connect goes offline."""
        self._run: Any = None
        self._name = name
        self.forgets = OFFLINE_FORGETS if mode == "offline" else 0
        self._timeout_s = finish_timeout_s
        os.environ.setdefault("WANDB_SILENT", "true")

        def start(mode: Mode) -> Any:
            import wandb

            # Ray has the worker's console in its own logs.
            settings = wandb.Settings(init_timeout=connect_timeout_s, console="off")
            identity: dict[str, Any] = {"project": project, "name": name, "id": name, "group": group, "resume": "allow"}
            terminal = sys.stdin
            with open(os.devnull) as sys.stdin:  # wandb asks a terminal for a key that it lacks, and waits
                try:
                    return wandb.init(**identity, mode=mode, dir=str(folder), config=config, settings=settings)
                finally:
                    sys.stdin = terminal

        try:
            self._run = start(mode)
        except Exception as error:
            reason = first_line(error)
            try:
                if mode != "online":
                    raise
                import wandb

                wandb.teardown()  # its service still holds the run's id
                self._run = start("offline")
                self.forgets = OFFLINE_FORGETS
                logger.warning(
                    "wandb cannot be used online, so this run is kept offline (%s); send it later with: wandb sync %s",
                    *(reason, folder / "wandb" / "offline-run-*"),
                )
            except Exception:
                logger.warning("wandb is off for this run: %s", reason)
        self._try("set up", lambda run: (run.define_metric("step"), run.define_metric("*", step_metric="step")))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        self._log(step, lambda wandb: values)

    def picture(self, step: int, name: str, png: bytes, caption: str) -> None:
        """A PNG."""
        image = Image.open(io.BytesIO(png))
        self._log(step, lambda wandb: {f"pictures/{name}": wandb.Image(image, caption=caption or None)})

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Counts [n] between edges [n + 1]."""
        binned = (np.asarray(counts), np.asarray(edges))
        self._log(step, lambda wandb: {name: wandb.Histogram(np_histogram=binned)})

    def flush(self) -> None:
        """Does nothing: wandb's own process holds what it was told."""

    def finish(self, best: Path | None) -> None:
        """The run has ended. best: a checkpoint to upload. Waits for what is left to send, but not forever."""
        if self._run is None:
            return

        def send(run: Any) -> None:
            if best is not None:
                import wandb

                artifact = wandb.Artifact(f"{self._name}-best", type="model", metadata={"checkpoint": best.name})
                artifact.add_dir(str(best))
                run.log_artifact(artifact)
            run.finish()

        sending = threading.Thread(target=self._try, args=("send the end of the run", send), daemon=True)
        sending.start()
        sending.join(self._timeout_s)
        if sending.is_alive():
            logger.warning("wandb was still sending after %g s; `wandb sync` sends the rest", self._timeout_s)
        self._run = None

    def _log(self, step: int, make: Callable[[Any], Mapping[str, Any]]) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({"step": step, **make(wandb)})

        self._try(f"log step {step}", send)

    def _try(self, what: str, call: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            logger.warning("wandb could not %s and is off from here on: %s", what, error)
            self._run = None


class TensorBoard:
    """Event files that `tensorboard --logdir EXPERIMENT/tensorboard` reads."""

    forgets = 0  # flushed before each checkpoint

    def __init__(self, folder: Path) -> None:
        """folder: the experiment's."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self.flush = self._writer.flush

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes, caption: str) -> None:
        """A PNG."""
        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Each bin stands as its middle: TensorBoard's summary wants sums that counts do not hold."""
        middles = (np.asarray(edges[:-1]) + np.asarray(edges[1:])) / 2
        if total := int(sum(counts)):
            first, second = float((middles * counts).sum()), float((middles**2 * counts).sum())
            self._writer.add_histogram_raw(
                name, float(edges[0]), float(edges[-1]), total, first, second, list(edges[1:]), list(counts), step
            )

    def finish(self, best: Path | None) -> None:
        """The run has ended."""
        self._writer.close()


class Console:
    """What the driver prints: facts, warnings, and a bar on a terminal or plain lines of progress anywhere else."""

    def __init__(self) -> None:
        self.rich = RichConsole(stderr=False, highlight=False, soft_wrap=True)
        self.interactive = sys.stdout.isatty() and not in_notebook()

    def say(self, line: str) -> None:
        """One fact, one line."""
        self.rich.print(line, markup=False)

    def warn(self, line: str) -> None:
        """A degraded path, reported once at the start."""
        self.rich.print(f"WARNING: {line}", style="yellow", markup=False)

    @contextmanager
    def progress(self, experiment: Path, total_steps: int, steps_per_epoch: int, start: int) -> Iterator[None]:
        """Follow a run's records, those of its preparations first, until the block ends."""
        stop, since = threading.Event(), time.time() - 0.001  # now: the thread may start after the first record
        arguments = (experiment, total_steps, steps_per_epoch, start, since, stop)
        thread = threading.Thread(target=self._follow, args=arguments, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)

    def _follow(
        self, experiment: Path, total: int, steps_per_epoch: int, start: int, since: float, stop: threading.Event
    ) -> None:
        log, before = MetricsLog(experiment / "metrics", "train"), Preparing(experiment).log
        epochs, shown, at, ended = -(-total // steps_per_epoch), start, 0.0, False
        first: dict[str, Any] | None = None
        prepared = ""
        columns = (TextColumn("epoch {task.fields[epoch]}"), TextColumn("step"), MofNCompleteColumn(), BarColumn())
        words = (TextColumn("{task.fields[left]}"), TextColumn("{task.description}"))
        with Progress(*columns, *words, console=self.rich, disable=not self.interactive) as bar:
            task = bar.add_task("starting workers", total=total, completed=start, epoch=f"-/{epochs}", left="")
            while not ended:
                ended = stop.wait(1.0)
                record = log.last()
                if record is None or record["time"] < since:  # of an earlier run, whose steps are taken again
                    work = before.last()
                    if work is not None and work["time"] >= since:
                        line = f"{work['what']}: {work['done']:,} of {work['total']:,}"
                        if self.interactive:
                            bar.update(task, description=line)
                        elif line != prepared and (ended or time.monotonic() - at >= PLAIN_SECONDS):
                            prepared, at = line, time.monotonic()
                            self.say(line)
                    continue
                first = record if first is None else first
                step, left = record["step"], time_left(first, record, total)
                losses = "  ".join(f"{label} {record[name]:.3g}" for name, label in SHOWN.items() if name in record)
                losses += f"  skipped {record['skipped_steps']:.0f}" if record.get("skipped_steps") else ""
                if self.interactive:
                    epoch = f"{min(int(record['epoch']) + 1, epochs)}/{epochs}"
                    bar.update(task, completed=step, epoch=epoch, description=losses, left=left)
                elif step > shown and (ended or time.monotonic() - at >= PLAIN_SECONDS):
                    shown, at = step, time.monotonic()
                    self.say(f"epoch {record['epoch']:.2f}/{epochs}  step {step}/{total}  {losses}  {left}")


def time_left(first: Mapping[str, Any], record: Mapping[str, Any], total: int) -> str:
    """`12 min left`, by the steps since the first record: starting the workers says nothing of it; "" without any."""
    steps, seconds = record["step"] - first["step"], record["time"] - first["time"]
    if steps <= 0:
        return ""
    remaining = (total - record["step"]) * seconds / steps
    return f"{remaining / 3600:.1f} h left" if remaining >= 5400 else f"{remaining / 60:.1f} min left"
