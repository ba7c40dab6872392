"""What a run says of itself: JSON lines and CSV always, wandb where asked. The only module that knows wandb."""

import csv
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)


class MetricsLog:
    """metrics/NAME.jsonl, one line a record, and the same as NAME.csv."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.jsonl"

    def resume_at(self, step: int) -> None:
        """Drop records of steps that will be taken again (after `step`)."""
        kept = [record for record in self.read() if record["step"] <= step]
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

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


class Wandb:
    """A wandb run that never stops training: what fails is said once and then left."""

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        mode: Literal["online", "offline", "disabled"],
        config: dict[str, Any],
    ) -> None:
        self._run: Any = None
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self._run = wandb.init(
                project=project, name=name, id=name, resume="allow", mode=mode, dir=str(folder), config=config
            )
        except Exception as error:
            logger.warning("wandb is off for this run: %s", error)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars of a step."""
        if self._run is not None:
            try:
                self._run.log(values, step=step)
            except Exception as error:
                logger.warning("wandb is off from step %d on: %s", step, error)
                self._run = None

    def finish(self) -> None:
        """Send what is left."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                logger.warning("wandb could not send the end of the run: %s", error)
            self._run = None
