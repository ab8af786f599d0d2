"""kNN-Diffusion (Sheynin et al., 2204.02849, ICLR 2023): condition, diffusion, samplers.

No text is seen in training. f_img, f_txt: CLIP's encoders; H: image embeddings (Sec. 3).

    training     condition on f_img(x_0) and the k rows of H nearest to it
    inference    condition on f_txt(text) and the k rows of H nearest to that

A text's embedding lies far from every picture's. Its neighbours do not: they are pictures'
embeddings both times. So they carry the condition across the gap.

    continuous   x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε,  t = 1 … T, ᾱ_0 = 1; the U-Net predicts ε, v or x_0
    discrete     tokens are masked and replaced; a transformer predicts p(x_0 | x_t)
    guidance     out = uncond + scale·(cond − uncond), 1 is off; of log p for tokens

    paper                  code                      paper        code
    x_t, ε, v              xt, eps, v                ᾱ_t          alpha_bar[t]
    f_img(x_0), f_txt(…)   query                     kNN(·)       neighbors

Shapes: B batch, C channels, H W picture, L image tokens (h·w), D width of the condition, E CLIP
dimension, K neighbours, T steps. Pictures are in [-1, 1]. t is the step, 1 … T; s < t the one
that a sampler goes to. Left out: ADM's learned variance, DALL-E 2's upsamplers."""
from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_model import QuickGELU, attention, load_model, require

# ---------------- configuration

@dataclass(frozen=True)
class UNetConfig:
    """The continuous backbone. Defaults: the paper's size, laid out as ADM's (2105.05233)."""
    image_size: int = 64         # pixels per side
    embed_dim: int = 512         # E, CLIP's dimension
    n_neighbors: int = 10        # K in training, and null tokens for none
    widths: tuple[int, ...] = (192, 384, 576, 768)  # channels per level, full size first
    blocks: int = 4              # residual blocks per level (ADM: 3)
    norm_groups: int = 32        # of every GroupNorm
    head_channels: int = 64      # channels per attention head
    condition_width: int = 1024  # D
    time_width: int = 1024       # of the time MLP
    attention: tuple[int, ...] = (32, 16, 8)  # sizes at which pixels see the condition
    self_attention: tuple[int, ...] = (32, 16, 8)  # ... and also each other
    dropout: float = 0.1
    T: int = 1000                # steps of the diffusion
    target: str = "eps"          # what is predicted: "eps", "v" or "x0"
    noise_shift: float = 1.0     # times √SNR; below 1: noisier
    unshuffle: int = 1           # Ours: "small networks", with the next 3
    position_map: bool = False
    query_map: int = 0           # channels; 0: none
    query_hidden: int = 1024
    edit: bool = False           # Sec. 3.3: a picture is a second input

    def __post_init__(self) -> None:
        require(self.target in ("eps", "v", "x0"), f"target {self.target!r}: not eps, v or x0")


PRESETS = {
    "paper": UNetConfig(),   # about 400M parameters, as the paper says of its own
    "gpu": UNetConfig(widths=(128, 256, 384, 512), blocks=2, condition_width=512, time_width=512,
                      self_attention=(16, 8), attention=(16, 8), target="v"),
    "stickers": UNetConfig(  # two CPU cores: 16x16 and 8x8 features
        embed_dim=256, widths=(96, 160), blocks=1, norm_groups=8, head_channels=32,
        condition_width=256, time_width=192, attention=(16, 8), self_attention=(8,), dropout=0.0,
        target="x0", noise_shift=0.5, unshuffle=4, position_map=True, query_map=24),
}


# ---------------- schedule

