"""How fast a run is: images a second, the share of time that waits for data, and model FLOP utilisation."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from m2d.models.precision import DTYPES
from m2d.training.batch import Draws
from m2d.training.flops import peak_flops
from m2d.training.plan import RunPlan
from m2d.training.step import BaseStep


class Throughput:
    """Times a worker's steps between two readings; `restart` leaves out what lies beside them, such as saving."""

    def __init__(self, step: BaseStep[Any], plan: RunPlan, device: torch.device, start: int, world_size: int) -> None:
        """start: steps of the run taken already. world_size: workers that train now."""
        self.step, self.plan, self.device = step, plan, device
        self.accumulation = plan.accumulation(world_size)
        self.images_per_step = plan.config.batch_size * self.accumulation * world_size
        self.peak: float | None = None  # FLOP/s of this worker's device; None: nothing is counted, the step is compiled
        if not plan.config.compile:
            self.peak, _ = peak_flops(device, DTYPES[plan.precision])
        self._flops: dict[tuple[bool, bool], int] = {}  # of a micro-batch, by the networks that learn in its step
        self._since, self._began, self._waited, self._computed = start, time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    def count(self, micro_batch: tuple[Any, Draws], step: int) -> None:
        """Note the FLOPs of the step to come; counted by computing once for each kind of step, outside the time."""
        if self.peak is None:
            return
        config = self.step.config
        kind = (step < config.vae_warmup_steps, config.trains_autoencoder(step))
        if self.plan.config.stage != "joint":
            kind = (False, False)
        if kind not in self._flops:
            self._synchronize()
            began = time.perf_counter()
            self._flops[kind] = self.step.flops(*micro_batch, step)
            self._synchronize()
            self._began += time.perf_counter() - began
        self._computed += self._flops[kind] * self.accumulation

    def read(self, done: int) -> dict[str, float]:
        """Since the last reading, `done` steps of the run being taken."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        values = {
            "images_per_s": (done - self._since) * self.images_per_step / seconds,  # of all workers
            "data_wait_share": self._waited / seconds,
        }
        if self.peak is not None:
            values["model_tflops_per_s"] = self._computed / seconds / 1e12  # of one worker
            values["model_flop_utilisation"] = self._computed / seconds / self.peak
        self.restart(done)
        return values

    def restart(self, done: int) -> None:
        """Begin anew after `done` steps."""
        self._since, self._began, self._waited, self._computed = done, time.perf_counter(), 0.0, 0

    def _synchronize(self) -> None:
        """So that what a GPU was asked for before is not counted as what follows."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory_gib(device: torch.device) -> float:
    """The most that was allocated on a GPU, or on a CPU the most that this process had resident, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20
