"""knn_diffusion.py, discrete half: closed forms by enumeration, samplers by their own chain."""

import itertools
import math
from unittest.mock import Mock

import pytest
import torch
from conftest import TRANSFORMER_CONFIG, tiny_transformer, two_samples, unit

import knn_diffusion as kd
from knn_diffusion import MaskSchedule

KINDS = ("released", "paper")


def one_hot_log(x0: torch.Tensor, n_codes: int) -> torch.Tensor:
    """Tokens (B, L) → log probabilities (B, L, V): 0 at the token, LOG_ZERO elsewhere."""
    log_p = torch.full((*x0.shape, n_codes), kd.LOG_ZERO, dtype=torch.float64)
    return log_p.scatter(-1, x0[..., None], 0.0)


def steps_matrix(schedule: MaskSchedule, s: int, t: int) -> torch.Tensor:
    """q(x_t | x_s), row x_s, column x_t, (V+1, V+1): the definition's product Q_{s+1} … Q_t."""
    V = schedule.n_codes
    product = torch.eye(V + 1, dtype=torch.float64)
    for i in range(s + 1, t + 1):
        alpha = (schedule.alpha_bar[i] / schedule.alpha_bar[i - 1]).item()
        gamma = (1 - (1 - schedule.gamma_bar[i]) / (1 - schedule.gamma_bar[i - 1])).item()
        beta = (1 - alpha - gamma) / V
        Q = torch.full((V + 1, V + 1), beta, dtype=torch.float64)
        Q[range(V), range(V)] += alpha
        Q[:, V] = gamma
        Q[V] = 0
        Q[V, V] = 1
        assert (Q >= -1e-15).all() and torch.allclose(Q.sum(1), torch.ones_like(Q[0]))
        product = product @ Q
    return product


def bayes(schedule: MaskSchedule, s: int, t: int) -> torch.Tensor:
    """q(x_s | x_t, x_0) by enumeration, (V, V+1, V+1): axes x_0, x_t, x_s."""
    V = schedule.n_codes
    joint = steps_matrix(schedule, 0, s)[:V, None] * steps_matrix(schedule, s, t).T[None]
    return joint / joint.sum(-1, keepdim=True)


