"""One DDP worker of test_distributed.py: takes its part of a known batch and saves the gradients of the step."""

import sys

import torch
import torch.distributed as dist
from tiny_networks import part, tiny_batch, tiny_networks, tiny_step

import m2d.training.step as step_module


def main(rank: int, world_size: int, rendezvous: str, output: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    networks = tiny_networks(discriminator=True)
    found: dict[str, torch.Tensor] = {}

    def capture(optimized, losses, scaler, look):  # type: ignore[no-untyped-def]
        for module_name, module in networks.trained().items():
            found.update({f"{module_name}.{name}": p.grad.clone() for name, p in module.named_parameters()})
            found.update({f"{module_name}.{name}": b.clone() for name, b in module.named_buffers()})
        return torch.tensor(True), [torch.zeros(()) for _ in optimized]

    step_module.guarded_update = capture
    step = tiny_step(networks, distributed=world_size > 1)
    whole = [tiny_batch(8, seed=0), tiny_batch(8, seed=1)]  # two micro-batches, so that no_sync is on the path
    size = 8 // world_size
    step([part(batch, rank * size, (rank + 1) * size) for batch in whole], 0)
    if rank == 0:
        torch.save(found, output)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
