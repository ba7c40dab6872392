"""The configuration tree: presets that fit together, values that are refused, what a resumed run may change."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from m2d.arguments import preset_files, preset_names, setting_types
from m2d.cli import parse
from m2d.errors import ConfigError
from m2d.models.autoencoder import build_autoencoder
from m2d.models.perceptual import LITE0_MAPS, PatchDiscriminator, ProjectedDiscriminator
from m2d.models.settings import (
    AutoencoderConfig,
    ConditioningConfig,
    DiscriminatorConfig,
    FeatureExtractorConfig,
    ProjectorConfig,
    UNetConfig,
)
from m2d.models.unet import AlignmentProjector, build_denoiser, tap_channels
from m2d.training.settings import DIVISION, RESUMABLE_CHANGES, TrainConfig, as_dict, differences, parse_num_workers


def test_the_promised_presets_are_there() -> None:
    assert {"demo", "ham-64", "ham-128", "isic-256"} <= set(preset_names())


def of_preset(name: str) -> TrainConfig:
    """A later stage's with the checkpoint that it needs, a published VAE's with a new one of that shape."""
    config: TrainConfig = parse("train", ["--preset", name, "--init_checkpoint", "earlier"])
    return dataclasses.replace(config, autoencoder=dataclasses.replace(config.autoencoder, pretrained=None))


def test_a_stages_preset_is_the_joint_stages_with_its_own_numbers_over_it() -> None:
    joint, latent = of_preset("isic-256"), of_preset("isic-256-latent")
    assert latent.unet == joint.unet
    assert latent.autoencoder == joint.autoencoder
    assert (latent.stage, latent.batch_size, latent.max_steps) == ("latent", 32, 100_000)
    effective = {config.batch_size * config.gradient_accumulation_steps for config in (joint, latent)}
    assert effective == {32}


@pytest.mark.parametrize("name", preset_names())
@torch.no_grad()
def test_a_presets_networks_fit_one_another(name: str) -> None:
    """A forward pass of every network it trains, on the meta device: shapes without numbers."""
    config = of_preset(name)
    size, feature_dim, patches = config.data.image_size, 1280, 16
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder, size).eval()
        side = size // autoencoder.downsampling
        denoiser = build_denoiser(
            config.unet,
            config.conditioning,
            latent_channels=autoencoder.latent_channels,
            latent_size=side,
            feature_dim=feature_dim,
        ).eval()
        projector = AlignmentProjector(tap_channels(denoiser, config.alignment.tap), config.projector, feature_dim)
        images = torch.zeros(1, 3, size, size)
        latents = autoencoder.encode(images).mean
        context = denoiser.context(torch.zeros(1, dtype=torch.int64), torch.zeros(1, feature_dim))
        velocity, middle = denoiser.velocity_and_tap(latents, torch.zeros(1), context, config.alignment.tap)
        assert latents.shape == velocity.shape == (1, autoencoder.latent_channels, side, side)
        assert projector(middle, patches).shape == (1, patches, feature_dim)
        assert autoencoder.decode(latents).shape == images.shape
        if config.discriminator.enabled and config.discriminator.kind == "patch":
            assert PatchDiscriminator(config.discriminator.channels, config.discriminator.layers)(images).numel() > 0
        elif config.discriminator.enabled:
            maps = [torch.zeros(1, width, size >> k, size >> k) for k, width in enumerate(LITE0_MAPS, start=1)]
            assert ProjectedDiscriminator(LITE0_MAPS, config.discriminator.channels)(maps).numel() > 0


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_opens_by_saying_what_it_is_for(name: str) -> None:
    text = preset_files(name)[-1].read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)["name"] == name


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"choose from {' '.join(preset_names())}"):
        preset_files("ham-65")


def refusal_of(make: type, **settings: object) -> str:
    with pytest.raises(ConfigError) as refusal:
        make(**settings)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("max_steps", 0),
        ("num_workers", -1),
        ("seed", -1),
        ("name", ""),
        ("name", "a/b"),
        ("name", "a b"),
        ("name", ".a"),
        ("name", "-a"),
        ("name", "a" * 201),
        ("seed", 2**64),
        ("name", "a\nb"),
        ("name", "*"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(setting: str, value: object) -> None:
    assert refusal_of(TrainConfig, **{setting: value}).startswith(f"{setting} is ")


@pytest.mark.parametrize(
    ("make", "settings", "named"),
    [
        (FeatureExtractorConfig, {"name": "resnet999"}, "feature_extractor.name"),
        (FeatureExtractorConfig, {"weights": "/no/such/file"}, "feature_extractor.weights"),
        (FeatureExtractorConfig, {"input_size": 100}, "feature_extractor.input_size"),
        (FeatureExtractorConfig, {"statistics_images": 1}, "feature_extractor.statistics_images"),
        (AutoencoderConfig, {"block_channels": []}, "autoencoder.block_channels"),
        (AutoencoderConfig, {"block_channels": [20], "norm_groups": 16}, "autoencoder.block_channels"),
        (AutoencoderConfig, {"norm_groups": 0}, "autoencoder.norm_groups"),
        (UNetConfig, {"block_channels": [], "attention_levels": []}, "unet.block_channels"),
        (UNetConfig, {"attention_levels": [True]}, "unet.attention_levels"),
        (UNetConfig, {"block_channels": [32, 64, 80]}, "unet.block_channels"),
        (UNetConfig, {"head_dim": 0}, "unet.head_dim"),
        (UNetConfig, {"layers_per_block": 0}, "unet.layers_per_block"),
        (ConditioningConfig, {"class_dropout": 1.5}, "conditioning.class_dropout"),
        (ConditioningConfig, {"feature_noise": float("nan")}, "conditioning.feature_noise"),
        (ConditioningConfig, {"feature_tokens": 0}, "conditioning.feature_tokens"),
        (ConditioningConfig, {"context_dim": 0}, "conditioning.context_dim"),
        (ProjectorConfig, {"hidden_dim": 0}, "projector.hidden_dim"),
        (DiscriminatorConfig, {"channels": 6}, "discriminator.channels"),
        (DiscriminatorConfig, {"layers": 0}, "discriminator.layers"),
        (DiscriminatorConfig, {"start_step": -1}, "discriminator.start_step"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(make: type, settings: dict[str, object], named: str) -> None:
    assert refusal_of(make, **settings).startswith(named)


def test_latents_that_the_unet_cannot_halve_are_refused_with_a_size_that_works() -> None:
    """72 / 4 = 18, which two halvings do not divide; 4 * 4 = 16 is the unit."""
    message = refusal_of(TrainConfig, data=dataclasses.replace(TrainConfig().data, image_size=72))
    assert "18 x 18" in message
    assert message.endswith("multiple of 16")


def test_an_image_too_small_for_the_discriminator_is_refused() -> None:
    """Three halvings of 16 leave 2 x 2, of which two 4 x 4 kernels leave nothing."""
    small = dataclasses.replace(TrainConfig().data, image_size=16)
    settings = {"data": small, "discriminator": DiscriminatorConfig(enabled=True, layers=3)}
    assert "discriminator.layers" in refusal_of(TrainConfig, **settings)
    TrainConfig(data=small, discriminator=DiscriminatorConfig(enabled=True, layers=2))
    TrainConfig(data=small, discriminator=DiscriminatorConfig(enabled=True, kind="projected"))


def test_a_run_from_before_there_were_kinds_of_discriminators_resumes_with_a_patch_one() -> None:
    old = as_dict(TrainConfig())
    del old["discriminator"]["kind"]
    assert differences(old, as_dict(TrainConfig())) == []
    projected = as_dict(TrainConfig(discriminator=DiscriminatorConfig(kind="projected")))
    assert differences(old, projected) == ["discriminator.kind: patch -> projected"]


@pytest.mark.parametrize("stage", ["latent", "decoder"])
def test_a_later_stage_needs_a_checkpoint(stage: str) -> None:
    assert "--init_checkpoint" in refusal_of(TrainConfig, stage=stage)
    TrainConfig(stage=stage, init_checkpoint="somewhere")


def test_a_data_root_that_is_not_set_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data_root"):
        _ = TrainConfig().checked_data_root
    with pytest.raises(ConfigError, match="is not a folder"):
        _ = TrainConfig(data_root=str(tmp_path / "nothing")).checked_data_root
    assert TrainConfig(data_root=str(tmp_path)).checked_data_root == str(tmp_path)


def test_a_remote_data_root_is_left_to_the_scan() -> None:
    assert TrainConfig(data_root="s3://bucket/ISIC").checked_data_root == "s3://bucket/ISIC"


def test_a_config_survives_yaml() -> None:
    values = as_dict(TrainConfig(max_steps=3, data=dataclasses.replace(TrainConfig().data, class_map={"mole": "NV"})))
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_what_may_change_on_resuming_is_no_difference() -> None:
    moved = TrainConfig(
        fresh=True,
        use_wandb=True,
        wandb_project="other",
        wandb_mode="offline",
        verbose=True,
        experiments_dir="/elsewhere",
        data_root="/mnt/copy",
        ray=dataclasses.replace(TrainConfig().ray, max_failures=9),
    )
    assert differences(as_dict(TrainConfig()), as_dict(moved)) == []


def test_what_may_not_change_is_named_with_both_values() -> None:
    config = TrainConfig()
    other = dataclasses.replace(config, seed=5, loss_weights=dataclasses.replace(config.loss_weights, kl=0.5))
    assert differences(as_dict(config), as_dict(other)) == ["loss_weights.kl: 1e-06 -> 0.5", "seed: 0 -> 5"]


def test_a_nested_setting_is_not_excused_by_its_last_name() -> None:
    """`verbose` at the top may change; a `verbose` inside a group would matter."""
    assert differences({"group": {"verbose": 1}}, {"group": {"verbose": 2}}) == ["group.verbose: 1 -> 2"]


def test_what_may_change_are_settings_that_exist() -> None:
    """A renamed setting must not stay behind in the list."""
    groups = {field.name for field in dataclasses.fields(TrainConfig)}
    assert groups | dict(setting_types(TrainConfig)).keys() >= RESUMABLE_CHANGES | DIVISION


@pytest.mark.parametrize(
    ("text", "workers"), [(0, (0, 0)), (4, (4, 4)), ("4", (4, 4)), ("2-8", (2, 8)), (" 1 - 1 ", (1, 1))]
)
def test_workers_are_a_number_or_a_range(text: int | str, workers: tuple[int, int]) -> None:
    assert parse_num_workers(text) == workers
    assert TrainConfig(num_workers=text).workers == workers


@pytest.mark.parametrize("text", [-1, "-1", "two", "2-", "-8", "2..8", "8-2", "0-2", "2-8-9", ""])
def test_other_numbers_of_workers_are_refused(text: int | str) -> None:
    with pytest.raises(ConfigError, match=r"^num_workers is "):
        TrainConfig(num_workers=text)


def test_a_run_may_go_on_with_fewer_workers_at_a_time_but_not_with_another_step() -> None:
    four, elastic, eight = (as_dict(TrainConfig(num_workers=workers)) for workers in (4, "2-4", 8))
    assert differences(four, elastic) == []
    assert differences(elastic, eight) == ["num_workers: 2-4 -> 8"]


def test_a_step_may_be_divided_otherwise_on_resuming_but_not_become_another() -> None:
    def settings(num_workers: int | str, batch_size: int, accumulation: int) -> dict[str, object]:
        made = TrainConfig(
            num_workers=num_workers, batch_size=batch_size, gradient_accumulation_steps=accumulation,
            unet=UNetConfig(gradient_checkpointing=batch_size < 8),
        )  # fmt: skip
        return as_dict(made)

    began = settings(2, 8, 1)
    for divided in (settings(1, 8, 2), settings(0, 4, 4), settings("1-4", 4, 1)):
        assert differences(began, divided) == []
    assert differences(began, settings(2, 16, 1)) == ["batch_size: 8 -> 16"]


def test_a_setting_that_an_older_run_lacks_had_its_default_value() -> None:
    new = as_dict(TrainConfig())
    old = as_dict(TrainConfig())
    del old["optimizer"]["weight_decay"], old["compile_mode"]
    assert differences(old, new) == []
    new["optimizer"]["weight_decay"] = 0.5
    assert differences(old, new) == ["optimizer.weight_decay: 0.0 -> 0.5"]


def test_a_setting_that_this_version_lacks_is_named_as_such() -> None:
    old = {**as_dict(TrainConfig()), "gone": 3}
    assert differences(old, as_dict(TrainConfig())) == ["gone: 3 -> not a setting of this M2D"]
