"""knn_diffusion.py: schedule, posterior, condition, U-Net, loss, guidance, samplers."""

import math
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import BACKBONES, UNET_CONFIG, tiny_unet, two_samples, unit

import knn_diffusion as kd
from clip_model import save_model

# ---------------------------------------------------------------- schedule

def test_schedule_is_the_squared_cosine():
    schedule = kd.Schedule(1000)
    assert schedule.alpha_bar.dtype == torch.float64 and schedule.alpha_bar[0] == 1
    for t in (1, 250, 500, 900):
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in (t, 0)]
        assert schedule.alpha_bar[t].item() == pytest.approx(f[0] / f[1], rel=1e-9)
    assert schedule.alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.02)
    beta = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    assert beta.max().item() == pytest.approx(0.999, rel=1e-9)


def test_noise_shift_multiplies_the_signal_to_noise_ratio():
    plain, shifted = kd.Schedule(1000).alpha_bar[1:900], kd.Schedule(1000, 0.5).alpha_bar[1:900]
    ratio = (shifted / (1 - shifted)) / (plain / (1 - plain))
    assert torch.allclose(ratio, torch.full_like(ratio, 0.25), rtol=1e-6)


def test_predictions_convert_into_each_other():
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
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
    mean, variance = kd.posterior(x0, xt, a_t, a_s)
    assert torch.allclose(mean, wanted) and torch.allclose(variance, 1 / precision)


# ---------------------------------------------------------------- the condition

def near(center, n, noise, seed=1):
    """n unit vectors around each of (B, E): (B, n, E)."""
    B, E = center.shape
    return torch.nn.functional.normalize(center[:, None] + noise * unit(B, n, E, seed=seed), dim=-1)


NO, YES = torch.tensor([[False]]), torch.tensor([[True]])


def test_the_summary_trusts_a_query_at_home_and_else_asks_the_neighbours():
    """A picture's embedding is its own summary; a text's, far from all pictures, picks one."""
    picture = unit(1, 64)
    neighbors = near(picture, 10, 0.7)
    assert kd.summarize(picture, neighbors, NO, NO) @ picture[0] > 0.999
    text = torch.nn.functional.normalize(neighbors[:, 3] + unit(1, 64, seed=7), dim=-1)
    assert kd.summarize(text, neighbors, NO, NO) @ neighbors[0, 3] > 0.98
    assert torch.equal(kd.summarize(text, neighbors, NO, YES), text)


@pytest.mark.parametrize("no_query", [NO, YES])
def test_the_summary_is_its_formula(no_query):
    """Without a query the neighbours' mean asks, and their answer is all."""
    query, neighbors = near(unit(1, 64), 1, 0.9, seed=3)[:, 0], near(unit(1, 64), 10, 0.6)
    asks = neighbors[0].mean(0) if no_query else query[0]
    answer = (kd.SHARPNESS * neighbors[0] @ asks).softmax(0) @ neighbors[0]
    answer = answer / answer.norm()
    excess = query[0] @ answer - (neighbors[0] @ answer).mean()
    trust = 0 if no_query else torch.sigmoid(kd.SHARPNESS * excess)
    found = kd.summarize(query, neighbors, no_query, NO)[0]
    assert torch.allclose(found, trust * query[0] + (1 - trust) * answer, atol=1e-5)


def test_query_noise_leaves_half_and_keeps_the_norm():
    query = unit(2000, 32)
    noisy = kd.add_query_noise(query, 1.5, torch.Generator().manual_seed(0))
    cosine = (noisy * query).sum(1)
    assert (cosine > 0.9999).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert torch.allclose(noisy.norm(dim=1), torch.ones(2000)) and 0.2 < cosine.min() < 0.6
    assert torch.allclose(kd.add_query_noise(query, 0.0, torch.Generator()), query)


def test_drops_are_exclusive_and_a_tenth_each():
    query, neighbors = kd.draw_drops(200_000, torch.Generator().manual_seed(0))
    for share in ((query & neighbors), (query & ~neighbors), (neighbors & ~query)):
        assert share.float().mean().item() == pytest.approx(0.1, abs=0.004)
    for condition in ("query", "neighbors"):               # a model of one condition
        drops = kd.draw_drops(100_000, torch.Generator().manual_seed(0), condition)
        sometimes, always = drops if condition == "query" else reversed(drops)
        assert always.all() and sometimes.float().mean().item() == pytest.approx(0.1, abs=0.004)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_dropped_condition_equals_null_on_every_path(backbone):
    model, xt, t, query, neighbors, _ = two_samples(backbone)
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    full = model(xt, t, query, neighbors)
    for drop_query, drop_neighbors, q, n in (
            (yes, no, None, neighbors), (no, yes, query, None), (yes, yes, None, None)):
        dropped = model(xt, t, query, neighbors, drop_query, drop_neighbors)
        assert torch.allclose(dropped, model(xt, t, q, n), atol=1e-6)
        assert (dropped - full).abs().max() > 1e-3
    half = torch.tensor([True, False])
    mixed = model(xt, t, query, neighbors, half, half)
    assert torch.allclose(mixed[1], full[1], atol=1e-5)
    assert torch.allclose(mixed[0], dropped[0], atol=1e-5)


