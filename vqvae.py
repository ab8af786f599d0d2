"""Pictures <-> tokens: a VQ-VAE (van den Oord et al., 1711.00937) in VQGAN's build (2012.09841).

The discrete backbone of kNN-Diffusion Sec. 3.2 draws tokens, not pixels:

    encode   z = encoder(x),  token of a place = argmin_v ‖z − e_v‖²
    decode   x̂ = decoder(e_token),  a 1x1 convolution between each of them and the codes
    loss     |x − x̂| + (x − x̂)² + ‖sg[z] − e‖² + β ‖z − sg[e]‖²,   sg: no gradient

Every term is a mean over its entries, as in taming: ‖·‖² is the squared length over Z.
The arg-min has no gradient. The *straight-through estimator* goes around it: the decoder gets e,
and its gradient goes to z as if z had been given. Where z is near e, the two agree. The third
term moves the code towards what the encoder says. The fourth (commitment, β) moves the encoder
towards its code. But for β they have the same value; they teach different sides.

Shapes: B batch, C channels, H W picture, h w its tokens (L = h·w), V codes, Z width of a code,
Y channels of the encoder's output. x is in [-1, 1]; a token is 0 … V−1.

Names are those of taming-transformers, so that its published weights load: f16 with 1,024 or
16,384 codes, Gumbel f8 with 8,192 (training it is left out), FFHQ's inside a transformer's file.

Departs: no LPIPS in training, which needs another network's weights, and no discriminator, which
gained nothing on the stickers (benchmarks/tokens.py).
"""
from __future__ import annotations

import math
import os
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip_model
from clip_model import load_model, read_weights, require, weights_digest

# ---------------- configuration

@dataclass(frozen=True)
class VQVAEConfig:
    """The defaults are VQGAN's f16 with 1,024 codes."""
    image_size: int = 256              # pixels per side in training
    channels: int = 128                # at full size
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # of channels, per level
    res_blocks: int = 2                # per level, one more in the decoder
    attention: tuple[int, ...] = (4,)  # levels with self-attention; 0 is full size
    latent_channels: int = 256         # Y
    embed_dim: int = 256               # Z
    n_codes: int = 1024                # V
    unshuffle: int = 1                 # Ours: r x r pixels become channels
    norm_groups: int = 32
    gumbel: bool = False               # tokens by a linear arg-max (DALL-E)
    commitment: float = 0.25           # β, on the commitment term (1711.00937 Eq. 3)

    @property
    def factor(self) -> int:
        """Pixels per side of a token: H = factor·h."""
        return self.unshuffle * 2 ** (len(self.multipliers) - 1)


PRESETS = {
    # 64 px -> 16x16 tokens, on two CPU cores (8x8 lose 4 dB: benchmarks/tokens.py).
    "stickers": VQVAEConfig(image_size=64, channels=96, multipliers=(1,), unshuffle=4,
                            res_blocks=1, attention=(), latent_channels=64, embed_dim=32,
                            n_codes=512, norm_groups=8),
    "f16-1024": VQVAEConfig(),
    "f16-16384": VQVAEConfig(n_codes=16384),
}


# ---------------- layers, in taming's names

class ResnetBlock(nn.Module):
    """norm → swish → conv, twice, added to the input."""
    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:    # (B, C, h, w)
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention of all places, one head."""
    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(c, c, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:                 # (B, C, h, w)
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)  # (B, L, C)
                   for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)     # scale C^-1/2
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """n blocks, each with self-attention behind it where the level attends; then another size."""
    def __init__(self, c_in: int, c_out: int, n: int, attends: bool, groups: int,
                 halves: bool = False, doubles: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if j else c_in, c_out, groups)
                                   for j in range(n))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(n if attends else 0))
        self.downsample = self.upsample = nn.Identity()
        if halves:  # padded on the right and below only
            self.downsample = nn.Sequential(OrderedDict(
                pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c_out, c_out, 3, stride=2)))
        if doubles:
            self.upsample = nn.Sequential(OrderedDict(
                grow=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c_out, c_out, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = self.attn[j](block(x)) if self.attn else block(x)
        return self.upsample(self.downsample(x))


def middle(c: int, groups: int) -> nn.Module:
    """Block, attention, block, at the smallest size."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(c, c, groups), attn_1=AttnBlock(c, groups),
                                     block_2=ResnetBlock(c, c, groups)))


