"""A step is the same however it is divided: into workers, and into micro-batches of any size."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_steps import work
from torch import Tensor
from torch.testing import assert_close


@pytest.fixture(scope="module")
def undivided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One worker that takes a step's 8 images at once."""
    return taken(1, 8, tmp_path_factory.mktemp("undivided"))


def taken(world_size: int, batch_size: int, folder: Path) -> dict[str, Any]:
    """What rank 0 of so many workers has after the steps. They import torch once, in the server that they fork from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddp_steps"])
    output = folder / "taken.pt"
    arguments = (world_size, batch_size, str(folder / "rendezvous"), str(output))
    workers = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker in workers] == [0] * world_size
    found: dict[str, Any] = torch.load(output, weights_only=True)
    return found


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 4), (2, 2), (4, 2)])
def test_weights_after_six_steps_do_not_depend_on_workers_and_micro_batches(
    world_size: int, batch_size: int, undivided: dict[str, Any], tmp_path: Path
) -> None:
    """With a discriminator of either kind, and the latent norm's statistics over the whole step.

    Sums in another order round otherwise: gradients agree to 1e-4. AdamW makes a whole step of a gradient that is all
    rounding, so weights are held to the way that they have come: the difference is less than a thousandth of it.
    """
    for kind, divided in taken(world_size, batch_size, tmp_path).items():
        whole = undivided[kind]
        assert len(whole["gradients"]) > 100
        assert_close(divided["gradients"], whole["gradients"], rtol=1e-4, atol=1e-6)
        for name, before in whole["before"].items():
            start, one, other = (flat(state) for state in (before, whole["after"][name], divided["after"][name]))
            assert (one - start).norm() > 0
            assert (other - one).norm() < 1e-3 * (one - start).norm(), (kind, name)


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])
