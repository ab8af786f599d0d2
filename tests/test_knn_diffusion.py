"""knn_diffusion.py: schedule, posterior, condition, U-Net, loss, guidance, samplers."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import UNET_CONFIG, tiny_unet

import knn_diffusion as kd


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


# ---------------------------------------------------------------- schedule


def test_schedule_is_the_squared_cosine():
    schedule = kd.Schedule(1000)
    assert schedule.alpha_bar.dtype == torch.float64 and schedule.alpha_bar[0] == 1
    for t in (1, 250, 500, 900):
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (t, 0)]
        assert schedule.alpha_bar[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert schedule.beta.max() == 0.999 and schedule.beta[0] == 0
    assert schedule.alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.02)


def test_noise_shift_multiplies_the_signal_to_noise_ratio():
    plain, shifted = kd.Schedule(1000).alpha_bar[1:900], kd.Schedule(1000, 0.5).alpha_bar[1:900]
    ratio = (shifted / (1 - shifted)) / (plain / (1 - plain))
    assert torch.allclose(ratio, torch.full_like(ratio, 0.25), rtol=1e-6)


def test_predictions_convert_into_each_other():
    x0, eps = torch.randn(2, 3, 4, 4, dtype=torch.float64).repeat(2, 1, 1, 1, 1)
    eps = torch.randn_like(x0)
    alpha_bar = kd.Schedule(1000).at(torch.tensor([10, 700]), x0)
    xt = kd.add_noise(x0, eps, alpha_bar)
    assert torch.allclose(xt, alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps)
    assert torch.allclose(kd.x0_from(eps, xt, alpha_bar, "eps"), x0)
    assert torch.allclose(kd.x0_from(kd.to_v(x0, eps, alpha_bar), xt, alpha_bar, "v"), x0)
    assert torch.equal(kd.x0_from(x0, xt, alpha_bar, "x0"), x0)
    assert torch.allclose(kd.eps_from(x0, xt, alpha_bar), eps)


@pytest.mark.parametrize("t, s", [(2, 1), (500, 499), (900, 300), (1000, 1)])
def test_posterior_equals_bayes_for_gaussians(t, s):
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0): multiply two densities in x_s."""
    schedule = kd.Schedule(1000)
    a_t, a_s = schedule.alpha_bar[t], schedule.alpha_bar[s]
    x0, xt = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
    alpha = a_t / a_s
    precision = alpha / (1 - alpha) + 1 / (1 - a_s)
    wanted = (alpha.sqrt() * xt / (1 - alpha) + a_s.sqrt() * x0 / (1 - a_s)) / precision
    mean, variance, beta = kd.posterior(x0, xt, a_t, a_s)
    assert torch.allclose(mean, wanted) and torch.allclose(variance, 1 / precision)
    assert torch.allclose(beta, 1 - alpha)


def test_learned_variance_runs_from_beta_tilde_to_beta():
    beta_tilde, beta = torch.tensor(0.01), torch.tensor(0.04)
    for fraction, wanted in ((-1, 0.01), (1, 0.04), (0, 0.02)):
        value = kd.learned_log_variance(torch.tensor(float(fraction)), beta_tilde, beta).exp()
        assert value.item() == pytest.approx(wanted, rel=1e-5)


# ---------------------------------------------------------------- the condition


def test_drops_are_exclusive_and_a_tenth_each():
    query, neighbors = kd.draw_drops(200_000, torch.Generator().manual_seed(0))
    for share in ((query & neighbors), (query & ~neighbors), (neighbors & ~query)):
        assert share.float().mean().item() == pytest.approx(0.1, abs=0.004)


@pytest.mark.parametrize("condition", ["query", "neighbors"])
def test_a_model_of_one_condition_is_unconditional_in_a_tenth(condition):
    query, neighbors = kd.draw_drops(100_000, torch.Generator().manual_seed(0), condition)
    never, sometimes = (neighbors, query) if condition == "query" else (query, neighbors)
    assert never.all() and sometimes.float().mean().item() == pytest.approx(0.1, abs=0.004)


