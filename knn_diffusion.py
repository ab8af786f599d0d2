"""kNN-Diffusion (Sheynin et al., 2204.02849, ICLR 2023): condition, diffusion, samplers.

The model never sees a text in training. With f_img, f_txt CLIP's encoders and H an index of image
embeddings (kNN-Diffusion Sec. 3):

    training     condition on f_img(x_0) and the k rows of H nearest to it
    inference    condition on f_txt(text) and the k rows of H nearest to that

    continuous   x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε,  t = 1 … T, ᾱ_0 = 1; the U-Net predicts ε, v or x_0
    discrete     tokens are masked and replaced; a transformer predicts p(x_0 | x_t)
    guidance     out = uncond + scale·(cond − uncond), 1 is off; of log p for tokens

    paper        code                            paper        code
    x_t, ε, v    xt, eps, v                      ᾱ_t, β_t     alpha_bar[t], beta[t]
    f_img, f_txt query                           kNN(·)       neighbors
    H            an index.Index                  its scale    guidance

Shapes: B batch, C channels, H W picture, L image tokens (h·w), D width of the condition, E CLIP
dimension, K neighbours, T steps. Pictures are in [-1, 1]. t is the step, 1 … T, and s < t the one
that a sampler goes to (in training t − 1); x_0 is the picture.
"""
from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_model import QuickGELU, attention, load_model, require, save_model

# ---------------------------------------------------------------- configuration

@dataclass(frozen=True)
class UNetConfig:
    """The continuous backbone. Defaults: the paper's size, in the layout of ADM's 64-pixel U-Net
    (2105.05233)."""
    image_size: int = 64                      # pixels a side
    embed_dim: int = 512                      # E, CLIP's dimension
    n_neighbors: int = 10                     # K in training; this many null tokens stand for none
    widths: tuple[int, ...] = (192, 384, 576, 768)   # channels, a level each, full size first
    blocks: int = 4                           # residual blocks a level (ADM: 3)
    norm_groups: int = 32                     # of every GroupNorm
    head_channels: int = 64                   # a head
    condition_width: int = 1024               # D
    time_width: int = 1024                    # of the time embedding
    attention: tuple[int, ...] = (32, 16, 8)  # feature sizes at which pixels see the condition
    self_attention: tuple[int, ...] = (32, 16, 8)    # ... and also each other
    dropout: float = 0.1
    T: int = 1000                             # steps of the diffusion
    target: str = "eps"                       # what is predicted: "eps", "v" or "x0"
    learned_variance: bool = True             # as in ADM, with the hybrid loss
    noise_shift: float = 1.0                  # √SNR is multiplied by it; below 1: noisier
    unshuffle: int = 1                        # Ours: pixels of r x r squares become channels
    position_map: bool = False                # Ours: a learned map is added to the input features
    query_map: int = 0                        # Ours: channels of a map made from the query ...
    query_hidden: int = 1024                  # ... by a perceptron with so many hidden units
    edit: bool = False                        # Sec. 3.3: a picture to edit is a second input

    def __post_init__(self) -> None:
        for name in ("widths", "attention", "self_attention"):        # JSON gives lists back
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.target not in ("eps", "v", "x0") or self.T < 2:
            raise ValueError(f"target {self.target!r}, T {self.T}: wanted eps, v or x0, and T >= 2")
        size = self.image_size // self.unshuffle
        for i, width in enumerate(self.widths):
            attends = size // 2 ** i in self.attention
            if width % self.norm_groups or (attends and width % self.head_channels):
                raise ValueError(f"width {width} is no multiple of {self.norm_groups} groups and "
                                 f"{self.head_channels} channels a head")


PRESETS = {
    # About 400M parameters, as the paper says of its models; the layout is ADM's and GLIDE's.
    "paper": UNetConfig(),
    # A consumer GPU of 12 GB.
    "gpu": UNetConfig(widths=(128, 256, 384, 512), blocks=2, condition_width=512, time_width=512,
                      self_attention=(16, 8), attention=(16, 8), target="v",
                      learned_variance=False),
    # Two CPU cores: everything happens on 16x16 and 8x8 features.
    "stickers": UNetConfig(
        embed_dim=256, widths=(96, 160), blocks=1, norm_groups=8, head_channels=32,
        condition_width=256, time_width=192, attention=(16, 8), self_attention=(8,), dropout=0.0,
        target="x0", learned_variance=False, noise_shift=0.5, unshuffle=4, position_map=True,
        query_map=24),
}


# ---------------------------------------------------------------- schedule

