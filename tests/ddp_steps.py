"""One worker of test_distributed.py: takes its share of known steps, whatever the world and the batch size are."""

from typing import Any

import torch
import torch.distributed as dist
from tiny_networks import CONDITIONING, FEATURE_DIM, IMAGE_SIZE, LATENT_SHAPE, tiny_networks, tiny_step
from torch import Tensor

import m2d.training.step as step_module
from m2d.data.order import Share
from m2d.training.batch import Draws, ImageBatch, draw

GLOBAL_BATCH = 8
STEPS = 6
SEED = 3
DISCRIMINATORS = ("patch", "projected")


def micro_batch(rows: Tensor) -> tuple[ImageBatch, Draws]:
    """Each stream row's image and label are its own."""
    generators = [torch.Generator().manual_seed(int(row)) for row in rows]
    shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
    images = torch.stack([torch.randint(0, 256, shape, dtype=torch.uint8, generator=g) for g in generators])
    return ImageBatch(images, rows % 7), draw(SEED, rows, LATENT_SHAPE, FEATURE_DIM, CONDITIONING)


def work(rank: int, world_size: int, batch_size: int, rendezvous: str, output: str) -> None:
    """All state before the steps and after them, and the first one's gradients, by discriminator, saved by rank 0."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    found = {kind: steps(kind, rank, world_size, batch_size) for kind in DISCRIMINATORS}
    if rank == 0:
        torch.save(found, output)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def steps(discriminator: str, rank: int, world_size: int, batch_size: int) -> dict[str, dict[str, Any]]:
    """See work."""
    networks = tiny_networks(discriminator=discriminator)
    gradients: dict[str, Tensor] = {}
    update = step_module.guarded_update

    def capture(*arguments):  # type: ignore[no-untyped-def]
        for module_name, module in networks.trained().items() if not gradients else ():
            gradients.update({f"{module_name}.{name}": p.grad.clone() for name, p in module.named_parameters()})
        return update(*arguments)

    step_module.guarded_update = capture
    step = tiny_step(networks, distributed=world_size > 1)

    def state() -> dict[str, dict[str, Tensor]]:
        modules = {**networks.trained(), "average": step.ema.module}
        return {name: {key: t.clone() for key, t in module.state_dict().items()} for name, module in modules.items()}

    before = state()
    micro_batches = GLOBAL_BATCH // batch_size
    each = micro_batches // world_size
    share = Share(batch_size=batch_size, rank=rank, world_size=world_size, step_micro_batches=micro_batches)
    for number in range(STEPS):
        turns = range(number * each, (number + 1) * each)
        step([micro_batch(torch.from_numpy(share.rows(turn))) for turn in turns], number)
    step_module.guarded_update = update
    return {"gradients": gradients, "before": before, "after": state()}