def test_a_dropped_condition_equals_null_on_every_path():
    model, xt, t = tiny_unet(), torch.randn(2, 3, 16, 16), torch.tensor([3, 70])
    query, neighbors = unit(2, 16), unit(2, 3, 16, seed=1)
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    for drop_query, drop_neighbors in ((yes, no), (no, yes), (yes, yes)):
        dropped = model(xt, t, query, neighbors, drop_query, drop_neighbors)
        null = model(
            xt, t, None if drop_query[0] else query, None if drop_neighbors[0] else neighbors
        )
        assert torch.allclose(dropped, null, atol=1e-6)
        assert not torch.allclose(dropped, model(xt, t, query, neighbors), atol=1e-3)
    half = torch.tensor([True, False])
    mixed = model(xt, t, query, neighbors, half, half)
    assert torch.allclose(mixed[1], model(xt, t, query, neighbors)[1], atol=1e-5)
    assert torch.allclose(mixed[0], model(xt, t, None, None)[0], atol=1e-5)


def test_every_path_reads_the_query():
    """Tokens, time embedding, query map: with the others silenced each alone still matters."""
    for alive in ("tokens", "time", "map"):
        model = tiny_unet()
        with torch.no_grad():
            if alive != "time":
                model.query_to_time.weight.zero_()
            if alive != "map":
                model.query_map[2].weight.zero_()
            if alive != "tokens":
                model.condition.to_width.weight.zero_()
        xt, t = torch.randn(1, 3, 16, 16), torch.tensor([50])
        one, two = (model(xt, t, unit(1, 16, seed=s), unit(1, 3, 16, seed=9)) for s in (1, 2))
        assert (one - two).abs().max() > 1e-4, alive


def test_neighbours_are_a_set_of_any_size():
    model, xt, t = tiny_unet(), torch.randn(1, 3, 16, 16), torch.tensor([50])
    query, neighbors = unit(1, 16), unit(1, 7, 16, seed=1)
    out = model(xt, t, query, neighbors)
    assert torch.allclose(out, model(xt, t, query, neighbors.flip(1)), atol=1e-5)
    assert not torch.allclose(out, model(xt, t, query, neighbors[:, :3]), atol=1e-3)
    none = model(xt, t, query, neighbors[:, :0])
    assert torch.equal(none, model(xt, t, query, None))


# ---------------------------------------------------------------- the U-Net


def test_time_embedding_is_cosines_then_sines():
    out = kd.time_embedding(torch.tensor([5]), 8)[0]
    freqs = [10000 ** (-i / 4) for i in range(4)]
    wanted = [math.cos(5 * f) for f in freqs] + [math.sin(5 * f) for f in freqs]
    assert torch.allclose(out, torch.tensor(wanted), atol=1e-5)


def test_a_fresh_model_predicts_zero():
    model = kd.UNet(UNET_CONFIG)
    out = model(torch.randn(2, 3, 16, 16), torch.tensor([1, 9]), unit(2, 16), unit(2, 3, 16))
    assert out.shape == (2, 3, 16, 16) and (out == 0).all()


def test_joint_attention_equals_softmax_over_condition_and_pixels():
    block = kd.AttentionBlock(UNET_CONFIG, 16, with_self=True)
    torch.nn.init.normal_(block.out.weight)
    x, tokens = torch.randn(1, 16, 2, 2), torch.randn(1, 5, 24)
    pixels = block.norm(x).flatten(2).transpose(1, 2)[0]  # (4, 16)
    q, k, v = (pixels @ block.to_qkv.weight.T + block.to_qkv.bias).chunk(3, -1)
    ck, cv = (tokens[0] @ block.condition_kv.weight.T + block.condition_kv.bias).chunk(2, -1)
    k, v, heads = torch.cat([ck, k]), torch.cat([cv, v]), []
    for h in range(2):
        part = slice(8 * h, 8 * h + 8)
        heads.append((q[:, part] @ k[:, part].T / 8**0.5).softmax(-1) @ v[:, part])
    wanted = x + (torch.cat(heads, -1) @ block.out.weight.T + block.out.bias).T.view(1, 16, 2, 2)
    assert torch.allclose(block(x, tokens), wanted, atol=1e-5)


