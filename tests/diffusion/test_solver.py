"""The path is held to its definition, solvers to flows with a closed form, guidance to its formula and its passes.

Data N(m, s^2): x_t ~ N((1 - t) m, var_t) with var_t = (1 - t)^2 s^2 + t^2, so E[v | x_t] is linear in x_t and noise eps
flows to m + s eps. Mixtures in one dimension: the flow keeps the order of points, so noise eps flows to the point with
the same cumulative probability.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from m2d.diffusion.interpolant import interpolate, shifted, training_times, velocity_target
from m2d.diffusion.settings import SOLVERS, Solver
from m2d.diffusion.solver import AutoguidedVelocity, GuidedVelocity, HeldVelocity, solve, time_grid

Flow = Callable[[Tensor, Tensor], Tensor]
MEANS = torch.tensor([-2.0, 1.5], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.6], dtype=torch.float64)
WEIGHTS = torch.tensor([0.35, 0.65], dtype=torch.float64)


def gaussian_velocity(mean: float | Tensor, std: float | Tensor) -> Flow:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        var = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / var * (x - (1 - t) * mean)

    return velocity


def mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Posterior mean over the components of each one's Gaussian velocity."""
    var = (1 - t) ** 2 * STDS**2 + t**2
    offset = x[..., None] - (1 - t) * MEANS
    posterior = torch.softmax(WEIGHTS.log() - 0.5 * var.log() - 0.5 * offset**2 / var, dim=-1)
    return (posterior * (-MEANS + (t - (1 - t) * STDS**2) / var * offset)).sum(-1)


def mixture_flow(x: Tensor, t: Tensor) -> Tensor:
    return mixture_velocity(x.double(), t).to(x.dtype)


def seeded_noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian_error(solver: Solver, steps: int) -> float:
    """Root mean square distance to m + s eps."""
    start = seeded_noise(2048, 1)
    end = solve(gaussian_velocity(mean=2.0, std=0.5), start, steps=steps, solver=solver)
    return (end - (2.0 + 0.5 * start)).square().mean().sqrt().item()