def every_pair(V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every (x_0, x_t), as one row of V·(V+1) tokens."""
    return torch.arange(V).repeat_interleave(V + 1)[None], torch.arange(V + 1).repeat(V)[None]


# ---------------------------------------------------------------- mask and replace

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V, T", [(2, 2), (3, 5), (6, 8)])
def test_products_of_steps_equal_the_closed_form(kind, V, T):
    schedule = MaskSchedule(T, V, kind)
    for t in range(1, T + 1):
        for s in range(t):
            alpha, beta, gamma = (part.item() for part in schedule.between(s, t))
            wanted = steps_matrix(schedule, s, t)[0]                       # from code 0
            assert [alpha + beta, beta, gamma] == pytest.approx(wanted[[0, 1, V]].tolist(),
                                                                abs=1e-12)
            if s == 0:
                at_t = schedule.alpha_bar[t], schedule.gamma_bar[t]
                assert at_t == pytest.approx((alpha, gamma), abs=1e-12)


def test_both_schedules_are_the_published_ones():
    code = MaskSchedule(100, 2887, "released")
    assert code.alpha_bar[[1, 100]].tolist() == pytest.approx([0.99999, 0.000009])
    assert code.gamma_bar[[1, 100]].tolist() == pytest.approx([0.000009, 0.99999])
    t = torch.arange(1, 101)
    assert (2887 * code.between(0, t)[1]).tolist() == pytest.approx([1e-6] * 100)
    text = MaskSchedule(100, 2887, "paper")
    assert text.gamma_bar[[50, 100]].tolist() == pytest.approx([0.45, 0.9])
    assert (2887 * text.between(0, t)[1][[49, 99]]).tolist() == pytest.approx([0.05, 0.1], abs=2e-6)
    for schedule in (code, text):                                          # β ≥ 0 in every step
        alpha, _, gamma = schedule.between(t - 1, t)
        assert (1 - alpha - gamma > -1e-15).all()
    assert text.alpha_bar[100] == 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_tokens_follow_the_closed_form(kind):
    """u on a fine grid and every code in turn: the integral, no sampling."""
    V, T, n = 5, 8, 4000
    schedule = MaskSchedule(T, V, kind)
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat_interleave(V)
    codes = torch.arange(V).repeat(n)
    for t in (1, 4, 8):
        for x0 in (0, 3):
            xt = kd.mask_and_replace(torch.full((1, n * V), x0), torch.tensor([t]), schedule,
                                     u[None], codes[None])
            share = xt[0].bincount(minlength=V + 1) / (n * V)
            assert torch.allclose(share.double(), steps_matrix(schedule, 0, t)[x0], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V, T", [(2, 4), (4, 6), (6, 8)])
def test_posterior_equals_bayes_on_small_vocabulary(kind, V, T):
    """MASK included; under the network it is the mean over its x_0."""
    schedule, (x0, xt) = MaskSchedule(T, V, kind), every_pair(V)
    generator = torch.Generator().manual_seed(0)
    log_x0 = torch.randn(1, V + 1, V, generator=generator).double().log_softmax(-1)
    for t in range(1, T + 1):
        for s in range(t):
            at, wanted = (torch.tensor([t]), torch.tensor([s])), bayes(schedule, s, t)
            found = kd.log_posterior(one_hot_log(x0, V), xt, *at, schedule)[0].exp()
            assert torch.allclose(found, wanted.flatten(0, 1), atol=1e-7), (t, s)
            found = kd.log_posterior(log_x0, torch.arange(V + 1)[None], *at, schedule)[0].exp()
            mean = torch.einsum("tv,vts->ts", log_x0[0].exp(), wanted)
            assert torch.allclose(found, mean, atol=1e-7), (t, s)


# ---------------------------------------------------------------- loss

@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_kl_and_the_weighted_auxiliary_term(kind):
    schedule, t = MaskSchedule(10, 7, kind), torch.arange(1, 11)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(7, (10, 9), generator=generator)
    xt = kd.mask_and_replace(x0, t, schedule, torch.rand(10, 9, generator=generator),
                             torch.randint(7, (10, 9), generator=generator))
    assert kd.posterior_kl(one_hot_log(x0, 7), x0, xt, t, t - 1, schedule).abs().max() < 1e-5
    blind = torch.full((10, 9, 7), -math.log(7))
    terms = kd.posterior_kl(blind, x0, xt, t, t - 1, schedule).mean(1)
    weight = TRANSFORMER_CONFIG.auxiliary * (2 - (t - 1) / 10)             # from 2 down to 1.1
    model = Mock(config=TRANSFORMER_CONFIG, return_value=blind)
    loss = kd.discrete_loss(model, schedule, x0, xt, t, None, None, None, None)
    assert loss.item() == pytest.approx((terms + weight * math.log(7)).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_equals_its_definition(kind):
    """Every (x_0, x_t) and s < t, and the gradient to the network's output."""
    V, T = 4, 6
    schedule, (x0, xt) = MaskSchedule(T, V, kind), every_pair(V)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, x0.shape[1], V, generator=generator).double().requires_grad_()
    log_x0 = logits.log_softmax(-1)
    for t in range(1, T + 1):
        for s in range(t):
            at, table = (torch.tensor([t]), torch.tensor([s])), bayes(schedule, s, t)
            q = table[x0[0], xt[0]]                                        # (pairs, V+1)
            p = torch.einsum("iv,vis->is", log_x0[0].exp(), table[:, xt[0]])
            kls = [(q * (q.clamp(min=1e-30) / p.clamp(min=1e-30)).log()).sum(-1),
                   kd.posterior_kl(log_x0, x0, xt, *at, schedule)[0]]
            gradients = [torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0] for kl in kls]
            for one, two in (kls, gradients):
                assert torch.allclose(one, two, atol=1e-7), (t, s)