class Schedule:
    """The squared-cosine schedule (Nichol & Dhariwal, 2102.09672 Eq. 17), float64, index 0 … T.

    ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2), s = 0.008; β_t = 1 − ᾱ_t/ᾱ_{t−1} ≤ 0.999.
    noise_shift c multiplies the signal-to-noise ratio ᾱ/(1−ᾱ) by c² (Hoogeboom et al., 2301.11093
    Sec. 3.1): a picture of twice the side hides half the noise, c = 1/2 gives it back.
    """

    def __init__(self, T: int, noise_shift: float = 1.0) -> None:
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
        alpha_bar = f / f[0]
        snr = alpha_bar / (1 - alpha_bar) * noise_shift ** 2               # inf at t = 0
        alpha_bar = torch.where(t == 0, 1.0, snr / (1 + snr))
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        self.T = T
        self.beta = torch.cat([beta.new_zeros(1), beta])                   # (T+1,), beta[0] = 0
        self.alpha_bar = torch.cumprod(1 - self.beta, 0)                   # (T+1,), 1 at 0
        assert (self.alpha_bar.diff() < 0).all() and self.alpha_bar[-1] > 0

    def at(self, t: int | Tensor, x: Tensor) -> Tensor:
        """ᾱ_t in x's precision, shaped to multiply x (B, ...)."""
        alpha_bar = self.alpha_bar[torch.as_tensor(t).cpu()].to(x)
        return alpha_bar.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t = √ᾱ x_0 + √(1−ᾱ) ε (Ho et al., 2006.11239 Eq. 4)."""
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def to_v(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v = √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho, 2202.00512 App. D)."""
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
              ) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_s | x_t, x_0) for any s < t: mean, variance β̃, and the forward variance β_{t|s}.

    With α_{t|s} = ᾱ_t/ᾱ_s and β_{t|s} = 1 − α_{t|s}:
    mean = √ᾱ_s β_{t|s}/(1−ᾱ_t) x_0 + √α_{t|s} (1−ᾱ_s)/(1−ᾱ_t) x_t,
    β̃ = (1−ᾱ_s)/(1−ᾱ_t) β_{t|s}. For s = t − 1: Ho et al. (2006.11239) Eq. 6, 7.
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    mean = (alpha_bar_s.sqrt() * beta * x0 + alpha.sqrt() * (1 - alpha_bar_s) * xt) / (
        1 - alpha_bar_t)
    return mean, (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta, beta


def learned_log_variance(fraction: Tensor, beta_tilde: Tensor, beta: Tensor) -> Tensor:
    """log Σ = f log β + (1 − f) log β̃ with f = (output + 1)/2 (2102.09672 Eq. 15)."""
    f = (fraction + 1) / 2
    return f * beta.log() + (1 - f) * beta_tilde.log()


# ---------------------------------------------------------------- the condition (Sec. 3.2)

class Condition(nn.Module):
    """Ours: [query; n_1 … n_K] as tokens, and the query as a vector, with learned nulls.

    One linear map serves all; a type embedding tells the query from the neighbours, nothing tells
    the neighbours' ranks: they are a set, and any K works at inference. A null is a learned CLIP
    vector put in *before* every path that reads the condition, so that no path can miss it.
    """

    def __init__(self, config: UNetConfig | TransformerConfig) -> None:
        super().__init__()
        E, D = config.embed_dim, config.condition_width
        self.n_neighbors = config.n_neighbors
        self.null_query = nn.Parameter(torch.randn(E) * E ** -0.5)         # norm about 1, as CLIP's
        self.null_neighbor = nn.Parameter(torch.randn(E) * E ** -0.5)
        self.to_width = nn.Linear(E, D)
        self.type_embedding = nn.Parameter(torch.randn(2, D) * 0.02)       # query, neighbour
        self.scale = math.sqrt(E)          # unit-norm vectors have entries of 1/√E: make them 1

    def forward(self, query: Tensor | None, neighbors: Tensor | None, batch: int,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1+K, D) and the query (B, E), nulls put in, entries of order 1.

        query: unit-norm (B, E); neighbors: unit-norm (B, K, E); None, or K = 0, is the null.
        drop_query, drop_neighbors: bool (B,), the samples to blind.
        """
        if query is None:
            query = self.null_query.expand(batch, -1)                      # (B, E)
        elif drop_query is not None:
            query = torch.where(drop_query[:, None], self.null_query, query)
        if neighbors is None or neighbors.shape[1] == 0:
            neighbors = self.null_neighbor.expand(batch, self.n_neighbors, -1)     # (B, K, E)
        elif drop_neighbors is not None:
            neighbors = torch.where(drop_neighbors[:, None, None], self.null_neighbor, neighbors)
        query, neighbors = self.scale * query, self.scale * neighbors
        tokens = torch.cat([query[:, None], neighbors], dim=1)             # (B, 1+K, E)
        types = self.type_embedding[[0] + [1] * neighbors.shape[1]]        # (1+K, D)
        return self.to_width(tokens) + types, query


def draw_drops(batch: int, generator: torch.Generator, condition: str = "both"
               ) -> tuple[Tensor, Tensor]:
    """Which samples lose their query and which their neighbours: two bool (B,), on the CPU.

    Ours: exclusive, per sample: 10 % both, 10 % the neighbours only, 10 % the query only. So one
    set of weights serves `both`, `query`, `neighbors` and the unconditional half of the guidance.
    condition "query" is the paper's no-kNN baseline: neighbours never, the query in 90 %;
    "neighbors" the other way round.
    """
    u = torch.rand(batch, generator=generator)
    everything, always = u < 0.1, torch.ones(batch, dtype=torch.bool)
    return {"both": (everything | (0.2 <= u) & (u < 0.3), u < 0.2),
            "query": (everything, always), "neighbors": (always, everything)}[condition]


def add_query_noise(query: Tensor, largest: float, generator: torch.Generator) -> Tensor:
    """Half of the queries (B, E) get Gaussian noise of a norm of about σ, σ uniform in 0 …
    `largest`, and are unit-norm again. Ours: a text's embedding is as far from every picture's as
    such a query, and training teaches to lean on the neighbours there. Draws on the CPU."""
    B, E = query.shape
    chosen, sigma = torch.rand(2, B, 1, generator=generator)
    noise = torch.randn(B, E, generator=generator) * E ** -0.5
    sigma = torch.where(chosen < 0.5, sigma * largest, 0)
    return F.normalize(query + (sigma * noise).to(query), dim=1)


# ---------------------------------------------------------------- both backbones edit (Sec. 3.3)

NO_EDITOR = "a picture to edit wants weights of `train.py edit`"

def draw_edit_drops(batch: int, generator: torch.Generator, condition: str = "both"
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples lose their query, their neighbours and the picture to edit: three bool (B,).

    As `draw_drops`; and half of those that lose the whole condition lose the picture with it. So
    the formula's e(∅,∅), e(I,∅) and e(I,T) are all trained; the picture is never dropped alone.
    """
    drop_query, drop_neighbors = draw_drops(batch, generator, condition)
    drop_picture = torch.rand(batch, generator=generator) < 0.5
    return drop_query, drop_neighbors, drop_picture & drop_query & drop_neighbors


def widened(model: UNet | TokenTransformer) -> UNet | TokenTransformer:
    """The same model with a second input, the picture to edit, whose weights are zero: so far it
    gives what the model gave."""
    wide, state = type(model)(replace(model.config, edit=True)), model.state_dict()
    for name, weight in wide.state_dict().items():
        weight.zero_()
        if name in state:                                          # conv_in has channels more
            weight[tuple(map(slice, state[name].shape))] = state[name]
    return wide


# ---------------------------------------------------------------- the U-Net (Sec. 3.2, continuous)

def zeroed(layer: nn.Module) -> nn.Module:
    """Start a layer at zero: a residual block is the identity at first, a model predicts 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines of t at geometric frequencies from 1 down to 1/10000: (B, width)."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * freqs                                    # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """ADM's residual block: norm → SiLU → (resize) → conv → norm·(1 + scale) + shift → SiLU → conv.

    scale and shift come from the time embedding, which carries the query too.
    """

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, resize: str = "") -> None:
        super().__init__()
        self.resize = resize                                               # "", "up" or "down"
        self.norm_in = nn.GroupNorm(config.norm_groups, c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.modulation = nn.Linear(config.time_width, 2 * c_out)
        self.norm_out = nn.GroupNorm(config.norm_groups, c_out)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def resized(self, x: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resize == "up" else x

    def forward(self, x: Tensor, time: Tensor) -> Tensor:                  # (B, C, h, w)
        h = self.conv_in(self.resized(F.silu(self.norm_in(x))))            # (B, C', h', w')
        scale, shift = self.modulation(time)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        h = self.conv_out(self.dropout(F.silu(h)))
        return self.skip(self.resized(x)) + h


class AttentionBlock(nn.Module):
    """GLIDE's joint attention: pixels ask, the condition's tokens and the pixels answer together.

    with_self=False leaves the pixels' own keys out: cheap at large feature maps.
    """

    def __init__(self, config: UNetConfig, channels: int, with_self: bool) -> None:
        super().__init__()
        self.heads, self.with_self = channels // config.head_channels, with_self
        self.norm = nn.GroupNorm(config.norm_groups, channels)
        self.to_qkv = nn.Linear(channels, (3 if with_self else 1) * channels)
        self.condition_kv = nn.Linear(config.condition_width, 2 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, heads, L, d)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:                # tokens (B, 1+K, D)
        B, C, h, w = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)                   # (B, L, C)
        q, *own = self.to_qkv(pixels).split(C, dim=-1)
        k, v = self.condition_kv(tokens).split(C, dim=-1)                  # (B, 1+K, C)
        if self.with_self:
            k, v = torch.cat([k, own[0]], dim=1), torch.cat([v, own[1]], dim=1)
        mixed = attention(*(self.split_heads(part) for part in (q, k, v)))   # (B, heads, L, d)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))                 # (B, L, C)
        return x + mixed.transpose(1, 2).reshape(B, C, h, w)


def query_perceptron(config: UNetConfig | TransformerConfig, places: int) -> nn.Module | None:
    """Ours: which picture a query means has to be learned by heart. A perceptron does that at next
    to no cost: its hidden units are the places of a memory. (B, E) → (B, query_map·places)."""
    return nn.Sequential(
        nn.Linear(config.embed_dim, config.query_hidden), nn.SiLU(),
        nn.Linear(config.query_hidden, config.query_map * places)) if config.query_map else None


class Level(nn.Module):
    """A residual block and, where wanted, an attention block behind it."""

    def __init__(self, config: UNetConfig, c_in: int, c_out: int, size: int,
                 resize: str = "", attend: bool = True) -> None:
        super().__init__()
        self.block = ResBlock(config, c_in, c_out, resize)
        self.attention = AttentionBlock(
            config, c_out, size in config.self_attention
        ) if attend and size in config.attention else None

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        x = self.block(x, time)
        return x if self.attention is None else self.attention(x, tokens)


class UNet(nn.Module):
    """ε, v or x_0 of x_t under a condition; with learned variance the variance's fraction too."""

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
                self.down.append(Level(config, c, width, size))
                c = width
                skips.append(c)
            if i + 1 < len(widths):
                size //= 2
                self.down.append(Level(config, c, c, size, "down", attend=False))
                skips.append(c)
        self.query_map = query_perceptron(config, size * size)
        self.map_in = nn.Conv2d(config.query_map, c, 1) if config.query_map else None
        self.middle = nn.ModuleList([Level(config, c, c, size),
                                     Level(config, c, c, size, attend=False)])
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Level(config, c + skips.pop(), width, size))
                c = width
            if i > 0:
                # Ours: it narrows while it grows; ADM keeps the width, at a seventh more time.
                size *= 2
                self.up.append(Level(config, c, widths[i - 1], size, "up", attend=False))
                c = widths[i - 1]
        self.norm_out = nn.GroupNorm(config.norm_groups, c)
        out_channels = 6 if config.learned_variance else 3
        self.conv_out = zeroed(nn.Conv2d(c, out_channels * r * r, 3, padding=1))

    def forward(self, xt: Tensor, t: Tensor, query: Tensor | None, neighbors: Tensor | None,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None,
                picture: Tensor | None = None) -> Tensor:
        """xt float32 (B, 3, H, W), t (B,) in 1 … T, condition as in `Condition.forward`; picture:
        what to edit, as xt, None is zeros (with `config.edit` only).

        Returns float32 (B, 3 or 6, H, W).
        """
        config = self.config
        require(picture is None or config.edit, NO_EDITOR)
        if config.edit:
            xt = torch.cat([xt, torch.zeros_like(xt) if picture is None else picture], dim=1)
        tokens, query = self.condition(query, neighbors, len(xt), drop_query, drop_neighbors)
        time = F.silu(self.time_mlp(time_embedding(t, config.widths[0]))
                      + self.query_to_time(query))                         # (B, time_width)
        x = F.pixel_unshuffle(xt, config.unshuffle)                # (B, 3r² or 6r², H/r, W/r)
        x = self.conv_in(x.to(memory_format=torch.channels_last))          # (B, C, h, w)
        if self.position_map is not None:
            x = x + self.position_map.to(x.dtype)
        skips = [x]
        for level in self.down:
            x = level(x, time, tokens)
            skips.append(x)
        if self.query_map is not None:
            shape = (len(x), config.query_map, *x.shape[-2:])
            x = x + self.map_in(self.query_map(query).view(shape))
        for level in self.middle:
            x = level(x, time, tokens)
        for level in self.up:
            if level.block.resize != "up":
                x = torch.cat([x, skips.pop()], dim=1)
            x = level(x, time, tokens)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x.float(), config.unshuffle)                # (B, 3 or 6, H, W)


