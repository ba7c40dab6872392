"""Who gets which gradient, and what a bad step leaves behind, in the joint, the latent and the decoder's stage."""

import copy
import dataclasses

import pytest
import torch
from tiny_networks import FEATURE_DIM, LATENT_SHAPE, moved, part, state_of, tiny_batch, tiny_networks, tiny_step
from torch import Tensor, nn
from torch.testing import assert_close

import m2d.training.step as step_module
from m2d.errors import TrainingError
from m2d.models.extractors import Features
from m2d.models.perceptual import FeatureDistance, LpipsDistance
from m2d.training.batch import Draws, ImageBatch, LatentBatch, extract
from m2d.training.losses import AutoencoderPhase, DenoiserPhase, frozen
from m2d.training.networks import Networks
from m2d.training.settings import AlignmentConfig, LossWeights

NORM = {"latent_norm.running_mean", "latent_norm.running_var"}
NOTHING = dict.fromkeys(vars(LossWeights()), 0.0) | {"manifold": 3.0}


def only(**weights: float) -> LossWeights:
    return LossWeights(**(NOTHING | weights))


def gradients(networks: Networks) -> dict[str, Tensor]:
    return {
        f"{module_name}.{name}": parameter.grad.clone()
        for module_name, module in networks.trained().items()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def captured_gradients(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The gradients at the moment of the update, by network and parameter; nothing is updated."""
    found: dict[str, Tensor] = {}
    networks_seen: list[Networks] = []

    original_init = step_module.BaseStep.__init__

    def remember(self, networks, *arguments):  # type: ignore[no-untyped-def]
        networks_seen.append(networks)
        original_init(self, networks, *arguments)

    def capture(optimizers, losses, scaler, clip_norm, look):  # type: ignore[no-untyped-def]
        found.clear()
        found.update(gradients(networks_seen[-1]))
        return torch.tensor(True), [torch.zeros(()) for _ in optimizers]

    monkeypatch.setattr(step_module.BaseStep, "__init__", remember)
    monkeypatch.setattr(step_module, "guarded_update", capture)
    return found


@pytest.mark.parametrize(
    ("weights", "learns"),
    [
        (only(diffusion=1.0), {"denoiser"}),
        (only(diffusion=1.0, alignment=1.0), {"denoiser", "projector"}),
        (only(reconstruction=1.0, alignment_vae=1.0), {"autoencoder"}),
    ],
)
def test_a_loss_moves_the_network_that_it_is_of_and_no_other(weights: LossWeights, learns: set[str]) -> None:
    networks = tiny_networks()
    before = state_of(networks)
    tiny_step(networks, weights=weights)([tiny_batch()], 0)
    changed = moved(networks, before)
    assert {name for name, tensors in changed.items() if tensors - NORM} == learns
    assert changed["denoiser"] >= NORM
    if "projector" in learns:
        assert changed["projector"] == set(before["projector"])


def test_the_alignment_loss_reaches_the_encoder_and_nothing_else() -> None:
    networks = tiny_networks()
    vae, unet = AutoencoderPhase(networks.autoencoder), DenoiserPhase(networks.denoiser, networks.projector)
    batch, draws = tiny_batch()
    pixels = batch.images.permute(0, 3, 1, 2)
    _, latents, _, _ = vae(pixels.float() / 127.5 - 1, draws.posterior)
    with frozen(unet):
        unet.align_autoencoder(latents, batch.labels, extract(networks.extractor, pixels), draws).backward()
    touched = {name for name, gradient in gradients(networks).items() if gradient.abs().sum() > 0}
    assert "autoencoder.vae.encoder.conv_in.weight" in touched
    assert all(name.startswith(("autoencoder.vae.encoder", "autoencoder.vae.quant_conv")) for name in touched)


def test_every_trained_parameter_gets_a_gradient_and_the_extractor_none(
    captured_gradients: dict[str, Tensor],
) -> None:
    networks = tiny_networks(discriminator=True)
    tiny_step(networks)([tiny_batch(8)], 0)
    expected = {f"{n}.{p}" for n, module in networks.trained().items() for p, _ in module.named_parameters()}
    assert set(captured_gradients) == expected
    assert not any(parameter.requires_grad for parameter in networks.extractor.parameters())
    assert all(parameter.grad is None for parameter in networks.extractor.parameters())


def test_the_gradient_in_parts_is_that_of_the_whole_objective(captured_gradients: dict[str, Tensor]) -> None:
    """The step takes its losses one by one; here they are one sum, by autograd, through the same networks."""
    weights = LossWeights(kl=1e-3, adversarial=0.7)
    networks = tiny_networks(discriminator=True)
    images, draws = tiny_batch()
    tiny_step(networks, weights=weights)([(images, draws)], 0)
    by_parts = dict(captured_gradients)

    networks = tiny_networks(discriminator=True)
    unet = DenoiserPhase(networks.denoiser, networks.projector)
    pixels = images.images.permute(0, 3, 1, 2)
    targets = pixels.float() / 127.5 - 1
    features = extract(networks.extractor, pixels)
    posterior = networks.autoencoder.encode(targets)
    latents = posterior.mean + posterior.std * draws.posterior
    drawn = networks.autoencoder.decode(latents)
    with frozen(unet), frozen(networks.discriminator):
        of_vae = (
            weights.reconstruction * (drawn - targets).abs().mean()
            + weights.perceptual * FeatureDistance(networks.extractor)(drawn, targets).mean()
            + weights.kl * posterior.kl().mean()
            - weights.adversarial * networks.discriminator(drawn).mean()
            + weights.alignment_vae * unet.align_autoencoder(latents, images.labels, features, draws)
        )
        of_vae.backward()
    whole = {name: gradient for name, gradient in gradients(networks).items() if name.startswith("autoencoder")}
    assert len(whole) > 40
    for name, gradient in whole.items():
        assert_close(by_parts[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def pulls_by_hand(networks: Networks, batch: tuple[ImageBatch, Draws], weights: LossWeights) -> tuple[Tensor, Tensor]:
    """What the pointwise losses and what a projected discriminator asks of the decoder's last layer, by autograd."""
    images, draws = batch
    targets = images.images.permute(0, 3, 1, 2).float() / 127.5 - 1
    distance = FeatureDistance(networks.extractor)
    posterior = networks.autoencoder.encode(targets)
    drawn = networks.autoencoder.decode(posterior.mean + posterior.std * draws.posterior)
    pointwise = weights.reconstruction * (drawn - targets).abs().mean()
    pointwise = pointwise + weights.perceptual * distance(drawn, targets).mean()
    adversarial = -networks.discriminator(distance.maps(drawn)).mean()
    last = networks.autoencoder.vae.decoder.conv_out.weight
    first, second = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (pointwise, adversarial))
    return first, second


def test_a_projected_discriminator_pulls_by_its_weight_as_much_as_the_pointwise_losses(
    captured_gradients: dict[str, Tensor],
) -> None:
    """The adaptive weight is the ratio of the gradients at the decoder's last layer, measured in the step before."""
    weights, batch = LossWeights(reconstruction=0.6, perceptual=0.4, adversarial=0.7), tiny_batch(8)
    networks = tiny_networks(discriminator="projected")
    pointwise, adversarial = pulls_by_hand(networks, batch, weights)
    step = tiny_step(networks, "decoder", weights=weights)
    for number, adaptive in enumerate([0.0, pointwise.norm() / adversarial.norm()]):
        assert_close(networks.discriminator.adaptive_weight, torch.as_tensor(adaptive), rtol=1e-4, atol=0)
        for module in networks.trained().values():
            module.zero_grad()
        step([part(batch, 0, 4), part(batch, 4, 8)], number)  # nothing is updated
        found = captured_gradients["autoencoder.vae.decoder.conv_out.weight"]
        assert_close(found, pointwise + 0.7 * adaptive * adversarial, rtol=1e-4, atol=1e-6)
    gained = (found - pointwise).norm() / pointwise.norm()
    assert gained.item() == pytest.approx(0.7, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_adaptive_weight_does_not_depend_on_the_scale_of_gradients(precision: str) -> None:
    found = []
    for mode in ("no", precision):
        step = tiny_step(tiny_networks(discriminator="projected"), "decoder", precision=mode)
        step([tiny_batch(8)], 0)
        assert step.read_scalars()["skipped_steps"] == 0
        found.append(step.networks.discriminator.adaptive_weight.item())
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("lpips", [False, True], ids=["features", "LPIPS"])
def test_perceptual_loss_and_projected_discriminator_share_one_pass_for_each_side(
    lpips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each micro-batch the maps of reconstructions are computed once, with a gradient, and of images, without one.

    The network that makes the maps stays as it is and gets no gradient. Beside LPIPS it is there for the discriminator.
    """
    networks = tiny_networks(discriminator="projected")
    extractor, passes = networks.extractor, []
    before = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    pyramid = type(extractor).pyramid

    def counted(self, x):  # type: ignore[no-untyped-def]
        passes.append(x.requires_grad)
        return pyramid(self, x)

    monkeypatch.setattr(type(extractor), "pyramid", counted)
    step = tiny_step(networks, "decoder")
    if lpips:
        step.perceptual = PixelLpips(step.perceptual.maps)
    trained = state_of(networks)
    for number in range(2):
        step([tiny_batch(seed=2 * number), tiny_batch(seed=2 * number + 1)], number)
    assert sorted(passes) == [False] * 4 + [True] * 4
    assert_close(dict(extractor.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in extractor.parameters())
    changed = moved(networks, trained)
    assert {name.split(".")[1] for name in changed["autoencoder"]} == {"decoder", "post_quant_conv"}
    assert changed["discriminator"] == set(trained["discriminator"]) - {"mixing_0"}


class PixelLpips(LpipsDistance):
    """In its place the distance of pixels: LPIPS's weights may not be at hand."""

    def __init__(self, maps: nn.Module) -> None:
        nn.Module.__init__(self)
        self._network, self.maps = [nn.Identity()], maps  # type: ignore[assignment]

    def forward(self, images: Tensor, targets: Tensor, maps: object = None) -> Tensor:
        return (images - targets).square().flatten(1).mean(dim=1)


@pytest.mark.parametrize(
    ("stage", "poison", "kind"),
    [
        ("joint", "loss", "patch"),
        ("joint", "gradient", "patch"),
        ("decoder", "loss", "patch"),
        ("decoder", "loss", "projected"),
        ("decoder", "gradient", "projected"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    stage: str, poison: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tiny_step(tiny_networks(discriminator=kind), stage)
    step([tiny_batch(seed=1)], 0)
    before = copy.deepcopy(step.state_dict())
    if poison == "loss":
        monkeypatch.setattr(step_module, "discriminator_loss", lambda real, fake: real.mean() * 0 + float("inf"))
    else:
        original = torch.nn.utils.clip_grad_norm_

        def poisoned(parameters, max_norm):  # type: ignore[no-untyped-def]
            parameters[0].grad.view(-1)[0] = float("nan")
            return original(parameters, max_norm)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    step([tiny_batch(seed=2)], 1)
    after = step.state_dict()
    assert after.pop("skipped").item() == before.pop("skipped").item() + 1
    rates = [
        group.pop("lr")
        for state in (before, after)
        for o in state["optimizers"].values()
        for group in o["param_groups"]
    ]
    assert rates  # the rate of the next step may be set; nothing else may differ
    assert_close(after, before, rtol=0, atol=0)


def test_training_goes_on_after_bad_steps_unless_too_many_come_in_a_row() -> None:
    networks = tiny_networks()
    step = tiny_step(networks)
    bad = tiny_batch()
    bad[1].noise.fill_(float("nan"))
    for number in range(2):
        step([bad], number)
    before = state_of(networks)
    step([tiny_batch(seed=3)], 2)
    assert "unet.conv_in.weight" in moved(networks, before)["denoiser"]
    assert all(torch.isfinite(tensor).all() for tensor in networks.denoiser.state_dict().values())
    for number in range(3, 6):
        step([bad], number)
    with pytest.raises(TrainingError, match=r"3 steps in a row .*loss/diffusion"):
        step.read_scalars()


def test_a_run_whose_every_step_was_skipped_has_not_trained() -> None:
    """However short: fewer steps than are allowed in a row, and some of them before it was resumed."""
    step = tiny_step(tiny_networks(), total_steps=2)
    bad = tiny_batch()
    bad[1].noise.fill_(float("nan"))
    step([bad], 0)
    assert step.read_scalars()["skipped_steps"] == 1
    resumed = tiny_step(tiny_networks(), total_steps=2)
    resumed.load_state_dict(step.state_dict())
    resumed([bad], 1)
    with pytest.raises(TrainingError, match="not finite"):
        resumed.read_scalars()


def test_a_loss_that_joins_late_is_averaged_over_its_own_steps() -> None:
    means = []
    for reads in (True, False):
        step = tiny_step(tiny_networks(), vae_warmup_steps=3)
        for number in range(3):
            step([tiny_batch()], number)
        if reads:
            step.read_scalars()
        step([tiny_batch(seed=9)], 3)
        means.append(step.read_scalars()["loss/diffusion"])
    assert means[0] == pytest.approx(means[1])


def test_averages_follow_the_weights_by_the_stated_decay() -> None:
    networks = tiny_networks()
    start = networks.denoiser.unet.conv_in.weight.detach().clone()
    step = tiny_step(networks)
    step([tiny_batch()], 0)
    new = networks.denoiser.unet.conv_in.weight.detach()
    decay = 1 / 10  # (1 + n) / (10 + n) at n = 0
    assert_close(step.ema.module.unet.conv_in.weight, decay * start + (1 - decay) * new)


@pytest.mark.parametrize(
    ("stage", "discriminator"),
    [("joint", True), ("decoder", True), ("decoder", False), ("joint", "projected"), ("decoder", "projected")],
)
def test_a_step_goes_on_from_its_state_in_fresh_networks(stage: str, discriminator: bool | str) -> None:
    """A projected discriminator's mixes are drawn otherwise in the second, and come from the state."""
    first, second = (tiny_step(tiny_networks(discriminator=discriminator), stage) for _ in range(2))
    if discriminator == "projected":
        second.networks.discriminator.mixing_0.normal_()
    first([tiny_batch(seed=1)], 0)
    first.flops(*tiny_batch(seed=3), 1)  # what is counted on the way leaves nothing behind
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in (first, second):
        step([tiny_batch(seed=2)], 1)
    assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_stays_near_float32(precision: str, captured_gradients: dict[str, Tensor]) -> None:
    """fp16 scales its gradients before the update; the comparison divides that out."""
    collected = []
    for mode in ("no", precision):
        step = tiny_step(tiny_networks(), precision=mode)
        step([tiny_batch(8)], 0)
        scale = step.scaler.get_scale() if mode == "fp16" else 1.0
        flat = torch.cat([(gradient / scale).flatten() for gradient in captured_gradients.values()])
        collected.append(flat)
    exact, reduced = collected
    assert torch.nn.functional.cosine_similarity(exact, reduced, dim=0) > 0.99


def latent_batch() -> tuple[LatentBatch, Draws]:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(4, *LATENT_SHAPE, generator=generator), torch.ones(4, *LATENT_SHAPE)
    patches = torch.randn(4, 4, FEATURE_DIM, generator=generator)
    features = Features(patches.mean(dim=1).half(), patches.half())
    return LatentBatch(mean.half(), std.half(), features, torch.tensor([0, 1, 2, 3])), tiny_batch(4)[1]


def test_the_latent_stage_trains_the_unet_alone_and_keeps_the_latent_scale() -> None:
    networks = tiny_networks()
    before = state_of(networks)
    tiny_step(networks, "latent")([latent_batch()], 0)
    changed = moved(networks, before)
    assert changed["autoencoder"] == set()
    assert "unet.conv_in.weight" in changed["denoiser"]
    assert not changed["denoiser"] & NORM


def test_the_decoders_stage_trains_decoder_and_discriminator_and_leaves_latents_and_unet_as_they_are() -> None:
    networks = tiny_networks(discriminator=True)
    before = state_of(networks)
    step = tiny_step(networks, "decoder")
    averaged = copy.deepcopy(step.ema.module.state_dict())
    for number in range(3):
        step([tiny_batch(seed=number)], number)
    changed = moved(networks, before)
    assert {name.split(".")[1] for name in changed["autoencoder"]} == {"decoder", "post_quant_conv"}
    assert changed["discriminator"]
    assert changed["denoiser"] == changed["projector"] == set()
    assert_close(step.ema.module.state_dict(), averaged, rtol=0, atol=0)


def test_the_decoder_fits_what_it_is_shown() -> None:
    step = tiny_step(tiny_networks(), "decoder", weights=only(reconstruction=1.0), rate=1e-2)
    losses = []
    for number in range(31):
        step([tiny_batch()], number)
        losses.append(step.read_scalars()["loss/reconstruction"])
    assert losses[-1] < 0.7 * losses[0]


def test_the_adversarial_loss_is_in_the_decoder_only_from_its_start_on() -> None:
    networks = tiny_networks(discriminator=True)
    step = tiny_step(networks, "decoder", weights=only(adversarial=1.0), discriminator_start=2)
    before = state_of(networks)
    step([tiny_batch()], 1)
    assert moved(networks, before)["autoencoder"] == set()
    step([tiny_batch()], 2)
    assert moved(networks, before)["autoencoder"]


def test_two_micro_batches_of_the_decoder_are_one_batch_of_twice_the_size() -> None:
    """Without a discriminator every loss is a mean over images, so the decoder's gradient is the mean of both."""
    batch = tiny_batch(8)
    one, two = (tiny_step(tiny_networks(), "decoder") for _ in range(2))
    one([batch], 0)
    two([part(batch, 0, 4), part(batch, 4, 8)], 0)
    assert_close(two.read_scalars()["gradient_norm/autoencoder"], one.read_scalars()["gradient_norm/autoencoder"])


def with_features(batch: tuple[ImageBatch, Draws], networks: Networks) -> tuple[ImageBatch, Draws]:
    """The batch as the cache would give it: features of the same pixels, in fp16."""
    images, draws = batch
    features = extract(networks.extractor, images.images.permute(0, 3, 1, 2))
    cached = Features(features.cls.half(), features.patches.half())
    return dataclasses.replace(images, features=cached), draws


def test_cached_features_give_the_losses_and_gradients_that_extracted_ones_give(
    captured_gradients: dict[str, Tensor],
) -> None:
    collected, losses = [], []
    for cached in (False, True):
        networks = tiny_networks()
        batch = with_features(tiny_batch(), networks) if cached else tiny_batch()
        step = tiny_step(networks)
        if cached:
            networks.extractor = None
        step([batch], 0)
        collected.append(dict(captured_gradients))
        losses.append(step.read_scalars())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)  # fp16 keeps 11 bits
    assert set(collected[0]) == set(collected[1])
    for name, gradient in collected[0].items():
        assert_close(collected[1][name], gradient, rtol=2e-2, atol=1e-4)


def test_a_stopped_alignment_leaves_the_gradient_of_the_diffusion_loss(captured_gradients: dict[str, Tensor]) -> None:
    """100 steps in all: with stop_fraction 0.5, step 49 is the last that aligns."""
    aligned, without = LossWeights(kl=1e-3), LossWeights(kl=1e-3, alignment=0.0, alignment_vae=0.0)
    runs = {}
    for name, weights, number in (("last", aligned, 49), ("stopped", aligned, 50), ("never", without, 50)):
        step = tiny_step(tiny_networks(), weights=weights, alignment=AlignmentConfig(stop_fraction=0.5))
        step([tiny_batch()], number)
        runs[name] = dict(captured_gradients)
        assert ("loss/alignment_vae" in step.read_scalars()) is (name == "last")
    for name, gradient in runs["never"].items():
        assert_close(runs["stopped"][name], gradient, rtol=1e-6, atol=1e-9)
    assert runs["stopped"]["projector.layers.0.weight"].abs().sum() == 0
    for name in ("projector.layers.0.weight", "denoiser.unet.conv_in.weight", "autoencoder.vae.encoder.conv_in.weight"):
        assert not torch.allclose(runs["last"][name], runs["stopped"][name], rtol=1e-3)


def test_the_latent_stages_alignment_stops_too(captured_gradients: dict[str, Tensor]) -> None:
    moved_by = []
    for number in (4, 5):
        step = tiny_step(tiny_networks(), "latent", total_steps=10, alignment=AlignmentConfig(stop_fraction=0.5))
        step([latent_batch()], number)
        moved_by.append(captured_gradients["projector.layers.0.weight"].abs().sum().item())
    assert moved_by[0] > 0
    assert moved_by[1] == 0


@pytest.mark.parametrize("tap", ["down_0", "up_1"])
def test_another_tap_aligns_both_halves(tap: str, captured_gradients: dict[str, Tensor]) -> None:
    """The blocks up to the tap feel the U-Net's alignment, and so does the encoder below them."""
    networks = tiny_networks(tap=tap)
    weights = only(alignment=1.0, alignment_vae=1.0)
    tiny_step(networks, weights=weights, alignment=AlignmentConfig(tap=tap))([tiny_batch()], 0)
    felt = {name for name, gradient in captured_gradients.items() if gradient.abs().sum() > 0}
    assert "autoencoder.vae.encoder.conv_in.weight" in felt
    assert "denoiser.unet.conv_in.weight" in felt
    assert any(name.startswith("denoiser.unet.up_blocks.1") for name in felt) is (tap == "up_1")
    assert not any(name.startswith("denoiser.unet.conv_out") for name in felt)


def test_spatial_normalisation_changes_what_both_halves_are_aligned_with() -> None:
    """Patches that say the same everywhere but for a small part: raw they are one direction, normalised they differ."""
    networks = tiny_networks()
    batch, draws = tiny_batch()
    common = torch.full((4, 1, FEATURE_DIM), 100.0)
    patches = common + torch.randn(4, 4, FEATURE_DIM, generator=torch.Generator().manual_seed(1))
    features = Features(patches.mean(dim=1), patches)
    by_hand = (patches - 0.8 * patches.mean(1, keepdim=True)) / (patches.std(1, keepdim=True) + 1e-6)
    latents = torch.randn(4, *LATENT_SHAPE, generator=torch.Generator().manual_seed(2))
    networks.denoiser.eval()
    raw, normalised = (DenoiserPhase(networks.denoiser, networks.projector, spatial_norm=gamma) for gamma in (0.0, 0.8))
    for loss in ("alignment", "manifold"):
        expected = raw(latents, batch.labels, Features(features.cls, by_hand), draws)[loss]
        assert_close(normalised(latents, batch.labels, features, draws)[loss], expected)
    expected = raw.align_autoencoder(latents, batch.labels, Features(features.cls, by_hand), draws)
    assert_close(normalised.align_autoencoder(latents, batch.labels, features, draws), expected)
    assert not torch.isclose(raw.align_autoencoder(latents, batch.labels, features, draws), expected)


def test_frozen_thaws_only_what_it_froze() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    with frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [parameter.requires_grad for parameter in module.parameters()] == [False, False, True, True]