def test_kl_in_float32_where_the_prediction_is_almost_sure():
    """The released schedule's β̄ of 1e-9 and probabilities down to e^-60: no NaN, near float64."""
    V, T = 512, 100
    schedule, generator = MaskSchedule(T, V), torch.Generator().manual_seed(0)
    x0 = torch.randint(V, (40, 6), generator=generator)
    t = torch.randint(1, T + 1, (40,), generator=generator)
    xt = kd.mask_and_replace(x0, t, schedule, torch.rand(40, 6, generator=generator), x0)
    xt[:, 0] = torch.randint(V, (40,), generator=generator)                # some replaced
    logits = 12 * torch.randn(40, 6, V, generator=generator)
    log_x0 = logits.log_softmax(-1).clamp(min=kd.LOG_ZERO)
    found = kd.posterior_kl(log_x0, x0, xt, t, t - 1, schedule)
    wanted = kd.posterior_kl(log_x0.double(), x0, xt, t, t - 1, schedule)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_patched_tokens_go_to_their_place_and_back():
    tokens = torch.arange(16.0).view(1, 16, 1)                             # 4x4, row by row
    places = kd.to_places(tokens, 2)
    assert places[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(kd.to_tokens(places, 2), tokens)


# ---------------------------------------------------------------- samplers

def uniforms(batch: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(batch, *shape, generator=generator)


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """The statistic over cells of at least 5 expected, minus its degrees of freedom, in standard
    deviations of its distribution."""
    expected = counts.sum() * p
    big = expected >= 5
    statistic = ((counts[big] - expected[big]) ** 2 / expected[big]).sum().item()
    freedom = max(1, int(big.sum()) - 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


def ideal_predictor(p: torch.Tensor, schedule: MaskSchedule, length: int):
    """log p(x_0^i | x_t), each place's marginal of the true joint posterior; p over V^length."""
    V = schedule.n_codes
    states = torch.tensor(list(itertools.product(range(V), repeat=length)))      # (V^L, L)

    def predict(xt: torch.Tensor, t: int) -> torch.Tensor:
        Q, joint = steps_matrix(schedule, 0, t), p.expand(len(xt), -1)
        for i in range(length):
            joint = joint * Q[states[:, i]][:, xt[:, i]].T                 # (B, V^L)
        marginals = joint @ torch.nn.functional.one_hot(states, V).double().flatten(1)
        marginals = marginals.unflatten(1, (length, V)) / joint.sum(1)[:, None, None]
        return marginals.clamp(min=1e-30).log()
    return predict


def chain_distribution(p: torch.Tensor, schedule: MaskSchedule, times: list[int], length: int
                       ) -> torch.Tensor:
    """The distribution of x_0 under the sampler's own Markov chain, over all (V+1)^L states."""
    V, predict = schedule.n_codes, ideal_predictor(p, schedule, length)
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=length)))
    last = steps_matrix(schedule, 0, schedule.T)[0]
    last[:V] = last[:V].sum() / V                                          # the prior
    now = last[states].prod(1)
    for t, s in zip(times, times[1:]):
        posterior = bayes(schedule, s, t)                                  # (x_0, x_t, x_s)
        network = predict(states, t).exp()                                 # (states, L, V)
        step = torch.ones(len(states), len(states), dtype=torch.float64)
        for i in range(length):
            per_place = torch.einsum("nv,vnc->nc", network[:, i], posterior[:, states[:, i]])
            step *= per_place[:, states[:, i]]
        now = now @ step
    inside = (states < V).all(1)
    return now[inside] / now[inside].sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T, steps", [(8, 8), (8, 3), (8, 1)])
def test_one_token_is_exact_at_any_stride(kind, T, steps):
    V, n = 5, 20_000
    p = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02]).double()
    schedule = MaskSchedule(T, V, kind)
    times = [round(T * (steps - i) / steps) for i in range(steps + 1)]
    *_, x0 = kd.ancestral(ideal_predictor(p, schedule, 1), schedule, times, 1, uniforms(n))
    assert abs(chi_square(x0[:, 0].bincount(minlength=V + 1)[:V].double(), p)) < 4
    assert (x0 < V).all()


def test_sampling_starts_from_the_prior():
    """x_T, which an ideal predictor would forgive: MASK with γ̄_T, else any code alike."""
    V, schedule, n, seen = 5, MaskSchedule(8, 5, "paper"), 400_000, []

    def predict(xt: torch.Tensor, t: int) -> torch.Tensor:
        seen.append(xt.clone())
        return torch.full((len(xt), 1, V), -math.log(V), dtype=torch.float64)

    next(kd.ancestral(predict, schedule, [8, 4, 0], 1, uniforms(n)))
    prior = torch.tensor([0.1 / V] * V + [0.9], dtype=torch.float64)
    assert abs(chi_square(seen[0][:, 0].bincount(minlength=V + 1).double(), prior)) < 4


