"""The autoencoder behind encode and decode: diffusers AutoencoderKL, new, of a folder or a hub id; or block PCA."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from m2d.errors import CheckpointError, first_line
from m2d.models.precision import keep_input_type
from m2d.models.settings import AutoencoderConfig

_FIRST_LOGVAR = -8.0  # of a residual autoencoder's posterior: a deviation of 0.018 where latents have about 1
NetworkT = TypeVar("NetworkT", bound=ModelMixin)
_CODED_PIXELS = 32 * 128**2  # through a VAE at once; its activations at 256 px: 1.3 GiB in bf16, 1.6 in float32


class LinearAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' mixins are untyped
    """Principal components of an image's blocks of pixels, with the methods of diffusers' AutoencoderKL.

    Nothing is learned by descent: `set_basis` takes the components from the blocks' covariance. Encoding has no noise,
    and both ways are computed in float32, whatever the autocast.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, latent_channels: int = 16, patch_size: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    @torch.no_grad()
    def set_basis(self, first: Tensor, second: Tensor, whitening: float) -> None:
        """Take the first C components of blocks x with first moment E[x] [P] and second E[x x'] [P, P]; P = 3 patch^2.

        P is ordered as pixel_unshuffle orders it: colour, row, column. Components are about the mean colour. Component
        k is divided by its deviation to the power `whitening`, then all by one number, so that their mean variance is
        1. At 0 the map is an isometry but for that number: errors of latents count as errors of pixels do. At 1 all
        components weigh alike.
        """
        first, second, block = first.double(), second.double(), self.config.patch_size**2
        colour = first.view(3, block).mean(dim=1)
        centre = colour.repeat_interleave(block)
        crossed = torch.outer(first, centre)
        variance, basis = torch.linalg.eigh(second - crossed - crossed.T + torch.outer(centre, centre))
        kept = slice(-self.config.latent_channels, None)  # eigenvalues ascend
        variance, basis = variance[kept].flip(0).clamp(min=1e-12), basis[:, kept].flip(1).T
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()  # eigh may give either
        scale = variance.sqrt()[:, None] ** whitening * (variance ** (1 - whitening)).mean().sqrt()
        kernels = self.encoder.weight.shape
        weights = {"encoder.weight": (basis / scale).view(kernels), "decoder.weight": (basis * scale).view(kernels)}
        self.load_state_dict(weights | {"encoder.bias": -(basis / scale) @ centre, "decoder.bias": colour})

    def encode(self, images: Tensor) -> AutoencoderKLOutput:
        """See AutoencoderKL."""
        with _without_autocast(images.device.type):
            mean = self.encoder(images.float())
        parameters = torch.cat([mean, torch.zeros_like(mean)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """See AutoencoderKL."""
        with _without_autocast(latents.device.type):
            return DecoderOutput(sample=self.decoder(latents.float()))


class ResidualAutoencoderKL(AutoencoderKL):  # type: ignore[misc]
    """diffusers' AutoencoderKL on top of block PCA: it adds to the components' means, and to the decoded image.

    What it adds is nothing at first, so training begins with the closed form's reconstructions.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        channels, levels = self.config.latent_channels, len(self.config.block_out_channels)
        self.linear = LinearAutoencoder(channels, 2 ** (levels - 1))
        for convolution in (self.quant_conv, self.decoder.conv_out):
            nn.init.zeros_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        nn.init.constant_(self.quant_conv.bias[channels:], _FIRST_LOGVAR)

    __init__.__wrapped__ = AutoencoderKL.__init__  # type: ignore[attr-defined]  # diffusers reads the signature

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        """See AutoencoderKL."""
        mean, logvar = super().encode(x).latent_dist.parameters.chunk(2, dim=1)
        mean = mean + self.linear.encode(x).latent_dist.mean
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, logvar.float()], dim=1)))

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput:
        """See AutoencoderKL."""
        return DecoderOutput(sample=super().decode(z).sample + self.linear.decode(z).sample)


Vae: TypeAlias = AutoencoderKL | LinearAutoencoder
_KINDS: dict[str, Any] = {"kl": AutoencoderKL, "linear": LinearAutoencoder, "residual": ResidualAutoencoderKL}


def block_pca(vae: Vae) -> LinearAutoencoder | None:
    """The part of an autoencoder that is fitted and not learned, where it has one."""
    return vae if isinstance(vae, LinearAutoencoder) else getattr(vae, "linear", None)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext()


class Autoencoder(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] to a Gaussian over latents [B, C, h, w] and back.

    Latents are as the VAE gives them; `Denoiser.normalize` puts them on the U-Net's scale.
    """

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        keep_input_type(vae)
        self.vae = vae

    @property
    def latent_channels(self) -> int:
        """C."""
        return int(self.vae.config.latent_channels)

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, along one side."""
        if isinstance(self.vae, LinearAutoencoder):
            return int(self.vae.config.patch_size)
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def encoder_parts(self) -> list[nn.Module]:
        """What `encode` computes with; the rest decodes."""
        pca = block_pca(self.vae)
        parts = [self.vae.encoder, getattr(self.vae, "quant_conv", None), None if pca is None else pca.encoder]
        return [part for part in parts if part is not None]

    def encode(self, images: Tensor) -> DiagonalGaussianDistribution:
        """The posterior of images [B, 3, H, W] in [-1, 1]."""
        return self.vae.encode(images).latent_dist

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about [-1, 1], of latents [B, C, h, w]."""
        return self.vae.decode(latents).sample


def from_uint8(pixels: Tensor) -> Tensor:
    """Images in [-1, 1], float32, of pixels from 0 to 255, in any shape."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3], rounded to the nearest; values outside are clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def build_autoencoder(config: AutoencoderConfig, image_size: int, *, weights: bool = True) -> Autoencoder:
    """A new or pretrained autoencoder. Raises CheckpointError where `pretrained` cannot be loaded.

    weights: False: those of a pretrained one are not read, where shapes alone matter.
    """
    vae: Vae
    if config.pretrained is not None:
        vae = _pretrained(config.pretrained, weights)
    elif config.kind == "linear":
        vae = LinearAutoencoder(config.latent_channels, config.patch_size)
    else:
        levels = len(config.block_channels)
        vae = _KINDS[config.kind](
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(config.block_channels),
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            sample_size=image_size,
            mid_block_add_attention=config.mid_attention,
            scaling_factor=1.0,  # the latent batch norm scales; a second constant would contradict it
        )
    if config.gradient_checkpointing and isinstance(vae, AutoencoderKL):
        vae.enable_gradient_checkpointing()
    return Autoencoder(vae)


def load_vae(location: str | Path, setting: str, *, weights: bool = True, **options: Any) -> Vae:
    """An autoencoder of any kind, from a folder or a hub id. Raises CheckpointError as load_strictly does."""
    config = AutoencoderKL.load_config(location, **options)
    kind: Any = {kind.__name__: kind for kind in _KINDS.values()}.get(config.get("_class_name"), AutoencoderKL)
    vae: Vae = load_strictly(kind, location, setting, **options) if weights else kind.from_config(config)
    return vae


def load_strictly(kind: type[NetworkT], location: str | Path, setting: str, **options: Any) -> NetworkT:
    """A diffusers network with every tensor in its file: diffusers only warns and leaves others at random values."""
    network, report = kind.from_pretrained(location, torch_dtype=torch.float32, output_loading_info=True, **options)
    strangers = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if strangers:
        raise CheckpointError(
            f"{setting}: the weights in {location} do not fit its config.json: {len(strangers)} tensors are missing or "
            f"unknown, the first is {strangers[0]}"
        )
    return network


def _pretrained(location: str, weights: bool) -> Vae:
    try:
        folder = Path(location)
        if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            location = str(folder / "vae")
        return load_vae(location, "autoencoder.pretrained", weights=weights)
    except CheckpointError:
        raise
    except Exception as error:  # diffusers, huggingface_hub, safetensors and torch each have their own
        raise CheckpointError(
            f"autoencoder.pretrained: {location} is neither a folder with an AutoencoderKL nor a hub id that can be "
            f"reached ({first_line(error)}); give a local folder"
        ) from None


def coded_at_once(image_size: int) -> int:
    """Images that a VAE encodes or decodes at once, so that its memory has a bound whatever the batch size."""
    return max(1, _CODED_PIXELS // image_size**2)