def test_every_path_reads_the_query():
    """Tokens, time embedding, query map: with the others silenced each alone still matters."""
    for alive in ("tokens", "time", "map"):
        model = tiny_unet()
        paths = {"tokens": model.condition.to_width, "time": model.query_to_time,
                 "map": model.query_map[2]}
        for name in paths.keys() - {alive}:
            torch.nn.init.zeros_(paths[name].weight)
        xt, t = torch.randn(1, 3, 16, 16), torch.tensor([50])
        one, two = (model(xt, t, unit(1, 16, seed=s), unit(1, 3, 16, seed=9)) for s in (1, 2))
        assert (one - two).abs().max() > 1e-4, alive


@pytest.mark.parametrize("backbone", BACKBONES)
def test_neighbours_are_a_set_of_any_size(backbone):
    model, xt, t, query, _, _ = two_samples(backbone)
    neighbors = unit(2, 7, 16, seed=1)
    out = model(xt, t, query, neighbors)
    assert torch.allclose(out, model(xt, t, query, neighbors.flip(1)), atol=1e-5)
    assert not torch.allclose(out, model(xt, t, query, neighbors[:, :3]), atol=1e-3)
    assert torch.equal(model(xt, t, query, neighbors[:, :0]), model(xt, t, query, None))


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


def test_presets_run_and_the_papers_have_about_400m_parameters():
    """On the meta device: shapes without numbers."""
    with torch.device("meta"):
        for config in kd.PRESETS.values():
            x = torch.empty(2, 3, config.image_size, config.image_size)
            out = kd.UNet(config)(x, torch.ones(2), torch.empty(2, config.embed_dim), None)
            assert out.shape == x.shape
        for make, presets in ((kd.UNet, kd.PRESETS), (kd.TokenTransformer, kd.DISCRETE_PRESETS)):
            n = sum(p.numel() for p in make(presets["paper"]).parameters())
            assert n == pytest.approx(400e6, rel=0.05)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_come_back_with_their_config(tmp_path, backbone):
    model, xt, t, query, neighbors, _ = two_samples(backbone)
    save_model(tmp_path / "m", model, {"clip": "abc"})
    again, metadata = kd.load(tmp_path / "m")
    assert again.config == model.config and metadata["clip"] == "abc" and not again.training
    found, wanted = (each(xt, t, query, neighbors) for each in (again, model.half().float()))
    assert torch.allclose(found, wanted, atol=1e-5)


# ---------------------------------------------------------------- loss