class Schedule:
    """The squared-cosine schedule (Nichol & Dhariwal, 2102.09672 Eq. 17), float64, index 0 … T.

    ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + 0.008)/1.008 · π/2), β_t = 1 − ᾱ_t/ᾱ_{t−1} ≤ 0.999.
    noise_shift c multiplies the signal-to-noise ratio (SNR) ᾱ/(1−ᾱ) by c² (2301.11093 Sec. 3.1):
    at twice the side pixels average out half of the noise, c = 1/2 gives it back."""
    def __init__(self, T: int, noise_shift: float = 1.0, device: torch.device | str = "cpu"
                 ) -> None:
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        alpha_bar = f / f[0]
        snr = alpha_bar / (1 - alpha_bar) * noise_shift ** 2  # inf at t = 0
        alpha_bar = torch.where(t == 0, 1.0, snr / (1 + snr))
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        beta = torch.cat([beta.new_zeros(1), beta])           # (T+1,), beta[0] = 0
        alpha_bar = torch.cumprod(1 - beta, 0)                # (T+1,), 1 at 0
        self.T, self.alpha_bar = T, alpha_bar.to(device)

    def at(self, t: int | Tensor, x: Tensor) -> Tensor:
        """ᾱ_t in x's precision, shaped to multiply x (B, ...)."""
        return self.alpha_bar[t].to(x).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ x_0 + √(1−ᾱ) ε (Ho et al., 2006.11239 Eq. 4)."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def to_v(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho, 2202.00512 App. D).
    With √ᾱ = cos φ, √(1−ᾱ) = sin φ, (x_t, v) is (x_0, ε) rotated by φ:
    x_t = cos φ x_0 + sin φ ε and v = −sin φ x_0 + cos φ ε. Rotating back gives `x0_from`."""
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0


def x0_from(output: Tensor, xt: Tensor, alpha_bar: Tensor, target: str) -> Tensor:
    """x_0 from a prediction: itself, √ᾱ x_t − √(1−ᾱ) v, or (x_t − √(1−ᾱ) ε)/√ᾱ."""
    if target == "x0":
        return output
    if target == "v":
        return alpha_bar.sqrt() * xt - (1 - alpha_bar).sqrt() * output
    return (xt - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()


def eps_from(x0: Tensor, xt: Tensor, alpha_bar: Tensor) -> Tensor:
    """The ε that leads from x_0 to x_t: (x_t − √ᾱ x_0)/√(1−ᾱ)."""
    return (xt - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()


def posterior(x0: Tensor, xt: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor
              ) -> tuple[Tensor, Tensor]:
    """q(x_s | x_t, x_0) for any s < t: its mean and its variance β̃.

    With α_{t|s} = ᾱ_t/ᾱ_s and β_{t|s} = 1 − α_{t|s}:
    mean = √ᾱ_s β_{t|s}/(1−ᾱ_t) x_0 + √α_{t|s} (1−ᾱ_s)/(1−ᾱ_t) x_t,
    β̃ = (1−ᾱ_s)/(1−ᾱ_t) β_{t|s}. For s = t − 1: Ho et al. (2006.11239) Eq. 6, 7."""
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    mean = (alpha_bar_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - alpha_bar_s) * xt) / (
        1 - alpha_bar_t)
    return mean, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta


# ---------------- the condition (Sec. 3.2)

SHARPNESS = 250.0  # κ of `summarize`: a cosine higher by 0.01 weighs 12 times more


class Condition(nn.Module):
    """Departs: one vector for query and neighbours, their summary; tokens [summary; n_1 … n_K].

    Attention reads the tokens. The summary also joins the time embedding (in layers that are
    named after the query), which scales and shifts every block: attention would first have to
    find what the whole picture depends on. A text's own embedding is unlike all that was trained:
    beside neighbours it hardly enters. One linear map serves all tokens, a type embedding tells
    the summary from neighbours. Ranks are not told: neighbours are a set, and any K works at
    inference. A null is a learned CLIP vector, put in before any path reads the condition."""
    def __init__(self, config: UNetConfig | TransformerConfig) -> None:
        super().__init__()
        E, D = config.embed_dim, config.condition_width
        self.n_neighbors = config.n_neighbors
        self.null_query = nn.Parameter(torch.randn(E) * E ** -0.5)    # norm about 1
        self.null_neighbor = nn.Parameter(torch.randn(E) * E ** -0.5)
        self.to_width = nn.Linear(E, D)
        self.type_embedding = nn.Parameter(torch.randn(2, D) * 0.02)  # summary, neighbour
        self.scale = math.sqrt(E)  # entries of unit-norm vectors become 1

    def forward(self, query: Tensor | None, neighbors: Tensor | None, batch: int,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1+K, D) and their summary (B, E), nulls put in, entries of order 1.
        query: unit-norm (B, E); neighbors: unit-norm (B, K, E); None, or K = 0, is the null.
        drop_query, drop_neighbors: bool (B,), the samples to blind."""
        none = torch.zeros(batch, dtype=torch.bool, device=self.null_query.device)
        if query is None:
            query, drop_query = self.null_query.expand(batch, -1), ~none        # (B, E)
        if neighbors is None or neighbors.shape[1] == 0:
            neighbors = self.null_neighbor.expand(batch, self.n_neighbors, -1)  # (B, K, E)
            drop_neighbors = ~none
        no_query = (none if drop_query is None else drop_query)[:, None]        # (B, 1)
        no_neighbors = (none if drop_neighbors is None else drop_neighbors)[:, None]
        query = torch.where(no_query, self.null_query, query)
        neighbors = torch.where(no_neighbors[..., None], self.null_neighbor, neighbors)
        summary = self.scale * summarize(query, neighbors, no_query, no_neighbors)
        tokens = torch.cat([summary[:, None], self.scale * neighbors], dim=1)  # (B, 1+K, E)
        types = self.type_embedding[[0] + [1] * neighbors.shape[1]]            # (1+K, D)
        return self.to_width(tokens) + types, summary


def summarize(query: Tensor, neighbors: Tensor, no_query: Tensor, no_neighbors: Tensor) -> Tensor:
    """One vector (B, E) that a picture could have, from a query (B, E) and neighbours (B, K, E).

    Ours: the nearer the query is to its neighbours, the more it counts. A picture's (training) is
    as near to the answer as its ten are: trust is near 1. (One or two are nearer: they speak
    alone.) A text's is far from all pictures: trust is near 0, its neighbours speak for it.
    With sharpness κ:
        answer = a/‖a‖, a = Σ_i softmax_i(κ q·n_i) n_i   the query asks, the neighbours answer
        trust = σ(κ (q·answer − mean_i n_i·answer))      is q as close to it as they are?
        summary = trust·q + (1 − trust)·answer
    no_query, no_neighbors: bool (B, 1). Without a query the neighbours' mean asks, and trust
    is 0. Without neighbours it is 1."""
    asks = torch.where(no_query, neighbors.mean(1), query)                   # (B, E)
    scores = (neighbors * asks[:, None]).sum(-1, keepdim=True)               # (B, K, 1)
    answer = ((SHARPNESS * scores).softmax(1) * neighbors).sum(1)
    answer = F.normalize(answer, dim=-1)                                     # (B, E)
    agreement = (neighbors * answer[:, None]).sum(-1).mean(1, keepdim=True)  # (B, 1)
    excess = (query * answer).sum(-1, keepdim=True) - agreement
    trust = torch.sigmoid(SHARPNESS * excess)                                # (B, 1)
    trust = trust.masked_fill(no_query, 0).masked_fill(no_neighbors, 1)
    return trust * query + (1 - trust) * answer


def draw_drops(batch: int, generator: torch.Generator, condition: str = "both"
               ) -> tuple[Tensor, Tensor]:
    """Which samples lose their query and which their neighbours: two bool (B,), on the CPU.

    Ours: 10 % lose both, 10 % the neighbours only, 10 % the query only: one set of weights
    serves `both`, `query`, `neighbors` and guidance's unconditional half. Independent drops of
    10 % would leave 1 % to the unconditional model, which guidance calls at every step.
    condition "query" is the paper's no-kNN baseline: neighbours never, the query in 90 %;
    "neighbors" the other way round."""
    u = torch.rand(batch, generator=generator)
    lose_both, lose_query = u < 0.1, (u >= 0.2) & (u < 0.3)
    always = torch.ones(batch, dtype=torch.bool)
    return {"both": (lose_both | lose_query, u < 0.2), "query": (lose_both, always),
            "neighbors": (always, lose_both)}[condition]


