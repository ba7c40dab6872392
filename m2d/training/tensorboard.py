"""TensorBoard files of a run, one of telemetry's sinks. tensorboardX comes with Ray Tune."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter


class TensorBoard:
    """Event files that `tensorboard --logdir EXPERIMENT/tensorboard` reads."""

    forgets = 0  # flushed before each checkpoint

    def __init__(self, folder: Path) -> None:
        """folder: the experiment's."""
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See Sink."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, png: bytes, caption: str) -> None:
        """See Sink."""
        with Image.open(io.BytesIO(png)) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        """See Sink. Each bin stands as its middle: TensorBoard's summary wants sums that counts do not hold."""
        middles = (np.asarray(edges[:-1]) + np.asarray(edges[1:])) / 2
        total = int(sum(counts))
        if total:
            self._writer.add_histogram_raw(
                name, min=float(edges[0]), max=float(edges[-1]), num=total, sum=float((middles * counts).sum()),
                sum_squares=float((middles**2 * counts).sum()), bucket_limits=list(edges[1:]),
                bucket_counts=list(counts), global_step=step,
            )  # fmt: skip

    def flush(self) -> None:
        """See Sink."""
        self._writer.flush()

    def finish(self, best: Path | None) -> None:
        """See Sink."""
        self._writer.close()