def test_the_plain_layout_runs_with_learned_variance():
    config = kd.UNetConfig(
        image_size=16,
        embed_dim=8,
        n_neighbors=2,
        widths=(32, 64),
        blocks=2,
        head_channels=16,
        condition_width=16,
        time_width=32,
        attention=(16, 8),
        self_attention=(16, 8),
    )
    model = kd.UNet(config)
    assert model.query_map is None and model.position_map is None
    assert model(torch.randn(1, 3, 16, 16), torch.tensor([7]), unit(1, 8), None).shape == (
        1,
        6,
        16,
        16,
    )


@pytest.mark.parametrize("name", list(kd.PRESETS))
def test_presets_run(name):
    """On the meta device: shapes without numbers."""
    config = kd.PRESETS[name]
    with torch.device("meta"):
        model, x = kd.UNet(config), torch.empty(2, 3, config.image_size, config.image_size)
        out = model(x, torch.ones(2), torch.empty(2, config.embed_dim), None)
    assert out.shape == (2, 6 if config.learned_variance else 3, *x.shape[2:])


@pytest.mark.parametrize(
    "changes", [{"target": "score"}, {"T": 1}, {"widths": (100, 200)}, {"head_channels": 100}]
)
def test_configurations_that_can_not_be_are_refused(changes):
    with pytest.raises(ValueError):
        replace(kd.PRESETS["paper"], **changes)


def test_paper_preset_has_about_400m_parameters():
    with torch.device("meta"):
        model = kd.UNet(kd.PRESETS["paper"])
    n = sum(p.numel() for p in model.parameters())
    assert abs(n / 400e6 - 1) < 0.05, n


def test_weights_come_back_with_their_config(tmp_path):
    model = tiny_unet()
    kd.save(tmp_path / "m", model, {"clip": "abc"})
    again, metadata = kd.load(tmp_path / "m")
    assert metadata["clip"] == "abc" and not again.training
    x, t, q = torch.randn(1, 3, 16, 16), torch.tensor([9]), unit(1, 16)
    assert torch.allclose(again(x, t, q, None), model(x, t, q, None), atol=2e-2)
    assert again.config == UNET_CONFIG


# ---------------------------------------------------------------- loss


class Oracle(torch.nn.Module):
    """Stands in for the U-Net: knows x_0 and ε, and says them."""

    def __init__(self, config, answer):
        super().__init__()
        self.config, self.answer, self.seen = config, answer, []

    def forward(self, xt, t, *given, **named):
        self.seen.append((xt, t, *given, *named.values()))
        return self.answer


@pytest.mark.parametrize("target", ["eps", "v"])
def test_loss_is_the_squared_error_of_the_target(target):
    schedule, x0, eps = kd.Schedule(100), torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    t, drop = torch.tensor([1, 100]), torch.zeros(2, dtype=torch.bool)
    alpha_bar = schedule.alpha_bar[t].float().view(2, 1, 1, 1)
    right = eps if target == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    config = replace(UNET_CONFIG, target=target)
    for offset in (0.0, 0.5):
        model = Oracle(config, right + offset)
        loss = kd.diffusion_loss(model, schedule, x0, None, None, t, eps, drop, drop)
        assert loss.item() == pytest.approx(offset**2, abs=1e-6)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    assert torch.allclose(model.seen[0][0], xt, atol=1e-6)


