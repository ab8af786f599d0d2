"""CLIP: one embedding space for pictures and texts (Radford et al., 2103.00020).

The retrieval model of kNN-Diffusion Sec. 3 is frozen. This is its pair of encoders:

    f_img(x) = W_img · ViT(x)[class token]        f_txt(y) = W_txt · Transformer(y)[end token]

Both are divided by their norm, so that an inner product is a cosine. Some of the published models
have a ResNet in place of the ViT. Modules and parameters have the names of OpenAI's release.
`load` reads the checkpoints of OpenAI, OpenCLIP and Hugging Face, and our small sticker CLIP.

Shapes: B batch, C channels, H W picture, L tokens (M keys), D width (d per head), E CLIP dimension.

Left out: other projects' towers (timm's, Hugging Face's text models), CoCa's and SigLIP's heads.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn


def require(claim: object, message: str) -> None:
    """Raise ValueError(message) unless `claim` holds."""
    if not claim:
        raise ValueError(message)


class QuickGELU(nn.Module):
    """x·σ(1.702 x), a cheap stand-in for GELU; features differ if the two are mixed up."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)      # CLIP's own statistics, RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers. The defaults are ViT-B/32's."""
    embed_dim: int = 512             # E
    image_size: int = 224            # pixels per side
    patch_size: int = 32             # pixels per side; of a ResNet: pixels per feature
    vision_width: int = 768          # D of the image tower
    vision_layers: int | tuple[int, ...] = 12        # four numbers of blocks: a ResNet
    vision_heads: int = 12
    context_length: int = 77         # L of the text tower, start and end token included
    vocab_size: int = 49408          # the end token is the last id
    text_width: int = 512            # D of the text tower
    text_layers: int = 12
    text_heads: int = 8
    activation: str = "quick_gelu"   # OpenAI's weights; "gelu" for most of OpenCLIP's
    vision_hidden: int = 0           # hidden width of an MLP; 0 is 4 D
    text_hidden: int = 0
    pixel_mean: tuple[float, ...] = PIXEL_MEAN       # per channel; a few models have their own
    pixel_std: tuple[float, ...] = PIXEL_STD

    def __post_init__(self) -> None:
        require(self.activation in ACTIVATIONS,
                f"activation is {self.activation!r}, wanted {' or '.join(ACTIVATIONS)}")
        require(len(self.pixel_mean) == len(self.pixel_std) == 3 and min(self.pixel_std) > 0
                and math.isfinite(sum(self.pixel_mean + self.pixel_std)),
                "pixel_mean and pixel_std must be three numbers, the latter above 0")


# ---------------------------------------------------------------- layers

class LayerNorm(nn.LayerNorm):
    """Computed in float32 whatever comes in: half precision loses the small variances."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(),
                            self.bias.float(), self.eps).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for q (B, heads, L, d) and k, v (B, heads, M, d); softmax in float32.

    torch's fused kernel, except for gradients on the CPU, where it is several times slower.
    """
    if not (q.requires_grad and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                      # (B, heads, L, M)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.float().softmax(-1).to(v.dtype) @ v                             # (B, heads, L, d)


class Attention(nn.Module):
    """Multi-head self-attention, parameters named as torch.nn.MultiheadAttention's."""

    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                 # (B, L, 3D)
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, self.is_causal)                                    # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))                  # (B, L, D)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(ln(x)), then x + MLP(ln(x))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str,
                 is_causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, is_causal)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, hidden),
                                             gelu=ACTIVATIONS[activation](),
                                             c_proj=nn.Linear(hidden, width)))
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; `is_causal` hides later tokens (text)."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int, activation: str,
                 is_causal: bool) -> None:
        super().__init__()
        blocks = (Block(width, heads, hidden or 4 * width, activation, is_causal)
                  for _ in range(layers))
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)

    def initialise(self) -> None:
        """CLIP's initial scales. Branches shrink with depth, so that their sum does not grow."""
        for block in self.resblocks:
            D, shrink = len(block.ln_1.weight), (2 * len(self.resblocks)) ** -0.5
            nn.init.normal_(block.attn.in_proj_weight, std=D ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=D ** -0.5 * shrink)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=D ** -0.5 * shrink)


# ---------------------------------------------------------------- the image towers

