"""Pictures <-> tokens: a VQ-VAE (van den Oord et al., 1711.00937) in VQGAN's build (2012.09841).

The discrete backbone of kNN-Diffusion Sec. 3.2 draws tokens, not pixels:

    encode   z = E(x),  token of a place = argmin_v ‖z − e_v‖²       x (B, 3, H, W) in [-1, 1]
    decode   x̂ = D(e_token)                                          tokens (B, L), 0 … V−1
    loss     |x − x̂| + (x − x̂)² + ‖sg[z] − e‖² + β ‖z − sg[e]‖²,  sg: no gradient

Every term is a mean over its entries, as in taming: ‖·‖² in the loss stands for the squared length
divided by E. The arg-min has no gradient. *Straight through* means: D is given e, but on the way
back its gradient goes to z as if z had been given; near each other they want the same. The third
term moves the code towards what the encoder says, the fourth (commitment, β) the encoder towards
its code. They have the same value and teach different sides.

Modules and parameters are named as in taming-transformers, so that its published weights load:
`load` reads our files and theirs (f16 with 1,024 or 16,384 codes, Gumbel f8 with 8,192, FFHQ's
inside a transformer's checkpoint). Their loss network and discriminator are dropped.

Shapes: B batch, C channels, H W picture, h w its tokens (L = h·w), V codes, E width of a code.

Departs: no LPIPS in training, which wants another network's weights, and no discriminator, which
gained nothing on the stickers (benchmarks/tokens.py).
"""
from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_model import FORMAT, load_model, read_tensors, require, save_model

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class VQVAEConfig:
    """The defaults are VQGAN's f16 with 1,024 codes."""
    image_size: int = 256                     # pixels a side in training; other multiples work too
    channels: int = 128                       # at full size
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)   # channels by level; each level halves the size
    res_blocks: int = 2                       # a level, one more in the decoder
    attention: tuple[int, ...] = (4,)         # levels with self-attention; 0 is full size
    latent_channels: int = 256                # of the encoder's output
    embed_dim: int = 256                      # E
    n_codes: int = 1024                       # V
    unshuffle: int = 1                        # Ours: r x r pixels become channels at both ends
    norm_groups: int = 32
    gumbel: bool = False                      # tokens by a linear layer's arg-max (DALL-E's way)
    commitment: float = 0.25                  # β, on the commitment term (1711.00937 Eq. 3)

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention"):                      # JSON gives lists back
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def factor(self) -> int:
        """Pixels a side of a token: H = factor·h."""
        return self.unshuffle * 2 ** (len(self.multipliers) - 1)


PRESETS = {
    # 64 px -> 16x16 tokens, on two CPU cores (8x8 lose 4 dB: benchmarks/tokens.py).
    "stickers": VQVAEConfig(image_size=64, channels=96, multipliers=(1,), unshuffle=4,
                            res_blocks=1, attention=(), latent_channels=64, embed_dim=32,
                            n_codes=512, norm_groups=8),
    "f16-1024": VQVAEConfig(),
    "f16-16384": VQVAEConfig(n_codes=16384),
    "f8-8192": VQVAEConfig(multipliers=(1, 1, 2, 4), attention=(3,), n_codes=8192, gumbel=True),
}


# ---------------------------------------------------------------- layers, in taming's names

class ResnetBlock(nn.Module):
    """norm → swish → conv, twice, added to the input."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:                            # (B, C, h, w)
        h = self.conv1(F.silu(self.norm1(x)))                          # (B, C', h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention of all places, one head."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(c, c, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:                            # (B, C, h, w)
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2)             # (B, L, C)
                   for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)                # scale C^-1/2
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


def halved(c: int) -> nn.Module:
    """(B, C, h, w) → (B, C, h/2, w/2); the picture is padded at the right and below only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=nn.Conv2d(c, c, 3, stride=2)))


def doubled(c: int) -> nn.Module:
    """(B, C, h, w) → (B, C, 2h, 2w)."""
    return nn.Sequential(OrderedDict(grow=nn.Upsample(scale_factor=2),
                                     conv=nn.Conv2d(c, c, 3, padding=1)))


class Level(nn.Module):
    """n blocks, behind each self-attention where the level has it; then `downsample` or `upsample`,
    which the encoder and the decoder hang in."""

    def __init__(self, c_in: int, c_out: int, n: int, attends: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if j else c_in, c_out, groups)
                                   for j in range(n))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(n * attends))

    def forward(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.block):
            x = block(x)
            x = self.attn[j](x) if self.attn else x
        return x