def test_the_loss_shows_the_model_what_it_was_given():
    schedule, x0, eps = kd.Schedule(100), torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    t, query, neighbors, picture = torch.tensor([1, 100]), unit(2, 16), unit(2, 3, 16), -x0
    drop_query, drop_neighbors = torch.tensor([True, False]), torch.tensor([False, True])
    model = Oracle(UNET_CONFIG, torch.zeros_like(x0))
    kd.diffusion_loss(model, schedule, x0, query, neighbors, t, eps, drop_query, drop_neighbors,
                      picture)
    [(_, *given)] = model.seen
    for found, wanted in zip(given, (t, query, neighbors, drop_query, drop_neighbors, picture),
                             strict=True):
        assert torch.equal(found, wanted)


def test_learned_variance_adds_its_term_and_stays_unguided():
    """L_hybrid = the squared error + T/1000 of the bound, and a fraction from the conditional
    call alone."""
    schedule, x0, eps = kd.Schedule(100), torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    config, t = replace(UNET_CONFIG, target="eps", learned_variance=True), torch.tensor([1, 60])
    answer, drop = 0.3 * torch.randn(2, 6, 4, 4), torch.zeros(2, dtype=torch.bool)
    loss = kd.diffusion_loss(Oracle(config, answer), schedule, x0, None, None, t, eps, drop, drop)
    xt = kd.add_noise(x0, eps, schedule.at(t, x0))
    bound = kd.vlb_term(answer, x0, xt, t, schedule, "eps").mean()
    wanted = ((answer[:, :3] - eps) ** 2).mean() + 0.1 * bound
    assert bound > 0.1 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    class Model(torch.nn.Module):
        def forward(self, xt, t, query, neighbors, **_):
            return torch.full((len(xt), 6, 4, 4), 0.9 if query is None else 0.2)

    model = Model()
    model.config = config
    found = kd.denoise(model, schedule, xt, 60, unit(2, 16), None, guidance=3.0)
    assert (found.variance_fraction == 0.2).all()


def test_a_plain_model_refuses_a_picture_to_edit():
    xt = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="train.py edit"):
        tiny_unet()(xt, torch.tensor([1]), None, None, picture=xt)


def test_loss_of_x0_is_that_of_v_with_a_capped_weight():
    schedule, x0, eps = kd.Schedule(100), torch.rand(1, 3, 4, 4) * 2 - 1, torch.randn(1, 3, 4, 4)
    drop, guess = torch.zeros(1, dtype=torch.bool), torch.rand(1, 3, 4, 4)
    for t in (5, 30, 70, 100):
        t = torch.tensor([t])
        alpha_bar = schedule.alpha_bar[t].item()
        xt = kd.add_noise(x0, eps, schedule.at(t, x0))
        v = (alpha_bar**0.5 * xt - guess) / (1 - alpha_bar) ** 0.5
        losses = [
            kd.diffusion_loss(
                Oracle(replace(UNET_CONFIG, target=target), answer),
                schedule,
                x0,
                None,
                None,
                t,
                eps,
                drop,
                drop,
            ).item()
            for target, answer in (("v", v), ("x0", guess))
        ]
        capped = min(1, 5 * (1 - alpha_bar))
        assert losses[1] == pytest.approx(capped * losses[0], rel=1e-3)


