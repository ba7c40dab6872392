"""A checkpoint directory of tiny networks, for what loads one from the disk: actors, subprocesses."""

from pathlib import Path

from m2d.models.checkpoint import Checkpoint, mark_complete, write_inference_files


def write_checkpoint(checkpoint: Checkpoint, directory: Path) -> Path:
    """Write a loaded checkpoint as training does; returns the directory."""
    for folder in ("vae", "unet"):
        (directory / folder).mkdir(parents=True)
    tensors = {"vae": checkpoint.autoencoder.vae.state_dict(), "denoiser": checkpoint.denoiser.state_dict()}
    write_inference_files(
        directory, checkpoint.info, checkpoint.autoencoder, checkpoint.denoiser.unet, tensors, checkpoint.prior
    )
    mark_complete(directory)
    return directory
