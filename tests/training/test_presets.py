"""Every preset takes real steps in its stages, is saved and resumed, and generates: at its own architecture.

Levels, layers, attention, checkpointing, aligned block, projector, discriminator and losses are the preset's. Images,
batches and the number of steps are small. Levels of more than 256 channels make checkpoints of gigabytes (isic-256: 5),
so that networks which have such levels are narrower by a whole factor where they are saved, and take steps alone at
their full widths. An exhaustive test takes a step of isic-256 at its true size.
"""

import functools
import json
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import random_batch
from torch import Tensor, nn

from m2d.arguments import preset_names
from m2d.classes import ISIC7
from m2d.cli import parse
from m2d.diffusion.settings import SamplingSettings
from m2d.experiment import Experiment
from m2d.generation.generator import Generator
from m2d.generation.plan import rows_of, standard_plan
from m2d.models.autoencoder import build_autoencoder
from m2d.models.checkpoint import load_checkpoint
from m2d.models.extractors import Features
from m2d.models.perceptual import build_perceptual
from m2d.models.settings import AutoencoderConfig
from m2d.training.batch import LatentBatch
from m2d.training.networks import build_networks
from m2d.training.settings import TrainConfig
from m2d.training.step import JointStep, StepConfig, build_step
from m2d.training.trainer import train

CPU = torch.device("cpu")
STAGES = ("joint", "latent", "decoder")
STEPS, SAVED = 3, 2  # the first step of the joint stage is the VAE's warm-up, where the preset has one
UNET_WIDEST, VAE_WIDEST = 192, 128  # channels of a level, where the preset has more than 256
DECODED = {"reconstruction", "perceptual"}
FLOW = {"diffusion", "alignment", "manifold"}
LOSSES = {"joint": DECODED | FLOW | {"kl", "alignment_vae"}, "latent": FLOW, "decoder": DECODED}
ADVERSARIAL = {"adversarial", "discriminator"}
# What of a checkpoint each stage trains, by the beginnings of the tensors' names.
DECODER = {"vae/decoder", "vae/post_quant_conv", "vae/linear.decoder"}
VAE = DECODER | {"vae/encoder", "vae/quant_conv", "vae/linear.encoder"}
UNET_PARTS = ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
UNET = {
    *(f"{folder}/{part}" for folder in ("unet", "training/denoiser/unet") for part in UNET_PARTS),
    *(f"{folder}/conditioning" for folder in ("conditioning", "training/denoiser")),
}
TRAINED = {"joint": VAE | UNET | {"training/projector"}, "latent": UNET | {"training/projector"}, "decoder": DECODER}


def preset_of(base: str, stage: str) -> str:
    """The preset that a stage has of its own, or the base."""
    return f"{base}-{stage}" if f"{base}-{stage}" in preset_names() else base


@functools.cache
def linear(base: str) -> bool:
    """Block PCA, which has a latent stage alone."""
    config: TrainConfig = parse("train", ["--preset", base, "--init_checkpoint", "earlier"])
    return config.autoencoder.kind == "linear"


BASES = [name for name in preset_names() if not name.endswith(tuple(f"-{stage}" for stage in STAGES))]
# isic-256-pretrained goes on as isic-256 does.
ONE_STAGE = {"isic-256-pretrained": ("joint",)}
RUNS = [(base, stage) for base in BASES for stage in (("latent",) if linear(base) else ONE_STAGE.get(base, STAGES))]


def test_no_preset_is_left_out() -> None:
    assert {preset_of(base, stage) for base, stage in RUNS} == set(preset_names())


def test_a_projected_discriminator_is_weighed_so_that_it_acts() -> None:
    """Measured (docs/results/train_step.md): at 0.1 of the other losses' pull images are as they are without it."""
    runs: list[TrainConfig] = [
        parse("train", ["--preset", of, "--init_checkpoint", "earlier"]) for of in preset_names()
    ]
    projected = [run for run in runs if run.discriminator.enabled and run.discriminator.kind == "projected"]
    assert {run.loss_weights.adversarial for run in projected} == {0.8}, "VQGAN's own"