def add_query_noise(query: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Half of the queries (B, E) get Gaussian noise of norm about σ, uniform in 0 … `largest`.
    Unit-norm again, they are like LAFITE's pseudo texts (2111.13792 Sec. 3.1; one norm there), for
    a baseline without neighbours. Draws on the CPU."""
    B, E = query.shape
    chosen, sigma = torch.rand(2, B, 1, generator=generator)
    noise = torch.randn(B, E, generator=generator) * E ** -0.5
    sigma = torch.where(chosen < 0.5, sigma * largest, 0)
    return F.normalize(query + (sigma * noise).to(query), dim=1)


# ---------------- both backbones edit (Sec. 3.3)

def draw_edit_drops(batch: int, generator: torch.Generator, condition: str = "both"
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """As `draw_drops`, and which lose the picture to edit: half of those that lose both.
    So e(∅,∅), e(I,∅) and e(I,c) of `guided` are all trained."""
    drop_query, drop_neighbors = draw_drops(batch, generator, condition)
    drop_picture = torch.rand(batch, generator=generator) < 0.5
    return drop_query, drop_neighbors, drop_picture & drop_query & drop_neighbors


def widened(model: UNet | TokenTransformer) -> UNet | TokenTransformer:
    """The same model with a second input, the picture to edit, of zero weights so far."""
    wide, state = type(model)(replace(model.config, edit=True)), model.state_dict()
    for name, weight in wide.state_dict().items():
        weight.zero_()
        if name in state:  # conv_in has more input channels
            weight[tuple(map(slice, state[name].shape))] = state[name]
    return wide


# ---------------- small networks
#
# Ours: what lets 7 million parameters on two CPU cores draw at all. `paper` and `gpu` have none
# of it: skip this part to read the paper's networks.
#
#     unshuffle     r x r pixels become channels: all work is on small feature maps
#     patch         the same for the transformer: r x r tokens share one place
#     position_map  a learned map added to the first features
#     query_map     a small feature map that an MLP draws from the summary: it learns by
#                   heart, at little cost, which picture an embedding means

def query_mlp(config: UNetConfig | TransformerConfig, places: int) -> nn.Module | None:
    """(B, E) → (B, query_map·places)."""
    return nn.Sequential(
        nn.Linear(config.embed_dim, config.query_hidden), nn.SiLU(),
        nn.Linear(config.query_hidden, config.query_map * places)) if config.query_map else None


def to_places(x: Tensor, r: int) -> Tensor:
    """(B, L, C), a square row by row → (B, l, r²C): r x r neighbouring tokens in one place."""
    side = math.isqrt(x.shape[1]) // r
    x = x.view(len(x), side, r, side, r, -1).transpose(2, 3)  # (B, h/r, w/r, r, r, C)
    return x.reshape(len(x), side * side, -1)


def to_tokens(x: Tensor, r: int) -> Tensor:
    """(B, l, r²C) → (B, L, C): the way back."""
    side = math.isqrt(x.shape[1])
    x = x.view(len(x), side, side, r, r, -1).transpose(2, 3)  # (B, h/r, r, w/r, r, C)
    return x.reshape(len(x), side * side * r * r, -1)


# ---------------- layers of both backbones

def multi_head(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention in so many heads: q (B, L, C), k and v (B, M, C) → (B, L, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(2)


def zeroed(layer: nn.Module) -> nn.Module:
    """Start a layer at zero: a residual block is the identity, a U-Net predicts 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


# ---------------- the U-Net (Sec. 3.2, continuous)

def time_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines of t at geometric frequencies, 1 to 1/10000: (B, width)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * freqs  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """ADM's: norm → SiLU → (resize) → conv → norm·(1 + scale) + shift → SiLU → conv.
    scale and shift come from the time embedding and the condition's summary."""
    def __init__(self, config: UNetConfig, c_in: int, c_out: int, resize: str = "") -> None:
        super().__init__()
        self.resize = {"": nn.Identity(), "down": nn.AvgPool2d(2),
                       "up": nn.Upsample(scale_factor=2)}[resize]
        self.norm_in = nn.GroupNorm(config.norm_groups, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(config.time_width, 2 * c_out)
        self.norm_out = nn.GroupNorm(config.norm_groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:       # (B, C, h, w)
        h = self.conv_in(self.resize(F.silu(self.norm_in(x))))  # (B, C', h', w')
        scale, shift = self.modulation(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.skip(self.resize(x)) + h


class AttentionBlock(nn.Module):
    """GLIDE's joint attention: queries from the pixels, keys and values from the condition's
    tokens and, with_self, the pixels."""
    def __init__(self, config: UNetConfig, channels: int, with_self: bool) -> None:
        super().__init__()
        self.heads, self.with_self = channels // config.head_channels, with_self
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.to_qkv = nn.Linear(channels, (3 if with_self else 1) * channels)
        self.condition_kv = nn.Linear(config.condition_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # tokens (B, 1+K, D)
        B, C, h, w = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)     # (B, L, C)
        q, *own = self.to_qkv(pixels).split(C, dim=-1)
        k, v = self.condition_kv(tokens).split(C, dim=-1)    # (B, 1+K, C)
        if self.with_self:
            k, v = torch.cat([k, own[0]], dim=1), torch.cat([v, own[1]], dim=1)
        mixed = self.out(multi_head(q, k, v, self.heads))    # (B, L, C)
        return x + mixed.transpose(1, 2).reshape(B, C, h, w)


class Layer(nn.Module):
    """A residual block and, where wanted, an attention block behind it."""
    def __init__(self, config: UNetConfig, c_in: int, c_out: int, size: int,
                 resize: str = "", attend: bool = True) -> None:
        super().__init__()
        self.block = ResBlock(config, c_in, c_out, resize)
        attend = attend and size in config.attention
        with_self = size in config.self_attention
        self.attention = AttentionBlock(config, c_out, with_self) if attend else None

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.attention is None else self.attention(x, tokens)


class UNet(nn.Module):
    """ε, v or x_0 of x_t under a condition."""
    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        r, widths = config.unshuffle, config.widths
        size = config.image_size // r
        self.condition = Condition(config)
        self.time_mlp = nn.Sequential(nn.Linear(widths[0], config.time_width), nn.SiLU(),
                                      nn.Linear(config.time_width, config.time_width))
        self.query_to_time = nn.Linear(config.embed_dim, config.time_width)
        self.conv_in = nn.Conv2d((2 if config.edit else 1) * 3 * r * r, widths[0], 3, padding=1)
        self.position_map = nn.Parameter(
            torch.zeros(1, widths[0], size, size)) if config.position_map else None

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = widths[0], [widths[0]]
        for i, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Layer(config, c, width, size))
                c = width
                skips.append(c)
            if i + 1 < len(widths):
                size //= 2
                self.down.append(Layer(config, c, c, size, "down", attend=False))
                skips.append(c)
        self.query_map = query_mlp(config, size * size)
        self.map_in = nn.Conv2d(config.query_map, c, 1) if config.query_map else None
        self.middle = nn.ModuleList([Layer(config, c, c, size),
                                     Layer(config, c, c, size, attend=False)])
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Layer(config, c + skips.pop(), width, size))
                c = width
            if i > 0:
                # Ours: it also narrows. ADM's keeps the width, which takes a seventh more time.
                size *= 2
                self.up.append(Layer(config, c, widths[i - 1], size, "up", attend=False))
                c = widths[i - 1]
        self.norm_out = nn.GroupNorm(config.norm_groups, c)
        self.conv_out = zeroed(nn.Conv2d(c, 3 * r * r, 3, padding=1))

    def forward(self, xt: Tensor, t: Tensor, query: Tensor | None, neighbors: Tensor | None,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None,
                picture: Tensor | None = None) -> Tensor:
        """The target, float32 (B, 3, H, W), of xt float32 (B, 3, H, W), t (B,) in 1 … T.
        Condition as in `Condition.forward`. picture: what to edit, as xt; None is zeros."""
        config = self.config
        if config.edit:
            xt = torch.cat([xt, torch.zeros_like(xt) if picture is None else picture], dim=1)
        tokens, summary = self.condition(query, neighbors, len(xt), drop_query, drop_neighbors)
        time = F.silu(self.time_mlp(time_embedding(t, config.widths[0]))
                      + self.query_to_time(summary))               # (B, time_width)
        x = F.pixel_unshuffle(xt, config.unshuffle)                # (B, 3r² or 6r², H/r, W/r)
        x = self.conv_in(x.to(memory_format=torch.channels_last))  # (B, C, h, w)
        if self.position_map is not None:
            x = x + self.position_map.to(x.dtype)
        skips = [x]
        for layer in self.down:
            x = layer(x, time, tokens)
            skips.append(x)
        if self.query_map is not None:
            shape = (len(x), config.query_map, *x.shape[-2:])
            x = x + self.map_in(self.query_map(summary).view(shape))
        for layer in self.middle:
            x = layer(x, time, tokens)
        for layer in self.up:
            if not isinstance(layer.block.resize, nn.Upsample):
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, time, tokens)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x.float(), config.unshuffle)  # (B, 3, H, W)