class Middle(nn.Module):
    """Block, attention, block, at the smallest size."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(c, c, groups), AttnBlock(c, groups)
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """x (B, 3, H, W) → (B, latent_channels, h, w)."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, c = config.norm_groups, config.channels
        self.unshuffle = config.unshuffle
        self.conv_in = nn.Conv2d(3 * self.unshuffle ** 2, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, multiplier in enumerate(config.multipliers):
            width, is_last = config.channels * multiplier, i + 1 == len(config.multipliers)
            level = Level(c, width, config.res_blocks, i in config.attention, groups)
            level.downsample = nn.Identity() if is_last else halved(width)
            self.down.append(level)
            c = width
        self.mid = Middle(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.unshuffle))         # (B, C, H/r, W/r)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) → x (B, 3, H, W). `up` is numbered by size: 0 is the picture's."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        groups, c = config.norm_groups, config.channels * config.multipliers[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c, 3, padding=1)
        self.mid = Middle(c, groups)
        levels = []
        for i, multiplier in reversed(list(enumerate(config.multipliers))):
            width = config.channels * multiplier
            levels.append(Level(c, width, config.res_blocks + 1, i in config.attention, groups))
            levels[-1].upsample = doubled(width) if i > 0 else nn.Identity()
            c = width
        self.up = nn.ModuleList(reversed(levels))
        self.unshuffle = config.unshuffle
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3 * self.unshuffle ** 2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.unshuffle)


# ---------------------------------------------------------------- the codebook

class Codebook(nn.Module):
    """V vectors; a place takes the nearest."""

    def __init__(self, n_codes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_codes, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_codes, 1 / n_codes)

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, E, h, w) → int64 (B, L), the code of least ‖z − e‖² = ‖z‖² + ‖e‖² − 2 z·e."""
        codes = self.embedding.weight.float()                          # (V, E)
        flat = z.flatten(2).transpose(1, 2).float()                    # (B, L, E)
        with torch.autocast(z.device.type, enabled=False):             # near codes differ by little
            return (codes.square().sum(1) - 2 * flat @ codes.T).argmin(-1)

    def vectors(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) → (B, L, E)."""
        return self.embedding(tokens)

    def losses(self, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The codebook term (teaches e alone) and the commitment term, without β (z alone)."""
        return F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())


class GumbelCodebook(nn.Module):
    """Codes by arg-max of a 1x1 convolution's logits, as DALL-E trains them. Published weights
    encode and decode with it; training it is left out."""

    def __init__(self, n_codes: int, embed_dim: int, latent_channels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(n_codes, embed_dim)
        self.proj = nn.Conv2d(latent_channels, n_codes, 1)

    def nearest(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).argmax(1)                       # (B, L)

    def vectors(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens)                                      # (B, L, E)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the codes' shares, counts (V,): 1 for one code, V for all alike."""
    return torch.special.entr(counts.double() / counts.sum()).sum().exp().item()


@torch.no_grad()
def restart_dead_codes(codebook: Codebook, counts: Tensor, z: Tensor, generator: torch.Generator
                       ) -> int:
    """Put codes that nothing used at random encoder outputs; return how many.

    counts: (V,), uses over some batches; z: (B, E, h, w), a batch's encoder outputs. A code that is
    nobody's nearest gets no gradient and would stay dead. Ours; Jukebox (2005.00341 Sec. 3) does
    alike.
    """
    places = z.flatten(2).transpose(1, 2).reshape(-1, z.shape[1]).float()       # (B·L, E)
    dead = (counts == 0).nonzero()[:, 0][: len(places)]
    chosen = torch.randperm(len(places), generator=generator)[: len(dead)]
    codebook.embedding.weight[dead] = places[chosen.to(places.device)]
    return len(dead)


# ---------------------------------------------------------------- the model

class VQVAE(nn.Module):
    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = (
            GumbelCodebook(config.n_codes, config.embed_dim, config.latent_channels)
            if config.gumbel else Codebook(config.n_codes, config.embed_dim))
        width = config.latent_channels if config.gumbel else config.embed_dim
        self.quant_conv = nn.Conv2d(config.latent_channels, width, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)

    def latents(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] → z (B, E, h, w), before the codebook; for Gumbel's, which has
        a convolution of its own before it, (B, latent_channels, h, w)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] → tokens int64 (B, L), row by row. H and W are multiples of
        `config.factor`."""
        factor = self.config.factor
        require(x.ndim == 4 and x.shape[-1] % factor == x.shape[-2] % factor == 0,
              f"pictures have shape {tuple(x.shape)}, wanted (B, 3, H, W), multiples of {factor}")
        return self.quantize.nearest(self.latents(x))

    def decode(self, tokens: Tensor, height: int | None = None) -> Tensor:
        """Tokens int64 (B, L) → x (B, 3, H, W), about in [-1, 1]. height: rows of tokens, by
        default √L. Raises ValueError for tokens that fill no rows, or are no codes (MASK = V)."""
        height = height or math.isqrt(tokens.shape[1])
        highest = int(tokens.max())
        require(highest < self.config.n_codes,
              f"token {highest}, but the codes are 0 to {self.config.n_codes - 1} (MASK is none)")
        require(height > 0 and tokens.shape[1] % height == 0,
              f"{tokens.shape[1]} tokens do not fill {height} rows")
        e = self.quantize.vectors(tokens)                              # (B, L, E)
        return self.from_vectors(e.transpose(1, 2).unflatten(2, (height, -1)))

    def from_vectors(self, e: Tensor) -> Tensor:                       # (B, E, h, w)
        return self.decoder(self.post_quant_conv(e)).float()           # (B, 3, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (B, 3, H, W), the codebook's loss (a scalar, β within), tokens (B, L)."""
        z = self.latents(x).float()                                    # (B, E, h, w)
        tokens = self.quantize.nearest(z)
        e = self.quantize.vectors(tokens).transpose(1, 2).view(z.shape)
        codebook, commitment = self.quantize.losses(z, e)
        through = z + (e - z).detach()                                 # e forwards, z backwards
        return self.from_vectors(through), codebook + self.config.commitment * commitment, tokens