@functools.cache
def whole(preset: str) -> TrainConfig:
    config: TrainConfig = parse("train", ["--preset", preset, "--stage", "latent" if linear(preset) else "joint"])
    return config


def narrower(widths: list[int], widest: int) -> list[int]:
    divisor = max(widths) // widest if max(widths) > 256 else 1
    return [width // divisor for width in widths]


def small_settings(preset: str, vae: Path, *, full_width: bool = False) -> list[str]:
    """Flags that make a preset's run one of seconds and leave its graph as it is. vae: in place of a published one."""
    config = whole(preset)
    settings: dict[str, Any] = {}
    if config.autoencoder.pretrained is not None:
        settings["autoencoder.pretrained"] = str(vae)
    if not full_width:
        settings["unet.block_channels"] = narrower(config.unet.block_channels, UNET_WIDEST)
        settings["autoencoder.block_channels"] = narrower(config.autoencoder.block_channels, VAE_WIDEST)
    if config.data.image_size > 48:
        multiple = config.autoencoder.downsampling * 2 ** (len(config.unet.block_channels) - 1)
        least = max(32, 3 * 2**config.discriminator.layers if config.discriminator.enabled else 0)
        settings["data.image_size"] = multiple * -(-least // multiple)
    settings |= {
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_workers": 0,
        "max_steps": STEPS,
        "data.views": 1,
        "feature_extractor.input_size": 64,
        "feature_extractor.statistics_images": 14,
        "perceptual.kind": "features",
        "schedule.vae_warmup_fraction": 0.34 if config.schedule.vae_warmup_fraction else 0,
        "schedule.log_every_steps": 1,
        "discriminator.start_step": 1,
        "saving.every_steps": SAVED,
        "saving.validation_images": 2,
        "telemetry.pictures": False,
        "ray.threads_per_worker": 1,
    }
    return ["--preset", preset, *(f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in settings.items())]


def write_images(root: Path) -> Path:
    """Four smooth images of each class, of which two train."""
    generator = np.random.default_rng(0)
    for code in ISIC7.codes:
        (root / code).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((84, 72)).save(root / code / f"{code}_{number}.png")
    return root


def write_vae(folder: Path) -> Path:
    """A stand-in for a published VAE, as diffusers saves one: Stable Diffusion 3's shape at a quarter of its widths."""
    torch.manual_seed(1)
    shape = AutoencoderConfig(
        block_channels=[32, 64, 128, 128], layers_per_block=2, latent_channels=16, norm_groups=32, mid_attention=True
    )
    build_autoencoder(shape, 64).vae.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Run:
    """A run of STEPS steps that was saved at SAVED and at the end, lost the last checkpoint, and was run again."""

    config: TrainConfig
    experiment: Experiment
    start: Path | None  # the checkpoint that it started from
    lost: Path  # the first last checkpoint, moved away
    records: list[str]  # of metrics/train.jsonl, from before it was run again

    @property
    def saved(self) -> Path:
        return self.experiment.checkpoints / f"step_{SAVED:08d}"

    @property
    def last(self) -> Path:
        return self.experiment.checkpoints / f"step_{STEPS:08d}"

    @property
    def adversarial(self) -> bool:
        return self.config.discriminator.enabled and self.config.stage != "latent"


class Stages:
    """The stages of a preset, each run when it is first asked for.

    Each begins with the checkpoint of the one before, but a latent stage on a published VAE or block PCA has none.
    """

    def __init__(self, base: str, root: Path) -> None:
        self.base, self.root = base, root
        self.vae = write_vae(root / "vae")
        given = whole(base).autoencoder.pretrained is not None or linear(base)
        self.before = {"joint": None, "latent": None if given else "joint", "decoder": "latent"}
        places = {"data_root": write_images(root / "data"), "experiments_dir": root / "runs", "cache_dir": root / "c"}
        self.places = [f"--{name}={place}" for name, place in places.items()]
        self.runs: dict[str, Run] = {}

    def run(self, stage: str) -> Run:
        if stage in self.runs:
            return self.runs[stage]
        before = self.before[stage]
        start = None if before is None else self.run(before).last
        settings = [*small_settings(preset_of(self.base, stage), self.vae), *self.places]
        init = [] if start is None else ["--init_checkpoint", str(start)]
        config: TrainConfig = parse("train", [*settings, "--stage", stage, "--name", stage, *init])
        experiment = train(config)
        lost, lines = self.root / f"lost_{stage}", record_lines(experiment)
        (experiment.checkpoints / f"step_{STEPS:08d}").rename(lost)
        for name in ("best", "best.json"):
            (experiment.checkpoints / name).unlink()
        experiment.update_info(state="running")
        assert train(config).path == experiment.path
        self.runs[stage] = Run(config, experiment, start, lost, lines)
        return self.runs[stage]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stages]:
    return {base: Stages(base, tmp_path_factory.mktemp(base)) for base in BASES}


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(stages: dict[str, Stages], request: pytest.FixtureRequest) -> Iterator[Run]:
    """All tests of a run come before the next one's; with a preset's last stage its gigabytes go."""
    base, stage = request.param
    yield stages[base].run(stage)
    if (base, stage) == [run for run in RUNS if run[0] == base][-1]:
        shutil.rmtree(stages.pop(base).root)


def record_lines(experiment: Experiment) -> list[str]:
    return (experiment.path / "metrics" / "train.jsonl").read_text(encoding="utf-8").splitlines()


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """`vae/encoder.conv_in.weight`, `training/denoiser/unet.conv_in.weight` and so on, of every network."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        if not path.stem.startswith(("optimizer", "counters", "feature_prior")):
            place = path.relative_to(checkpoint)
            folder = place.parent if path.stem == "diffusion_pytorch_model" else place.with_suffix("")
            found |= {f"{folder}/{name.replace('unet.', 'unet/', 1)}": t for name, t in load_file(path).items()}
    return found


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.slow
def test_every_loss_of_the_stage_is_finite_at_every_step(run: Run) -> None:
    expected = LOSSES[run.config.stage] | (ADVERSARIAL if run.adversarial else set())
    warms_up = run.config.stage == "joint" and run.config.schedule.vae_warmup_fraction > 0
    for line in record_lines(run.experiment):
        record = json.loads(line)
        losses = {name.removeprefix("loss/"): value for name, value in record.items() if name.startswith("loss/")}
        early = warms_up and record["step"] == 1
        assert losses.keys() == (expected - FLOW - {"alignment_vae"} if early else expected)
        assert [name for name, value in losses.items() if not np.isfinite(value)] == []
        assert record["skipped_steps"] == 0


@pytest.mark.slow
def test_what_a_stage_trains_moves_and_the_rest_stays_bit_equal(run: Run) -> None:
    """Every part that the stage trains moves between the two checkpoints; all else is as it was at the start."""
    stage, before, after = run.config.stage, tensors_of(run.saved), tensors_of(run.last)
    trained = TRAINED[stage] | ({"training/discriminator"} if run.adversarial else set())
    if run.config.autoencoder.pretrained is not None:
        trained = {part for part in trained if not part.startswith("vae/linear")}
    moved = different(before, after)
    assert {part for part in trained if not any(name.startswith(part) for name in moved)} == set()
    norm = ("conditioning/latent_norm", "training/denoiser/latent_norm") if stage == "joint" else ()
    assert {name for name in moved if not name.startswith((*trained, *norm))} == set()
    if run.start is not None:  # a checkpoint's averages become both the weights and their averages
        kept = {name: tensor for name, tensor in tensors_of(run.start).items() if not name.startswith("training/")}
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith((*trained, "conditioning/latent"))}
        assert any(name.startswith("vae/encoder") for name in kept)
        assert different(kept, after) == set()


@pytest.mark.slow
def test_a_resumed_run_takes_the_remaining_steps_and_ends_where_the_unbroken_one_did(run: Run) -> None:
    """What was on record at the saved step stays, the rest is done again, and ends where it had ended before."""
    lines = record_lines(run.experiment)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[:SAVED] == run.records[:SAVED]
    assert lines[SAVED:] != run.records[SAVED:]  # other times
    first, second = tensors_of(run.lost), tensors_of(run.last)
    assert first.keys() == second.keys()
    assert different(first, second) == set()


@pytest.mark.slow
def test_the_checkpoint_of_every_stage_generates(run: Run) -> None:
    checkpoint = load_checkpoint(run.last)
    assert (checkpoint.step, checkpoint.info.stage) == (STEPS, run.config.stage)
    settings = [SamplingSettings(solver=solver, steps=2) for solver in ("euler", "unipc")]
    plans = [standard_plan({"MEL": 1, "NV": 1}, run_seed=0, sampling=each, feature="prior") for each in settings]
    rows = [row for plan in plans for row in rows_of(plan)]
    images = Generator(checkpoint, batch_size=2, device="cpu").generate(rows)  # raises where one is not finite
    size = run.config.data.image_size
    assert (images.dtype, images.shape) == (np.uint8, (4, size, size, 3))
    assert len({image.tobytes() for image in images[:2]}) == 2
    assert min(image.std() for image in images) > 0


def digits(module: nn.Module) -> list[float]:
    """A sum of each parameter: enough to see it move, without a copy of gigabytes."""
    return [parameter.detach().double().sum().item() for parameter in module.parameters()]


FULL_WIDTHS = [
    base
    for base in BASES
    if whole(base).autoencoder.pretrained is None
    and narrower(whole(base).unet.block_channels, UNET_WIDEST) != whole(base).unet.block_channels
]


@pytest.mark.slow
@pytest.mark.parametrize("base", FULL_WIDTHS)
def test_a_wide_preset_takes_two_steps_in_each_stage_at_its_full_widths(base: str, tmp_path: Path) -> None:
    config: TrainConfig = parse("train", [*small_settings(base, tmp_path, full_width=True), "--stage", "joint"])
    networks, settings = build_networks(config, CPU), StepConfig(config, "no", STEPS)
    perceptual = build_perceptual("features", networks.extractor)
    unet, decoder = networks.denoiser.unet, networks.autoencoder.vae.decoder
    for stage in STAGES:
        networks.autoencoder.requires_grad_(True)  # the latent stage froze it
        step = build_step(stage, networks, perceptual, settings, CPU)
        for number in range(2):
            before = {"U-Net": digits(unet), "decoder": digits(decoder)}
            batches: list[Any] = [random_batch(config, networks, 2 * number + k, config.batch_size) for k in range(2)]
            if stage == "latent":
                patches = torch.randn(config.batch_size, 4, networks.feature_dim)
                rest = (torch.ones_like(batches[0][1].noise), Features(patches.mean(dim=1), patches))
                batches = [(LatentBatch(draws.noise, *rest, images.labels), draws) for images, draws in batches]
            step(batches, number)
            moved = {name for name, was in before.items() if digits({"U-Net": unet, "decoder": decoder}[name]) != was}
            assert moved == {"joint": {"U-Net", "decoder"}, "latent": {"U-Net"}, "decoder": {"decoder"}}[stage]
        scalars = step.read_scalars()
        assert scalars["skipped_steps"] == 0
        assert all(np.isfinite(value) for value in scalars.values())
        del step  # its moments are gigabytes


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_isic_256_takes_a_joint_step_at_its_true_size(capsys: pytest.CaptureFixture[str]) -> None:
    """256 px and its own batch of 2, but a single micro-batch in place of 16; after the warm-up."""
    settings = ["--gradient_accumulation_steps", "1", "--perceptual.kind", "features"]
    config: TrainConfig = parse("train", ["--preset", "isic-256", *settings])
    assert (config.data.image_size, config.batch_size) == (256, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        networks = build_networks(config, CPU)
        step = JointStep(
            networks, build_perceptual("features", networks.extractor), StepConfig(config, "no", STEPS), CPU
        )
        before = {name: digits(module) for name, module in networks.trained().items()}
        step([random_batch(config, networks, 0, config.batch_size)], 0)
    finally:
        torch.set_num_threads(threads)
    assert all(np.isfinite(value) for value in step.read_scalars().values())
    assert [name for name, module in networks.trained().items() if digits(module) == before[name]] == []
    with capsys.disabled():
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"isic-256, joint step of 2 images at 256 px in float32: peak RSS {peak_gib:.1f} GiB")