def mixture_error(solver: Solver, evaluations: int) -> float:
    """Root mean square difference of the cumulative probabilities of start and end."""
    start = seeded_noise(2048, 1)
    end = solve(mixture_velocity, start, steps=evaluations // 2 if solver == "heun" else evaluations, solver=solver)
    reached = (WEIGHTS * torch.special.ndtr((end[..., None] - MEANS) / STDS)).sum(-1)
    return float((reached - torch.special.ndtr(start)).square().mean().sqrt())


def test_the_path_runs_from_data_at_0_to_noise_at_1_and_the_velocity_is_its_derivative() -> None:
    clean, noise = seeded_noise(2, 3, 2, 4, 4)
    x_t = interpolate(clean, noise, torch.tensor([0.0, 1.0, 0.25]))
    assert_close(x_t, torch.stack([clean[0], noise[1], 0.75 * clean[2] + 0.25 * noise[2]]))
    t, h = torch.tensor([0.1, 0.5, 0.8]), 2.0**-6
    derivative = (interpolate(clean, noise, t + h) - interpolate(clean, noise, t - h)) / (2 * h)
    assert_close(velocity_target(clean, noise), derivative)


def test_an_error_of_the_velocity_weighs_that_of_the_data_by_one_over_t_squared() -> None:
    """Which is (1 + sqrt(SNR))^2 with SNR = ((1 - t) / t)^2, see docs/train.md."""
    clean, noise, error = seeded_noise(3, 4, 2)
    t = torch.tensor([0.1, 0.4, 0.5, 1.0], dtype=torch.float64)
    estimate = interpolate(clean, noise, t) - t[:, None] * (velocity_target(clean, noise) + error)  # x_0 = x_t - t v
    weight = (1 + (1 - t) / t) ** 2
    assert_close(error.square(), weight[:, None] * (estimate - clean).square())


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_training_times_are_the_quantiles_of_their_density(shift: float) -> None:
    """SciPy's: log(t / (1 - t)) is normal about log(shift), or t is uniform before the shift of SD3's eq. 23."""
    share = torch.linspace(0, 1, 4097)[1:-1]
    z = scipy.stats.norm.ppf(share.double().numpy(), loc=np.log(shift))
    logit_normal = torch.from_numpy(scipy.special.expit(z)).float()
    assert_close(training_times(share, "logit_normal", shift), logit_normal, rtol=2e-7, atol=0)
    from_uniform = torch.from_numpy(scipy.special.expit(scipy.special.logit(share.double().numpy()) + np.log(shift)))
    assert_close(training_times(share, "uniform", shift), from_uniform.float(), rtol=2e-7, atol=0)
    assert training_times(torch.tensor([0.0]), "logit_normal", shift).item() == 0


def test_without_density_and_shift_no_bit_of_a_time_changes() -> None:
    share = seeded_noise(4096).float()
    assert torch.equal(training_times(share), share)
    assert torch.equal(shifted(share, 1.0), share)


@pytest.mark.parametrize(
    ("solver", "gaussian", "mixture"),
    [("euler", 4e-3, 2e-3), ("heun", 2e-5, 2e-5), ("dpmpp", 2e-4, 1e-4), ("unipc", 5e-5, 2e-5)],
)
def test_each_solver_converges_to_the_gaussian_and_to_the_mixture(
    solver: Solver, gaussian: float, mixture: float
) -> None:
    assert gaussian_error(solver, steps=256) < gaussian
    assert mixture_error(solver, evaluations=256) < mixture


@pytest.mark.parametrize(
    ("solver", "order", "slack"), [("euler", 1.0, 0.1), ("heun", 2.0, 0.1), ("dpmpp", 2.0, 0.35), ("unipc", 2.0, 0.2)]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver: Solver, order: float, slack: float) -> None:
    ratio = torch.tensor(gaussian_error(solver, 64) / gaussian_error(solver, 128))
    assert_close(ratio.log2().item(), order, atol=slack, rtol=0)


@pytest.mark.parametrize("solver", ["heun", "dpmpp", "unipc"])
@pytest.mark.parametrize("evaluations", [8, 24, 50])
def test_higher_order_beats_euler_at_the_same_number_of_evaluations(solver: Solver, evaluations: int) -> None:
    assert mixture_error(solver, evaluations) < 0.4 * mixture_error("euler", evaluations)


@pytest.mark.parametrize(
    ("scheduler", "solver", "tolerance"),
    [(UniPCMultistepScheduler, "unipc", 1e-11), (DPMSolverMultistepScheduler, "dpmpp", 1e-5)],  # the latter in float32
)
@pytest.mark.parametrize(
    ("steps", "start_time"), [(1, 1.0), (2, 1.0), (3, 1.0), (10, 1.0), (25, 1.0), (60, 1.0), (9, 0.6)]
)
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers on its betas
def test_multistep_solvers_are_those_of_diffusers(
    scheduler: Any, solver: Solver, tolerance: float, steps: int, start_time: float
) -> None:
    """On our grid, in float64. (In float32 diffusers' UniPC is up to 3e-5 off its own float64.)"""
    start = seeded_noise(256, 1)
    times = time_grid(steps, start_time=start_time).clamp(max=1 - 1e-6)
    theirs = scheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, final_sigmas_type="zero"
    )
    theirs.set_timesteps(steps)
    theirs.sigmas = times.float().double()
    theirs.set_begin_index(0)
    expected = start
    for index in range(steps):
        velocity = mixture_velocity(expected, times[index])
        expected = theirs.step(velocity, theirs.timesteps[index], expected, return_dict=False)[0]
    end = solve(mixture_velocity, start, steps=steps, solver=solver, start_time=start_time)
    assert_close(end, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_asks_a_device_for_sums_and_products_alone(solver: Solver) -> None:
    """Nothing is read from it or copied to it, and no system is solved on it: a GPU is never waited for."""
    asked: set[str] = set()

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.device.type == "meta":
                asked.add(func.overloadpacket.__name__)
            return result

    start = torch.zeros(2, 3, device="meta")  # without values: reading one is an error
    with Asked():
        end = solve(lambda x, t: x, start, steps=6, solver=solver)
    assert end.shape == start.shape
    assert asked <= {"add", "sub", "mul", "div", "detach"}


@pytest.mark.parametrize("solver", SOLVERS)
def test_channels_flow_apart_from_each_other(solver: Solver) -> None:
    mean = torch.tensor([0.0, 3.0, -1.0]).view(1, 3, 1, 1)
    std = torch.tensor([1.0, 0.2, 0.7]).view(1, 3, 1, 1)
    start = seeded_noise(4, 3, 2, 2).float()
    end = solve(gaussian_velocity(mean, std), start, steps=200, solver=solver)
    assert_close(end, mean + std * start, atol=1.5e-2 if solver == "euler" else 1e-3, rtol=0)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 7), ("heun", 14), ("dpmpp", 7), ("unipc", 7)])
