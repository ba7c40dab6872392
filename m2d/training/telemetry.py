"""What a run says of itself: JSON lines, CSV and PNG always, wandb and TensorBoard where asked.

The first worker holds one `Telemetry` and tells it everything; the report and the console read what it wrote. The only
module that knows wandb.
"""

import csv
import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from m2d.errors import first_line
from m2d.experiment import Experiment
from m2d.files.atomic import write_whole
from m2d.training.settings import TrainConfig, as_dict

logger = logging.getLogger(__name__)
Mode = Literal["online", "offline", "disabled"]
# wandb's own process writes blocks of 32 KiB and dies with ours, so an offline file lacks what came last; a record
# takes about 1 KiB. Online it has been sent.
OFFLINE_FORGETS = 100


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
        """Every whole record; a last line cut by a crash is left out."""
        records = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return records

    def write_csv(self) -> None:
        """The records as a table; a column for every name that occurs."""
        records = self.read()
        columns = list(dict.fromkeys(name for record in records for name in record))
        with self.path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(records)


def open_telemetry(config: TrainConfig, experiment: Experiment) -> "Telemetry":
    """What a run asked for: records and pictures, and wandb and TensorBoard as its settings say."""
    sinks: list[Wandb | TensorBoard] = []
    if config.use_wandb:
        info = experiment.info()
        known = {name: info.get(name) for name in ("dataset", "feature_extractor", "versions", "git", "degraded")}
        sinks.append(
            Wandb(
                experiment.path, config.wandb_project, experiment.name, config.wandb_mode,
                {**as_dict(config), **known}, finish_timeout_s=config.telemetry.finish_timeout_s,
                group=config.wandb_group,
            )
        )  # fmt: skip
    if config.telemetry.tensorboard:
        sinks.append(TensorBoard(experiment.path))
    return Telemetry(experiment.path, sinks)


class Telemetry:
    """One voice of a run: records in metrics/, pictures in visualizations/, and the same to every sink.

    A sink never raises: a lost connection must not stop training. `forgets`: how many records of each kind a killed
    process may have lost although the sink was told them.
    """

    def __init__(self, folder: Path, sinks: "Sequence[Wandb | TensorBoard]" = ()) -> None:
        """folder: the experiment's."""
        self.folder = folder
        self.sinks = list(sinks)
        self.logs: dict[str, MetricsLog] = {}
        for name in ("train", "validation", "gradients", "features"):
            self.logs[name] = MetricsLog(folder / "metrics", name)
        self.histograms = MetricsLog(folder / "metrics", "histograms")

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
        if isinstance(image, bytes):
            png = image
        else:
            image.save(buffer := io.BytesIO(), format="PNG")
            png = buffer.getvalue()
        path = self.folder / "visualizations" / name / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, png)
        for sink in self.sinks:
            sink.picture(step, name, png, caption)
        return path

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Counts [n] between edges [n + 1], kept in metrics/histograms.jsonl."""
        self.histograms.append({"step": step, "name": name, "counts": list(counts), "edges": list(edges)})
        for sink in self.sinks:
            sink.histogram(step, name, counts, edges)

    def flush(self) -> None:
        """Before a checkpoint is kept."""
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
    """A wandb run that never stops training: what fails is said once and then left.

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
        """folder: the experiment's; wandb's files lie in its wandb/. An online run that cannot connect goes offline."""
        self._run: Any = None
        self._name = name
        self.forgets = OFFLINE_FORGETS if mode == "offline" else 0
        self._timeout_s = finish_timeout_s
        os.environ.setdefault("WANDB_SILENT", "true")

        def start(mode: Mode) -> Any:
            import wandb

            # Ray has the worker's console in its own logs.
            settings = wandb.Settings(init_timeout=connect_timeout_s, console="off")
            with _for_nobody_at_a_terminal():
                return wandb.init(
                    project=project, name=name, id=name, group=group, resume="allow", mode=mode, dir=str(folder),
                    config=config, settings=settings,
                )  # fmt: skip

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
                    reason, folder / "wandb" / "offline-run-*",
                )  # fmt: skip
            except Exception:
                logger.warning("wandb is off for this run: %s", reason)
        self._try("set up", lambda run: (run.define_metric("step"), run.define_metric("*", step_metric="step")))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""
        self._try(f"log step {step}", lambda run: run.log({"step": step, **values}))

    def picture(self, step: int, name: str, png: bytes, caption: str) -> None:
        """A PNG."""

        def send(run: Any) -> None:
            import wandb

            with Image.open(io.BytesIO(png)) as image:
                run.log({"step": step, f"pictures/{name}": wandb.Image(image, caption=caption or None)})

        self._try(f"log the picture {name}", send)

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """Counts [n] between edges [n + 1]."""

        def send(run: Any) -> None:
            import numpy as np
            import wandb

            histogram = wandb.Histogram(np_histogram=(np.asarray(counts), np.asarray(edges)))
            run.log({"step": step, name: histogram})

        self._try(f"log the histogram {name}", send)

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

    def _try(self, what: str, call: Any) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            logger.warning("wandb could not %s and is off from here on: %s", what, error)
            self._run = None


@contextmanager
def _for_nobody_at_a_terminal() -> Iterator[None]:
    """wandb asks at the terminal for a key that it lacks, and notes the command line: it finds neither here.

    The command line is there, but without the secrets of URIs.
    """
    command, terminal = sys.argv, sys.stdin
    with open(os.devnull) as nobody:
        sys.argv, sys.stdin = command, nobody
        try:
            yield
        finally:
            sys.argv, sys.stdin = command, terminal


class TensorBoard:
    """Event files that `tensorboard --logdir EXPERIMENT/tensorboard` reads."""

    forgets = 0  # flushed before each checkpoint

    def __init__(self, folder: Path) -> None:
        """folder: the experiment's."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

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
        total = int(sum(counts))
        if total:
            self._writer.add_histogram_raw(
                name, min=float(edges[0]), max=float(edges[-1]), num=total, sum=float((middles * counts).sum()),
                sum_squares=float((middles**2 * counts).sum()), bucket_limits=list(edges[1:]),
                bucket_counts=list(counts), global_step=step,
            )  # fmt: skip

    def flush(self) -> None:
        """A checkpoint is about to be kept, whose steps are not taken again: what was said so far must last."""
        self._writer.flush()

    def finish(self, best: Path | None) -> None:
        """The run has ended. best: a checkpoint to keep there."""
        self._writer.close()