def reconstruction_loss(found: Tensor, x: Tensor) -> Tensor:
    """L1 + L2, means over all pixels."""
    return F.l1_loss(found, x) + F.mse_loss(found, x)


def psnr(found: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture (B,), dB: 10 log₁₀(4 / mean squared error), for
    the range [-1, 1]."""
    return 10 * torch.log10(4 / (found.clamp(-1, 1) - x).square().flatten(1).mean(1))


# ---------------------------------------------------------------- load, save

def load(path: str | os.PathLike) -> tuple[VQVAE, dict[str, str]]:
    """A VQ-VAE in eval mode, float32, on the CPU, and its file's metadata (none for taming's).

    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") == FORMAT:
        model, metadata = load_model(path, {"VQVAE": (VQVAE, VQVAEConfig)})
        return model.requires_grad_(False), metadata
    try:
        first = "first_stage_model."                                   # in a transformer's file
        if any(name.startswith(first) for name in tensors):
            tensors = {name.removeprefix(first): t for name, t in tensors.items()
                       if name.startswith(first)}
        parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
        tensors = {name: t.float() for name, t in tensors.items() if name.startswith(parts)}
        model = VQVAE(sizes_from_shapes(tensors))
        model.load_state_dict(tensors)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit a VQ-VAE in taming's layout: {reason}") from None
    return model.eval().requires_grad_(False), {}


def fingerprint(model: VQVAE) -> str:
    """16 hex digits: which codes stand for what. The same for float32 and float16 files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sizes_from_shapes(tensors: dict[str, Tensor]) -> VQVAEConfig:
    """The config of weights in taming's names; 32 groups, as all of theirs have."""
    def shape(name: str) -> tuple[int, ...]:
        require(name in tensors, f"it lacks {name}")
        return tuple(tensors[name].shape)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    channels = shape("encoder.conv_in.weight")[0]
    levels = [i for i in range(20) if has(f"encoder.down.{i}.")]
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels]
    gumbel = "quantize.embed.weight" in tensors
    codes = shape("quantize.embed.weight" if gumbel else "quantize.embedding.weight")
    return VQVAEConfig(
        channels=channels, multipliers=tuple(width // channels for width in widths),
        res_blocks=sum(has(f"encoder.down.0.block.{j}.") for j in range(20)),
        attention=tuple(i for i in levels if has(f"encoder.down.{i}.attn.")),
        latent_channels=shape("encoder.conv_out.weight")[0], embed_dim=codes[1],
        n_codes=codes[0], gumbel=gumbel)


save = save_model                       # float16 weights, class and config; metadata: the command