def test_three_dependent_tokens_follow_the_chain_and_converge():
    """What one step sets it sets independently, each by its marginal: the error falls as 1/T."""
    V, n, distances = 2, 20_000, []
    generator = torch.Generator().manual_seed(3)
    p = torch.rand(V ** 3, generator=generator, dtype=torch.float64) ** 3
    p /= p.sum()
    for T in (8, 16, 32):
        schedule, times = MaskSchedule(T, V, "released"), list(range(T, -1, -1))
        chain = chain_distribution(p, schedule, times, 3)
        distances.append(0.5 * (chain - p).abs().sum().item())
        if T == 8:
            *_, x0 = kd.ancestral(ideal_predictor(p, schedule, 3), schedule, times, 3, uniforms(n))
            code = (x0 * torch.tensor([V ** 2, V, 1])).sum(1)
            assert abs(chi_square(code.bincount(minlength=V ** 3).double(), chain)) < 4
            assert abs(chi_square(code.bincount(minlength=V ** 3).double(), p)) > 4
    assert 0.4 < distances[1] / distances[0] < 0.6 and 0.4 < distances[2] / distances[1] < 0.6


def test_a_category_is_drawn_by_its_share_of_the_mass():
    """u on a fine grid: the integral, no sampling; a category without mass never comes."""
    p, n = torch.tensor([0.0, 0.6, 0.3, 0.0, 0.1, 0.0]), 10_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = kd.draw_category(p.clamp(min=1e-30).log().expand(1, n, 6), u[None])[0]
    assert torch.allclose(drawn.bincount(minlength=6) / n, p, atol=2 / n)
    ends = torch.tensor([[0.0, 1 - 2 ** -24]])
    assert kd.draw_category(p.clamp(min=1e-30).log().expand(1, 2, 6), ends)[0].tolist() == [4, 1]


def test_truncation_keeps_the_codes_before_r_of_mass():
    p = torch.tensor([0.1, 0.5, 0.15, 0.25])
    guide, xt = kd.Guide(None, None), torch.zeros(1, 1, dtype=torch.int64)
    model = Mock(return_value=p.log()[None, None])
    for r, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        found = kd.predict_tokens(model, guide, r, xt, 3)[0, 0].exp()
        wanted = torch.zeros(4)
        wanted[kept] = p[kept] / p[kept].sum()
        assert torch.allclose(found, wanted, atol=1e-6), r


def test_guidance_extrapolates_log_probabilities():
    model, xt, _, query, neighbors, _ = two_samples("discrete")
    t = torch.full((2,), 4)
    cond, uncond = model(xt, t, query, neighbors), model(xt, t, None, None)
    assert (cond - uncond).abs().max() > 1e-2
    for s in (0.0, 1.0, 3.0):
        found = kd.predict_tokens(model, kd.Guide(query, neighbors, s), 1.0, xt, 4)
        wanted = torch.softmax(uncond.double() + s * (cond - uncond).double(), -1)
        assert torch.allclose(found.exp().double(), wanted, atol=1e-6), s


# ---------------------------------------------------------------- the transformer

def test_every_input_reaches_the_output():
    model, query, neighbors = tiny_transformer(), unit(1, 16), unit(1, 3, 16)
    xt, t = torch.full((1, 9), 7), torch.tensor([3])
    base, other = model(xt, t, query, neighbors), xt.clone()
    other[0, 8] = 2
    changed = (model(other, t, query, neighbors) - base).abs().amax(-1)[0]
    assert (changed > 1e-5).all()                                          # nothing is causal
    assert (model(xt, t + 1, query, neighbors) - base).abs().max() > 1e-4
    assert base[0].std(0).max() > 1e-3                                     # places differ


def test_samples_end_without_masks_and_depend_on_their_seed_alone():
    model, query, neighbors = tiny_transformer(), unit(3, 16), unit(3, 3, 16)
    *_, three = kd.sample_tokens(model, query, neighbors, [5, 6, 7], steps=4)
    assert three.shape == (3, 9) and three.max() < 7
    *_, one = kd.sample_tokens(model, query[1:2], neighbors[1:2], [6], steps=4)
    assert torch.equal(one[0], three[1])
