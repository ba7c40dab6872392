"""Settings of a generation run refuse what cannot work, in one line."""

from typing import Any

import pytest

from m2d.classes import BINARY, ISIC7
from m2d.errors import ConfigError
from m2d.generation.settings import GenerateConfig


def test_classes_are_read_in_any_letter_case_and_put_in_order() -> None:
    assert GenerateConfig(checkpoint="c", classes=" mel,Df, mel,").class_codes(ISIC7) == ("DF", "MEL")


def test_a_class_that_the_checkpoint_lacks_is_an_error_that_lists_its_classes() -> None:
    config = GenerateConfig(checkpoint="c", classes="MEL,MOLE")
    with pytest.raises(ConfigError, match=r"^classes: MOLE is not known; choose from AKIEC,BCC,BKL,DF,MEL,NV,VASC$"):
        config.class_codes(ISIC7)
    with pytest.raises(ConfigError, match="MEL, MOLE is not known; choose from BENIGN,MALIGNANT"):
        config.class_codes(BINARY)


def test_no_classes_means_all() -> None:
    assert GenerateConfig(checkpoint="c").class_codes(ISIC7) == ISIC7.codes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": " ,"}, "classes is empty"),
        ({"checkpoint": ""}, "checkpoint is empty"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"steps": 0}, "steps is 0"),
        ({"solver": "rk45"}, "solver is rk45; known: euler heun dpmpp unipc"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is"),
        ({"guidance_interval": (0.0, 1.2)}, "guidance_interval is"),
        ({"feature": "real"}, "feature is real; known: prior none reference"),
        ({"feature_temperature": -0.1}, "feature_temperature is -0.1; it must be a number of at least 0"),
        ({"feature_temperature": float("nan")}, "feature_temperature is nan"),
        ({"feature_temperature": float("inf")}, "feature_temperature is inf"),
        ({"time_shift": 0.0}, "time_shift is 0.0; it must be a number above 0"),
        ({"time_shift": float("inf")}, "time_shift is inf; it must be a number above 0"),
        ({"guide_checkpoint": "g", "guidance_scale": 1}, "guide_checkpoint has nothing to do at guidance_scale 1"),
        ({"strength": 1.5}, "strength is 1.5; it must be from 0"),
        ({"strength": "0.6..0.3"}, "strength is 0.6..0.3; it must be from 0"),
        ({"strength": "0.3.."}, "strength is 0.3..; it must be from 0"),
        ({"strength": "half"}, "strength is half; it must be from 0"),
        ({"strength": 0.3}, "strength is 0.3, and mode standard has none"),
        ({"strength": 0.3, "mode": "balance", "data_root": "d"}, "strength is 0.3, and balance_from noise has none"),
        (
            {"strength": "0.3..0.6", "balance_from": "flips", "mode": "balance", "data_root": "d"},
            "strength is 0.3..0.6, and balance_from flips has none",
        ),
        ({"balance_from": "dreams"}, "balance_from is dreams; known: noise real"),
        ({"balance_from": "real", "data_root": "d"}, "balance_from real varies training images in mode balance"),
        ({"balance_from": "real", "mode": "balance", "catalog": "c"}, "balance_from real varies training images"),
        ({"masks": "m"}, "masks are of real lesions, and these images come from noise"),
        ({"masks": "m", "mode": "balance", "data_root": "d"}, "masks are of real lesions"),
        (
            {"balance_from": "flips", "mode": "balance", "data_root": "d", "feature": "prior"},
            "feature is prior, but nothing guides a flip",
        ),
        ({"mode": "dream"}, "mode is dream; known: standard image2image interpolate balance"),
        ({"mode": "image2image"}, "mode image2image needs --init_images"),
        ({"mode": "interpolate", "reference_images": "a"}, "mode interpolate needs --reference_images_b"),
        ({"init_images": "a"}, "init_images is for mode image2image, and the mode is standard"),
        ({"mode": "balance"}, "mode balance needs what is to be balanced"),
        ({"mode": "balance", "data_root": "d", "to": "many"}, "to is many"),
        ({"mode": "balance", "data_root": "d", "balance_split": "test"}, "balance_split is test; known: all train"),
        ({"feature": "reference"}, "feature reference needs an image to take it from"),
        ({"format": "zip"}, "format is zip; known: folder webdataset parquet"),
        ({"shard_images": 0}, "shard_images is 0"),
        ({"num_actors": -1}, "num_actors is -1; it must be at least 0"),
        ({"gpus_per_actor": 1.5}, "gpus_per_actor is 1.5; above 1 it must be a whole number"),
        ({"merge": True}, "merge needs the real images; name their folder by --data_root"),
        ({"plan": "p", "plan_only": True}, "plan_only would write the plan that --plan names"),
        (
            {"compile_mode": "fast", "compile": True},
            "compile_mode is fast; known: default reduce-overhead max-autotune",
        ),
        ({"compile_mode": "max-autotune"}, "compile_mode is max-autotune, but nothing is compiled; add --compile true"),
        ({"mixed_precision": "fp8"}, "mixed_precision is fp8; known: no bf16 fp16"),
    ],
)
def test_a_bad_setting_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateConfig(**{"checkpoint": "c", **settings})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_strength_is_for_images_that_start_from_others() -> None:
    for settings in ({"mode": "image2image", "init_images": "i"}, {"mode": "balance", "balance_from": "real"}):
        assert GenerateConfig(**{"checkpoint": "c", "data_root": "d", "strength": 0.3, **settings}).strength == 0.3


def test_a_plan_needs_none_of_what_a_mode_needs() -> None:
    assert GenerateConfig(checkpoint="c", plan="plan.parquet", mode="image2image").plan == "plan.parquet"