def test_the_network_runs_as_often_as_promised(solver: Solver, evaluations: int) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.device.type == "cpu"
        assert t.ndim == 0
        times.append(float(t))
        return torch.zeros_like(x)

    solve(velocity, torch.zeros(1, 1), steps=7, solver=solver)
    assert len(times) == evaluations
    assert max(times) == pytest.approx(1.0, abs=2e-6)
    assert sorted({round(t, 4) for t in times if t > 0}) == [round(k / 7, 4) for k in range(1, 8)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_state_stays_in_float32_when_the_network_does_not_and_under_a_callers_autocast(solver: Solver) -> None:
    """As training's autocast around a picture's samples."""
    exact = gaussian_velocity(mean=2.0, std=0.5)
    seen: set[torch.dtype] = set()

    def bfloat16_velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return exact(x, t).bfloat16()

    start = seeded_noise(64, 1).bfloat16()
    expected = solve(exact, start, steps=50, solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        end = solve(bfloat16_velocity, start, steps=50, solver=solver)
        assert torch.equal(solve(exact, start, steps=50, solver=solver), expected)
    assert seen == {torch.float32}
    assert end.dtype == torch.float32
    # Rounding each velocity of about 2 to eight bits leaves about 2^-8; a state in bf16 would drift much further.
    assert_close(end, expected, atol=1e-2, rtol=0)


def test_the_grid_is_uniform_from_1_to_0_the_shift_moves_it_to_the_noise_and_a_start_takes_its_tail() -> None:
    assert time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert_close(time_grid(4, shift=3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64))
    assert time_grid(3, start_time=0.75).tolist() == [0.75, 0.5, 0.25, 0.0]
    whole = time_grid(8, shift=3.0)
    assert_close(time_grid(5, shift=3.0, start_time=float(whole[3])), whole[3:])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shifted_grid_ends_at_the_same_place(solver: Solver) -> None:
    start = seeded_noise(64, 1)
    end = solve(gaussian_velocity(mean=2.0, std=0.5), start, steps=256, solver=solver, shift=2.0)
    assert_close(end, 2.0 + 0.5 * start, atol=2e-2 if solver == "euler" else 2e-3, rtol=0)


@pytest.mark.parametrize(("solver", "tolerance"), [("euler", 8e-3), ("heun", 8e-5), ("dpmpp", 8e-4), ("unipc", 2e-4)])
@pytest.mark.parametrize("start_time", [0.3, 0.75])
def test_from_a_time_on_the_path_the_gaussian_ends_where_the_path_from_noise_does(
    solver: Solver, tolerance: float, start_time: float
) -> None:
    """Along the flow (x_t - (1 - t) m) / sqrt(var_t) is constant: noise eps stands at (1 - t) m + sqrt(var_t) eps."""
    noise = seeded_noise(2048, 1)
    var = (1 - start_time) ** 2 * 0.5**2 + start_time**2
    start = (1 - start_time) * 2.0 + var**0.5 * noise
    end = solve(gaussian_velocity(mean=2.0, std=0.5), start, steps=128, solver=solver, start_time=start_time)
    assert (end - (2.0 + 0.5 * noise)).square().mean().sqrt() < tolerance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1.0, 3.3])