# ---------------------------------------------------------------- loss

def diffusion_loss(model: UNet, schedule: Schedule, x0: Tensor, query: Tensor, neighbors: Tensor,
                   t: Tensor, eps: Tensor, drop_query: Tensor, drop_neighbors: Tensor,
                   picture: Tensor | None = None) -> Tensor:
    """Mean squared error of the target over the batch; with learned variance plus ADM's L_vlb term.

    The error of v is that of x_0 times 1/(1−ᾱ) = SNR + 1. Ours, for the target x_0: the same
    weight, but at most 5. (Min-SNR, 2303.09556 Sec. 3.4, caps, too: min(SNR, 5) goes to 0 where all
    is noise, ours to 1.) A v or ε holds all of the noise, which a narrow network must carry
    through; x_0 does not.

    x0 float32 (B, 3, H, W) in [-1, 1]; t int64 (B,) in 1 … T; eps standard normal as x0; picture:
    what to edit into x0, as x0.
    """
    alpha_bar = schedule.at(t, x0)                                         # (B, 1, 1, 1)
    xt = add_noise(x0, eps, alpha_bar)
    output = model(xt, t, query, neighbors, drop_query, drop_neighbors, picture)
    if model.config.target == "x0":
        weight = (1 / (1 - alpha_bar)).clamp(max=5)
        loss = (weight * (output[:, :3].float() - x0) ** 2).mean()
    else:
        target = eps if model.config.target == "eps" else to_v(x0, eps, alpha_bar)
        loss = F.mse_loss(output[:, :3].float(), target)
    if model.config.learned_variance:
        # L_hybrid (2102.09672 Eq. 16) with ADM's weight: T/1000 per term, bits per dimension.
        loss = loss + schedule.T / 1000 * vlb_term(output, x0, xt, t, schedule,
                                                   model.config.target).mean()
    return loss


def vlb_term(output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, schedule: Schedule,
             target: str) -> Tensor:
    """One term of the variational bound a sample, (B,), in bits per dimension.

    KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) for t > 1, −log p(x_0 | x_1) for t = 1. The mean is
    detached: this term teaches the variance only (2102.09672 Sec. 3.1).
    """
    mean_output, fraction = output.float().chunk(2, dim=1)                 # (B, 3, H, W) each
    alpha_bar_t, alpha_bar_s = schedule.at(t, x0), schedule.at(t - 1, x0)
    x0_hat = x0_from(mean_output.detach(), xt, alpha_bar_t, target)
    true_mean, beta_tilde, beta = posterior(x0, xt, alpha_bar_t, alpha_bar_s)
    mean = posterior(x0_hat, xt, alpha_bar_t, alpha_bar_s)[0]
    # β̃_1 = 0 has no logarithm; as in ADM the next one, β̃_2, stands in for it.
    beta_tilde_2 = posterior(x0, xt, schedule.at(2, x0), schedule.at(1, x0))[1]
    beta_tilde = torch.where((t == 1).view_as(beta_tilde), beta_tilde_2, beta_tilde)
    log_variance = learned_log_variance(fraction, beta_tilde, beta)
    kl = normal_kl(true_mean, beta_tilde.log(), mean, log_variance)
    decoder = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    nats = torch.where((t == 1).view_as(beta), decoder, kl)                # (B, 3, H, W)
    return nats.flatten(1).mean(1) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, var1) ‖ N(mean2, var2)) in nats, elementwise."""
    return 0.5 * (log_variance2 - log_variance1 - 1 + (log_variance1 - log_variance2).exp()
                  + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal's mass in x0's 8-bit bin (2006.11239 Eq. 13); x0 = ±1 own the tails."""
    def cdf(x: Tensor) -> Tensor:
        return torch.special.ndtr((x - mean) * (-log_scale).exp())

    upper = torch.where(x0 > 0.999, 1.0, cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, cdf(x0 - 1 / 255))
    return (upper - lower).clamp(min=1e-12).log()