# ---------------- loss

def diffusion_loss(model: UNet, schedule: Schedule, x0: Tensor, query: Tensor, neighbors: Tensor,
                   t: Tensor, eps: Tensor, drop_query: Tensor, drop_neighbors: Tensor,
                   picture: Tensor | None = None) -> Tensor:
    """Mean squared error of the target over the batch.

    Ours, for the target x_0: weighted with 1/(1−ᾱ) = SNR + 1, at most 5. That is v's loss, as
    x_0's error is √(1−ᾱ) times v's; capped as in Min-SNR (2303.09556 Sec. 3.4). A v or ε holds
    all of the noise, which a narrow network must carry through; x_0 does not.

    x0, and the picture to edit into it: float32 (B, 3, H, W) in [-1, 1]; t: int64 (B,), 1 … T."""
    alpha_bar = schedule.at(t, x0)  # (B, 1, 1, 1)
    xt = add_noise(x0, eps, alpha_bar)
    output = model(xt, t, query, neighbors, drop_query, drop_neighbors, picture).float()
    if model.config.target == "x0":
        return ((1 / (1 - alpha_bar)).clamp(max=5) * (output - x0) ** 2).mean()
    return F.mse_loss(
        output, eps if model.config.target == "eps" else to_v(x0, eps, alpha_bar))


# ---------------- guidance

@dataclass(frozen=True)
class Guide:
    """What steers a sampler; see `sample`."""
    query: Tensor | None
    neighbors: Tensor | None
    scale: float = 1.0
    picture: Tensor | None = None
    picture_scale: float = 1.0

    def __post_init__(self) -> None:
        require(math.isfinite(self.scale + self.picture_scale), "guidance is not finite")