class VisionTransformer(nn.Module):
    """Patches and a class token through a transformer; the class token is projected."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D, patch = config.vision_width, config.patch_size
        n_patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, D, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(D ** -0.5 * torch.randn(D))
        self.positional_embedding = nn.Parameter(D ** -0.5 * torch.randn(n_patches + 1, D))
        self.ln_pre = LayerNorm(D)
        self.transformer = Transformer(D, config.vision_layers, config.vision_heads,
                                       config.vision_hidden, config.activation, is_causal=False)
        self.ln_post = LayerNorm(D)
        self.proj = nn.Parameter(D ** -0.5 * torch.randn(D, config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:                              # (B, 3, H, W)
        x = self.conv1(x)                                                # (B, D, H/p, W/p)
        x = x.flatten(2).transpose(1, 2)                                 # (B, L-1, D)
        first = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)   # (B, 1, D)
        x = torch.cat([first, x], dim=1)                                 # (B, L, D)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj                         # (B, E)


class Bottleneck(nn.Module):
    """ResNet-50's block, 1x1 → 3x3 → 1x1, in CLIP's anti-aliased form: a stride is an average pool
    in front of a convolution, on both branches."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.stride, self.downsample = stride, nn.Sequential()           # as it is
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                            nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:                              # (B, C, h, w)
        short = self.downsample(F.avg_pool2d(x, self.stride))            # (B, C', h', w')
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), self.stride)
        return F.relu(self.bn3(self.conv3(x)) + short)                   # (B, C', h', w')


class AttentionPool(nn.Module):
    """The mean of all features is the query; the mean and the features are keys and values."""

    def __init__(self, n_features: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(n_features + 1, width))
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:                              # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)                                 # (B, M-1, D)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1 or M, d)
                   for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        x = attention(q, k, v)                                           # (B, heads, 1, d)
        return self.c_proj(x.flatten(1))                                 # (B, E)