# ---------------- encoder, decoder

class Encoder(nn.Module):
    """x (B, 3, H, W) → (B, Y, h, w). `down` is numbered by size: 0 is the largest."""
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * m for m in config.multipliers], config.norm_groups
        before, n = [config.channels, *widths], len(widths)
        self.unshuffle = config.unshuffle
        self.conv_in = nn.Conv2d(3 * self.unshuffle ** 2, config.channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(before[i], widths[i], config.res_blocks, i in config.attention, groups,
                  halves=i + 1 < n) for i in range(n))
        self.mid = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.unshuffle))  # (B, C, H/r, W/r)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, Y, h, w) → x (B, 3, H, W). `up` is numbered as `down`, and run from its end."""
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        widths, groups = [config.channels * m for m in config.multipliers], config.norm_groups
        before, n = [*widths[1:], widths[-1]], len(widths)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        levels = [Level(before[i], widths[i], config.res_blocks + 1, i in config.attention, groups,
                        doubles=i > 0) for i in reversed(range(n))]
        self.up = nn.ModuleList(reversed(levels))
        self.unshuffle = config.unshuffle
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * self.unshuffle ** 2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.unshuffle)


# ---------------- the codebook

class Codebook(nn.Module):
    """V vectors; each place takes the nearest."""
    def __init__(self, n_codes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_codes, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_codes, 1 / n_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, Z, h, w) → int64 (B, L), the code of least ‖z − e‖² = ‖z‖² + ‖e‖² − 2 z·e."""
        codes = self.embedding.weight.float()               # (V, Z)
        flat = z.flatten(2).transpose(1, 2).float()         # (B, L, Z)
        with torch.autocast(z.device.type, enabled=False):  # near codes differ by little
            return (codes.square().sum(1) - 2 * flat @ codes.T).argmin(-1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) → (B, L, Z)."""
        return self.embedding(tokens)


class GumbelCodebook(nn.Module):
    """V vectors; a linear map Y → V makes logits, each place takes the arg-max (DALL-E's way)."""
    def __init__(self, n_codes: int, embed_dim: int, latent_channels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_codes, embed_dim)
        self.proj = nn.Conv2d(latent_channels, n_codes, 1)

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, Y, h, w) → int64 (B, L)."""
        return self.proj(z).flatten(2).argmax(1)

    def vectors(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)  # (B, L, Z)


@torch.no_grad()
def restart_dead_codes(codebook: Codebook, counts: Tensor, z: Tensor, generator: torch.Generator
                       ) -> None:
    """Put codes that nothing used at random encoder outputs z (B, Z, h, w); counts: (V,) uses.
    A code that is nobody's nearest gets no gradient and would stay dead.
    Ours; Jukebox (2005.00341 Sec. 3) does alike."""
    places = z.flatten(2).transpose(1, 2).reshape(-1, z.shape[1]).float()  # (B·L, Z)
    dead = (counts == 0).nonzero()[:, 0][: len(places)]
    chosen = torch.randperm(len(places), generator=generator)[: len(dead)]
    codebook.embedding.weight[dead] = places[chosen.to(places.device)]


# ---------------- the model

class VQVAE(nn.Module):
    """`encode` and `decode` turn pictures into tokens and back; `forward` is for training."""
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        n_codes, code, latent = config.n_codes, config.embed_dim, config.latent_channels
        if config.gumbel:  # its codebook has the map from Y itself
            self.quantize = GumbelCodebook(n_codes, code, latent)
            self.quant_conv = nn.Conv2d(latent, latent, 1)
        else:
            self.quantize = Codebook(n_codes, code)
            self.quant_conv = nn.Conv2d(latent, code, 1)
        self.post_quant_conv = nn.Conv2d(code, latent, 1)

    def latents(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) → z as `quantize` reads it: (B, Z, h, w), or (B, Y, h, w) for Gumbel's."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] → tokens int64 (B, L), row by row.
        Raises ValueError where H or W is no multiple of `config.factor`."""
        height, width, factor = *x.shape[2:], self.config.factor
        require(height % factor == width % factor == 0,
                f"{height} x {width} pixels: sides must be multiples of {factor}")
        return self.quantize.nearest(self.latents(x))

    def decode(self, tokens: Tensor, height: int | None = None) -> Tensor:
        """Tokens int64 (B, L) → x float32 (B, 3, H, W), about in [-1, 1].
        height: rows of tokens, by default √L. Raises ValueError for MASK = V, which is no code."""
        last = self.config.n_codes - 1
        require(int(tokens.max()) <= last, f"tokens must be codes, 0 to {last}; MASK is none")
        height = height or math.isqrt(tokens.shape[1])
        e = self.quantize.vectors(tokens)  # (B, L, Z)
        return self.from_vectors(e.transpose(1, 2).unflatten(2, (height, -1)))

    def from_vectors(self, e: Tensor) -> Tensor:              # (B, Z, h, w)
        return self.decoder(self.post_quant_conv(e)).float()  # (B, 3, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (B, 3, H, W) and the codebook's loss, a scalar, β within."""
        z = self.latents(x).float()  # (B, Z, h, w)
        e = self.quantize.vectors(self.quantize.nearest(z)).transpose(1, 2).view(z.shape)
        # The codebook term teaches e alone, the commitment term z alone.
        loss = F.mse_loss(e, z.detach()) + self.config.commitment * F.mse_loss(z, e.detach())
        return self.from_vectors(z + (e - z).detach()), loss  # e forwards, z backwards