@torch.no_grad()
def guided(model: UNet | TokenTransformer, xt: Tensor, t: int, guide: Guide) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, 2207.12598): uncond + scale·(cond − uncond).

    cond − uncond is what the condition changes. A scale above 1 changes more: what was asked for
    shows more clearly, at the price of variety; too much burns the colours. With a picture I to
    edit and the text's condition c there are two scales, s_I and s_T (InstructPix2Pix, 2211.09800
    Eq. 3); e is the model's output, ∅ a null:
        e(∅,∅) + s_I·[e(I,∅) − e(∅,∅)] + s_T·[e(I,c) − e(I,∅)]"""
    require(guide.picture is None or model.config.edit, "a picture needs `train.py edit` weights")
    steps = torch.full((len(xt),), t, device=xt.device)
    out = model(xt, steps, guide.query, guide.neighbors, picture=guide.picture)
    if guide.scale != 1 or guide.picture_scale != 1:
        uncond = model(xt, steps, None, None, picture=guide.picture)
        out = uncond + guide.scale * (out - uncond)
        if guide.picture_scale != 1:
            out = out + (guide.picture_scale - 1) * (uncond - model(xt, steps, None, None))
    return out


def predict_x0(model: UNet, schedule: Schedule, guide: Guide, xt: Tensor, t: int) -> Tensor:
    """Guided x_0 of xt (B, 3, H, W), clipped to [-1, 1]."""
    return x0_from(guided(model, xt, t, guide), xt, schedule.at(t, xt),
                   model.config.target).clamp(-1, 1)


# ---------------- samplers
#
# Each is a generator of x_t, so that a notebook can watch. `times` falls to 0 (x_0); `xt` (B, ...)
# is at times[0]. `noise()` is the next standard normal.

Predictor = Callable[[Tensor, int], Tensor]  # (x_t, t) → x_0; of tokens: log p(x_0 | x_t)


def falling(first: int, steps: int) -> list[int]:
    """steps + 1 times, evenly spaced from `first` to 0. ValueError unless steps is 1 … first."""
    require(1 <= steps <= first, f"steps is {steps}, wanted 1 to {first}")
    return [round(first * (steps - i) / steps) for i in range(steps + 1)]


def ddpm(predict: Predictor, schedule: Schedule, times: list[int], xt: Tensor,
         noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Ancestral sampling (2006.11239 Alg. 2) at any times; the last step adds no noise."""
    for t, s in zip(times, times[1:]):
        mean, variance = posterior(predict(xt, t), xt, schedule.at(t, xt), schedule.at(s, xt))
        xt = mean + variance.sqrt() * noise() if s > 0 else mean
        yield xt


