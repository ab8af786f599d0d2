"""CLIP: one embedding space for pictures and texts (Radford et al., 2103.00020).

The retrieval model of kNN-Diffusion Sec. 3 is frozen; this is its pair of encoders:

    f_img(i) = W_i · ViT(i)[class token]        f_txt(t) = W_t · Transformer(t)[end token]

both divided by their norm, so that an inner product is a cosine. Names of modules and parameters
are those of OpenAI's release; the sticker CLIP that ships with this repository is a small one of
the same build, trained by `train.py clip`.

Shapes: B batch, C channels, H W picture, L tokens (M keys), D width (d a head), E CLIP dimension.

Left out so far: the ResNet image towers and the published checkpoints' own file formats.
"""
from __future__ import annotations

import functools
import hashlib
import html
import json
import math
import os
import re
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x·σ(1.702 x), a cheap stand-in for GELU; features differ if the two are mixed up."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of both towers. The defaults are ViT-B/32's."""
    embed_dim: int = 512             # E
    image_size: int = 224            # pixels a side
    patch_size: int = 32             # pixels a side
    vision_width: int = 768          # D of the image tower
    vision_layers: int = 12
    vision_heads: int = 12
    context_length: int = 77         # L of the text tower, start and end token included
    vocab_size: int = 49408          # the end token is the last id
    text_width: int = 512            # D of the text tower
    text_layers: int = 12
    text_heads: int = 8
    activation: str = "quick_gelu"   # OpenAI's weights; "gelu" for most of OpenCLIP's

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "activation" and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}, wanted a whole number of 1 or more")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, wanted {list(ACTIVATIONS)}")
        if (self.image_size % self.patch_size or self.vision_width % self.vision_heads
                or self.text_width % self.text_heads):
            raise ValueError("patches must tile the picture, and heads the widths")


# The sticker CLIP. Its vocabulary is learned, so train.py replaces vocab_size.
STICKERS = ClipConfig(embed_dim=256, image_size=64, patch_size=16, vision_width=256,
                      vision_layers=5, vision_heads=4, context_length=24, vocab_size=1514,
                      text_width=192, text_layers=3, text_heads=3, activation="gelu")

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)      # CLIP's own statistics, RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------- weights on disk (safetensors)
#
# 8 bytes: length n of the header, little-endian. n bytes: JSON, name -> {dtype, shape,
# data_offsets}, padded with spaces to a multiple of 8, plus "__metadata__" of strings. Then the
# tensors' raw little-endian bytes, one after the other without holes. No code can hide there.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
FORMAT = "knn-diffusion 1"
MAX_HEADER = 100_000_000              # bytes


def write_weights(path: str | os.PathLike, tensors: dict[str, Tensor],
                  metadata: dict[str, str]) -> None:
    """Write tensors and string metadata to a .safetensors file, atomically.

    Source: the safetensors format, written from its public description.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite: {path} was not written")
    # Widest dtype first keeps every tensor aligned in the file.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset, blobs = {"__metadata__": dict(metadata)}, 0, []
    for name, tensor in ordered:
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + blob.nbytes]}
        offset += blob.nbytes
        blobs.append(blob)
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for blob in blobs:
            file.write(blob.tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_weights(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors file: tensors, memory-mapped (copied on write), and the metadata.

    Raises FileNotFoundError, or ValueError with one sentence where the file is damaged: all lengths
    are checked before anything is mapped.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        header, start, size = read_header(path)
        metadata = header.pop("__metadata__", {})
        check(isinstance(metadata, dict)
              and all(isinstance(value, str) for value in metadata.values()),
              "its metadata are not strings")
        spans = check_spans(header, size - start)
    except (ValueError, RecursionError, struct.error) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from None
    storage = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    file = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name, (dtype, shape, begin, end) in spans.items():
        raw = file[start + begin: start + end]
        if raw.storage_offset() % dtype.itemsize:               # a foreign writer's odd order
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors, metadata


def check(claim: bool, message: str) -> None:
    if not claim:
        raise ValueError(message)


def read_header(path: Path) -> tuple[dict, int, int]:
    """The header as a dict, where the data begin, and the file's size, in bytes."""
    size = path.stat().st_size
    check(size >= 8, f"it has {size} bytes")
    with open(path, "rb") as file:
        n = struct.unpack("<Q", file.read(8))[0]
        check(2 <= n <= min(MAX_HEADER, size - 8), f"its header claims {n} bytes of {size}")
        header = json.loads(file.read(n).decode("utf-8"))
    check(isinstance(header, dict), "its header is no table")
    return header, 8 + n, size


