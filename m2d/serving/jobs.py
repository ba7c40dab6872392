"""Jobs on a folder: large orders that the bulk pipeline makes, one after the other, and that survive the server."""

from pathlib import Path
from typing import Protocol

from m2d.generation.settings import GenerateConfig


class Run(Protocol):
    """How the work of a job is done elsewhere: in a process of its own (`run_in_process`), or on Ray."""

    async def __call__(self, config: GenerateConfig, sha256: str, log: Path) -> None:
        """`make_images(config, sha256)` elsewhere, to its end; raises the M2DError that it raises.

        log: file for what it prints. Where this call is cancelled (asyncio), the work is ended at once, and
        CancelledError goes on once nothing of it can write any more. It must also end when this process is killed.
        """
        ...


def make_images(config: GenerateConfig, sha256: str) -> None:
    """`generate` of a job, where its checkpoint is still the one of this SHA-256. Raises an M2DError."""
    from m2d.errors import CheckpointError
    from m2d.generation.run import generate
    from m2d.models.checkpoint import checkpoint_sha256, read_info

    read_info(config.checkpoint)
    raise NotImplementedError(CheckpointError, generate, checkpoint_sha256)