# ---------------------------------------------------------------- guidance

@dataclass
class Prediction:
    """What a sampler needs to know at (x_t, t); variance_fraction as `learned_log_variance`'s."""
    x0: Tensor
    eps: Tensor
    variance_fraction: Tensor | None = None


Denoiser = Callable[[Tensor, int], Prediction]


def guided(call: Callable[..., Tensor], query: Tensor | None, neighbors: Tensor | None,
           guidance: float, picture: Tensor | None = None, guidance_picture: float = 1.0) -> Tensor:
    """uncond + guidance·(cond − uncond), 1 is off; call(query, neighbors, picture) is the model.

    With a picture I to edit and the text's condition T, two scales: s_I, `guidance_picture`, and
    s_T, `guidance` (InstructPix2Pix, 2211.09800 Eq. 3). e(I, T) is the model's output, ∅ a null:
        e(∅,∅) + s_I·[e(I,∅) − e(∅,∅)] + s_T·[e(I,T) − e(I,∅)]
    """
    out = call(query, neighbors, picture)
    if guidance != 1.0 or guidance_picture != 1.0:
        uncond = call(None, None, picture)
        out = uncond + guidance * (out - uncond)
        if guidance_picture != 1.0:
            out = out + (guidance_picture - 1) * (uncond - call(None, None, None))
    return out


@torch.no_grad()
def denoise(model: UNet, schedule: Schedule, xt: Tensor, t: int, query: Tensor | None,
            neighbors: Tensor | None, guidance: float = 1.0,
            dynamic_threshold: float | None = None, picture: Tensor | None = None,
            guidance_picture: float = 1.0) -> Prediction:
    """Guided prediction of x_0 and ε, see `guided`.

    xt float32 (B, 3, H, W); query (B, E) or None; neighbors (B, K, E) or None; picture to edit, as
    xt, or None. x_0 is clipped to [-1, 1]; or, with `dynamic_threshold`, to that quantile of its
    magnitudes a sample where it exceeds 1, and divided by it (Imagen, 2205.11487 Sec. 2.3). ε
    follows from the clipped x_0. A learned variance is the unguided one.
    """
    steps = torch.full((len(xt),), t, device=xt.device)
    fractions = []

    def call(query: Tensor | None, neighbors: Tensor | None, picture: Tensor | None) -> Tensor:
        output = model(xt, steps, query, neighbors, picture=picture).float()
        fractions.append(output[:, 3:] if model.config.learned_variance else None)
        return output[:, :3]

    out = guided(call, query, neighbors, guidance, picture, guidance_picture)
    fraction = fractions[0]
    alpha_bar = schedule.at(t, xt)
    x0 = x0_from(out, xt, alpha_bar, model.config.target)
    if dynamic_threshold is None:
        x0 = x0.clamp(-1, 1)
    else:
        limit = x0.abs().flatten(1).quantile(dynamic_threshold, dim=1).clamp(min=1)
        limit = limit.view(-1, 1, 1, 1)                                    # (B, 1, 1, 1)
        x0 = x0.clamp(-limit, limit) / limit
    return Prediction(x0, eps_from(x0, xt, alpha_bar), fraction)


# ---------------------------------------------------------------- samplers
#
# Each is a generator of x_t along `times`, a falling list that ends at 0 (x_0): so a notebook can
# watch. It begins with `xt` (B, C, H, W) at times[0]; `noise()` gives the next standard normal.

def sampling_times(schedule: Schedule, steps: int, target: str = "v") -> list[int]:
    """steps + 1 falling times, evenly spaced from T to 0; see `falling`.

    Where ε is predicted, x_0 = (x_t − √(1−ᾱ) ε)/√ᾱ blows up as ᾱ → 0, so fewer than T steps start
    at the last t with ᾱ_t ≥ 1e-4 (Ours), or at t = steps where that is later.
    """
    first = schedule.T
    if target == "eps" and steps < schedule.T:
        first = max(steps, int((schedule.alpha_bar >= 1e-4).nonzero().max()))
    return falling(first, steps)


def falling(first: int, steps: int) -> list[int]:
    """steps + 1 times, evenly spaced from `first` to 0. Raises ValueError for steps outside
    1 … first."""
    require(1 <= steps <= first, f"steps is {steps}, wanted 1 to {first}")
    return [round(first * (steps - i) / steps) for i in range(steps + 1)]