def check_spans(header: dict, data_size: int) -> dict[str, tuple]:
    """name -> (dtype, shape, begin, end); the spans must tile the data without holes."""
    spans = {}
    for name, entry in header.items():
        check(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry),
              f"entry {name!r} lacks a field")
        shape, offsets = entry["shape"], entry["data_offsets"]
        check(isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES,
              f"entry {name!r} has an unknown dtype {entry['dtype']!r}")
        check(isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
              and len(shape) <= 16
              and all(type(n) is int and 0 <= n < 2**48 for n in shape + offsets),
              f"entry {name!r} has an odd shape or offsets")
        dtype = DTYPES[entry["dtype"]]
        check(offsets[1] - offsets[0] == math.prod(shape) * dtype.itemsize,
              f"entry {name!r} has {offsets[1] - offsets[0]} bytes for shape {shape}")
        spans[name] = (dtype, shape, *offsets)
    end = 0
    for _, _, begin, stop in sorted(spans.values(), key=lambda span: span[2:]):
        check(begin == end, f"there is a hole or an overlap at byte {end}")
        end = stop
    check(end == data_size, f"{end} bytes of tensors are announced, {data_size} are there")
    return spans


def save_model(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write a model's weights in float16, its class name and config: enough to load it again."""
    tensors = {name: t.half() if t.is_floating_point() else t
               for name, t in model.state_dict().items()}
    write_weights(path, tensors, {"format": FORMAT, "class": type(model).__name__,
                                  "config": json.dumps(asdict(model.config)), **metadata})


def load_model(path: str | os.PathLike, classes: dict[str, tuple[type, type]]
               ) -> tuple[nn.Module, dict[str, str]]:
    """Build the model that a file of `save_model` names, in float32 on the CPU, in eval mode.

    classes: class name -> (model class, config class) that the caller can use.
    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    tensors, metadata = read_weights(path)
    name = metadata.get("class")
    if metadata.get("format") != FORMAT or name is None:
        raise ValueError(f"{path} was not written by this project (no {FORMAT!r} in its metadata)")
    if name not in classes:
        raise ValueError(f"{path} holds a {name}, wanted {' or '.join(classes)}")
    model_class, config_class = classes[name]
    try:
        config = config_class(**json.loads(metadata["config"]))
        model = model_class(config)
        model.load_state_dict({key: t.float() if t.is_floating_point() else t
                               for key, t in tensors.items()})
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit the {name} of this version: {reason}") from None
    return model.eval(), metadata


# ---------------------------------------------------------------- tokenizer
#
# Byte-pair encoding (Sennrich et al., 1508.07909) over UTF-8 bytes, as GPT-2 and CLIP do it. Every
# byte has a printable stand-in, so that any text can be written down. A word starts as its bytes,
# the last one marked "</w>"; then the pair that was learned first among those present is merged,
# everywhere in the word, until no learned pair is left. What remains are the tokens.

WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@functools.cache
def byte_symbols() -> dict[int, str]:
    """GPT-2's stand-ins: printable Latin-1 bytes are themselves, the others count up from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """CLIP's cleaning: mend mojibake, unescape HTML twice, collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip().lower()


def split_words(text: str) -> list[str]:
    """Cleaned text -> its words in byte symbols, without the "</w>"."""
    symbols = byte_symbols()
    return ["".join(symbols[b] for b in word.encode()) for word in WORD.findall(clean(text))]


def merge_pair(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join every occurrence of the neighbours `pair` in a word, from left to right."""
    merged, i = [], 0
    while i < len(parts):
        if parts[i:i + 2] == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return tuple(merged)


class Tokenizer:
    """Texts <-> token ids. Vocabulary: 256 bytes, the same with "</w>", merges, start, end.

    The end token has the largest id, since the text tower finds it by arg-max.
    """

    def __init__(self, merges: list[tuple[str, str]], context_length: int = 77) -> None:
        # The published ids follow the stand-ins' order: printable bytes first.
        symbols = list(byte_symbols().values())
        words = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        words += SPECIAL
        self.merges, self.context_length = merges, context_length
        self.ids = {word: i for i, word in enumerate(words)}
        self.words = words
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = len(words) - 2, len(words) - 1
        self.cache: dict[str, list[int]] = {}

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word in byte symbols: merge the earliest learned pair until none is left."""
        parts = (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.rank.get(p, len(self.rank)))
            if pair not in self.rank:
                break
            parts = merge_pair(parts, pair)
        return [self.ids[part] for part in parts]

    def encode(self, text: str) -> list[int]:
        """Ids of a text without start and end token. Words are cached (the first 100,000)."""
        ids: list[int] = []
        for word in split_words(text):
            found = self.cache.get(word)
            if found is None:
                found = [self.ids[word]] if word in SPECIAL else self.encode_word(word)
                if len(self.cache) < 100_000:
                    self.cache[word] = found
            ids += found
        return ids

    def decode(self, ids: list[int]) -> str:
        """Words and signs that ids stand for, a space between two; start and end are dropped."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        symbols = "".join(self.words[i] for i in ids if i != self.start).replace("</w>", " ")
        byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        return bytes(byte_of.get(s, 32) for s in symbols).decode("utf-8", "replace").strip()

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (B, L): start, tokens, end, then zeros. A longer text is cut and keeps its end
        token (CLIP pools there), with a warning."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > self.context_length:
                warnings.warn(f"a text of {len(ids)} tokens was cut to {self.context_length}: "
                              f"{text[:40]!r}", stacklevel=2)
                ids = [*ids[: self.context_length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------- pictures

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_image(path: str | os.PathLike) -> Image.Image:
    """Open any picture as RGB: first frame, EXIF rotation applied, transparency put on white.

    Raises FileNotFoundError, or ValueError with one sentence where Pillow can't read it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except Exception as error:            # Pillow's decoders raise many kinds on damaged files
        raise ValueError(f"{path} is no readable picture ({type(error).__name__})") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """EXIF rotation applied, 16-bit grey scaled to 8 bits, transparency on white, then RGB."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode} does not say its range")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side resized to `size` with Pillow's antialiased bicubic, then a centre crop."""
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if short != size:                               # the long side is truncated, not rounded
        width, height = (size if side == short else int(size * side / short)
                         for side in (width, height))
    left, top = round((width - size) / 2), round((height - size) / 2)
    if short != size and long > 16 * short:         # a thin picture: resize what is kept alone
        x, y = picture.width / width, picture.height / height
        return picture.resize((size, size), Image.Resampling.BICUBIC,
                              box=(left * x, top * y, (left + size) * x, (top + size) * y))
    if short != size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def to_pixels(pictures: np.ndarray | list[Image.Image]) -> Tensor:
    """uint8 (B, H, W, 3) or RGB pictures of one size -> CLIP's float32 pixels (B, 3, H, W)."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 - mean) / std


def to_pictures(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1] (B, 3, H, W), clipped -> 8-bit RGB pictures."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def grid(rows: list[list[Image.Image | None]], cell: int) -> Image.Image:
    """Pictures in rows, each `cell` pixels a side, a gap between them; None leaves a grey cell."""
    columns, gap = max((len(row) for row in rows), default=1), 2
    size = (columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is None:
                picture = Image.new("RGB", (cell, cell), (235, 235, 235))
            elif picture.width == picture.height and cell % picture.width == 0:
                picture = picture.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(fit_square(picture, cell),
                        (gap + x * (cell + gap), gap + y * (cell + gap)))
    return sheet


# ---------------------------------------------------------------- layers

class LayerNorm(nn.LayerNorm):
    """Computed in float32 whatever comes in: half precision loses the small variances."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(),
                            self.bias.float(), self.eps).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for q (B, heads, L, d) and k, v (B, heads, M, d); softmax in float32.

    torch's fused kernel, but written out where a gradient is wanted on the CPU: there the fused
    backward pass is several times slower than these three products at a few hundred tokens.
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

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)                 # (B, L, 3D)
        q, k, v = qkv.view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = attention(q, k, v, is_causal)                                         # (B, heads, L, d)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, D))                  # (B, L, D)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(ln(x)), then x + MLP(ln(x)), hidden width 4 D."""

    def __init__(self, width: int, heads: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; `is_causal` hides later tokens (text)."""

    def __init__(self, width: int, layers: int, heads: int, activation: str,
                 is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.is_causal)
        return x


class VisionTransformer(nn.Module):
    """The image tower: patches and a class token through a transformer, class token projected."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D, patch = config.vision_width, config.patch_size
        n_patches = (config.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, D, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(D ** -0.5 * torch.randn(D))
        self.positional_embedding = nn.Parameter(D ** -0.5 * torch.randn(n_patches + 1, D))
        self.ln_pre = LayerNorm(D)
        self.transformer = Transformer(D, config.vision_layers, config.vision_heads,
                                       config.activation, is_causal=False)
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


class CLIP(nn.Module):
    """Both towers and the learned temperature. `tokenizer` belongs to the weights.

    The text tower's modules sit at the top level, as OpenAI's names want it.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        D = config.text_width
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.visual = VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, D))
        self.transformer = Transformer(D, config.text_layers, config.text_heads,
                                       config.activation, is_causal=True)
        self.ln_final = LayerNorm(D)
        self.text_projection = nn.Parameter(D ** -0.5 * torch.randn(D, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for tower in (self.visual.transformer, self.transformer):
            initialise(tower)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """CLIP pixels (B, 3, H, W) -> unit-norm float32 (B, E)."""
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) from the tokenizer -> unit-norm float32 (B, E)."""
        # Attention is causal: nothing behind the end token can change it, so it is cut away.
        tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]  # (B, D): the end token
        return F.normalize((x @ self.text_projection).float(), dim=-1)   # (B, E)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit-norm float32 (B, E), on the model's device; cut with a warning if long."""
        return self.embed_tokens(self.tokenizer(texts).to(self.logit_scale.device))

    @torch.no_grad()
    def embed_pictures(self, pictures: list[Image.Image]) -> Tensor:
        """RGB pictures of any sizes -> unit-norm float32 (B, E), on the model's device."""
        size = self.config.image_size
        pixels = to_pixels([fit_square(picture, size) for picture in pictures])
        return self.embed_images(pixels.to(self.logit_scale.device))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Cosines of every picture with every text, times the temperature: logits (B, B).

        float32 even under autocast: bfloat16 logits would move in steps of a quarter.
        """
        images, texts = self.embed_images(pixels), self.embed_tokens(tokens)      # (B, E)
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.clamp(max=math.log(100)).exp() * (images @ texts.T)

    def describe(self) -> str:
        """The build in words, for manifests and messages."""
        c = self.config
        return (f"CLIP ViT {c.image_size}/{c.patch_size}, {c.vision_layers} x {c.vision_width} and "
                f"{c.text_layers} x {c.text_width}")

    def fingerprint(self) -> str:
        """16 hex digits that tell two CLIPs apart, the same for float32 and float16 files.

        Weights, config and vocabulary go in: two CLIPs with one fingerprint embed alike.
        """
        merges = self.tokenizer.merges if self.tokenizer else []
        digest = hashlib.sha256(json.dumps([asdict(self.config), merges]).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().half().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def initialise(tower: Transformer) -> None:
    """CLIP's initial scales: residual branches shrink with depth, so their sum does not grow."""
    for block in tower.resblocks:
        D, layers = block.ln_1.normalized_shape[0], len(tower.resblocks)
        nn.init.normal_(block.attn.in_proj_weight, std=D ** -0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=D ** -0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=D ** -0.5 * (2 * layers) ** -0.5)


# ---------------------------------------------------------------- load, save

def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Raises ValueError for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"no device {name!r} here") from None


def save(path: str | os.PathLike, model: CLIP, metadata: dict[str, str]) -> None:
    """Write float16 weights, config and the tokenizer's merges in one file."""
    merges = "\n".join(" ".join(pair) for pair in model.tokenizer.merges)
    save_model(path, model, {**metadata, "merges": merges})


def load(path: str | os.PathLike) -> CLIP:
    """Load a CLIP with its tokenizer from one file, in eval mode, float32, on the CPU.

    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    model, metadata = load_model(path, {"CLIP": (CLIP, ClipConfig)})
    lines = metadata.get("merges", "").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line]
    if 514 + len(merges) != model.config.vocab_size or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path} has {len(merges)} merges for {model.config.vocab_size} tokens")
    model.tokenizer = Tokenizer(merges, model.config.context_length)
    return model.requires_grad_(False)
