"""CLIP: one embedding space for pictures and texts (Radford et al., 2103.00020).

The retrieval model of kNN-Diffusion Sec. 3 is frozen. This is its pair of encoders:

    f_img(x) = W_img · ViT(x)[class token]        f_txt(y) = W_txt · Transformer(y)[end token]

Both are divided by their norm, so that an inner product is a cosine. Some published models have
a ResNet in place of the ViT. Modules and parameters have OpenAI's names.
`load` reads the checkpoints of OpenAI, OpenCLIP and Hugging Face, and our sticker CLIP.

Shapes: B batch, C channels, H W picture, L tokens (M keys), D width (d per head), E CLIP dimension.
Left out: other projects' towers (timm's, Hugging Face's text models), CoCa's and SigLIP's heads."""
from __future__ import annotations

import argparse
import functools
import gzip
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x·σ(1.702 x), a cheap stand-in for GELU; features differ if the two are mixed up."""
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


AnyPath = str | os.PathLike
Tensors = dict[str, Tensor]                       # by name
Conv = functools.partial(nn.Conv2d, bias=False)   # a ResNet's: its norm has a bias
ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers. The defaults are ViT-B/32's."""
    embed_dim: int = 512            # E
    image_size: int = 224           # pixels per side
    patch_size: int = 32            # pixels per side; of a ResNet: pixels per feature
    vision_width: int = 768         # D of the image tower
    vision_layers: int | tuple[int, ...] = 12  # four numbers of blocks: a ResNet
    vision_heads: int = 12
    context_length: int = 77        # L of the text tower, start and end token included
    vocab_size: int = 49408         # the end token is the last id
    text_width: int = 512           # D of the text tower
    text_layers: int = 12
    text_heads: int = 8
    activation: str = "quick_gelu"  # OpenAI's weights; "gelu" for most of OpenCLIP's
    vision_hidden: int = 0          # hidden width of an MLP; 0 is 4 D
    text_hidden: int = 0
    pixel_mean: tuple[float, ...] = PIXEL_MEAN  # per channel; a few differ
    pixel_std: tuple[float, ...] = PIXEL_STD


# ---------------- layers and image towers

