"""What only a GPU can answer of a training step. `make gpu` runs these beside its measurements."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bench.gpu import GIB, Training, host_waits, predicted_gib, settings
from m2d.models.precision import keep_input_type
from m2d.training.batch import ImageBatch, LatentBatch
from m2d.training.loop import read_ahead

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("preset", ["demo", "ham-64", "ham-128-decoder"])
def test_a_step_in_bf16_never_waits_for_the_gpu(preset: str) -> None:
    training = Training(settings(preset, CUDA, "--mixed_precision", "bf16"), CUDA)
    training.take(0)  # makes the moments
    assert host_waits(lambda: training.take(1)) == []


def test_memory_is_what_the_dry_run_says() -> None:
    config = settings("ham-128", CUDA, "--batch_size", "16", "--mixed_precision", "bf16")
    before = torch.cuda.memory_allocated(CUDA)
    training = Training(config, CUDA)
    for number in range(3):
        if number == 2:
            torch.cuda.reset_peak_memory_stats(CUDA)
        training.take(number)
    measured = (torch.cuda.max_memory_allocated(CUDA) - before) / GIB
    assert measured == pytest.approx(predicted_gib(config), rel=0.1)


@pytest.mark.parametrize(("mean", "atol"), [(0, 2**-7), (10, 2**-6)])
def test_a_group_norm_in_bf16_is_that_of_float32(mean: float, atol: float) -> None:
    """To bf16's own rounding: of the output, 2^-8, and of the mean, which the kernel keeps in bf16.

    A mean of 10 is kept to 2^-5, which is 2^-5 / 3 = 0.0104 deviations. Statistics over 64 x 64 cells.
    """
    torch.manual_seed(0)
    plain = nn.GroupNorm(8, 64).to(CUDA)
    x = (torch.randn(2, 64, 64, 64, device=CUDA) * 3 + mean).bfloat16()
    ours = nn.Sequential(copy.deepcopy(plain))
    keep_input_type(ours)
    normed = ours(x)
    assert normed.dtype == torch.bfloat16
    assert_close(normed.float(), plain(x.float()), rtol=2**-7, atol=atol)


def test_batches_are_read_ahead_into_pinned_memory() -> None:
    def batches() -> Iterator[ImageBatch | LatentBatch]:
        for number in range(5):
            yield ImageBatch(torch.full((1, 4, 4, 3), number, dtype=torch.uint8), torch.tensor([number]))

    read = list(read_ahead(batches(), pin_memory=True))
    assert [int(batch.labels) for batch in read] == [0, 1, 2, 3, 4]
    assert all(batch.labels.is_pinned() for batch in read)
    images = [batch.images for batch in read if isinstance(batch, ImageBatch)]
    assert all(image.is_pinned() for image in images)
    assert [int(image.to(CUDA, non_blocking=True).max()) for image in images] == [0, 1, 2, 3, 4]