def reconstruction_loss(found: Tensor, x: Tensor) -> Tensor:
    """L1 + L2, means over all pixels."""
    return F.l1_loss(found, x) + F.mse_loss(found, x)


# ---------------- load, taming's layout

fingerprint = weights_digest  # which codes stand for what

# A transformer's checkpoint holds a VQ-VAE within; loss network and discriminator lie beside it.
TAMING = r"(?:first_stage_model\.)?((?:encoder|decoder|quantize|quant_conv|post_quant_conv)\..*)"


def load(path: str | os.PathLike) -> tuple[VQVAE, dict[str, str]]:
    """A VQ-VAE in eval mode, float32, on the CPU, and its file's metadata (none for taming's).
    Raises FileNotFoundError, or ValueError for a file that does not fit."""
    tensors, metadata = read_weights(path)
    if metadata.get("format") == clip_model.FORMAT:
        model, metadata = load_model(path, {"VQVAE": (VQVAE, VQVAEConfig)})
        return model.requires_grad_(False), metadata
    tensors = {found[1]: tensor for name, tensor in tensors.items()
               if (found := re.fullmatch(TAMING, name))}
    try:
        model = VQVAE(sizes_from_shapes(tensors))
        model.load_state_dict(tensors)
    except clip_model.MISFITS as error:
        said = clip_model.reason(error)
        raise ValueError(f"{path} holds no VQ-VAE, ours or taming's: {said}") from None
    return model.eval().requires_grad_(False), {}


def sizes_from_shapes(tensors: dict[str, Tensor]) -> VQVAEConfig:
    """The config of weights in taming's names; 32 groups, as all of theirs have."""
    gumbel = "quantize.embed.weight" in tensors
    codes = tensors["quantize.embed.weight" if gumbel else "quantize.embedding.weight"]
    channels = len(tensors["encoder.conv_in.bias"])
    widths = [len(tensor) for name, tensor in sorted(tensors.items())
              if re.fullmatch(r"encoder\.down\.\d\.block\.0\.conv1\.bias", name)]
    return VQVAEConfig(
        channels=channels, multipliers=tuple(width // channels for width in widths),
        res_blocks=sum(f"encoder.down.0.block.{j}.conv1.bias" in tensors for j in range(20)),
        attention=tuple(i for i in range(len(widths))
                        if f"encoder.down.{i}.attn.0.q.bias" in tensors),
        latent_channels=len(tensors["encoder.conv_out.bias"]), n_codes=codes.shape[0],
        embed_dim=codes.shape[1], gumbel=gumbel)