def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for q (B, heads, L, d) and k, v (B, heads, M, d); softmax in float32.
    Causal: token i sees tokens 0 … i. torch's fused kernel, but for gradients on the CPU:
    there it is four times slower in bfloat16."""
    if not (q.requires_grad and q.device.type == "cpu"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, L, M)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, device=q.device).triu(1)
    return scores.float().softmax(-1).to(v.dtype) @ v         # (B, heads, L, d)


class Attention(nn.Module):
    """Multi-head self-attention, parameters named as torch.nn.MultiheadAttention's."""
    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.is_causal = heads, is_causal
        self.in_proj_weight = nn.Parameter(width ** -0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3D)
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, self.is_causal)                     # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))   # (B, L, D)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(ln(x)), then x + MLP(ln(x))."""
    def __init__(self, width: int, heads: int, hidden: int, activation: str,
                 is_causal: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, is_causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, hidden),
                                             gelu=ACTIVATIONS[activation](),
                                             c_proj=nn.Linear(hidden, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def transformer(width: int, layers: int, heads: int, hidden: int, activation: str,
                is_causal: bool) -> nn.Sequential:
    """A stack of blocks, named "resblocks"; `is_causal` hides later tokens (text). CLIP's initial
    scales: branches shrink with depth, so their sum does not grow."""
    blocks = nn.Sequential()
    for _ in range(layers):
        block = Block(width, heads, hidden or 4 * width, activation, is_causal)
        nn.init.normal_(block.attn.out_proj.weight, std=(2 * width * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=(2 * width * layers) ** -0.5)
        blocks.append(block)
    return nn.Sequential(OrderedDict(resblocks=blocks))


class VisionTransformer(nn.Module):
    """Patches and a class token through a transformer; the class token is projected."""
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D, patch = config.vision_width, config.patch_size
        n_patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, D, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(D ** -0.5 * torch.randn(D))
        self.positional_embedding = nn.Parameter(D ** -0.5 * torch.randn(n_patches + 1, D))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = transformer(D, config.vision_layers, config.vision_heads,
                                       config.vision_hidden, config.activation, is_causal=False)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(D ** -0.5 * torch.randn(D, config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:       # (B, 3, H, W)
        x = self.conv1(x)                         # (B, D, H/p, W/p)
        x = x.flatten(2).transpose(1, 2)          # (B, L-1, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)  # (B, L, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj  # (B, E)


class Bottleneck(nn.Module):
    """ResNet-50's block, 1x1 → 3x3 → 1x1, in CLIP's anti-aliased form: a stride is an average
    pool before a convolution, on both branches."""
    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1, self.bn1 = Conv(c_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = Conv(width, width, 3, 1, 1), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = Conv(width, c_out, 1), nn.BatchNorm2d(c_out)
        self.stride, self.downsample = stride, nn.Sequential()  # as it is
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(Conv(c_in, c_out, 1), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:                    # (B, C, h, w)
        short = self.downsample(F.avg_pool2d(x, self.stride))  # (B, C', h', w')
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.avg_pool2d(F.relu(self.bn2(self.conv2(x))), self.stride)
        return F.relu(self.bn3(self.conv3(x)) + short)         # (B, C', h', w')


class AttentionPool(nn.Module):
    """The features' mean is the query; mean and features are keys and values."""
    def __init__(self, n_features: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(n_features + 1, width))
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)     # (B, M-1, D)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        # q (B, heads, 1, d); k, v (B, heads, M, d)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        x = attention(q, k, v)               # (B, heads, 1, d)
        return self.c_proj(x.flatten(1))     # (B, E)


class ModifiedResNet(nn.Module):
    """A stem of three convolutions, four stages, attention pooling."""
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, half = config.vision_width, config.vision_width // 2
        self.conv1, self.bn1 = Conv(3, half, 3, 2, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = Conv(half, half, 3, 1, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = Conv(half, width, 3, 1, 1), nn.BatchNorm2d(width)
        c_in = width
        for i, n_blocks in enumerate(config.vision_layers):
            stage = nn.Sequential()
            for j in range(n_blocks):
                stage.append(Bottleneck(c_in, width * 2 ** i, stride=2 if i and not j else 1))
                c_in = 4 * width * 2 ** i
            setattr(self, f"layer{i + 1}", stage)
        self.attnpool = AttentionPool((config.image_size // 32) ** 2, c_in, config.vision_heads,
                                      config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:                        # (B, 3, H, W)
        x = F.relu(self.bn1(self.conv1(x)))                        # (B, D/2, H/2, W/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)       # (B, D, H/4, W/4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (B, 32 D, H/32, W/32)
        return self.attnpool(x)                                    # (B, E)


# ---------------- CLIP

class CLIP(nn.Module):
    """Both towers and the learned temperature. The text tower's modules are at the top level, as
    OpenAI's. `tokenizer` belongs to the weights."""
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config, D = config, config.text_width
        self.tokenizer: Tokenizer | None = None
        is_resnet = isinstance(config.vision_layers, tuple)
        self.visual = ModifiedResNet(config) if is_resnet else VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, D))
        self.transformer = transformer(D, config.text_layers, config.text_heads,
                                       config.text_hidden, config.activation, is_causal=True)
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(D ** -0.5 * torch.randn(D, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """CLIP pixels (B, 3, H, W) -> unit-norm float32 (B, E)."""
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) from the tokenizer -> unit-norm float32 (B, E)."""
        # The end token has the largest id. Nothing behind it can change it (causal).
        end = tokens.argmax(-1)                                         # (B,)
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), end]               # (B, D)
        return F.normalize((x @ self.text_projection).float(), dim=-1)  # (B, E)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit-norm float32 (B, E), on the model's device. One too long is cut, with a
        warning. Raises ValueError where no vocabulary was found for the weights."""
        require(self.tokenizer, f"texts need CLIP's {VOCABULARY} or merges.txt beside the weights")
        return self.embed_tokens(self.tokenizer(texts).to(self.logit_scale.device))

    @torch.no_grad()
    def embed_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures of any size and mode -> unit-norm float32 (B, E), on its device."""
        squares = [fit_square(to_rgb(picture), self.config.image_size)
                   for picture in pictures]
        pixels = to_pixels(squares, self.config.pixel_mean, self.config.pixel_std)
        return self.embed_images(pixels.to(self.logit_scale.device))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of all pictures with all texts, unit-norm (B, E), times the temperature: (B, B).
        float32 even under autocast: bfloat16 logits move in steps of a quarter."""
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.clamp(max=math.log(100)).exp() * (images @ texts.T)

    def describe(self) -> str:
        """The build in words, for manifests and messages."""
        c = self.config
        return (f"CLIP {type(self.visual).__name__} {c.image_size}/{c.patch_size}, "
                f"{c.vision_layers} x {c.vision_width} and {c.text_layers} x {c.text_width}, "
                f"{c.activation}")

    def fingerprint(self) -> str:
        """16 hex digits of the image tower: which f_img this is. Indexes hold its
        embeddings, generators learned from them; the text tower may be another."""
        c = self.config
        return weights_digest(self.visual, repr((c.vision_heads, c.activation, c.pixel_mean)))


# ---------------- tokenizer
#
# Byte-pair encoding (Sennrich et al., 1508.07909) over UTF-8 bytes, as GPT-2 and CLIP do it.
# Every byte has a printable stand-in, so that any text can be written down. A word starts as its
# bytes, the last one marked "</w>". Then the pair that was learned first is merged, everywhere in
# the word, until no learned pair is left. What remains are the tokens.

WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# GPT-2's stand-ins, in the order of their ids: printable Latin-1, then the others from 256 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_SYMBOLS = dict(zip(PRINTABLE + OTHERS, map(chr, [*PRINTABLE, *range(256, 324)])))


def split_words(text: str) -> list[str]:
    """Any text -> its words in byte symbols, without the "</w>". CLIP's cleaning: mend
    mojibake, unescape HTML twice, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
    return ["".join(map(BYTE_SYMBOLS.get, word.encode())) for word in WORD.findall(text)]


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
    """Texts -> token ids. Vocabulary: 256 bytes, the same with "</w>", merges, start, end.
    The end token is the largest id: the text tower finds it by arg-max."""
    def __init__(self, merges: list[tuple[str, str]], context_length: int = 77) -> None:
        symbols = list(BYTE_SYMBOLS.values())
        self.words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), *SPECIAL]
        self.merges, self.context_length = merges, context_length
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = (self.ids[word] for word in SPECIAL)
        self.encode_word = functools.lru_cache(100_000)(self.encode_word)

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word in byte symbols: merge the earliest learned pair until none is left."""
        parts = (word,) if word in SPECIAL else (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        return [self.ids[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end token."""
        return [i for word in split_words(text) for i in self.encode_word(word)]

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (B, L): start, tokens, end, zeros. A longer text is cut with a warning, but keeps
        its end token: CLIP pools there."""
        require(not isinstance(texts, str), "wanted a list of texts, not one")
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > len(row):
                warnings.warn(f"a text of {len(ids)} tokens was cut to {len(row)}: {text[:40]!r}",
                              stacklevel=2)
                ids = [*ids[: len(row) - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------- pictures

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # PostScript runs programs
IMAGE_SUFFIXES = set(".png .jpg .jpeg .jfif .webp .bmp .gif .tif .tiff .avif".split())


def read_image(path: AnyPath, least: int = 0) -> Image.Image:
    """Open a picture file's first frame, `to_rgb`. least: pixels per side that are enough: a
    JPEG is then decoded at 1/2, 1/4 or 1/8, faster. Raises ValueError for unreadable files."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if least:
                picture.draft(None, (least, least))
            return to_rgb(picture)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise ValueError(f"{path} is no readable picture: {reason(error)}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says, 16-bit grey scaled to 8 bits, transparency on white, then RGB."""
    picture = picture.copy()
    with suppress(Exception):  # EXIF's other tags may be broken
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16"):
        grey, transparent = np.asarray(picture), picture.info.get("transparency")
        grey = np.where(grey == transparent, 255, (grey / 257).round())
        picture = Image.fromarray(grey.astype(np.uint8))
    require(picture.mode not in ("I", "F"), f"mode {picture.mode} does not say its range")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("RGB")
    picture.info = {}  # a colour profile belonged to the mode of before
    return picture


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` with Pillow's antialiased bicubic, then a centre crop.
    As torchvision, the long side is truncated, the offset rounded."""
    width, height = (size * side // min(picture.size) for side in picture.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def to_pixels(pictures: np.ndarray | list[Image.Image], mean: tuple = PIXEL_MEAN,
              std: tuple = PIXEL_STD) -> Tensor:
    """uint8 (B, H, W, 3) or RGB pictures of one size -> CLIP's float32 pixels (B, 3, H, W)."""
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---------------- published checkpoints
#
# Three projects publish CLIPs under three sets of names. All are turned into OpenAI's, then
# sizes are read off the shapes. The rest is read from files beside the weights, known, or
# guessed with a warning.

TEXT_TOWER = re.compile(r"(.*?)(text_model\.embeddings\.|text\.|)token_embedding.weight")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
HUGGING_FACE = (  # their names and OpenAI's, piece by piece
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.", ""),
    ("encoder.layers", "transformer.resblocks"), ("patch_embedding", "conv1"),
    ("position_embedding.weight", "positional_embedding"), ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"), ("final_layer_norm", "ln_final"), ("self_attn", "attn"),
    ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("fc1", "c_fc"), ("fc2", "c_proj"),
    ("visual_projection.weight", "visual.proj"), ("text_projection.weight", "text_projection"))
ONLY = {  # other settings that matter, and their values here
    "layer_norm_eps": (1e-5,), "pool_type": ("tok", "argmax"), "no_causal_mask": (False,),
    "norm_kwargs": ({},), "act_kwargs": ({},), "resize_mode": ("shortest",), "resample": (3,),
    "interpolation": ("bicubic",), "do_resize": (True,), "do_center_crop": (True,),
    "do_normalize": (True,), "do_rescale": (True,)}
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # OpenCLIP's H, g, bigG; else 64
VOCABULARY, PUBLISHED_SIZE, N_MERGES = "bpe_simple_vocab_16e6.txt.gz", 49408, 48894


def to_openai_names(tensors: Tensors) -> Tensors:
    """Any of the three layouts -> OpenAI's names, wrappers' prefixes stripped."""
    # "module.", "model." and the like: whatever stands in front of the text tower.
    found = next(filter(None, map(TEXT_TOWER.fullmatch, tensors)), None)
    require(found, "no token_embedding: no CLIP of the three kinds")
    wrapper, place = found.groups()
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


def sizes_from_shapes(tensors: Tensors) -> dict[str, object]:
    """ClipConfig's sizes, from weights in OpenAI's names. Raises KeyError."""
    def count(start: str, end: str) -> int:
        return sum(name.startswith(start) and name.endswith(end) for name in tensors)

    mlp = "transformer.resblocks.0.mlp.c_fc.bias"
    length, width = tensors["positional_embedding"].shape
    text = {"context_length": length, "text_width": width, "text_heads": width // 64,
            "embed_dim": tensors["text_projection"].shape[1],
            "vocab_size": len(tensors["token_embedding.weight"]),
            "text_layers": count("transformer.", ".ln_1.bias"),
            "text_hidden": len(tensors[mlp])}
    if "visual.proj" in tensors:
        width, _, _, patch = tensors["visual.conv1.weight"].shape
        side = math.isqrt(len(tensors["visual.positional_embedding"]))  # patches
        return text | {"image_size": side * patch, "patch_size": patch, "vision_width": width,
                       "vision_layers": count("visual.transformer.", ".ln_1.bias"),
                       "vision_heads": width // HEAD_WIDTHS.get(width, 64),
                       "vision_hidden": len(tensors[f"visual.{mlp}"])}
    width = len(tensors["visual.layer1.0.conv1.weight"])
    side = math.isqrt(len(tensors["visual.attnpool.positional_embedding"]))  # features
    layers = tuple(count(f"visual.layer{i}.", ".bn1.bias") for i in (1, 2, 3, 4))
    return text | {"image_size": 32 * side, "vision_width": width, "vision_heads": width // 2,
                   "vision_layers": layers}


def settings_beside(folder: Path) -> dict[str, object]:
    """ClipConfig's fields that OpenCLIP's or Hugging Face's files in a folder tell. Raises
    ValueError for what is not built here."""
    def table(name: str) -> dict:
        return json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}

    openclip = table("open_clip_config.json")
    model = openclip.get("model_cfg") or table("config.json")
    vision = model.get("vision_cfg") or model.get("vision_config")
    text = model.get("text_cfg") or model.get("text_config")
    if not (vision and text):  # of another model
        return {}
    pixels = openclip.get("preprocess_cfg") or table("preprocessor_config.json")
    for name, value in [*vision.items(), *text.items(), *pixels.items()]:
        require(value is None or value in ONLY.get(name, (value,)),
                f"its {name} is {value}: not built here")
    said = {"vision_heads": vision.get("num_attention_heads"),
            "text_heads": text.get("heads", text.get("num_attention_heads")),
            "pixel_mean": tuple(pixels.get("mean") or pixels.get("image_mean") or PIXEL_MEAN),
            "pixel_std": tuple(pixels.get("std") or pixels.get("image_std") or PIXEL_STD),
            "activation": text.get("hidden_act", "quick_gelu")}
    if openclip:
        said["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if "head_width" in vision:
        said["vision_heads"] = vision["width"] // vision["head_width"]
    return {field: value for field, value in said.items() if value is not None}


def weights_in(folder: Path) -> Tensors:
    """All tensors of a folder as Hugging Face lays it out: one file, or shards."""
    for pattern in ("model.safetensors", "open_clip_model.safetensors", "model-*.safetensors",
                    "pytorch_model.bin", "open_clip_pytorch_model.bin"):
        tensors = {}
        for file in folder.glob(pattern):
            tensors |= read_weights(file)[0]
        if tensors:
            return tensors
    raise FileNotFoundError(f"no model.safetensors, or shards, in {folder}")


def published_tokenizer(place: Path, context_length: int = 77) -> Tokenizer | None:
    """CLIP's tokenizer. Its merges are `place`, or lie in that folder, or in an installed CLIP
    package's; None where there are none. Raises ValueError for others."""
    specs = map(importlib.util.find_spec, ("clip", "open_clip"))
    folders = [place, *(Path(spec.origin).parent
                        for spec in specs if spec and spec.origin)]
    files = [folder / name for folder in folders for name in (VOCABULARY, "merges.txt")]
    path = next(filter(Path.is_file, [place, *files]), None)
    if path is None:
        return None
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    # A header line, then 262,144 pairs. CLIP uses as many as make 49,408 ids.
    merges = [tuple(line.split()) for line in text.split("\n")[1: N_MERGES + 1]]
    require(len(set(merges)) == N_MERGES, f"{path} is not CLIP's list of {N_MERGES} merges")
    return Tokenizer(merges, context_length)


# ---------------- weights on disk (safetensors)
#
# 8 bytes: n, little-endian. n bytes: JSON, name -> {dtype, shape, data_offsets}, and "__metadata__"
# of strings, padded to a multiple of 8. Then the tensors' raw little-endian bytes, without holes.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BOOL": torch.bool,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
FORMAT = "knn-diffusion 1"
# What Python and torch raise where a file's content does not fit.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def write_weights(path: AnyPath, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write tensors, all finite, and string metadata to a .safetensors file, atomically."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data = {"__metadata__": metadata}, bytearray()
    # Widest dtype first keeps every tensor aligned in the file.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        require(tensor.isfinite().all(), f"{name} is not finite: {path} was not written")
        begin = len(data)
        data += tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, len(data)]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.writelines([len(head).to_bytes(8, "little"), head, data])


def read_weights(path: AnyPath) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of torch's zip archive. Raises
    FileNotFoundError, or ValueError for a damaged file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return read_archive(path)
    size, tensors = os.path.getsize(path), {}
    try:
        raw = torch.from_file(str(path), size=size, dtype=torch.uint8)  # memory-mapped
        start = 8 + int.from_bytes(raw[:8].numpy().tobytes(), "little")
        header = json.loads(raw[8:start].numpy().tobytes())
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            blob = raw[begin:end].clone()  # aligned
            tensors[name] = blob.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        total = start + sum(tensor.nbytes for tensor in tensors.values())
        require(total == size, f"its header says {total} bytes, it has {size}")
    except MISFITS as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {reason(error)}") from None
    return tensors, metadata


# ---------------- foreign weights (zip archives)
#
# torch.save and torch.jit.save write a zip: TOP/data.pkl, a pickle, and tensors' raw bytes in
# TOP/data/KEY. A pickle is a program that may call any Python object by name. Here `find_class`
# answers with what builds tensors, or a class that does nothing: no foreign code runs.

class Inert(dict):
    """Any other object that a pickle names: it takes what comes and runs nothing. What it holds
    stays readable: TorchScript's modules are such objects."""
    __hash__ = object.__hash__  # classes and objects are keys of tables
    __init__ = __call__ = append = extend = lambda self, *_, **__: None

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


STORAGES = zip("Double Float Half Bool BFloat16 Long Int Byte".split(), DTYPES.values())
KNOWN = {f"torch.{kind}Storage": dtype for kind, dtype in STORAGES} | {
    "torch._utils._rebuild_tensor_v2":  # as_strided stays inside the storage
        lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "collections.OrderedDict": OrderedDict}


class ArchiveReader(pickle.Unpickler):
    """Reads the pickle of a zip archive of torch's."""
    def __init__(self, archive: zipfile.ZipFile) -> None:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        self.archive, self.folder, self.storages = archive, name.removesuffix(".pkl"), {}
        super().__init__(io.BytesIO(archive.read(name)))  # checksum checked

    def find_class(self, module: str, name: str) -> object:
        return KNOWN.get(f"{module}.{name}", Inert)

    def persistent_load(self, persistent_id: tuple) -> Tensor:
        _, dtype, key, _, _ = persistent_id
        if key not in self.storages:
            raw = np.frombuffer(bytearray(self.archive.read(f"{self.folder}/{key}")), np.uint8)
            self.storages[key] = torch.from_numpy(raw).view(dtype)
        return self.storages[key]


def named_tensors(found: dict, prefix: str = "") -> Tensors:
    """Dotted name -> tensor, of a TorchScript module, a state dict, or what holds one."""
    found, tensors = found.get("state_dict", found), {}
    for name, value in found.items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, Inert) and isinstance(found, Inert):  # a module in a module
            tensors |= named_tensors(value, f"{prefix}{name}.")
    return tensors


def read_archive(path: AnyPath) -> tuple[Tensors, dict[str, str]]:
    """Named tensors of a zip archive of torch.save or torch.jit.save, and which it is:
    metadata {} or {"format": "TorchScript"}. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = ArchiveReader(archive).load()
        return named_tensors(found), {"format": "TorchScript"} if isinstance(found, Inert) else {}
    except Exception as error:  # pickle and zipfile raise many kinds
        raise ValueError(f"{path} is no whole archive of tensors: {reason(error)}") from None


# ---------------- load, save

def save_model(path: AnyPath, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write a model's float16 weights, class name and config: enough to load it."""
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor
               for name, tensor in model.state_dict().items()}
    write_weights(path, tensors, {"format": FORMAT, "class": type(model).__name__,
                                  "config": json.dumps(asdict(model.config)), **metadata})


def weights_digest(module: nn.Module, also: str = "") -> str:
    """16 hex digits of a module's weights, rounded to float16, and of a text."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model(path: AnyPath, classes: dict[str, tuple]) -> tuple[nn.Module, dict[str, str]]:
    """Build the model that a file of `save_model` names, float32, on the CPU, in eval mode.
    classes: class name -> (model class, config class) that fit the caller. Raises as `load`."""
    tensors, metadata = read_weights(path)
    name = metadata.get("class", "foreign model")
    require(metadata.get("format") == FORMAT and name in classes,
            f"{path} holds a {name}, wanted {' or '.join(classes)}")
    model_class, config_class = classes[name]
    try:
        require(all(tensor.isfinite().all() for tensor in tensors.values()), "it is not finite")
        fields = {field: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
                  for field, value in json.loads(metadata["config"]).items()}
        model = model_class(config_class(**fields))
        model.load_state_dict(tensors)
    except MISFITS as error:
        raise ValueError(f"{path} does not fit the {name} of today: {reason(error)}") from None
    return model.eval(), metadata


def save(path: AnyPath, model: CLIP, metadata: dict[str, str]) -> None:
    """Write float16 weights, config and the tokenizer's merges in one file."""
    merges = map(" ".join, model.tokenizer.merges)
    save_model(path, model, {**metadata, "merges": "\n".join(merges)})


def load(path: AnyPath, tokenizer: AnyPath | None = None, activation: str | None = None) -> CLIP:
    """Load a CLIP, ours or a published one, with its tokenizer, in eval mode, on the CPU.

    path: our .safetensors; OpenAI's TorchScript .pt; a state dict as .pt, .bin or .safetensors in
        OpenAI's, OpenCLIP's or Hugging Face's names; a folder as Hugging Face lays it out.
    tokenizer: the published vocabulary's file or folder. Else it is looked for beside the weights
        and in installed CLIP packages. Without any, no text can be embedded.
    activation: "quick_gelu" or "gelu", where no file tells it; else guessed, with a warning.
    Raises FileNotFoundError, or ValueError for a file that does not fit."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tensors, metadata = (weights_in(path), {}) if path.is_dir() else read_weights(path)
    if metadata.get("format") == FORMAT:
        model, metadata = load_model(path, {"CLIP": (CLIP, ClipConfig)})
        merges = [tuple(line.split(" ")) for line in metadata.get("merges", "").splitlines()]
        model.tokenizer = Tokenizer(merges, model.config.context_length)
        return model.requires_grad_(False)
    try:
        tensors = to_openai_names(tensors)
        settings = sizes_from_shapes(tensors) | settings_beside(folder)
        if activation or metadata.get("format") == "TorchScript":  # OpenAI's: all QuickGELU
            settings["activation"] = activation or "quick_gelu"
        if "activation" not in settings:
            is_half = tensors["token_embedding.weight"].dtype == torch.float16
            settings["activation"] = "quick_gelu" if is_half else "gelu"
            warnings.warn(f"{path} does not name its activation: {settings['activation']} "
                          "is guessed; say activation=...", stacklevel=2)
        model = CLIP(ClipConfig(**settings))
        model.load_state_dict(tensors)
    except MISFITS as error:
        raise ValueError(f"{path} does not fit a CLIP: {reason(error)}") from None
    if model.config.vocab_size == PUBLISHED_SIZE:
        folder = Path(tokenizer or folder)
        model.tokenizer = published_tokenizer(folder, model.config.context_length)
    return model.eval().requires_grad_(False)


# ---------------- what the scripts share: no CLIP

SHIPPED = Path(__file__).resolve().parent / "weights" / "stickers"


def require(claim: object, message: str) -> None:
    """Raise ValueError(message) unless `claim` holds."""
    if not claim:
        raise ValueError(message)


def reason(error: Exception) -> str:
    """What an exception says, in one line."""
    said = " ".join(str(error).split())[:300]
    return said if " " in said else f"{type(error).__name__} {said}"


@contextmanager
def replacing(path: AnyPath) -> Iterator[io.BufferedIOBase]:
    """A fresh file beside `path`, open for writing. It takes path's place if all goes well, else
    is gone: a reader sees the old file or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".part", dir=path.parent) as folder:
            with open(Path(folder) / path.name, "wb") as file:
                yield file
            os.replace(file.name, path)
    except (OSError, RuntimeError) as error:  # torch.save's on a full disk
        raise OSError(f"{path} could not be written: {reason(error)}") from None


def run_command(parser: argparse.ArgumentParser, run: Callable, argv: list | None = None) -> int:
    """Parse arguments and run. Exit status: 0 done, 2 bad input, 1 else, with a sentence."""
    warnings.formatwarning = lambda message, *_: f"{message}\n"  # without its source line
    if hasattr(sys.stdout, "reconfigure"):  # for a terminal's narrow alphabet
        sys.stdout.reconfigure(errors="backslashreplace")
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
    return status


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Raises ValueError for others."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=auto if name == "auto" else name).device
    except Exception:  # one kind per missing backend
        raise ValueError(f"no device {name!r} here") from None


def to_x(pictures: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], made on the device."""
    return torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1] (B, 3, H, W), clipped -> 8-bit RGB pictures."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def grid(rows: list[list[Image.Image | None]], cell: int, labels: list[str] | None = None
         ) -> Image.Image:
    """Rows of pictures, `cell` pixels per side, below their labels; None is a grey cell."""
    above, height = (24, cell + 26) if labels else (2, cell + 2)
    columns, step, font = max(map(len, rows), default=1), cell + 2, ImageFont.load_default(14)
    sheet = Image.new("RGB", (columns * step + 2, len(rows) * height + 2), "white")
    for y, row in enumerate(rows):
        if labels:
            ImageDraw.Draw(sheet).text((4, y * height + 4), labels[y][:200], (60, 60, 60), font)
        for x, picture in enumerate(row):
            picture = picture or Image.new("RGB", (cell, cell), (235, 235, 235))
            if picture.width == picture.height and cell % picture.width == 0:
                picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(fit_square(picture, cell), (2 + x * step, above + y * height))
    return sheet