class ModifiedResNet(nn.Module):
    """A stem of three convolutions, four stages, attention pooling."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, half = config.vision_width, config.vision_width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, 1, 1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        c_in = width
        for i, n_blocks in enumerate(config.vision_layers):
            c_out = width * 2 ** i                                       # a quarter of the output
            blocks = [Bottleneck(c_in, c_out, stride=1 if i == 0 else 2)]
            blocks += [Bottleneck(4 * c_out, c_out, stride=1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = 4 * c_out
        self.attnpool = AttentionPool((config.image_size // 32) ** 2, c_in, config.vision_heads,
                                      config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:                              # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))                              # (B, D/2, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)             # (B, D, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))        # (B, 32 D, H/32, W/32)
        return self.attnpool(x)                                          # (B, E)


# ---------------------------------------------------------------- CLIP

class CLIP(nn.Module):
    """Both towers and the learned temperature. The text tower's modules sit at the top level, as in
    OpenAI's release. `tokenizer` belongs to the weights."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D = config.text_width
        self.config = config
        self.tokenizer: Tokenizer | None = None
        is_resnet = isinstance(config.vision_layers, tuple)
        self.visual = ModifiedResNet(config) if is_resnet else VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, D))
        self.transformer = Transformer(D, config.text_layers, config.text_heads,
                                       config.text_hidden, config.activation, is_causal=True)
        self.ln_final = LayerNorm(D)
        self.text_projection = nn.Parameter(D ** -0.5 * torch.randn(D, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.transformer.initialise()
        if not is_resnet:
            self.visual.transformer.initialise()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """CLIP pixels (B, 3, H, W) -> unit-norm float32 (B, E)."""
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) from the tokenizer -> unit-norm float32 (B, E)."""
        # The end token has the largest id. Attention is causal: nothing behind it can change it.
        end = tokens.argmax(-1)                                          # (B,)
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), end]                # (B, D)
        return F.normalize((x @ self.text_projection).float(), dim=-1)   # (B, E)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit-norm float32 (B, E), on the model's device. A long one is cut, and said.

        Raises FileNotFoundError where weights came without their vocabulary and none was found.
        """
        if self.tokenizer is None:
            raise FileNotFoundError(f"texts need a vocabulary of {self.config.vocab_size} tokens: "
                                    f"put CLIP's {VOCABULARY} or merges.txt beside the weights")
        return self.embed_tokens(self.tokenizer(texts).to(self.logit_scale.device))

    @torch.no_grad()
    def embed_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures of any size and mode -> unit-norm float32 (B, E), on the model's device."""
        require(isinstance(pictures, list | tuple)
                and all(isinstance(picture, Image.Image) for picture in pictures),
                "embed_pictures takes a list of Pillow's pictures")
        squares = [fit_square(to_rgb(picture), self.config.image_size) for picture in pictures]
        pixels = to_pixels(squares, self.config.pixel_mean, self.config.pixel_std)
        return self.embed_images(pixels.to(self.logit_scale.device))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of all pictures with all texts, unit-norm (B, E), times the temperature: (B, B).

        float32 even under autocast: bfloat16 logits would move in steps of a quarter.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.clamp(max=math.log(100)).exp() * (images @ texts.T)

    def describe(self) -> str:
        """The build in words, for manifests and messages."""
        c = self.config
        return (f"CLIP {type(self.visual).__name__} {c.image_size}/{c.patch_size}, "
                f"{c.vision_layers} x {c.vision_width} and {c.text_layers} x {c.text_width}, "
                f"{c.activation}")

    def fingerprint(self) -> str:
        """16 hex digits of the image tower, the same for float32 and float16 files: which f_img
        this is. Indexes and generators hold its embeddings; a text tower that is tuned to it
        (examples/train_clip.py --text-only) may take the place of another."""
        c = self.config
        digest = hashlib.sha256(repr((c.vision_heads, c.activation, c.pixel_mean)).encode())
        for name, tensor in sorted(self.visual.state_dict().items()):
            digest.update(name.encode() + tensor.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


# ---------------------------------------------------------------- tokenizer
#
# Byte-pair encoding (Sennrich et al., 1508.07909) over UTF-8 bytes, as GPT-2 and CLIP do it. Every
# byte has a printable stand-in, so that any text can be written down. A word starts as its bytes,
# the last one marked "</w>". Then the pair that was learned first among those present is merged,
# everywhere in the word, until no learned pair is left. What remains are the tokens.

WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# GPT-2's stand-ins: printable Latin-1 bytes are themselves, the others count up from 256. The
# order counts: published ids follow it.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_SYMBOLS = dict(zip(PRINTABLE + OTHERS, map(chr, [*PRINTABLE, *range(256, 324)])))


def clean(text: str) -> str:
    """CLIP's cleaning: mend mojibake, unescape HTML twice, collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def split_words(text: str) -> list[str]:
    """Any text -> its cleaned words in byte symbols, without the "</w>"."""
    return ["".join(BYTE_SYMBOLS[byte] for byte in word.encode())
            for word in WORD.findall(clean(text))]


def merge_pair(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of the neighbours `pair` in a word, from left to right."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


class Tokenizer:
    """Texts -> token ids. Vocabulary: 256 bytes, the same with "</w>", merges, start, end. The end
    token has the largest id, since the text tower finds it by arg-max."""

    def __init__(self, merges: list[tuple[str, str]], context_length: int = 77) -> None:
        symbols = list(BYTE_SYMBOLS.values())
        self.words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), *SPECIAL]
        self.merges, self.context_length = merges, context_length
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = len(self.words) - 2, len(self.words) - 1
        self.encode_word = functools.lru_cache(100_000)(self.encode_word)

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word in byte symbols: merge the earliest learned pair until none is left."""
        parts = (word,) if word in SPECIAL else (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        return [self.ids[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end token."""
        return [i for word in split_words(text) for i in self.encode_word(word)]

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (B, L): start, tokens, end, zeros. A longer text is cut with a warning and keeps
        its end token, since CLIP pools there."""
        require(isinstance(texts, list | tuple) and len(texts) > 0
                and all(isinstance(text, str) for text in texts), "wanted a list of texts")
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > len(row):
                warnings.warn(f"a text of {len(ids)} tokens was cut to {len(row)}: {text[:40]!r}",
                              stacklevel=2)
                ids = [*ids[: len(row) - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------- pictures

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")     # PostScript would run programs
IMAGE_SUFFIXES = set(".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif".split())
# A PNG's transparent colour is written in the file's bits; Pillow makes 8 of them.
TO_8_BITS = {"L;2": lambda key: 85 * key, "L;4": lambda key: 17 * key,
             "RGB;16B": lambda key: tuple(value >> 8 for value in key)}


def read_image(path: str | os.PathLike) -> Image.Image:
    """Open any picture as RGB: first frame, turned as EXIF says, transparency put on white.
    Raises FileNotFoundError, or ValueError with one sentence where Pillow can't read it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return to_rgb(picture)
    except Exception as error:            # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{path} is no readable picture: {reason(error)}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says, 16-bit grey scaled to 8 bits, transparency on white, then RGB."""
    key = picture.info.get("transparency")
    if picture.format == "PNG" and picture.tile and picture.tile[0].args in TO_8_BITS and key:
        key = picture.info["transparency"] = TO_8_BITS[picture.tile[0].args](key)
    picture = picture.copy()
    with suppress(Exception):             # EXIF's other tags, if broken, have no say over pixels
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture)
        grey = np.where(grey == key, 255, (grey / 257).round())
        picture = Image.fromarray(grey.astype(np.uint8))
    require(picture.mode not in ("I", "F"), f"mode {picture.mode} does not say its range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    picture.info = {}                     # profile and transparency belong to the file's own mode
    return picture


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` with Pillow's antialiased bicubic, then a centre crop.

    The long side is truncated, not rounded, the offset rounded: as torchvision does.
    """
    short = min(picture.size)
    width, height = (size if side == short else int(size * side / short) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def to_pixels(pictures: np.ndarray | list[Image.Image], mean: tuple[float, ...] = PIXEL_MEAN,
              std: tuple[float, ...] = PIXEL_STD) -> Tensor:
    """uint8 (B, H, W, 3) or RGB pictures of one size -> CLIP's float32 pixels (B, 3, H, W)."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 - mean) / std


# ---------------------------------------------------------------- published checkpoints
#
# Three projects publish CLIPs under three sets of names. All are turned into OpenAI's, then the
# sizes are read off the shapes. What shapes can't say (heads, activation, the pixels' mean) is
# read from the files beside the weights, or known, or guessed with a warning.

TEXT_TOWER = re.compile(r"(.*?)(text_model\.embeddings\.|text\.|)token_embedding.weight")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
HUGGING_FACE = (                                   # their names and OpenAI's, piece by piece
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.", ""),
    ("encoder.layers", "transformer.resblocks"), ("patch_embedding", "conv1"),
    ("position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"), ("self_attn", "attn"),
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("fc1", "c_fc"), ("fc2", "c_proj"),
    ("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}      # OpenCLIP's H, g, bigG image towers; else 64
ONLY = {                   # other settings that change the numbers, and the values built here
    "layer_norm_eps": (1e-5,), "pool_type": ("tok", "argmax"), "no_causal_mask": (False,),
    "norm_kwargs": ({},), "act_kwargs": ({},), "timm_model_name": (), "hf_model_name": (),
    "resize_mode": ("shortest",), "interpolation": ("bicubic",), "resample": (3,),
    "do_resize": (True,), "do_center_crop": (True,), "do_normalize": (True,),
    "do_rescale": (True,), "rescale_factor": (1 / 255,), "hidden_act": tuple(ACTIVATIONS)}


def to_openai_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the three layouts -> OpenAI's names, wrappers' prefixes stripped."""
    # "module.", "model." and the like: whatever stands in front of the text tower.
    found = [match.groups() for match in map(TEXT_TOWER.fullmatch, tensors) if match]
    require(found, "it has no token_embedding: no CLIP of OpenAI's, OpenCLIP's or Hugging Face's")
    wrapper, place = found[0]
    renamed = {}
    for name, tensor in tensors.items():
        if not name.startswith(wrapper) or name.endswith(NOT_WEIGHTS):
            continue
        name = name.removeprefix(wrapper).removeprefix("text.")
        if place == "text_model.embeddings.":
            for theirs, ours in HUGGING_FACE:
                name = name.replace(theirs, ours)
            tensor = tensor.T if name in ("visual.proj", "text_projection") else tensor
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed


def sizes_from_shapes(tensors: dict[str, Tensor]) -> dict[str, object]:
    """ClipConfig's sizes, from weights in OpenAI's names. Raises KeyError where one is missing."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def count(place: str) -> int:
        found = [re.match(rf"{place}\.(\d+)\.", name) for name in tensors]
        return len({match[1] for match in found if match})

    blocks, text_width = "transformer.resblocks", shape["ln_final.weight"][0]
    text = {"embed_dim": shape["text_projection"][1], "text_width": text_width,
            "context_length": shape["positional_embedding"][0],
            "vocab_size": shape["token_embedding.weight"][0],
            "text_layers": count(blocks), "text_heads": text_width // 64,
            "text_hidden": shape[f"{blocks}.0.mlp.c_fc.bias"][0]}
    if "visual.proj" in shape:
        width, _, _, patch = shape["visual.conv1.weight"]
        side = math.isqrt(shape["visual.positional_embedding"][0])       # patches
        return text | {"image_size": side * patch, "patch_size": patch, "vision_width": width,
                       "vision_layers": count(f"visual.{blocks}"),
                       "vision_heads": width // HEAD_WIDTHS.get(width, 64),
                       "vision_hidden": shape[f"visual.{blocks}.0.mlp.c_fc.bias"][0]}
    width = shape["visual.layer1.0.conv1.weight"][0]
    side = math.isqrt(shape["visual.attnpool.positional_embedding"][0])  # features
    return text | {"image_size": 32 * side, "vision_width": width, "vision_heads": width // 2,
                   "vision_layers": tuple(count(f"visual.layer{i}") for i in range(1, 5))}


def settings_beside(folder: Path, is_single: bool, n: int) -> dict[str, object]:
    """What the files of OpenCLIP or Hugging Face in a folder say of ClipConfig's fields. is_single:
    one file was named, and a config.json beside it may be another model's. n: pixels per side.
    Raises ValueError for settings that are not built here."""
    def table(name: str) -> dict:
        return json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}

    openclip = table("open_clip_config.json")
    model = openclip["model_cfg"] if openclip else table("config.json")
    vision, text = (model.get(f"{tower}_cfg") or model.get(f"{tower}_config") or {}
                    for tower in ("vision", "text"))
    if is_single and not vision:
        return {}
    pixels = openclip.get("preprocess_cfg") or table("preprocessor_config.json")
    sizes = (n, [n, n], {"shortest_edge": n}, {"height": n, "width": n})
    only = ONLY | dict.fromkeys(("image_size", "size", "crop_size"), sizes)
    for name, value in [*vision.items(), *text.items(), *pixels.items()]:
        require(value is None or value in only.get(name, (value,)),
                f"its {name} is {value!r}, which is not built here")
    said = {"vision_heads": vision.get("num_attention_heads"),
            "text_heads": text.get("heads", text.get("num_attention_heads")),
            "pixel_mean": pixels.get("mean", pixels.get("image_mean")),
            "pixel_std": pixels.get("std", pixels.get("image_std"))}
    if openclip:
        said["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    elif text:
        said["activation"] = text.get("hidden_act", "quick_gelu")
    if "head_width" in vision:
        said["vision_heads"] = vision["width"] // vision["head_width"]
    return {field: value for field, value in said.items() if value is not None}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as Hugging Face lays it out: one file, or shards and their table."""
    names = [name for name in ("model.safetensors", "open_clip_model.safetensors",
             "pytorch_model.bin", "open_clip_pytorch_model.bin") if (folder / name).is_file()][:1]
    table = folder / "model.safetensors.index.json"
    if not names and table.is_file():
        names = sorted(set(json.loads(table.read_text("utf-8"))["weight_map"].values()))
    if not names:
        raise FileNotFoundError(f"no model.safetensors, nor shards of it, in {folder}")
    shards = [read_tensors(folder / name)[0] for name in names]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def load_published(path: Path, tensors: dict[str, Tensor], told: dict[str, object]) -> CLIP:
    """A CLIP without its tokenizer. told: the fields of ClipConfig that the caller knows."""
    folder = path if path.is_dir() else path.parent
    tensors = to_openai_names(tensors or weights_in(path))
    sizes = sizes_from_shapes(tensors)
    told = settings_beside(folder, path != folder, sizes["image_size"]) | told
    if "activation" not in told:
        is_half = tensors["token_embedding.weight"].dtype == torch.float16
        told["activation"] = "quick_gelu" if is_half else "gelu"
        warnings.warn(f"nothing beside {path} names its activation: {told['activation']} is "
                      "guessed from its dtype; say activation=... if you know", stacklevel=3)
    model = CLIP(from_json(ClipConfig, sizes | told))
    model.load_state_dict(tensors)
    return model


VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_SIZE, N_MERGES = 49408, 48894


def find_vocabulary(beside: Path) -> Path | None:
    """CLIP's list of merges: beside the weights, or in an installed CLIP package's folder."""
    specs = [importlib.util.find_spec(package) for package in ("clip", "open_clip")]
    folders = [beside, *(Path(spec.origin).parent for spec in specs if spec and spec.origin)]
    files = [folder / name for folder in folders for name in (VOCABULARY, "merges.txt")]
    return next(filter(Path.is_file, files), None)


def read_vocabulary(path: Path, context_length: int = 77) -> Tokenizer:
    """CLIP's published tokenizer from its list of merges, gzipped or not. Raises ValueError."""
    raw, merges = path.read_bytes(), []
    with suppress(ValueError, zlib.error):
        raw = zlib.decompress(raw, wbits=31) if raw[:2] == b"\x1f\x8b" else raw
        # A header line, then 262,144 pairs. CLIP uses as many as make 49,408 ids.
        merges = [tuple(line.split()) for line in raw.decode().split("\n")[1: N_MERGES + 1]]
    require(len(merges) == N_MERGES and all(len(pair) == 2 for pair in merges),
            f"{path} is not CLIP's list of {N_MERGES} merges")
    return Tokenizer(merges, context_length)


# ---------------------------------------------------------------- weights on disk (safetensors)
#
# 8 bytes: length n of the header, little-endian. n bytes: JSON, name -> {dtype, shape,
# data_offsets}, padded with spaces to a multiple of 8, plus "__metadata__" of strings. Then the
# tensors' raw little-endian bytes, one after the other without holes. No code can hide there.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
FORMAT = "knn-diffusion 1"
# What Python and torch raise where a file's content does not fit.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def write_weights(path: str | os.PathLike, tensors: dict[str, Tensor],
                  metadata: dict[str, str]) -> None:
    """Write tensors, all finite, and string metadata to a .safetensors file, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, blobs, place = {"__metadata__": metadata}, [], 0
    # Widest dtype first keeps every tensor aligned in the file.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        require(bool(tensor.isfinite().all()), f"{name} is not finite: {path} was not written")
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [place, place + blob.nbytes]}
        place += blob.nbytes
        blobs.append(blob)
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for blob in blobs:
            file.write(blob)


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors file: tensors, memory-mapped (copied on write), and the metadata.
    Raises FileNotFoundError, or ValueError with one sentence where the file is damaged."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    size, tensors = os.path.getsize(path), {}
    try:
        with open(path, "rb") as file:
            place = 8 + int.from_bytes(file.read(8), "little")           # the tensors begin here
            require(8 < place <= size, f"its header ends at byte {place} of {size}")
            header = json.loads(file.read(place - 8))
        metadata = header.pop("__metadata__", {})
        require(all(isinstance(value, str) for value in metadata.values()), "odd metadata")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        start = place
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
            begin, end = (start + offset for offset in entry["data_offsets"])
            require(begin == place and end - begin == math.prod(shape) * dtype.itemsize,
                    f"{name} has bytes {begin} to {end} for {dtype} {shape}, after byte {place}")
            raw, place = mapped[begin:end], end
            if begin % dtype.itemsize:                           # a foreign writer's odd order
                raw = raw.clone()
            tensors[name] = raw.view(dtype).reshape(shape)
        require(place == size, f"its tensors end at byte {place} of {size}")
    except MISFITS as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {reason(error)}") from None
    return tensors, metadata


# ---------------------------------------------------------------- foreign weights (zip archives)
#
# torch.save and torch.jit.save write a zip: TOP/data.pkl, a pickle, and each tensor's raw bytes in
# TOP/data/KEY. A pickle is a program that may name any Python object and call it. Here `find_class`
# answers every name itself: with what builds tensors, or with a class that does nothing. So nothing
# is imported and no foreign code runs.

STORAGES = dict(zip("DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage "
                    "ShortStorage CharStorage ByteStorage BoolStorage".split(), DTYPES.values()))
KNOWN = {"torch._utils._rebuild_tensor_v2":             # as_strided stays inside the storage
         lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset),
         "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
         "collections.OrderedDict": OrderedDict}


class Inert(dict):
    """Any other object that a pickle names: it takes what comes and runs nothing. What it holds
    stays readable, since TorchScript's modules are such objects."""
    __hash__ = object.__hash__                           # classes and objects are keys of tables

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})

    __call__ = append = extend = lambda self, *_, **__: None


class ArchiveReader(pickle.Unpickler):
    """Reads the pickle of a zip archive of torch's."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        name, = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        self.read = lambda entry: archive.read(name.removesuffix("data.pkl") + entry)
        self.storages: dict[str, Tensor] = {}
        super().__init__(io.BytesIO(self.read("data.pkl")))       # read() checks the checksum, too

    def find_class(self, module: str, name: str) -> object:
        return KNOWN.get(f"{module}.{name}") or type(name, (Inert,), {})

    def persistent_load(self, persistent_id: tuple) -> Tensor:
        _, kind, key, _, n = persistent_id
        if key not in self.storages:
            raw = bytearray(self.read(f"data/{key}"))
            empty = torch.empty(0, dtype=STORAGES[kind.__name__])
            self.storages[key] = torch.frombuffer(raw, dtype=empty.dtype) if raw else empty
        return self.storages[key]


def named_tensors(found: object, prefix: str = "") -> dict[str, Tensor]:
    """Dotted name -> tensor, out of a TorchScript module, a state dict, or what is around one."""
    require(isinstance(found, dict), "it holds no table of tensors")
    if isinstance(found.get("state_dict"), dict):
        return named_tensors(found["state_dict"])
    tensors = {}
    for name, value in found.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            tensors[prefix + name] = value
        elif isinstance(value, Inert) and isinstance(found, Inert):        # a module in a module
            tensors |= named_tensors(value, f"{prefix}{name}.")
    return tensors


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors of any weights file, and its metadata. .safetensors; zip archives of torch.save
    and torch.jit.save (metadata {"format": "TorchScript"}); torch.save's older single pickle, by
    torch's own restricted reader. Raises FileNotFoundError, or ValueError with one sentence."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    with open(path, "rb") as file:
        start = file.read(4)         # all 4 count: a .safetensors begins with its header's length
    if start not in (b"PK\x03\x04", b"\x80\x02\x8a\x0a"):
        return read_weights(path)
    try:
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                found = ArchiveReader(archive).load()
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        tensors = named_tensors(found)
        require(tensors, "it holds no table of tensors")
    except Exception as error:                      # pickle, zipfile and torch raise many kinds
        raise ValueError(f"{path} is not a whole archive of plain tensors: {reason(error)}"
                         ) from None
    return tensors, {"format": "TorchScript"} if isinstance(found, Inert) else {}


# ---------------------------------------------------------------- load, save

def save_model(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write a model's weights in float16, its class name and config: enough to load it again."""
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()}
    write_weights(path, tensors, {"format": FORMAT, "class": type(model).__name__,
                                  "config": json.dumps(asdict(model.config)), **metadata})


def from_json(config_class: type, fields: dict[str, object]) -> object:
    """A config, with tuples where JSON has lists."""
    return config_class(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in fields.items()})


def load_model(path: str | os.PathLike, classes: dict[str, tuple[type, type]]
               ) -> tuple[nn.Module, dict[str, str]]:
    """Build the model that a file of `save_model` names, in float32 on the CPU, in eval mode.

    classes: class name -> (model class, config class) that the caller can use.
    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    tensors, metadata = read_weights(path)
    name = metadata.get("class")
    require(metadata.get("format") == FORMAT and name is not None,
            f"{path} was not written by this project (no {FORMAT!r} in its metadata)")
    require(name in classes, f"{path} holds a {name}, wanted {' or '.join(classes)}")
    model_class, config_class = classes[name]
    try:
        require(all(tensor.isfinite().all() for tensor in tensors.values()), "it is not finite")
        model = model_class(from_json(config_class, json.loads(metadata["config"])))
        model.load_state_dict(tensors)
    except MISFITS as error:
        raise ValueError(f"{path} does not fit the {name} of this version: {reason(error)}"
                         ) from None
    return model.eval(), metadata


def save(path: str | os.PathLike, model: CLIP, metadata: dict[str, str]) -> None:
    """Write float16 weights, config and the tokenizer's merges in one file."""
    merges = "\n".join(" ".join(pair) for pair in model.tokenizer.merges)
    save_model(path, model, {**metadata, "merges": merges})


def load(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None,
         activation: str | None = None) -> CLIP:
    """Load a CLIP, ours or a published one, with its tokenizer, in eval mode, on the CPU.

    path: our .safetensors; OpenAI's TorchScript .pt; a state dict as .pt, .bin or .safetensors in
        OpenAI's, OpenCLIP's or Hugging Face's names; a folder as Hugging Face lays it out.
    tokenizer: the published vocabulary's file or folder. Else it is looked for beside the weights
        and in installed CLIP packages. Without any, pictures can be embedded, texts can't.
    activation: "quick_gelu" or "gelu", where no file tells it. Else it is guessed, with a warning.
    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    path = Path(path)
    tensors, metadata = ({}, {}) if path.is_dir() else read_tensors(path)
    if metadata.get("format") == FORMAT:
        require(not (tokenizer or activation),
                f"{path} carries its own vocabulary and names its activation")
        model, metadata = load_model(path, {"CLIP": (CLIP, ClipConfig)})
        merges = [tuple(line.split(" ")) for line in metadata.get("merges", "").splitlines()]
        model.tokenizer = Tokenizer(merges, model.config.context_length)
        require(len(model.tokenizer.words) == model.config.vocab_size,
                f"{path} has {len(merges)} merges for {model.config.vocab_size} ids")
    else:
        told = {"activation": activation} if activation else {}
        if metadata.get("format") == "TorchScript":      # OpenAI's, and all of them use QuickGELU
            told = {"activation": "quick_gelu"} | told
        try:
            model = load_published(path, tensors, told)
        except MISFITS as error:
            raise ValueError(f"{path} does not fit a CLIP: {reason(error)}") from None
        where = Path(tokenizer or (path if path.is_dir() else path.parent))
        where = find_vocabulary(where) if where.is_dir() else where
        if where and model.config.vocab_size == PUBLISHED_SIZE:
            model.tokenizer = read_vocabulary(where, model.config.context_length)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------- what the scripts share
#
# None of this is CLIP: arguments, files, devices, pictures in [-1, 1].

SHIPPED = Path(__file__).resolve().parent / "weights" / "stickers"


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    said = " ".join(str(error).split())[:300]
    return said if " " in said else f"{type(error).__name__} {said}"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[io.BufferedIOBase]:
    """A fresh file beside `path`, open for writing. It takes path's place when all went well, and
    is gone when not: a reader sees the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".part", delete=False)
    try:
        with file:
            yield file
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException as error:
        os.unlink(file.name)
        if isinstance(error, OSError) or "inline_container" in str(error):     # torch's disk full
            raise OSError(f"{path} could not be written: {reason(error)}") from None
        raise


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None],
                argv: list[str] | None = None) -> int:
    """Parse a script's arguments and run it. The exit status: 0 done, 2 bad input, 1 anything else,
    said in one sentence on stderr. No text is lost for a terminal's narrow alphabet."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"          # without its source line
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        run(parser.parse_args(argv))
        sys.stdout.flush()
        return 0
    except (ValueError, OverflowError, FileNotFoundError) as error:
        said, status = reason(error), 2
    except (OSError, FloatingPointError) as error:
        said, status = reason(error), 1
    except (MemoryError, RuntimeError) as error:
        if not re.search("memory|alloc", repr(error), re.I):
            raise
        said, status = f"not enough memory: lower --batch-size or --n ({reason(error)})", 1
    print(said, file=sys.stderr)
    with suppress(OSError):              # its reader is gone, or its disk full: drop what is left
        sys.stdout.flush()
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Raises ValueError for what is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.zeros(1, device=name).device
    except Exception:                     # torch raises many kinds: one per missing backend
        raise ValueError(f"no device {name!r} here") from None


def to_x(pictures: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]. Bytes go to the device, not floats."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1] (B, 3, H, W), clipped -> 8-bit RGB pictures."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def grid(rows: list[list[Image.Image | None]], cell: int) -> Image.Image:
    """Pictures in rows, each `cell` pixels per side, a gap between them; None is a grey cell."""
    columns, step = max(map(len, rows), default=1), cell + 2
    sheet = Image.new("RGB", (columns * step + 2, len(rows) * step + 2), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is None:
                picture = Image.new("RGB", (cell, cell), (235, 235, 235))
            elif picture.width == picture.height and cell % picture.width == 0:
                picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(fit_square(picture, cell), (2 + x * step, 2 + y * step))
    return sheet