def ddpm(predict: Denoiser, schedule: Schedule, times: list[int], xt: Tensor,
         noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Ancestral sampling (2006.11239 Alg. 2) over any falling times; the last step adds no noise.

    The variance is the learned one where the model has it, else β̃.
    """
    for t, s in zip(times, times[1:]):
        now = predict(xt, t)
        mean, beta_tilde, beta = posterior(now.x0, xt, schedule.at(t, xt), schedule.at(s, xt))
        if s > 0:
            std = beta_tilde.sqrt()
            if now.variance_fraction is not None:
                std = (0.5 * learned_log_variance(now.variance_fraction, beta_tilde, beta)).exp()
            mean = mean + std * noise()
        xt = mean
        yield xt


def ddim(predict: Denoiser, schedule: Schedule, times: list[int], xt: Tensor,
         noise: Callable[[], Tensor], eta: float = 0.0) -> Iterator[Tensor]:
    """DDIM (Song et al., 2010.02502 Eq. 12, 16): eta = 0 deterministic, 1 as noisy as DDPM."""
    for t, s in zip(times, times[1:]):
        now = predict(xt, t)
        alpha_bar_t, alpha_bar_s = schedule.at(t, xt), schedule.at(s, xt)
        variance = eta ** 2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (
            1 - alpha_bar_t / alpha_bar_s)
        left = (1 - alpha_bar_s - variance).clamp(min=0)         # rounding may cross 0 at eta = 1
        xt = alpha_bar_s.sqrt() * now.x0 + left.sqrt() * now.eps
        if eta > 0 and s > 0:
            xt = xt + variance.sqrt() * noise()
        yield xt


def dpm_solver(predict: Denoiser, schedule: Schedule, times: list[int], xt: Tensor,
               noise: Callable[[], Tensor]) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2211.01095 Alg. 2): second order from two predictions of x_0.

    λ = log(√ᾱ/√(1−ᾱ)), h = λ_s − λ_t, r = h_before/h:
    D = (1 + 1/2r) x_0(t) − 1/2r x_0(before),  x_s = √(1−ᾱ_s)/√(1−ᾱ_t) x_t − √ᾱ_s (e^{−h} − 1) D.
    The first step, and the last one to s = 0 (where h is infinite), take D = x_0(t).
    """
    before, h_before = None, 0.0
    alpha_bar = schedule.alpha_bar.tolist()
    for t, s in zip(times, times[1:]):
        x0 = predict(xt, t).x0
        if s == 0:
            yield x0
            return
        log_snr_t, log_snr_s = (math.log(alpha_bar[i] / (1 - alpha_bar[i])) for i in (t, s))
        h = (log_snr_s - log_snr_t) / 2
        D = x0
        if before is not None:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        ratio = math.sqrt((1 - alpha_bar[s]) / (1 - alpha_bar[t]))
        xt = ratio * xt - math.sqrt(alpha_bar[s]) * math.expm1(-h) * D
        before, h_before = x0, h
        yield xt


SAMPLERS = {"dpm": dpm_solver, "ddim": ddim, "ddpm": ddpm}         # the first is the default


def noise_source(seeds: list[int], device: torch.device | str = "cpu",
                 draw: Callable[..., Tensor] = torch.randn) -> Callable[..., Tensor]:
    """A function (*shape) → the next standard normal (B, *shape), or uniform with torch.rand.

    Every sample has a generator of its own on the CPU, so that its noise depends on its seed alone:
    not on the batch, not on the device.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda *shape: torch.stack([draw(shape, generator=g) for g in generators]).to(device)


def sample(model: UNet, query: Tensor | None, neighbors: Tensor | None, seeds: list[int],
           steps: int = 20, guidance: float = 2.0, sampler: str = "dpm",
           dynamic_threshold: float | None = None, picture: Tensor | None = None,
           guidance_picture: float = 1.0, start: Tensor | None = None, start_at: float = 1.0,
           eta: float = 0.0) -> Iterator[Tensor]:
    """Yield x_t after every step, float32 (B, 3, H, W); the last one is the picture in [-1, 1].

    query: unit-norm (B, E) or None; neighbors: unit-norm (B, K, E) or None; B seeds. picture: what
    to edit (B, 3, H, W), for a model with `config.edit`. start: begin at t = start_at·T from this
    picture, noised, instead of at T from noise (SDEdit, 2108.01073); `steps` from there. eta: of
    DDIM. Raises ValueError for another sampler, or where fewer steps are left than asked for.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, wanted {', '.join(SAMPLERS)}")
    schedule = Schedule(model.config.T, model.config.noise_shift)
    times = sampling_times(schedule, steps, model.config.target)
    size, device = model.config.image_size, model.conv_in.weight.device
    noise = functools.partial(noise_source(seeds, device), 3, size, size)
    xt = noise()
    if start is not None:
        times = falling(min(times[0], round(start_at * schedule.T)), steps)
        xt = add_noise(start, xt, schedule.at(times[0], start))

    def predict(xt: Tensor, t: int) -> Prediction:
        return denoise(model, schedule, xt, t, query, neighbors, guidance, dynamic_threshold,
                       picture, guidance_picture)

    options = {"eta": eta} if sampler == "ddim" else {}
    yield from SAMPLERS[sampler](predict, schedule, times, xt, noise, **options)


# ================================================================ the discrete backbone
#
# VQ-Diffusion (Gu et al., 2111.14822): x_0 is L tokens of 0 … V−1 (vqvae.py), MASK = V. In a step a
# token stays, or becomes any code, or MASK, which it remains:
#
#     q(x_t | x_{t−1}):   itself α_t + β_t,   another code β_t each,   MASK γ_t;   α + Vβ + γ = 1
#
# The steps' products have a closed form. A token was let alone in all steps with ᾱ_t = ∏ α_i and
# not masked in any with 1 − γ̄_t = ∏ (1 − γ_i); else, replaced at least once and never masked, it is
# any code alike, β̄_t = (1 − ᾱ_t − γ̄_t) / V each:
#
#     q(x_t | x_0):       x_0 itself ᾱ_t + β̄_t,   another code β̄_t,   MASK γ̄_t;   ᾱ + Vβ̄ + γ̄ = 1
#
# From any s to any later t it is the same form with ᾱ_t/ᾱ_s and (1 − γ̄_t)/(1 − γ̄_s) in place of the
# products: one function serves every stride. t runs 1 … T, t = 0 is the picture.
#
# In this half: L tokens in l places of the transformer (one each where `patch` is 1), V codes, v
# one of them, D the transformer's width, M = 1 + K condition tokens, s a step before t.

LOG_ZERO = -70.0                   # the one floor of log probabilities: e^-70 is about 4e-31


@dataclass(frozen=True)
class TransformerConfig:
    """The discrete backbone. Defaults: VQ-Diffusion-B (19 blocks of 1024) on 32x32 tokens."""
    image_size: int = 256                     # pixels a side, of the VQ-VAE's pictures
    n_codes: int = 8192                       # V
    tokens_a_side: int = 32                   # h = w; L = h·w
    patch: int = 1                            # Ours: r x r tokens share a place, of (h/r)·(w/r)
    embed_dim: int = 512                      # E, CLIP's dimension
    n_neighbors: int = 10                     # K in training
    width: int = 1024                         # D
    layers: int = 19
    heads: int = 16
    condition_width: int = 512                # of the condition's tokens
    T: int = 100                              # steps of the diffusion
    schedule: str = "released"                # "released": the code's; "paper": the text's
    auxiliary: float = 5e-4                   # λ of −log p(x_0 | x_t), the text-to-image configs'
    query_map: int = 0                        # Ours: channels of a map made from the query ...
    query_hidden: int = 1024                  # ... by a perceptron with so many hidden units
    edit: bool = False                        # Sec. 3.3: the tokens of a picture to edit, too

    def __post_init__(self) -> None:
        if self.schedule not in ("released", "paper") or self.T < 2 or self.width % self.heads:
            raise ValueError(f"schedule {self.schedule!r}, T {self.T}, width {self.width}, heads "
                             f"{self.heads}: wanted released or paper, T >= 2, heads that divide")
        if self.tokens_a_side % self.patch or self.width % self.patch ** 2:
            raise ValueError(f"patch {self.patch} does not divide {self.tokens_a_side} tokens a "
                             f"side, or its square the width {self.width}")


DISCRETE_PRESETS = {
    "paper": TransformerConfig(),
    "gpu": TransformerConfig(tokens_a_side=16, n_codes=1024, width=512, layers=16, heads=8),
    "stickers": TransformerConfig(image_size=64, tokens_a_side=16, n_codes=512, embed_dim=256,
                                  patch=2, width=192, layers=4, heads=6, condition_width=192,
                                  query_map=48, query_hidden=1024),
}


# ---------------------------------------------------------------- mask and replace

class MaskSchedule:
    """ᾱ_t and γ̄_t, float64, index 0 … T, and what follows from them.

    "released" (VQ-Diffusion's code): ᾱ falls linearly from 0.99999 at t = 1 to 0.000009 at T, γ̄
    rises from 0.000009 to 0.99999: Vβ̄ is 1e-6 throughout, almost pure masking. "paper" (its text):
    γ̄ rises linearly to 0.9 and Vβ̄ to 0.1; ᾱ_T = 0 is raised to FLOOR, taken from Vβ̄.
    """
    FLOOR = 1e-6

    def __init__(self, T: int, n_codes: int, kind: str = "released") -> None:
        t = torch.arange(T + 1, dtype=torch.float64)
        if kind == "released":
            alpha_bar = 0.99999 + (t - 1) / (T - 1) * (0.000009 - 0.99999)
            gamma_bar = 0.000009 + (t - 1) / (T - 1) * (0.99999 - 0.000009)
        else:
            alpha_bar, gamma_bar = (1 - t / T).clamp(min=self.FLOOR), 0.9 * t / T
        alpha_bar[0], gamma_bar[0] = 1, 0
        self.T, self.n_codes = T, n_codes
        self.alpha_bar, self.gamma_bar = alpha_bar, gamma_bar              # (T+1,)
        self.beta_bar = (1 - alpha_bar - gamma_bar) / n_codes
        assert (alpha_bar.diff() < 0).all() and (gamma_bar.diff() > 0).all()
        # β_t ≥ 0 in every step: (1 − γ̄)/ᾱ = 1 + Vβ̄/ᾱ may not fall.
        assert (self.beta_bar >= 0).all() and ((self.beta_bar / alpha_bar).diff() > -1e-18).all()

    def between(self, s: int | Tensor, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, β, γ of q(x_t | x_s), s ≤ t, float64, shaped as s and t; from s = 0: ᾱ, β̄, γ̄."""
        s, t = torch.as_tensor(s).cpu(), torch.as_tensor(t).cpu()
        alpha = self.alpha_bar[t] / self.alpha_bar[s]
        gamma = 1 - (1 - self.gamma_bar[t]) / (1 - self.gamma_bar[s])
        return alpha, ((1 - alpha - gamma) / self.n_codes).clamp(min=0), gamma


def mask_and_replace(x0: Tensor, t: Tensor, schedule: MaskSchedule, u: Tensor, codes: Tensor
                     ) -> Tensor:
    """Draw x_t given x_0: int64 (B, L). u: uniform (B, L); codes: uniform in 0 … V−1 (B, L)."""
    alpha_bar, _, gamma_bar = (p.to(u)[:, None] for p in schedule.between(0, t))       # (B, 1)
    xt = torch.where(u < alpha_bar, x0, codes)
    return torch.where(u < 1 - gamma_bar, xt, schedule.n_codes)            # MASK = V


def log_posterior(log_x0: Tensor, xt: Tensor, t: Tensor, s: Tensor, schedule: MaskSchedule
                  ) -> Tensor:
    """log p(x_s | x_t) = log Σ_v q(x_s | x_t, x_0 = v) p(x_0 = v), for any s < t (VQ-Diffusion
    Eq. 5 and 11).

    log_x0: log p(x_0) (B, L, V), normalised; xt: int64 (B, L); t, s: int64 (B,). Returns float32
    (B, L, V+1), MASK last. With a one-hot log_x0 it is the true posterior q(x_s | x_t, x_0).

    Bayes, and that x_s tells all that x_t has of x_0:
        q(x_s | x_t, v) = q(x_t | x_s) q(x_s | v) / q(x_t | v).
    Only the last two factors hold v, so with w_v = p(v) / q(x_t | v) and W = Σ_v w_v
        p(x_s | x_t) = q(x_t | x_s) · Σ_v w_v q(x_s | v).
    For a code c, q(c | v) is ᾱ_s [c = v] + β̄_s, so the sum is ᾱ_s w_c + β̄_s W; for MASK: γ̄_s W.
    The outer factor is, for x_t = MASK: γ_{t|s} from a code, 1 from MASK; for a code x_t:
    α_{t|s} [c = x_t] + β_{t|s} from a code c, 0 from MASK. And q(x_t | v) is γ̄_t for MASK, whatever
    v is: so a masked token's w is p itself, but for a factor; else ᾱ_t [v = x_t] + β̄_t.
    """
    V = schedule.n_codes

    def log(p: Tensor) -> Tensor:                                          # (B,) → (B, 1, 1)
        return p.clamp(min=math.exp(LOG_ZERO)).log().to(log_x0)[:, None, None]

    alpha, beta, gamma = schedule.between(s, t)
    alpha_t, beta_t, gamma_t = schedule.between(0, t)
    alpha_s, beta_s, gamma_s = schedule.between(0, s)
    is_masked = (xt == V)[..., None]                                       # (B, L, 1)
    is_xt = xt[..., None] == torch.arange(V, device=xt.device)             # (B, L, V)

    log_denominator = torch.where(is_masked, log(gamma_t), torch.where(
        is_xt, log(alpha_t + beta_t), log(beta_t)))                        # log q(x_t | v)
    log_w = log_x0 - log_denominator                                       # (B, L, V)
    log_W = log_w.logsumexp(-1, keepdim=True)                              # (B, L, 1)
    log_outer = torch.where(is_masked, log(gamma), torch.where(
        is_xt, log(alpha + beta), log(beta)))                              # log q(x_t | x_s = c)
    log_codes = log_outer + torch.logaddexp(log(alpha_s) + log_w, log(beta_s) + log_W)
    log_mask = torch.where(is_masked, log(gamma_s) + log_W, LOG_ZERO)
    log_p = torch.cat([log_codes, log_mask], dim=-1)                       # (B, L, V+1)
    return log_p.log_softmax(-1).clamp(min=LOG_ZERO)                       # rounding, no more


# ---------------------------------------------------------------- the transformer

class AdaLayerNorm(nn.Module):
    """LayerNorm with scale and shift from the step and the query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:                  # (B, l, D), (B, D)
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:           # (B, l or M, D) each
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v).transpose(1, 2).flatten(2)               # (B, l, D)

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor) -> Tensor:
        x = x + self.out_self(self.attend(*self.to_qkv(self.norm_self(x, time)).chunk(3, dim=-1)))
        k, v = self.condition_kv(tokens).chunk(2, dim=-1)                  # (B, M, D)
        x = x + self.out_cross(self.attend(self.to_q(self.norm_cross(x, time)), k, v))
        return x + self.mlp(self.norm_mlp(x))