def test_kl_equals_torchs_and_bins_sum_to_one():
    m1, v1, m2, v2 = torch.tensor([0.3, 0.5, -0.2, 2.0]).double()
    v1, v2 = v1.abs(), v2.abs()
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(m1, v1.sqrt()), torch.distributions.Normal(m2, v2.sqrt())
    )
    assert torch.allclose(kd.normal_kl(m1, v1.log(), m2, v2.log()), wanted)
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_scale in ((0.1, -2.0), (-0.99, -4.0), (0.7, 0.5)):
        log_p = kd.discretised_log_likelihood(
            bins, torch.tensor(mean).double(), torch.tensor(log_scale).double()
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_vlb_term_is_zero_for_the_true_posterior_and_blind_to_the_mean():
    schedule, x0, eps = (
        kd.Schedule(100),
        torch.rand(3, 3, 4, 4) * 1.8 - 0.9,
        torch.randn(3, 3, 4, 4),
    )
    t = torch.tensor([2, 40, 100])
    xt = kd.add_noise(x0, eps, schedule.at(t, x0))
    v = kd.to_v(x0, eps, schedule.at(t, x0))
    output = torch.cat([v, -torch.ones_like(v)], 1).requires_grad_()
    term = kd.vlb_term(output, x0, xt, t, schedule, "v")
    assert term.shape == (3,) and term.abs().max() < 1e-4
    wrong = torch.cat([v + 0.3, torch.zeros_like(v)], 1).requires_grad_()
    kd.vlb_term(wrong, x0, xt, t, schedule, "v").sum().backward()
    assert (wrong.grad[:, :3] == 0).all() and (wrong.grad[:, 3:] != 0).any()


def test_vlb_term_at_the_last_step_is_the_decoders_likelihood_in_bits():
    schedule, x0 = kd.Schedule(100), torch.full((1, 3, 2, 2), 0.2)
    t, eps = torch.tensor([1]), torch.randn(1, 3, 2, 2)
    xt = kd.add_noise(x0, eps, schedule.at(t, x0))
    output = torch.cat([kd.to_v(x0, eps, schedule.at(t, x0)), torch.ones(1, 3, 2, 2)], 1)
    std = schedule.beta[1].sqrt().item()  # fraction 1: the variance is β_1
    normal = torch.distributions.Normal(0.2, std)
    bits = -torch.log2(
        normal.cdf(torch.tensor(0.2 + 1 / 255)) - normal.cdf(torch.tensor(0.2 - 1 / 255))
    )
    assert kd.vlb_term(output, x0, xt, t, schedule, "v").item() == pytest.approx(
        bits.item(), rel=1e-3
    )


# ---------------------------------------------------------------- guidance


def test_guidance_is_uncond_plus_scale_times_difference():
    class Stub(Oracle):
        def forward(self, xt, t, query, neighbors, *_, **__):
            return torch.full_like(xt, 0.1 if query is None else 0.3)

    schedule, xt = kd.Schedule(100), torch.zeros(1, 3, 4, 4)
    model = Stub(replace(UNET_CONFIG, target="v"), None)
    alpha_bar = schedule.alpha_bar[60].item()
    for scale, out in ((1.0, 0.3), (0.0, 0.1), (3.0, 0.7), (-1.0, -0.1)):
        x0 = kd.denoise(model, schedule, xt, 60, unit(1, 16), None, guidance=scale).x0
        assert x0[0, 0, 0, 0].item() == pytest.approx(-math.sqrt(1 - alpha_bar) * out, abs=1e-6)


def test_guidance_of_one_equals_none():
    model, schedule, xt = tiny_unet(), kd.Schedule(100), torch.randn(2, 3, 16, 16)
    query, neighbors = unit(2, 16), unit(2, 3, 16, seed=1)
    off = kd.denoise(model, schedule, xt, 30, query, neighbors, guidance=1.0)
    almost = kd.denoise(model, schedule, xt, 30, query, neighbors, guidance=1.0 + 1e-9)
    assert torch.allclose(off.x0, almost.x0, atol=1e-6)
    twice = kd.denoise(model, schedule, xt, 30, query, neighbors, guidance=2.0)
    assert not torch.allclose(off.x0, twice.x0, atol=1e-3)


def test_clipping_keeps_x0_in_range_and_eps_consistent():
    model, schedule, xt = tiny_unet(), kd.Schedule(100), 3 * torch.randn(2, 3, 16, 16)
    for threshold in (None, 0.9):
        p = kd.denoise(model, schedule, xt, 50, None, None, dynamic_threshold=threshold)
        assert p.x0.abs().max() <= 1
        assert torch.allclose(kd.add_noise(p.x0, p.eps, schedule.at(50, xt)), xt, atol=1e-4)


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("T", [100, 1000])
def test_times_fall_from_the_last_step_to_zero(T):
    schedule = kd.Schedule(T)
    for steps in (1, 2, 7, 33, T):
        times = kd.sampling_times(schedule, steps)
        assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
        assert all(a > b for a, b in zip(times, times[1:]))
    for steps in (0, T + 1):
        with pytest.raises(ValueError, match=f"wanted 1 to {T}"):
            kd.sampling_times(schedule, steps)
    late = kd.sampling_times(schedule, 10, "eps")[0]
    assert schedule.alpha_bar[late] >= 1e-4 > schedule.alpha_bar[late + 1]
    assert kd.sampling_times(schedule, T, "eps")[0] == T


def test_an_unknown_sampler_is_refused_by_name():
    with pytest.raises(ValueError, match="'euler', wanted dpm, ddim, ddpm"):
        next(kd.sample(kd.UNet(UNET_CONFIG), None, None, [0], steps=2, sampler="euler"))


MU, VARIANCES = 0.4, (0.01, 0.09, 0.5)  # the data: N(0.4, v), uncorrelated, three dimensions


def gaussian_denoiser(schedule, variance):
    """E[x_0 | x_t] for Gaussian data, and the ε that belongs to it."""

    def predict(xt, t):
        alpha_bar = schedule.at(t, xt)
        gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
        x0 = MU + gain * (xt - alpha_bar.sqrt() * MU)
        return kd.Prediction(x0, kd.eps_from(x0, xt, alpha_bar))

    return predict


def affine_map(sampler, schedule, times, variance=0.09, **options):
    """The sampler's x_end = offset + Σ coefficient_i · noise_i, exactly: feed it unit impulses.

    Sample 0 gets zeros for all its noise, sample i a one as its i-th draw and zeros else.
    """
    draws, n = [0], len(times) + 1

    def noise():
        draws[0] += 1
        out = torch.zeros(n + 1, 1, 1, 1, dtype=torch.float64)
        out[draws[0]] = 1
        return out

    *_, x = sampler(gaussian_denoiser(schedule, variance), schedule, times, noise(), noise,
                    **options)
    return x[0].item(), (x[1:] - x[0]).flatten().numpy()


@pytest.mark.parametrize(
    "name, options", [("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {}), ("dpm", {})]
)
def test_samplers_reach_the_mean_and_variance_of_gaussian_data(name, options):
    schedule = kd.Schedule(1000)
    times = kd.sampling_times(schedule, 250 if name == "dpm" else 1000)
    for variance in VARIANCES:
        offset, coefficients = affine_map(kd.SAMPLERS[name], schedule, times, variance, **options)
        assert offset == pytest.approx(MU, abs=0.01)
        assert (coefficients**2).sum() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("sampler, slope", [(kd.ddim, -0.8), (kd.dpm_solver, -1.6)])
def test_order_of_convergence(sampler, slope):
    """On an interior interval the probability flow keeps (x_t − √ᾱ_t μ)/σ_t, where
    σ_t² = ᾱ_t v + 1 − ᾱ_t: an affine map of x_t. The error is the largest one of mean and variance
    over the dimensions."""
    schedule, first, last = kd.Schedule(1000), 900, 100
    a, b = (schedule.alpha_bar[t].item() for t in (first, last))
    errors = []
    for steps in (20, 40, 80, 160):
        times = [first - i * (first - last) // steps for i in range(steps + 1)]
        worst = 0.0
        for v in VARIANCES:
            gain = math.sqrt(b * v + 1 - b) / math.sqrt(a * v + 1 - a)
            shift = (math.sqrt(b) - gain * math.sqrt(a)) * MU
            offset, coefficients = affine_map(sampler, schedule, times, v)
            assert (coefficients[1:] == 0).all()  # deterministic: no other noise
            worst = max(worst, abs(offset - shift), abs(coefficients[0] ** 2 - gain**2))
        errors.append(worst)
    fitted = np.polyfit(np.log([20, 40, 80, 160]), np.log(errors), 1)[0]
    assert fitted <= slope, errors


def test_ddim_with_eta_one_is_ancestral_sampling():
    schedule = kd.Schedule(100)
    times = kd.sampling_times(schedule, 20)
    one = affine_map(kd.ddpm, schedule, times)
    two = affine_map(kd.ddim, schedule, times, eta=1.0)
    assert one[0] == pytest.approx(two[0], abs=1e-9) and np.allclose(one[1], two[1], atol=1e-9)


def test_ddim_with_eta_one_survives_rounding():
    for shift in (0.5, 1.0):
        schedule = kd.Schedule(1000, shift)
        for steps in (2, 3, 4, 5, 10):
            times = kd.sampling_times(schedule, steps)
            *_, x = kd.ddim(
                lambda xt, t: kd.Prediction(xt, xt),
                schedule,
                times,
                torch.ones(1, 1, 1, 1),
                lambda: torch.ones(1, 1, 1, 1),
                eta=1.0,
            )
            assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", list(kd.SAMPLERS))
def test_the_last_step_adds_no_noise_and_one_step_gives_x0(name):
    schedule, drawn = kd.Schedule(100), []

    def noise():
        drawn.append(1)
        return torch.randn(1, 3, 4, 4)

    answer = torch.full((1, 3, 4, 4), 0.25)
    *_, x = kd.SAMPLERS[name](
        lambda xt, t: kd.Prediction(answer, kd.eps_from(answer, xt, schedule.at(t, xt))),
        schedule,
        [100, 0],
        torch.randn(1, 3, 4, 4),
        noise,
    )
    assert torch.allclose(x, answer, atol=1e-5) and not drawn
    *_, x = kd.SAMPLERS[name](
        lambda xt, t: kd.Prediction(answer, kd.eps_from(answer, xt, schedule.at(t, xt))),
        schedule,
        [100, 50, 0],
        torch.randn(1, 3, 4, 4),
        noise,
    )
    assert torch.allclose(x, answer, atol=1e-4)


def test_learned_variance_sets_the_noise_of_ancestral_sampling():
    schedule, answer = kd.Schedule(100), torch.zeros(4096, 1, 1, 1)
    for fraction, pick in ((-1.0, 1), (1.0, 2)):
        predict = lambda xt, t: kd.Prediction(answer, answer, torch.full_like(xt, fraction))  # noqa
        noise = functools.partial(kd.noise_source(list(range(4096))), 1, 1, 1)
        start = noise()
        first = next(kd.ddpm(predict, schedule, [60, 30, 0], start, noise))
        mean, *variances = kd.posterior(
            answer, start, schedule.at(60, answer), schedule.at(30, answer)
        )
        assert (first - mean).var().item() == pytest.approx(variances[pick - 1].item(), rel=0.08)


def test_noise_depends_on_the_seed_alone():
    one, two = (functools.partial(kd.noise_source(seeds), 3, 2, 2) for seeds in ([5, 6, 7], [7]))
    for _ in range(3):
        assert torch.equal(one()[2:], two())
    assert not torch.equal(kd.noise_source([5])(2), kd.noise_source([6])(2))


@pytest.mark.parametrize("sampler", list(kd.SAMPLERS))
def test_sampling_watches_x_t_and_repeats(sampler):
    model, query, neighbors = tiny_unet(), unit(3, 16), unit(3, 3, 16, seed=1)

    def run(part):
        return list(
            kd.sample(
                model,
                query[part],
                neighbors[part],
                [4, 5, 6][part],
                steps=5,
                guidance=2.0,
                sampler=sampler,
            )
        )

    together, again = run(slice(None)), run(slice(None))
    assert len(together) == 5 and torch.equal(together[-1], again[-1])
    alone = run(slice(1, 2))[-1]
    assert (together[-1][1:2] - alone).abs().max() < 2 / 127.5  # rounding only
    assert not torch.allclose(together[-1][0], together[-1][1], atol=1e-2)