def test_a_start_time_of_one_changes_no_bit(solver: Solver, shift: float) -> None:
    start = seeded_noise(64, 1).float()
    from_one = solve(mixture_flow, start, steps=7, solver=solver, shift=shift, start_time=1.0)
    assert torch.equal(from_one, solve(mixture_flow, start, steps=7, solver=solver, shift=shift))
    uniform = torch.linspace(1, 0, 8, dtype=torch.float64)
    assert torch.equal(time_grid(7, shift, 1.0), shift * uniform / (1 + (shift - 1) * uniform))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start_time", [0.0, 1e-9])
def test_where_the_path_has_arrived_the_network_is_not_asked(solver: Solver, start_time: float) -> None:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked")

    start = seeded_noise(4, 3).float()
    assert torch.equal(solve(velocity, start, steps=5, solver=solver, start_time=start_time), start)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start_time", [1e-5, 0.4, 0.999999, 1.0])
def test_one_step_from_any_time_over_constant_velocity_is_exact(solver: Solver, start_time: float) -> None:
    """With the data a single point x_0, eps - x_0 is constant along the path."""
    noise, clean = seeded_noise(2, 3).float(), torch.tensor([[1.0, 2.0, 3.0]])
    start = (1 - start_time) * clean + start_time * noise
    end = solve(lambda x, t: noise - clean, start, steps=1, solver=solver, start_time=start_time)
    assert_close(end, clean.expand(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start_time", [0.4, 1.0])
def test_outside_of_a_region_a_step_is_at_the_known_latents_noised_to_its_time(
    solver: Solver, start_time: float
) -> None:
    known, noise = seeded_noise(2, 3, 4, 4), seeded_noise(4, 3, 4, 4)[2:]
    region = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    region[0, :, 1:3, 2:] = True
    flow, seen = gaussian_velocity(2.0, 0.5), []

    def inner(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.where(region, 0, x - (1 - t) * known - t * noise).abs().max())
        return flow(x, t)

    held = HeldVelocity(inner, region, noise - known)  # type: ignore[arg-type]
    start = (1 - start_time) * known + start_time * noise
    settings: dict[str, Any] = {"steps": 6, "solver": solver, "start_time": start_time}
    end = solve(held, start, **settings)
    assert max(seen) < 1e-5  # the multistep solvers begin at 1 - 1e-6
    expected = torch.where(region, solve(flow, start, **settings), known)
    assert_close(end, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("start_time", [-0.1, 1.5, float("nan")])
def test_a_start_time_off_the_path_is_refused(start_time: float) -> None:
    with pytest.raises(ValueError, match="start_time is"):
        solve(lambda x, t: x, torch.zeros(1, 1), steps=2, start_time=start_time)


# --- watching


@pytest.mark.parametrize("solver", SOLVERS)
def test_being_watched_changes_no_bit_and_each_step_is_seen_once(solver: Solver) -> None:
    seen: list[int] = []
    start = seeded_noise(64, 1).float()
    watched = solve(mixture_flow, start, steps=6, solver=solver, watch=lambda step, clean: seen.append(step))
    assert torch.equal(watched, solve(mixture_flow, start, steps=6, solver=solver))
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_estimate_of_the_data_is_right_from_the_first_step_on_where_the_data_is_a_point(solver: Solver) -> None:
    noise, clean = seeded_noise(2, 3), torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    seen: list[Tensor] = []
    solve(lambda x, t: noise - clean, noise, steps=5, solver=solver, watch=lambda _, x_0: seen.append(x_0))
    for estimate in seen:
        assert_close(estimate, clean.expand(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_that_stay_end_where_they_end_alone(solver: Solver) -> None:
    """Rows 1 and 3 leave after the second step, 0 after the fourth; each has a context of its own."""
    start, contexts = seeded_noise(5, 1, 2, 2), torch.arange(5.0, dtype=torch.float64).view(5, 1, 1)
    leaving = {2: [0, 2, 4], 4: [1, 2]}
    velocity = GuidedVelocity(CountingModel(), contexts, NULL.double(), scale=2.0, interval=(0.0, 0.7))

    def watch(step: int, clean: Tensor) -> list[int] | None:
        rows = leaving.get(step)
        if rows is not None:
            velocity.keep(rows)
        return rows

    end = solve(velocity, start, steps=8, solver=solver, watch=watch)
    alone = GuidedVelocity(CountingModel(), contexts[[2, 4]], NULL.double(), scale=2.0, interval=(0.0, 0.7))
    assert_close(end, solve(alone, start[[2, 4]], steps=8, solver=solver), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_where_no_row_is_left_the_network_is_asked_no_more(solver: Solver) -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return x

    end = solve(velocity, torch.ones(3, 2), steps=9, solver=solver, watch=lambda step, _: [] if step == 3 else None)
    assert end.shape == (0, 2)
    assert len(times) == (6 if solver == "heun" else 3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_narrowing_waits_for_no_device(solver: Solver) -> None:
    """On tensors without values, of which nothing can be read; a list of rows as an index would be copied to a GPU."""
    asked: set[str] = set()

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **kwargs or {})
            if isinstance(result, Tensor) and result.device.type == "meta":
                asked.add(func.overloadpacket.__name__)
            return result

    watched = {2: [2, 0], 3: [1]}
    start = torch.zeros(3, 4, device="meta")
    with Asked():
        end = solve(lambda x, t: x, start, steps=5, solver=solver, watch=lambda step, _: watched.get(step))
    assert end.shape == (1, 4)
    assert asked <= {"add", "sub", "mul", "div", "detach", "select", "stack"}


# --- guidance


class CountingModel:
    """velocity = x t + the context's first number; remembers the size of each batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        assert len(t) == len(context) == len(x_t)
        return x_t * t.view(-1, 1, 1, 1) + context[:, 0, :1, None, None]


X = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 2, 2)
CONDITIONAL = torch.tensor([3.0, 5.0]).view(2, 1, 1)
NULL = torch.tensor([1.0]).view(1, 1, 1)
HALF = torch.tensor(0.5, dtype=torch.float64)


def guided(model: CountingModel, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> GuidedVelocity:
    return GuidedVelocity(model, CONDITIONAL, NULL, scale=scale, interval=interval)


@pytest.mark.parametrize("scale", [2.5, 0.0])
def test_guidance_goes_from_the_null_velocity_past_the_conditional_one_in_one_pass(scale: float) -> None:
    # v_null = x t + 1; v_cond = x t + (3, 5)
    model = CountingModel()
    velocity = guided(model, scale)(X, HALF)
    assert_close(velocity, X * 0.5 + 1 + scale * torch.tensor([2.0, 4.0]).view(2, 1, 1, 1))
    assert model.batches == [4]


def test_scale_1_is_the_conditional_velocity_alone() -> None:
    model = CountingModel()
    assert_close(guided(model, scale=1.0)(X, HALF), X * 0.5 + CONDITIONAL.view(2, 1, 1, 1))
    assert model.batches == [2]


@pytest.mark.parametrize(("t", "passes"), [(0.19, [2]), (0.2, [4]), (0.5, [4]), (0.7, [4]), (0.71, [2])])
def test_the_null_half_is_computed_inside_the_interval_alone(t: float, passes: list[int]) -> None:
    model = CountingModel()
    velocity = guided(model, scale=3.0, interval=(0.2, 0.7))(X, torch.tensor(t, dtype=torch.float64))
    assert model.batches == passes
    if passes == [2]:
        assert_close(velocity, X * t + CONDITIONAL.view(2, 1, 1, 1))


def test_one_pass_a_step_through_a_whole_solve() -> None:
    # euler's ten times are 1, .9, ... .1: two above the interval, eight inside
    model = CountingModel()
    solve(guided(model, scale=3.0, interval=(0.0, 0.85)), X, steps=10, solver="euler")
    assert model.batches == [2] * 2 + [4] * 8


def test_guidance_is_computed_in_the_precision_of_the_state() -> None:
    class Bfloat16Model:
        def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return (x_t + context[:, 0, :1, None, None]).bfloat16()

    velocity = GuidedVelocity(Bfloat16Model(), CONDITIONAL, NULL, scale=1.3)(torch.zeros(2, 1, 1, 1), HALF)
    assert velocity.dtype == torch.float32
    assert_close(velocity.flatten(), torch.tensor([1 + 1.3 * 2, 1 + 1.3 * 4]))


# --- autoguidance


class GaussianModel:
    """The velocity of data N(context, 0.5^2), and how often it was asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def velocity(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        return gaussian_velocity(context[:, 0, :1], 0.5)(x_t, t[:, None])


def autoguided(
    scale: float, interval: tuple[float, float] = (0.0, 1.0), rows: int = 64
) -> tuple[AutoguidedVelocity, GaussianModel, GaussianModel]:
    """Data of mean 2, a guide that takes it for 1.5; rows alike."""
    model, guide = GaussianModel(), GaussianModel()
    contexts = (torch.full((rows, 1, 1), mean, dtype=torch.float64) for mean in (2.0, 1.5))
    return AutoguidedVelocity(model, guide, *contexts, scale=scale, interval=interval), model, guide


@pytest.mark.parametrize("solver", ["heun", "unipc"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_autoguidance_leads_from_the_guides_mean_past_the_models(solver: Solver, scale: float) -> None:
    """The velocity is affine in the mean, so the guided one is that of the mean 1.5 + scale (2 - 1.5)."""
    start = seeded_noise(64, 1)
    end = solve(autoguided(scale)[0], start, steps=128, solver=solver)
    assert_close(end, 1.5 + scale * 0.5 + 0.5 * start, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("scale", "asked"), [(3.0, 8), (1.0, 0)])
def test_the_guide_is_asked_inside_the_interval_alone(scale: float, asked: int) -> None:
    # euler's ten times are 1, .9, ... .1: two above the interval, eight inside
    velocity, model, guide = autoguided(scale, interval=(0.0, 0.85), rows=2)
    solve(velocity, seeded_noise(2, 1), steps=10, solver="euler")
    assert (model.batches, guide.batches) == ([2] * 10, [2] * asked)


def test_rows_that_stay_with_a_guide_end_where_they_end_alone() -> None:
    start, means = seeded_noise(3, 1), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1)
    velocity = AutoguidedVelocity(GaussianModel(), GaussianModel(), means, means - 0.5, scale=2.0)

    def watch(step: int, clean: Tensor) -> list[int] | None:
        if step != 2:
            return None
        velocity.keep([2, 0])
        return [2, 0]

    end = solve(velocity, start, steps=8, watch=watch)
    alone = AutoguidedVelocity(GaussianModel(), GaussianModel(), means[[2, 0]], means[[2, 0]] - 0.5, scale=2.0)
    assert_close(end, solve(alone, start[[2, 0]], steps=8), atol=1e-12, rtol=0)