def to_places(x: Tensor, r: int) -> Tensor:
    """(B, L, C), a square row by row → (B, l, r²C), l = L/r²: r x r neighbouring tokens side by
    side in one place."""
    side = math.isqrt(x.shape[1]) // r
    x = x.view(len(x), side, r, side, r, -1).transpose(2, 3)               # (B, h/r, w/r, r, r, C)
    return x.reshape(len(x), side * side, -1)


def to_tokens(x: Tensor, r: int) -> Tensor:
    """(B, l, r²C) → (B, L, C): the way back."""
    side = math.isqrt(x.shape[1])
    x = x.view(len(x), side, side, r, r, -1).transpose(2, 3)               # (B, h/r, r, w/r, r, C)
    return x.reshape(len(x), side * side * r * r, -1)


class TokenTransformer(nn.Module):
    """log p(x_0 | x_t) under a condition: VQ-Diffusion's network, one time table for all norms."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        D, r, side = config.width, config.patch, config.tokens_a_side // config.patch
        self.condition = Condition(config)
        self.time = nn.Embedding(config.T + 1, D)
        self.query_to_time = nn.Linear(config.embed_dim, D)
        self.token = nn.Embedding(config.n_codes + 1, D // r ** 2)         # MASK is the last
        self.row, self.column = nn.Embedding(side, D), nn.Embedding(side, D)
        for table in (self.time, self.token, self.row, self.column):
            nn.init.normal_(table.weight, std=0.02)
        self.query_map = query_perceptron(config, side * side)
        self.map_in = nn.Linear(config.query_map, D) if config.query_map else None
        self.picture_in = zeroed(nn.Linear(D, D, bias=False)) if config.edit else None
        self.blocks = nn.ModuleList(TokenBlock(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(D)
        self.out = zeroed(nn.Linear(D, r ** 2 * config.n_codes))

    def forward(self, xt: Tensor, t: Tensor, query: Tensor | None, neighbors: Tensor | None,
                drop_query: Tensor | None = None, drop_neighbors: Tensor | None = None,
                picture: Tensor | None = None) -> Tensor:
        """xt int64 (B, L) in 0 … V, t (B,) in 1 … T, condition as in `Condition.forward`; picture:
        tokens of what to edit, as xt, None is all MASK (with `config.edit` only).

        Returns log probabilities float32 (B, L, V), normalised, at least LOG_ZERO.
        """
        require(picture is None or self.config.edit, NO_EDITOR)
        tokens, query = self.condition(query, neighbors, len(xt), drop_query, drop_neighbors)
        time = F.silu(self.time(t) + self.query_to_time(query))            # (B, D)
        places = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)     # (l, D)
        x = to_places(self.token(xt), self.config.patch) + places          # (B, l, D)
        if self.query_map is not None:
            x = x + self.map_in(self.query_map(query).unflatten(1, (x.shape[1], -1)))
        if self.picture_in is not None:
            picture = torch.full_like(xt, self.config.n_codes) if picture is None else picture
            x = x + self.picture_in(to_places(self.token(picture), self.config.patch))
        for block in self.blocks:
            x = block(x, time, tokens)
        logits = to_tokens(self.out(self.norm_out(x)), self.config.patch)  # (B, L, V)
        return logits.float().log_softmax(-1).clamp(min=LOG_ZERO)


# ---------------------------------------------------------------- loss

def posterior_kl(log_x0: Tensor, x0: Tensor, xt: Tensor, t: Tensor, s: Tensor,
                 schedule: MaskSchedule) -> Tensor:
    """KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) of each token, nats: (B, L). p as in `log_posterior`.

    Ours: the same number without the two tables (B, L, V+1), in a third of the time. Write q as p,
    with all mass on x_0: what x_t says of x_s, q(x_t | x_s), stands in both and cancels,
        q_c / p_c = G_c / F_c,  F_c = ᾱ_s w_c + β̄_s W,  G_c = (ᾱ_s [c = x_0] + β̄_s) / q(x_t | x_0),
    and MASK adds nothing: q = p, γ̄_s / γ̄_t where x_t is MASK, else 0. q is the same for all codes,
    q_o, but x_0's and x_t's own, so
        KL = Σ_c q_c (log G_c − log F_c) = q_o Σ_c (log G_o − log F_c) + the corrections of the two.
    """
    V = schedule.n_codes
    is_masked, is_x0 = xt == V, xt == x0                                   # (B, L)
    is_other = ~is_masked & ~is_x0                                         # a code, not x_0's
    at = xt.clamp(max=V - 1)[..., None]                                    # (B, L, 1)

    def column(p: Tensor) -> Tensor:                                       # (B,) → (B, 1)
        return p.to(log_x0.device)[:, None]

    alpha, beta, gamma = (column(p) for p in schedule.between(s, t))
    alpha_t, beta_t, gamma_t = (column(p) for p in schedule.between(0, t))
    alpha_s, beta_s, _ = (column(p) for p in schedule.between(0, s))

    # q: float64 (B, L) each.
    q_xt_given_x0 = torch.where(is_masked, gamma_t, alpha_t * is_x0 + beta_t)
    G_x0, G_o = (alpha_s + beta_s) / q_xt_given_x0, beta_s / q_xt_given_x0
    q_x0 = torch.where(is_masked, gamma, alpha * is_x0 + beta) * G_x0
    q_xt = torch.where(is_other, (alpha + beta) * G_o, 0)
    q_o = torch.where(is_masked, gamma, beta) * G_o

    # p: w = p(v) / q(x_t | v), the same divisor for all v but x_t; r = w / W.
    divisor = torch.where(is_masked, gamma_t, beta_t).log().to(log_x0)     # (B, L)
    at_xt = torch.where(is_masked, 0, (beta_t / (alpha_t + beta_t)).log()).to(log_x0)
    log_w = log_x0.scatter_add(-1, at, at_xt[..., None])                   # log (w · divisor)
    log_r = log_w.log_softmax(-1)
    log_W = (log_w.gather(-1, at) - log_r.gather(-1, at))[..., 0] - divisor           # (B, L)
    floor = beta_s.clamp(min=math.exp(LOG_ZERO)).to(log_x0)[..., None]
    log_F = (alpha_s.to(log_x0)[..., None] * log_r.exp() + floor).log()               # − log W

    def excess(q: Tensor, G: Tensor, log_f: Tensor) -> Tensor:             # q (log G − log F)
        log_G = G.clamp(min=math.exp(LOG_ZERO)).log().to(log_x0)
        return q.to(log_x0) * (log_G - log_W - log_f)

    at_x0 = log_F.gather(-1, x0[..., None])[..., 0]
    at_xt = log_F.gather(-1, at)[..., 0]
    rest = log_F.sum(-1) - at_x0 - torch.where(is_other, at_xt, 0)
    n_rest = V - 1 - is_other.to(log_x0)
    return (excess(q_x0, G_x0, at_x0) + excess(q_xt, G_o, at_xt)
            + excess(q_o * n_rest, G_o, rest / n_rest.clamp(min=1)))


def discrete_loss(model: TokenTransformer, schedule: MaskSchedule, x0: Tensor, xt: Tensor,
                  t: Tensor, query: Tensor, neighbors: Tensor, drop_query: Tensor,
                  drop_neighbors: Tensor, picture: Tensor | None = None
                  ) -> tuple[Tensor, Tensor]:
    """The variational term and the auxiliary one of each sample, nats a token: two (B,).

    KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), VQ-Diffusion's L_vlb; at t = 1 q is certain and
    this is −log p(x_0 | x_1). Then −log p(x_0 | x_t), which teaches x_0 at once, with the code's
    adaptive weight 2 − (t−1)/T. Neither is divided by the probability of t yet: see `TimeSampler`.
    """
    log_x0 = model(xt, t, query, neighbors, drop_query, drop_neighbors, picture)     # (B, L, V)
    kl = posterior_kl(log_x0, x0, xt, t, t - 1, schedule).mean(1)          # (B,)
    auxiliary = -log_x0.gather(-1, x0[..., None])[..., 0].mean(1)
    return kl, model.config.auxiliary * (2 - (t - 1) / schedule.T) * auxiliary


class TimeSampler(nn.Module):
    """Steps t drawn in proportion to √E[loss²], where the sum over t is least noisy (2102.09672
    Sec. 3.3).

    As VQ-Diffusion's code has it: a running mean of 0.9 and 0.1; t = 1 takes the value of t = 2;
    uniform until every t was seen more than ten times. Ours: the mean begins at the first value,
    not at 0.
    """

    def __init__(self, T: int) -> None:
        super().__init__()
        self.register_buffer("mean_square", torch.zeros(T + 1, dtype=torch.float64))   # 0: unused
        self.register_buffer("seen", torch.zeros(T + 1, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """float64 (T+1,), 0 at t = 0; they sum to 1."""
        p = torch.ones_like(self.mean_square)
        if (self.seen[1:] > 10).all():
            p = self.mean_square.sqrt() + 1e-4
            p[1] = p[2]
        p[0] = 0
        return p / p.sum()

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n steps int64 (n,), and their weights 1/(T·p) float32 (n,), whose mean is 1."""
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, (1 / ((len(p) - 1) * p[t])).float()

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Note the variational terms (n,) of the steps t (n,)."""
        for step, value in zip(t.tolist(), loss.detach().double().tolist()):
            if math.isfinite(value):
                self.mean_square[step] = (value ** 2 if self.seen[step] == 0 else
                                          0.9 * self.mean_square[step] + 0.1 * value ** 2)
                self.seen[step] += 1


# ---------------------------------------------------------------- guidance and sampling

@torch.no_grad()
def denoise_tokens(model: TokenTransformer, xt: Tensor, t: int, query: Tensor | None,
                   neighbors: Tensor | None, guidance: float = 1.0, truncation: float = 1.0,
                   picture: Tensor | None = None, guidance_picture: float = 1.0) -> Tensor:
    """Guided, truncated log p(x_0 | x_t), normalised: (B, L, V).

    log p = log p_u + guidance·(log p_c − log p_u), renormalised (Improved VQ-Diffusion,
    2205.16007).
    truncation r < 1 keeps the most likely codes, those with less than r of mass before them
    (VQ-Diffusion's), and so always one. Raises ValueError unless 0 < r ≤ 1.
    """
    if not 0 < truncation <= 1:
        raise ValueError(f"truncation is {truncation}, wanted more than 0, at most 1")
    steps = torch.full((len(xt),), t, device=xt.device)

    def call(query: Tensor | None, neighbors: Tensor | None, picture: Tensor | None) -> Tensor:
        return model(xt, steps, query, neighbors, picture=picture)

    log_p = guided(call, query, neighbors, guidance, picture, guidance_picture)
    if guidance != 1.0 or guidance_picture != 1.0:
        log_p = log_p.log_softmax(-1).clamp(min=LOG_ZERO)
    if truncation < 1.0:
        ordered, order = log_p.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()                  # mass ahead of a code
        ordered = ordered.masked_fill(before >= truncation, LOG_ZERO)
        log_p = ordered.scatter(-1, order, ordered).log_softmax(-1).clamp(min=LOG_ZERO)
    return log_p


def gumbel(u: Tensor) -> Tensor:
    """−log(−log u): Gumbel noise from uniform numbers."""
    return -(-u.clamp(1e-20, 1 - 1e-7).log()).log()


def gumbel_max(log_p: Tensor, u: Tensor) -> Tensor:
    """A draw from exp(log_p) along the last axis: the arg-max with Gumbel noise on it."""
    return (log_p + gumbel(u)).argmax(-1)


def ancestral(predict: Callable[[Tensor, int], Tensor], schedule: MaskSchedule, times: list[int],
              length: int, uniform: Callable[..., Tensor]) -> Iterator[Tensor]:
    """x_T from the prior: MASK with γ̄_T, else any code alike (what is left of ᾱ_T among them). Then
    x_s from p(x_s | x_t) along `times`."""
    V = schedule.n_codes
    u, v = uniform(2, length).unbind(1)                                    # (B, L) each
    xt = torch.where(u < 1 - schedule.gamma_bar[-1].item(), (v * V).long().clamp(max=V - 1), V)
    for t, s in zip(times, times[1:]):
        now, then = (torch.full((len(xt),), i, device=xt.device) for i in (t, s))
        log_p = log_posterior(predict(xt, t), xt, now, then, schedule)
        xt = gumbel_max(log_p, uniform(length, V + 1))
        yield xt


def by_purity(predict: Callable[[Tensor, int], Tensor], schedule: MaskSchedule, times: list[int],
              length: int, uniform: Callable[..., Tensor], sharpen: float = 0.0
              ) -> Iterator[Tensor]:
    """Unmask the surest tokens first: Improved VQ-Diffusion's high-quality inference (2205.16007).

    From t to s as many tokens are unmasked as the schedule unmasks on average, at places drawn in
    proportion to their purity max_v p(x_0 = v), with log p multiplied by 1 + sharpen·purity. A
    token once set stays: for schedules that hardly replace ("released").
    """
    V = schedule.n_codes
    xt = torch.full_like(uniform(length), V, dtype=torch.int64)            # (B, L), all MASK
    for t, s in zip(times, times[1:]):
        log_p = predict(xt, t)                                             # (B, L, V)
        log_purity = log_p.amax(-1)                                        # (B, L)
        log_p = log_p * (1 + sharpen * log_purity.exp())[..., None]        # up to a constant
        drawn = gumbel_max(log_p, uniform(length, V))                      # (B, L)
        left = round(length * schedule.gamma_bar[s].item()) if s > 0 else 0
        n_set = max(0, int((xt[0] == V).sum()) - left)                     # alike in all samples
        rank = (log_purity + gumbel(uniform(length))).masked_fill(xt != V, -torch.inf)
        chosen = rank.topk(n_set, dim=1).indices
        xt = xt.scatter(1, chosen, drawn.gather(1, chosen))
        yield xt


ORDERS = {"ancestral": ancestral, "purity": by_purity}


def sample_tokens(model: TokenTransformer, query: Tensor | None, neighbors: Tensor | None,
                  seeds: list[int], steps: int = 25, guidance: float = 2.0,
                  truncation: float = 0.6, order: str = "ancestral", sharpen: float = 0.0,
                  picture: Tensor | None = None, guidance_picture: float = 1.0
                  ) -> Iterator[Tensor]:
    """Yield x_t after every step, int64 (B, L) in 0 … V (MASK = V); the last has no MASK.

    query: unit-norm (B, E) or None; neighbors: unit-norm (B, K, E) or None; B seeds. order:
    "ancestral", or "purity" (the surest places first; `sharpen` is its own). picture: tokens (B, L)
    of what to edit, for a model with `config.edit`. Raises ValueError for what does not fit.
    """
    config = model.config
    schedule = MaskSchedule(config.T, config.n_codes, config.schedule)
    if order not in ORDERS or (order == "purity" and config.schedule != "released"):
        raise ValueError(f"order is {order!r}, wanted ancestral, or purity with the schedule "
                         f"'released' (it is {config.schedule!r})")
    times = falling(config.T, steps)
    device = model.token.weight.device

    def predict(xt: Tensor, t: int) -> Tensor:
        return denoise_tokens(model, xt, t, query, neighbors, guidance, truncation, picture,
                              guidance_picture)

    options = {"sharpen": sharpen} if order == "purity" else {}
    yield from ORDERS[order](predict, schedule, times, config.tokens_a_side ** 2,
                             noise_source(seeds, device, torch.rand), **options)


# ---------------------------------------------------------------- load, save

def load(path: str | os.PathLike) -> tuple[UNet | TokenTransformer, dict[str, str]]:
    """A model of either backbone in eval mode, float32, on the CPU, and its file's metadata.

    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    model, metadata = load_model(path, {"UNet": (UNet, UNetConfig),
                                        "TokenTransformer": (TokenTransformer, TransformerConfig)})
    return model.to(memory_format=torch.channels_last).requires_grad_(False), metadata


save = save_model                  # float16 weights, class and config; metadata: CLIP and command