@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_loss_is_the_squared_error_of_the_target_under_the_given_condition(target):
    """x_0's with v's weight, 1/(1−ᾱ), capped."""
    schedule, x0, eps = kd.Schedule(100), torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4)
    t, query, neighbors, picture = torch.tensor([5, 70]), unit(2, 16), unit(2, 3, 16), -x0
    drops = torch.tensor([True, False]), torch.tensor([False, True])
    alpha_bar = schedule.alpha_bar[t].float().view(2, 1, 1, 1)
    xt = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    right = {"eps": eps, "v": v, "x0": x0}[target]
    model = Mock(config=replace(UNET_CONFIG, target=target), return_value=right + 0.5)
    loss = kd.diffusion_loss(model, schedule, x0, query, neighbors, t, eps, *drops, picture)
    weights = [5, 1 / (1 - alpha_bar[1].item())] if target == "x0" else [1, 1]
    assert 1 < 1 / (1 - alpha_bar[1]) < 5 < 1 / (1 - alpha_bar[0])
    assert loss.item() == pytest.approx(0.25 * sum(weights) / 2, rel=1e-4)
    given = xt, t, query, neighbors, *drops, picture
    for found, wanted in zip(model.call_args.args, given, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


# ---------------------------------------------------------------- guidance

def test_a_predicted_x0_is_clipped():
    model, schedule, xt = tiny_unet(), kd.Schedule(100), 9 * torch.randn(2, 3, 16, 16)
    guide = kd.Guide(None, None)
    wanted = kd.x0_from(kd.guided(model, xt, 50, guide), xt, schedule.at(50, xt), "v")
    assert wanted.abs().max() > 1
    assert torch.equal(kd.predict_x0(model, schedule, guide, xt, 50), wanted.clamp(-1, 1))


# ---------------------------------------------------------------- samplers

def test_times_fall_from_the_last_step_to_zero():
    T = 1000
    for steps in (1, 2, 7, 33, T):
        times = kd.falling(T, steps)
        assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
        assert all(a > b for a, b in zip(times, times[1:]))
    for steps in (0, T + 1):
        with pytest.raises(ValueError, match=f"wanted 1 to {T}"):
            kd.falling(T, steps)


@pytest.mark.parametrize("steps", [10, 100])
def test_a_predicted_noise_is_asked_where_a_picture_can_be_told_from_it(steps, monkeypatch):
    model, asked = tiny_unet(target="eps"), []
    monkeypatch.setattr(kd, "predict_x0", lambda *given: asked.append(given[-1]) or given[-2])
    *_, _ = kd.sample(model, None, None, [0], steps)
    alpha_bar = kd.Schedule(100).alpha_bar
    assert alpha_bar[asked[0]] >= 1e-4 > alpha_bar[asked[0] + 1] if steps == 10 else asked[0] == 100


MU, VARIANCES = 0.4, (0.01, 0.09, 0.5)  # the data: N(0.4, v), uncorrelated, three dimensions


def gaussian_denoiser(schedule, variance):
    """E[x_0 | x_t] for Gaussian data."""
    def predict(xt, t):
        alpha_bar = schedule.at(t, xt)
        gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
        return MU + gain * (xt - alpha_bar.sqrt() * MU)
    return predict


def affine_map(sampler, schedule, times, variance):
    """The sampler's x_end = offset + Σ coefficient_i · noise_i, exactly: sample 0 gets zeros for
    all its noise, sample i a one as its i-th draw and zeros else."""
    draws, n = [0], len(times) + 1

    def noise():
        draws[0] += 1
        out = torch.zeros(n + 1, 1, 1, 1, dtype=torch.float64)
        out[draws[0]] = 1
        return out

    *_, x = sampler(gaussian_denoiser(schedule, variance), schedule, times, noise(), noise)
    return x[0].item(), (x[1:] - x[0]).flatten().numpy()


@pytest.mark.parametrize("name", list(kd.SAMPLERS))
def test_samplers_reach_the_mean_and_variance_of_gaussian_data(name):
    schedule = kd.Schedule(1000)
    times = kd.falling(1000, 250 if name == "dpm" else 1000)
    for variance in VARIANCES:
        offset, coefficients = affine_map(kd.SAMPLERS[name], schedule, times, variance)
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
            assert (coefficients[1:] == 0).all()    # deterministic: no other noise
            worst = max(worst, abs(offset - shift), abs(coefficients[0] ** 2 - gain**2))
        errors.append(worst)
    fitted = np.polyfit(np.log([20, 40, 80, 160]), np.log(errors), 1)[0]
    assert fitted <= slope, errors


@pytest.mark.parametrize("name", list(kd.SAMPLERS))
def test_the_last_step_adds_no_noise_and_one_step_gives_x0(name):
    schedule, drawn = kd.Schedule(100), []

    def noise():
        drawn.append(1)
        return torch.randn(1, 3, 4, 4)

    answer, start = torch.full((1, 3, 4, 4), 0.25), torch.randn(1, 3, 4, 4)
    for times in ([100, 0], [100, 50, 0]):
        drawn.clear()
        *_, x = kd.SAMPLERS[name](lambda xt, t: answer, schedule, times, start, noise)
        assert torch.allclose(x, answer, atol=1e-4)
        assert len(drawn) == (name == "ddpm" and len(times) == 3)


@pytest.mark.parametrize("sampler", list(kd.SAMPLERS))
def test_a_sample_depends_on_its_seed_alone_and_every_x_t_is_watched(sampler):
    model, query, neighbors = tiny_unet(), unit(3, 16), unit(3, 3, 16, seed=1)
    together = list(kd.sample(model, query, neighbors, [4, 5, 6], steps=5, sampler=sampler))
    *_, alone = kd.sample(model, query[1:2], neighbors[1:2], [5], steps=5, sampler=sampler)
    assert len(together) == 5
    assert (together[-1][1:2] - alone).abs().max() < 2 / 127.5  # rounding only
    same = unit(1, 16).expand(2, -1)
    *_, two = kd.sample(model, same, None, [4, 5], steps=5, sampler=sampler)
    assert not torch.allclose(two[0], two[1], atol=1e-2)