def ddim(predict: Predictor, schedule: Schedule, times: list[int], xt: Tensor,
         noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """DDIM (Song et al., 2010.02502 Eq. 12, σ = 0): no noise, the same ε at the next step."""
    for t, s in zip(times, times[1:]):
        x0 = predict(xt, t)
        eps = eps_from(x0, xt, schedule.at(t, xt))
        xt = add_noise(x0, eps, schedule.at(s, xt))
        yield xt


def dpm_solver(predict: Predictor, schedule: Schedule, times: list[int], xt: Tensor,
               noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2211.01095 Alg. 2): DDIM's step, with x_0 on the straight
    line through the last two predictions.

    λ = log(√ᾱ/√(1−ᾱ)), h = λ_s − λ_t, x̂ = x_0(t) + [x_0(t) − x_0(before)] h / 2h_before,
    x_s = √(1−ᾱ_s)/√(1−ᾱ_t) x_t − √ᾱ_s (e^{−h} − 1) x̂.
    The first step, and the last one to s = 0 (h is infinite), take x̂ = x_0(t)."""
    before, h_before = None, 0.0
    alpha_bar = schedule.alpha_bar.tolist()
    for t, s in zip(times, times[1:]):
        x0 = predict(xt, t)
        if s == 0:
            yield x0
            return
        log_snr_t, log_snr_s = (math.log(alpha_bar[i] / (1 - alpha_bar[i]))
                                for i in (t, s))
        h = (log_snr_s - log_snr_t) / 2
        on_line = x0 if before is None else x0 + (x0 - before) * h / (2 * h_before)
        ratio = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]))
        xt = ratio * xt - math.sqrt(alpha_bar[s]) * math.expm1(-h) * on_line
        before, h_before = x0, h
        yield xt


SAMPLERS = {"dpm": dpm_solver, "ddim": ddim, "ddpm": ddpm}  # the first is the default


def noise_source(seeds: list[int], device: torch.device | str = "cpu",
                 draw: Callable[..., Tensor] = torch.randn) -> Callable[..., Tensor]:
    """A function (*shape) → the next standard normal (B, *shape), or uniform with torch.rand.
    Each sample has its own generator on the CPU: only its seed decides."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda *shape: torch.stack([draw(shape, generator=g) for g in generators]).to(device)


def sample(model: UNet, query: Tensor | None, neighbors: Tensor | None, seeds: list[int],
           steps: int = 20, guidance: float = 2.0, sampler: str = "dpm",
           picture: Tensor | None = None, guidance_picture: float = 1.0,
           start: Tensor | None = None, start_at: float = 1.0) -> Iterator[Tensor]:
    """Yield x_t after every step, float32 (B, 3, H, W); the last is the picture in [-1, 1].

    query: unit-norm (B, E) or None; neighbors: unit-norm (B, K, E) or None; B seeds. picture:
    what to edit (B, 3, H, W). start: begin at t = start_at·T from this picture, noised (SDEdit,
    2108.01073). Raises ValueError for another sampler, or more steps than are left."""
    require(sampler in SAMPLERS, f"sampler is {sampler!r}, wanted {', '.join(SAMPLERS)}")
    size, device = model.config.image_size, model.conv_in.weight.device
    schedule = Schedule(model.config.T, model.config.noise_shift, device)
    first = round(start_at * schedule.T)
    if model.config.target == "eps" and steps < schedule.T:
        # Ours: x_0 = (x_t − √(1−ᾱ) ε)/√ᾱ blows up as ᾱ → 0. Begin where ᾱ_t ≥ 1e-4.
        first = min(first, max(steps, int((schedule.alpha_bar >= 1e-4).sum()) - 1))
    times = falling(first, steps)
    noise = functools.partial(noise_source(seeds, device), 3, size, size)
    xt = noise()
    if start is not None:
        xt = add_noise(start, xt, schedule.at(first, start))
    guide = Guide(query, neighbors, guidance, picture, guidance_picture)
    predict = functools.partial(predict_x0, model, schedule, guide)
    yield from SAMPLERS[sampler](predict, schedule, times, xt, noise)


# ================ the discrete backbone
#
# VQ-Diffusion (Gu et al., 2111.14822): x_0 is L tokens of 0 … V−1 (vqvae.py), MASK = V. In a
# step a token stays, or becomes any code, or MASK, which it remains:
#
#     q(x_t | x_{t−1}):   itself α_t + β_t,   another code β_t each,   MASK γ_t;   α + Vβ + γ = 1
#
# The product of many steps has the same form. ᾱ_t = ∏ α_i: no step has touched the token.
# 1 − γ̄_t = ∏ (1 − γ_i): no step has masked it. What is left, replaced but never masked, is any
# code alike, with β̄_t = (1 − ᾱ_t − γ̄_t) / V each:
#
#     q(x_t | x_0):       x_0 itself ᾱ_t + β̄_t,   another code β̄_t,   MASK γ̄_t;   ᾱ + Vβ̄ + γ̄ = 1
#
# From any s to a later t it is this form again, with ᾱ_t/ᾱ_s and (1 − γ̄_t)/(1 − γ̄_s) for the
# products: one function serves every stride. t runs 1 … T, t = 0 is the picture.
#
# In this half: L tokens in l places of the transformer (l = L where `patch` is 1), V codes, v one
# of them, D the transformer's width, M = 1 + K condition tokens.

LOG_ZERO = -70.0  # the floor of log probabilities: e^-70 is about 4e-31


@dataclass(frozen=True)
class TransformerConfig:
    """The discrete backbone. Defaults: VQ-Diffusion-B (19 blocks of 1024) on 32x32 tokens."""
    image_size: int = 256       # pixels per side, of the VQ-VAE's pictures
    n_codes: int = 8192         # V
    tokens_a_side: int = 32     # h = w; L = h·w
    patch: int = 1              # Ours, "small networks": places are r x r tokens
    embed_dim: int = 512        # E, CLIP's dimension
    n_neighbors: int = 10       # K in training
    width: int = 1024           # D
    layers: int = 19
    heads: int = 16
    condition_width: int = 512  # of the condition's tokens
    T: int = 100                # steps of the diffusion
    schedule: str = "released"  # "released": the code's; "paper": the text's
    auxiliary: float = 5e-4     # λ of −log p(x_0 | x_t), their text configs'
    query_map: int = 0          # Ours, "small networks": channels; 0: none
    query_hidden: int = 1024
    edit: bool = False          # Sec. 3.3: the tokens of a picture to edit, too


DISCRETE_PRESETS = {
    "paper": TransformerConfig(),
    "gpu": TransformerConfig(tokens_a_side=16, n_codes=1024, width=512, layers=16, heads=8),
    "stickers": TransformerConfig(image_size=64, tokens_a_side=16, n_codes=512, embed_dim=256,
                                  patch=2, width=192, layers=4, heads=6, condition_width=192,
                                  query_map=48),
}


# ---------------- mask and replace

class MaskSchedule:
    """ᾱ_t and γ̄_t, float64, index 0 … T.

    "released" (VQ-Diffusion's code): from t = 1 to T ᾱ falls linearly from 0.99999 to 0.000009,
    γ̄ rises from 0.000009 to 0.99999: Vβ̄ is 1e-6, almost pure masking. "paper" (its text): γ̄
    rises linearly to 0.9, Vβ̄ to 0.1; ᾱ_T = 0 is raised to 1e-6, taken from Vβ̄."""
    def __init__(self, T: int, n_codes: int, kind: str = "released",
                 device: torch.device | str = "cpu") -> None:
        t = torch.arange(T + 1, dtype=torch.float64)
        require(kind in ("released", "paper"), f"schedule {kind!r}: not released or paper")
        if kind == "released":
            alpha_bar = 0.99999 + (t - 1) / (T - 1) * (0.000009 - 0.99999)
            gamma_bar = 0.000009 + (t - 1) / (T - 1) * (0.99999 - 0.000009)
        else:
            alpha_bar, gamma_bar = (1 - t / T).clamp(min=1e-6), 0.9 * t / T
        alpha_bar[0], gamma_bar[0] = 1, 0
        self.T, self.n_codes = T, n_codes
        self.alpha_bar, self.gamma_bar = alpha_bar.to(device), gamma_bar.to(device)  # (T+1,)

    def between(self, s: int | Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, β, γ of q(x_t | x_s), s ≤ t, float64, shaped as s and t; from s = 0: ᾱ, β̄, γ̄."""
        alpha = self.alpha_bar[t] / self.alpha_bar[s]
        gamma = 1 - (1 - self.gamma_bar[t]) / (1 - self.gamma_bar[s])
        return alpha, ((1 - alpha - gamma) / self.n_codes).clamp(min=0), gamma


def mask_and_replace(x0: Tensor, t: Tensor, schedule: MaskSchedule, u: Tensor, codes: Tensor
                     ) -> Tensor:
    """Draw x_t given x_0: int64 (B, L). u: uniform (B, L); codes: uniform in 0 … V−1 (B, L)."""
    alpha_bar, _, gamma_bar = (p.to(u)[:, None] for p in schedule.between(0, t))  # (B, 1)
    xt = torch.where(u < alpha_bar, x0, codes)
    return torch.where(u < 1 - gamma_bar, xt, schedule.n_codes)                   # MASK = V


# The posterior, for any s < t (VQ-Diffusion Eq. 5 and 11). Bayes' rule, where the Markov property
# drops x_0 from q(x_t | x_s, x_0):
#
#     q(x_s | x_t, x_0 = v) = q(x_t | x_s) q(x_s | v) / q(x_t | v)
#
# The first factor holds no v, so with w_v = p(v) / q(x_t | v) and W = Σ_v w_v
#
#     p(x_s | x_t) = Σ_v q(x_s | x_t, v) p(v) = q(x_t | x_s) · Σ_v w_v q(x_s | v)
#
# The sum: q(c | v) of a code c is ᾱ_s [c = v] + β̄_s, which gives ᾱ_s w_c + β̄_s W. MASK: γ̄_s W.
# The factor in front: for x_t = MASK it is γ_{t|s} from a code, 1 from MASK. For a code x_t it is
# α_{t|s} [c = x_t] + β_{t|s} from a code c, 0 from MASK. The divisor q(x_t | v) is γ̄_t for MASK,
# whatever v is, and ᾱ_t [v = x_t] + β̄_t for a code.

def log_of(p: Tensor, like: Tensor) -> Tensor:
    """log p of float64 (B,), in the precision of `like` (B, L, V), shaped to add to it."""
    return p.clamp(min=math.exp(LOG_ZERO)).log().to(like)[:, None, None]


def log_factors(log_x0: Tensor, xt: Tensor, t: Tensor, s: Tensor, schedule: MaskSchedule
                ) -> tuple[Tensor, Tensor, Tensor]:
    """For each code c the logs of the factor in front and the sum, (B, L, V); log W (B, L, 1)."""
    alpha, beta, gamma = schedule.between(s, t)
    abar_t, bbar_t, gbar_t = schedule.between(0, t)
    abar_s, bbar_s, _ = schedule.between(0, s)
    is_masked = (xt == schedule.n_codes)[..., None]                            # (B, L, 1)
    is_xt = xt[..., None] == torch.arange(schedule.n_codes, device=xt.device)  # (B, L, V)

    def to_xt(same: Tensor, other: Tensor, masked: Tensor) -> Tensor:  # log q(x_t | a code)
        same, other, masked = (log_of(p, log_x0) for p in (same, other, masked))
        return torch.where(is_masked, masked, torch.where(is_xt, same, other))

    log_w = log_x0 - to_xt(abar_t + bbar_t, bbar_t, gbar_t)  # (B, L, V)
    log_W = log_w.logsumexp(-1, keepdim=True)                # (B, L, 1)
    log_sum = torch.logaddexp(log_of(abar_s, log_x0) + log_w, log_of(bbar_s, log_x0) + log_W)
    return to_xt(alpha + beta, beta, gamma), log_sum, log_W


def log_posterior(log_x0: Tensor, xt: Tensor, t: Tensor, s: Tensor, schedule: MaskSchedule
                  ) -> Tensor:
    """log p(x_s | x_t) from log p(x_0): float32 (B, L, V+1), MASK last.
    log_x0: (B, L, V), normalised; xt: int64 (B, L); t, s: int64 (B,). With a one-hot log_x0 it is
    the true posterior q(x_s | x_t, x_0)."""
    log_front, log_sum, log_W = log_factors(log_x0, xt, t, s, schedule)
    is_masked = (xt == schedule.n_codes)[..., None]             # (B, L, 1)
    log_mask = torch.where(is_masked, log_of(schedule.gamma_bar[s], log_x0) + log_W, LOG_ZERO)
    log_p = torch.cat([log_front + log_sum, log_mask], dim=-1)  # (B, L, V+1)
    return log_p.log_softmax(-1).clamp(min=LOG_ZERO)            # rounding, no more


# ---------------- the transformer

class AdaLayerNorm(nn.Module):
    """LayerNorm with scale and shift from the step and the condition's summary."""
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # (B, l, D), (B, D)
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
        return F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype) * (1 + scale) + shift


class TokenBlock(nn.Module):
    """Self-attention of the tokens, cross-attention to the condition, MLP."""
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.norm_self, self.norm_cross, self.norm_mlp = (
            AdaLayerNorm(D), AdaLayerNorm(D), nn.LayerNorm(D))
        self.to_qkv, self.out_self = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.to_q, self.out_cross = nn.Linear(D, D), nn.Linear(D, D)
        self.condition_kv = nn.Linear(config.condition_width, 2 * D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), QuickGELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:  # (B, l, D)
        q, k, v = self.to_qkv(self.norm_self(x, time)).chunk(3, dim=-1)
        x = x + self.out_self(multi_head(q, k, v, self.heads))
        q = self.to_q(self.norm_cross(x, time))
        k, v = self.condition_kv(tokens).chunk(2, dim=-1)  # (B, M, D)
        x = x + self.out_cross(multi_head(q, k, v, self.heads))
        return x + self.mlp(self.norm_mlp(x))


class TokenTransformer(nn.Module):
    """log p(x_0 | x_t) under a condition: VQ-Diffusion's network, with one time table."""
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        D, r, side = config.width, config.patch, config.tokens_a_side // config.patch
        self.condition = Condition(config)
        self.time = nn.Embedding(config.T + 1, D)
        self.query_to_time = nn.Linear(config.embed_dim, D)
        self.token = nn.Embedding(config.n_codes + 1, D // r ** 2)  # MASK is the last
        self.row, self.column = nn.Embedding(side, D), nn.Embedding(side, D)
        for table in (self.time, self.token, self.row, self.column):
            nn.init.normal_(table.weight, std=0.02)
        self.query_map = query_mlp(config, side * side)
        self.map_in = nn.Linear(config.query_map, D) if config.query_map else None
        self.picture_in = zeroed(nn.Linear(D, D, bias=False)) if config.edit else None
        self.blocks = nn.ModuleList(TokenBlock(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(D)
        self.out = zeroed(nn.Linear(D, r ** 2 * config.n_codes))

    def forward(self, xt: Tensor, t: Tensor, query: Tensor | None, neighbors: Tensor | None,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None,
                picture: Tensor | None = None) -> Tensor:
        """log p(x_0 | x_t), float32 (B, L, V), normalised, at least LOG_ZERO.
        xt: int64 (B, L) in 0 … V; t: (B,) in 1 … T; condition as in `Condition.forward`.
        picture: tokens of what to edit, as xt; None is all MASK."""
        r = self.config.patch
        tokens, summary = self.condition(query, neighbors, len(xt), drop_query, drop_neighbors)
        time = F.silu(self.time(t) + self.query_to_time(summary))               # (B, D)
        places = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)  # (l, D)
        x = to_places(self.token(xt), r) + places                               # (B, l, D)
        if self.query_map is not None:
            x = x + self.map_in(self.query_map(summary).unflatten(1, (x.shape[1], -1)))
        if self.picture_in is not None:
            picture = torch.full_like(xt, self.config.n_codes) if picture is None else picture
            x = x + self.picture_in(to_places(self.token(picture), r))
        for block in self.blocks:
            x = block(x, time, tokens)
        logits = to_tokens(self.out(self.norm_out(x)), r)  # (B, L, V)
        return logits.float().log_softmax(-1).clamp(min=LOG_ZERO)


# ---------------- loss

def posterior_kl(log_x0: Tensor, x0: Tensor, xt: Tensor, t: Tensor, s: Tensor,
                 schedule: MaskSchedule) -> Tensor:
    """KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) = Σ q (log q − log p) per token, nats: (B, L).

    q has p's form (see `log_factors`) with all mass on x_0. The factor in front cancels in q/p,
    and the sums are left. q's sum is G_c = (ᾱ_s [c = x_0] + β̄_s) / q(x_t | x_0). MASK adds
    nothing: q = p there."""
    log_front, log_sum, _ = log_factors(log_x0, xt, t, s, schedule)  # (B, L, V) each
    abar_t, bbar_t, gbar_t = schedule.between(0, t)
    abar_s, bbar_s, _ = schedule.between(0, s)
    same, other, masked, code, no_code = (log_of(p, log_x0) for p in (
        abar_t + bbar_t, bbar_t, gbar_t, abar_s + bbar_s, bbar_s))              # (B, 1, 1) each
    log_divisor = torch.where((xt == schedule.n_codes)[..., None], masked,
                              torch.where((xt == x0)[..., None], same, other))  # (B, L, 1)
    is_x0 = x0[..., None] == torch.arange(schedule.n_codes, device=x0.device)   # (B, L, V)
    log_G = torch.where(is_x0, code, no_code) - log_divisor
    return ((log_front + log_G).exp() * (log_G - log_sum)).sum(-1)


def discrete_loss(model: TokenTransformer, schedule: MaskSchedule, x0: Tensor, xt: Tensor,
                  t: Tensor, query: Tensor, neighbors: Tensor, drop_query: Tensor,
                  drop_neighbors: Tensor, picture: Tensor | None = None) -> Tensor:
    """The variational term and the auxiliary one, nats per token, the mean over the batch.

    KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), VQ-Diffusion's L_vlb; at t = 1 this is
    −log p(x_0 | x_1). Then λ times −log p(x_0 | x_t), which teaches x_0 at once, with their
    adaptive weight 2 − (t−1)/T. Departs: t is uniform; their code draws it by its loss."""
    log_x0 = model(xt, t, query, neighbors, drop_query, drop_neighbors, picture)  # (B, L, V)
    kl = posterior_kl(log_x0, x0, xt, t, t - 1, schedule).mean(1)                 # (B,)
    auxiliary = -log_x0.gather(-1, x0[..., None])[..., 0].mean(1)
    weight = model.config.auxiliary * (2 - (t - 1) / schedule.T)
    return (kl + weight * auxiliary).mean()


# ---------------- guidance and sampling

def predict_tokens(model: TokenTransformer, guide: Guide, truncation: float, xt: Tensor, t: int
                   ) -> Tensor:
    """Guided, truncated log p(x_0 | x_t), normalised: (B, L, V).
    Guidance acts on log p (Improved VQ-Diffusion, 2205.16007). truncation r is top-p sampling:
    a code stays with less than r of the mass before it, so always one; 1 is off."""
    log_p = guided(model, xt, t, guide).log_softmax(-1).clamp(min=LOG_ZERO)
    if truncation < 1.0:
        ordered, order = log_p.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass ahead of a code
        ordered = ordered.masked_fill(before >= truncation, LOG_ZERO)
        log_p = ordered.scatter(-1, order, ordered).log_softmax(-1).clamp(min=LOG_ZERO)
    return log_p


def draw_category(log_p: Tensor, u: Tensor) -> Tensor:
    """A draw from exp(log_p) (B, L, n) per u in [0, 1) (B, L): the first category whose
    cumulated share is 1 − u or more."""
    mass = log_p.double().exp().cumsum(-1)
    return (mass < (1 - u[..., None].double()) * mass[..., -1:]).sum(-1)


def ancestral(predict: Predictor, schedule: MaskSchedule, times: list[int], length: int,
              uniform: Callable[..., Tensor]) -> Iterator[Tensor]:
    """x_T from the prior: MASK with γ̄_T, else any code alike (with what is left of ᾱ_T).
    Then x_s from p(x_s | x_t) along `times`."""
    V = schedule.n_codes
    u, v = uniform(2, length).unbind(1)  # (B, L) each
    xt = torch.where(u < 1 - schedule.gamma_bar[-1].to(u), (v * V).long().clamp(max=V - 1), V)
    for t, s in zip(times, times[1:]):
        now, then = (torch.full((len(xt),), i, device=xt.device) for i in (t, s))
        log_p = log_posterior(predict(xt, t), xt, now, then, schedule)
        xt = draw_category(log_p, uniform(length))
        yield xt


def sample_tokens(model: TokenTransformer, query: Tensor | None, neighbors: Tensor | None,
                  seeds: list[int], steps: int = 25, guidance: float = 2.0,
                  truncation: float = 0.6, picture: Tensor | None = None,
                  guidance_picture: float = 1.0) -> Iterator[Tensor]:
    """Yield x_t after every step, int64 (B, L) in 0 … V (MASK = V); the last has no MASK.
    As `sample`; picture: tokens (B, L); truncation: see `predict_tokens`."""
    require(0 < truncation <= 1, f"truncation is {truncation}, wanted above 0, to 1")
    config, device = model.config, model.token.weight.device
    schedule = MaskSchedule(config.T, config.n_codes, config.schedule, device)
    guide = Guide(query, neighbors, guidance, picture, guidance_picture)
    predict = functools.partial(predict_tokens, model, guide, truncation)
    yield from ancestral(predict, schedule, falling(config.T, steps), config.tokens_a_side ** 2,
                         noise_source(seeds, device, torch.rand))


# ---------------- load

def load(path: str | os.PathLike) -> tuple[UNet | TokenTransformer, dict[str, str]]:
    """A model of either backbone in eval mode, float32, on the CPU, and its file's metadata.
    Raises FileNotFoundError, or ValueError for one that does not fit."""
    model, metadata = load_model(path, {"UNet": (UNet, UNetConfig),
                                        "TokenTransformer": (TokenTransformer, TransformerConfig)})
    return model.to(memory_format=torch.channels_last).requires_grad_(False), metadata

