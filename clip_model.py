"""CLIP: one embedding space for pictures and texts (Radford et al., 2103.00020).

The retrieval model of kNN-Diffusion Sec. 3 is frozen; this is its pair of encoders:

    f_img(i) = W_i · ViT(i)[class token]        f_txt(t) = W_t · Transformer(t)[end token]

both divided by their norm, so that an inner product is a cosine; in place of the ViT some of the
published models have a ResNet. Names of modules and parameters are those of OpenAI's release.
`load` takes the published checkpoints of OpenAI, OpenCLIP and Hugging Face, and the small sticker
CLIP that ships with this repository, trained by `train.py clip`.

Shapes: B batch, C channels, H W picture, L tokens (M keys), D width (d a head), E CLIP dimension.

Left out: other projects' towers (timm's, Hugging Face's text models), CoCa's and SigLIP's heads.
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import html
import importlib.util
import json
import math
import os
import pickletools
import re
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

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
    patch_size: int = 32             # pixels a side; of a ResNet: pixels a feature
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

    def __post_init__(self) -> None:
        if isinstance(self.vision_layers, list):                         # JSON gives lists back
            object.__setattr__(self, "vision_layers", tuple(self.vision_layers))
        for name, value in asdict(self).items():
            least = 0 if name.endswith("hidden") else 1
            for number in value if isinstance(value, tuple) and len(value) == 4 else (value,):
                if name != "activation" and (type(number) is not int or number < least):
                    raise ValueError(f"{name} is {value!r}, wanted whole numbers from {least} up")
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
        require(bool(torch.isfinite(tensor).all()), f"{name} is not finite: {path} was not written")
    # Widest dtype first keeps every tensor aligned in the file.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, offset, blobs = {"__metadata__": dict(metadata)}, 0, []
    for name, tensor in ordered:
        blob = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + blob.nbytes]}
        offset += blob.nbytes
        blobs.append(blob)
    header["__metadata__"]["digest"] = header_digest(header)
    head = json.dumps(header, ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
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
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            require(8 < start <= min(8 + MAX_HEADER, size),
                  f"its header ends at byte {start} of {size}")
            header = json.loads(file.read(start - 8).decode("utf-8"))
        require(isinstance(header, dict), "its header is no table")
        metadata = header.pop("__metadata__", {})
        require(all(isinstance(value, str) for value in metadata.values()),
              "its metadata are not strings")
        if re.fullmatch("[0-9a-f]{16}", metadata.get("digest", "")):            # ours
            require(metadata.pop("digest") == header_digest({"__metadata__": metadata, **header}),
                  "its header was changed after it was written")
        spans = check_spans(header, size - start)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from None
    file = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, dtype, shape, begin, end in spans:
        raw = file[start + begin: start + end]
        if raw.storage_offset() % dtype.itemsize:               # a foreign writer's odd order
            raw = raw.clone()
        tensors[name] = raw.view(dtype).reshape(shape)
    return tensors, metadata


def require(claim: bool, message: str) -> None:
    """Raise ValueError(message) unless `claim` holds."""
    if not claim:
        raise ValueError(message)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A fresh file beside `path`, open for writing; it takes path's place when all went well, and
    is gone when not. So a reader sees the old file or the new one, whole."""
    path = Path(path)
    file = tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, suffix=".part",
                                       delete=False)
    try:
        with file:
            yield file
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except BaseException:
        os.unlink(file.name)
        raise


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None],
                argv: list[str] | None = None) -> int:
    """Parse a script's arguments and run it; the exit status: 0 done, 2 bad input, 1 anything else,
    said in one sentence on stderr. No text is lost for a terminal's narrow alphabet."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        run(parser.parse_args(argv))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        print(error or "out of memory", file=sys.stderr)
        return 1
    return 0


def header_digest(header: dict) -> str:
    """16 hex digits over the header without its own digest. Ours: a digit that flips in a config or
    in a merge would else go unseen; files of others have none like it and pass."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def check_spans(header: dict, data_size: int) -> list[tuple]:
    """(name, dtype, shape, begin, end) in the file's order, which must leave no holes."""
    for name, entry in header.items():
        require(isinstance(entry, dict) and {"dtype", "shape", "data_offsets"} <= set(entry),
              f"entry {name!r} lacks a field")
        require(str(entry["dtype"]) in DTYPES, f"entry {name!r} has an unknown dtype "
                                             f"{entry['dtype']!r}")
    spans, place = [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        require(isinstance(shape, list) and len(shape) <= 16
              and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end))
              and math.prod(n or 1 for n in shape) < 2**60,
              f"entry {name!r} has an odd shape or offsets")
        require(begin == place, f"there is a hole or an overlap at byte {place}")
        require(end - begin == math.prod(shape) * dtype.itemsize,
              f"entry {name!r} has {end - begin} bytes for shape {shape}")
        spans.append((name, dtype, shape, begin, end))
        place = end
    require(place == data_size, f"{place} bytes of tensors are announced, {data_size} are there")
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
    require(metadata.get("format") == FORMAT and name is not None,
          f"{path} was not written by this project (no {FORMAT!r} in its metadata)")
    require(name in classes, f"{path} holds a {name}, wanted {' or '.join(classes)}")
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


# ---------------------------------------------------------------- weights on disk (zip archives)
#
# torch.save and torch.jit.save write a zip: TOP/data.pkl, a pickle, and each tensor's raw bytes in
# TOP/data/KEY. A pickle is a program for a small stack machine: most instructions push a value,
# GLOBAL pushes a Python name, and REDUCE, NEWOBJ and BUILD call what was named. To load a pickle is
# to run it, so a foreign one may do anything. The machine below knows the instructions that tensors
# in plain containers need; what it may "call" is written out here, and nothing is imported.

STORAGE_DTYPES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
                  "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
                  "LongStorage": torch.int64, "IntStorage": torch.int32,
                  "ShortStorage": torch.int16, "CharStorage": torch.int8,
                  "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
MAX_PICKLE = 100_000_000              # bytes
# How the files begin. Two bytes are too few: a .safetensors begins with its header's length.
ZIP, OLD_PICKLE = b"PK\x03\x04", b"\x80\x02\x8a\x0a"


class Name(str):
    """A Python name that a pickle mentions, "module name"; never looked up."""


class Node(dict):
    """An object of a TorchScript archive: its attributes, without any code."""


def build_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    """What `torch._utils._rebuild_tensor_v2` does; `as_strided` keeps it inside the storage."""
    require(isinstance(size, tuple) and len(size) <= 16, "a tensor has an odd size")
    tensor = storage.as_strided(size, stride, offset)
    # A stride of 0 would show one number again and again: small here, huge once it is copied.
    require(tensor.numel() <= storage.numel(), "a tensor exceeds its storage")
    return tensor


def first(value: object, *_: object) -> object:
    return value


CALLABLE = {"torch._utils _rebuild_tensor_v2": build_tensor,
            "torch._utils _rebuild_parameter": first, "torch Size": first,
            "torch.jit._pickle build_intlist": first, "torch.jit._pickle build_doublelist": first,
            "torch.jit._pickle build_boollist": first, "torch.jit._pickle build_tensorlist": first,
            "torch.jit._pickle restore_type_tag": first,
            "collections OrderedDict": lambda: {}}         # filled by SETITEMS
PUSHES_ITS_VALUE = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
                    "SHORT_BINUNICODE"}
PUSHES = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
          "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}


def run_pickle(program: bytes, open_storage: Callable[[tuple], Tensor]) -> object:
    """Run a pickle on a machine that can only build tensors, numbers, strings and containers.

    open_storage: persistent id -> the storage as a flat tensor.
    Raises ValueError naming what the pickle wants to call or do besides; LookupError or TypeError
    where its instructions make no sense.
    """
    stack, marks, memo = [], [], {}                # marks: how high the stack was at each MARK

    def pop(n: int) -> list:
        return [stack.pop() for _ in range(n)][::-1]

    def pop_mark() -> list:
        return pop(len(stack) - marks.pop())

    for op, value, _ in pickletools.genops(program):
        name = op.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name in PUSHES_ITS_VALUE:
            stack.append(value)
        elif name in PUSHES:
            stack.append(PUSHES[name]())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(Name(value if name == "GLOBAL" else " ".join(pop(2))))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop_mark() if name == "TUPLE" else pop(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else pop_mark()
            require(type(stack[-1]) is list, "its pickle appends to no list")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else pop_mark()
            # Keys of other kinds are hashed, and a tuple's hash goes as deep as the tuple.
            require(type(stack[-1]) is dict and all(type(key) in (str, int) for key in items[::2]),
                  "its pickle fills no table of names")
            stack[-1].update(zip(items[::2], items[1::2]))
        elif name == "BINPERSID":
            stack.append(open_storage(*pop(1)))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = pop(2)
            what = called if isinstance(called, Name) else type(called).__name__
            if name == "NEWOBJ" and what.startswith("__torch__") and arguments == ():
                stack.append(Node())
            else:
                require(name == "REDUCE" and what in CALLABLE,
                      f"its pickle wants to call {what!r}, which is refused")
                stack.append(CALLABLE[what](*arguments))
        elif name == "BUILD":                      # of a state dict it is _metadata: left out
            state, = pop(1)
            require(isinstance(state, dict) and isinstance(stack[-1], dict),
                  "its pickle gives attributes to what has none")
            if isinstance(stack[-1], Node):
                stack[-1].update(state)
        elif name == "STOP":
            require(len(stack) == 1 and not marks, "its pickle ends early")
            return stack[0]
        else:
            raise ValueError(f"its pickle has the instruction {name}, which is refused")
    raise ValueError("its pickle has no end")


def read_archive(path: str | os.PathLike) -> object:
    """What torch.save or torch.jit.save wrote: containers, tensors, and `Node` for a module.

    All lengths are checked against the file's. Raises many kinds; `read_tensors` has one sentence.
    """
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        require(len(pickles) == 1, "it has no data.pkl")
        top = pickles[0].split("/")[0]
        require(sum(info.file_size for info in entries.values()
                  if info.compress_type == zipfile.ZIP_STORED) <= os.path.getsize(path),
              "its entries overlap")

        def read(name: str) -> bytearray:
            require(entries[name].compress_type == zipfile.ZIP_STORED,
                  f"its entry {name} is compressed")
            return bytearray(archive.read(name))                   # checks the checksum too

        @functools.cache
        def storage(kind: str, key: str) -> Tensor:
            require(kind in STORAGE_DTYPES, f"it has a storage of kind {kind!r}")
            raw, dtype = read(f"{top}/data/{key}"), STORAGE_DTYPES[kind]
            return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)

        def open_storage(persistent_id: tuple) -> Tensor:
            what, kind, key, _, n = persistent_id                  # _ is the device it was on
            require(what == "storage" and type(key) is str, "it refers to no storage")
            found = storage(kind.split()[-1], key)
            require(len(found) == n, f"its storage {key} has an odd size")
            return found

        order = f"{top}/byteorder"
        require(order not in entries or read(order) == b"little", "it is big-endian")
        require(entries[pickles[0]].file_size <= MAX_PICKLE, "its pickle is too long")
        return run_pickle(bytes(read(pickles[0])), open_storage)


def named_tensors(found: object) -> dict[str, Tensor]:
    """Dotted name -> tensor, out of a TorchScript module, a state dict, or what is around one."""
    require(isinstance(found, dict), "it holds no table of tensors")
    if not isinstance(found, Node):
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        inner = [found[key] for key in ("state_dict", "model_state_dict", "model") if key in found]
        return named_tensors(inner[0]) if inner and len(tensors) < 2 else tensors
    tensors, modules = {}, [("", found)]
    for prefix, module in modules:                 # the list grows on the way
        # Modules that are shared again and again would take years to name.
        require(len(prefix) < 1000 and len(modules) + len(tensors) < 100_000,
              "its modules are nested too deeply")
        for name, value in module.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, Node):
                modules.append((f"{prefix}{name}.", value))
    return tensors


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Named tensors of any weights file, and its metadata: {"format": "TorchScript"} for such an
    archive, {} for what torch.save wrote.

    .safetensors, zip archives of torch.save and torch.jit.save, torch.save's older single pickle
    (through torch.load's own restricted reader). Raises FileNotFoundError or ValueError.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no weights file at {path}")
    with open(path, "rb") as file:
        start = file.read(4)
    if start not in (ZIP, OLD_PICKLE):
        return read_weights(path)
    try:
        found = (read_archive(path) if start == ZIP else
                 torch.load(path, map_location="cpu", weights_only=True))
        tensors = named_tensors(found)
        require(len(tensors) > 0 and all(isinstance(name, str) for name in tensors),
              "it holds no table of tensors")
    except Exception as error:                   # zipfile and torch raise many kinds
        reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:200]
        raise ValueError(f"{path} is not a whole archive of plain tensors: "
                         f"{reason or type(error).__name__}") from None
    return tensors, {"format": "TorchScript"} if isinstance(found, Node) else {}


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
        self.words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), *SPECIAL]
        self.merges, self.context_length = merges, context_length
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = len(self.words) - 2, len(self.words) - 1
        self.pad = 0                                 # OpenAI's and OpenCLIP's; Hugging Face: end
        self.cached: dict[str, list[int]] = {}

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
        """Ids of a text without start and end token. Words are cached (the first 100,000)."""
        ids: list[int] = []
        for word in split_words(text):
            found = self.cached.get(word) or self.encode_word(word)
            if len(self.cached) < 100_000:
                self.cached[word] = found
            ids += found
        return ids

    def decode(self, ids: list[int]) -> str:
        """Words and signs that ids stand for, a space between two; start and end are dropped."""
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        symbols = "".join(self.words[i] for i in ids if i != self.start).replace("</w>", " ")
        byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        return bytes(byte_of.get(s, 32) for s in symbols).decode("utf-8", "replace").strip()

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (B, L): start, tokens, end, then `pad`. A longer text is cut and keeps its end
        token (CLIP pools there), with a warning."""
        tokens = torch.full((len(texts), self.context_length), self.pad)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > self.context_length:
                warnings.warn(f"a text of {len(ids)} tokens was cut to {self.context_length}: "
                              f"{text[:40]!r}", stacklevel=2)
                ids = [*ids[: self.context_length - 1], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


# ---------------------------------------------------------------- the published vocabulary

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_SIZE = 49408


def find_vocabulary(beside: Path) -> Path | None:
    """A file or folder with CLIP's vocabulary: beside the weights, or in an installed CLIP package
    (found on the disk, not imported)."""
    specs = [importlib.util.find_spec(package) for package in ("clip", "open_clip")]
    packages = [Path(spec.submodule_search_locations[0]) for spec in specs
                if spec and spec.submodule_search_locations]
    return next((folder for folder in (beside, *packages) for name in (VOCABULARY, "merges.txt")
                 if (folder / name).is_file()), None)


def read_vocabulary(path: Path, context_length: int = 77) -> Tokenizer:
    """CLIP's published tokenizer from the list of merges, gzipped or not, or from a folder with it
    or with Hugging Face's merges.txt (and vocab.json, which must then agree).

    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    file = path
    if path.is_dir():
        file = path / (VOCABULARY if (path / VOCABULARY).is_file() else "merges.txt")
    if not file.is_file():
        raise FileNotFoundError(f"no {VOCABULARY} or merges.txt at {path}")
    try:
        raw = file.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            # The published list has 1.4 MB in the clear; a bomb is cut off, then has no fit.
            raw = zlib.decompressobj(wbits=31).decompress(raw, 20_000_000)
        # A header line, then 262,144 pairs, of which CLIP uses so many that the ids are 49,408.
        lines = raw.decode("utf-8").split("\n")[1: PUBLISHED_SIZE - 514 + 1]
        merges = [tuple(line.split()) for line in lines]
        require(len(set(merges)) == PUBLISHED_SIZE - 514 and all(len(p) == 2 for p in merges),
              f"it has {len(set(merges))} different merges, wanted 48894 pairs")
        tokenizer = Tokenizer(merges, context_length)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{file} is not CLIP's list of merges: {error}") from None
    if file.name == "merges.txt":
        ids = file.parent / "vocab.json"
        require(not ids.is_file() or read_json(ids) == tokenizer.ids, f"{ids} and {file} disagree")
        # Hugging Face fills up with its pad token, the end token unless told otherwise.
        tokenizer.pad = tokenizer.end
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file.parent / name).is_file():
                pad = read_json(file.parent / name).get("pad_token")
                pad = pad.get("content") if isinstance(pad, dict) else pad
                tokenizer.pad = tokenizer.ids.get(str(pad), tokenizer.pad)
    return tokenizer


# ---------------------------------------------------------------- pictures

MAX_PIXELS = 64_000_000               # of a picture that is resized whole before it is cropped
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
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path} is no readable picture ({' '.join(reason.split())[:100]})"
                         ) from None


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
    width, height, left, top = fitted(picture.size, size)
    if width * height > MAX_PIXELS:                        # thin as a thread: resize what is kept
        return picture.resize((size, size), Image.Resampling.BICUBIC,
                              box=kept_box(picture.size, size))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture.crop((left, top, left + size, top + size))


def fitted(size_before: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """`fit_square`'s width and height after resizing, and where its crop begins: left, top. The
    long side is truncated, not rounded, the offset rounded: as torchvision does."""
    short = min(size_before)
    width, height = (size if side == short else int(size * side / short) for side in size_before)
    return width, height, round((width - size) / 2), round((height - size) / 2)


def kept_box(size_before: tuple[int, int], size: int) -> tuple[float, float, float, float]:
    """What `fit_square` keeps, in the picture's own pixels: left, top, right, bottom."""
    width, height, left, top = fitted(size_before, size)
    x, y = size_before[0] / width, size_before[1] / height
    return left * x, top * y, (left + size) * x, (top + size) * y


def to_pixels(pictures: np.ndarray | list[Image.Image]) -> Tensor:
    """uint8 (B, H, W, 3) or RGB pictures of one size -> CLIP's float32 pixels (B, 3, H, W)."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255 - mean) / std


def to_pictures(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1] (B, 3, H, W), clipped -> 8-bit RGB pictures."""
    array = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in array]


def to_x(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    """Pre-norm residual block: x + attention(ln(x)), then x + MLP(ln(x))."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.attn(self.ln_1(x), is_causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks; `is_causal` hides later tokens (text)."""

    def __init__(self, width: int, layers: int, heads: int, hidden: int, activation: str,
                 is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.resblocks = nn.ModuleList(Block(width, heads, hidden or 4 * width, activation)
                                       for _ in range(layers))

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
    in front of a convolution, on both ways."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.stride, self.downsample = stride, None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                            nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:                              # (B, C, h, w)
        short = x
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        if self.stride > 1:
            x, short = F.avg_pool2d(x, self.stride), F.avg_pool2d(short, self.stride)
        x = self.bn3(self.conv3(x))                                      # (B, C', h', w')
        return F.relu(x + (short if self.downsample is None else self.downsample(short)))


class AttentionPool(nn.Module):
    """The mean of all features asks, the mean and the features answer; one answer a picture."""

    def __init__(self, n_features: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(n_features + 1, width))
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.c_proj = nn.Linear(width, width), nn.Linear(width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:                              # (B, D, h, w)
        x = x.flatten(2).transpose(1, 2)                                 # (B, L-1, D)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
                   for part in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)))
        x = attention(q, k, v)                                           # (B, heads, 1, d)
        return self.c_proj(x.flatten(1))                                 # (B, E)


class ModifiedResNet(nn.Module):
    """The other image tower: a stem of three convolutions, four stages, attention pooling."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
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


class CLIP(nn.Module):
    """Both towers and the learned temperature. `tokenizer` belongs to the weights.

    The text tower's modules sit at the top level, as OpenAI's names want it.
    """

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
        initialise(self.transformer)
        if not is_resnet:
            initialise(self.visual.transformer)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """CLIP pixels (B, 3, H, W) -> unit-norm float32 (B, E)."""
        dtype = self.visual.conv1.weight.dtype
        return F.normalize(self.visual(pixels.to(dtype)).float(), dim=-1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) from the tokenizer -> unit-norm float32 (B, E)."""
        # The end token has the largest id. Attention is causal: nothing behind it can change it.
        end = tokens.argmax(-1)                                          # (B,)
        tokens = tokens[:, : int(end.max()) + 1]
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        x = self.ln_final(self.transformer(x))
        x = x[torch.arange(len(x), device=x.device), end]  # (B, D)
        return F.normalize((x @ self.text_projection).float(), dim=-1)   # (B, E)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        """Texts -> unit-norm float32 (B, E), on the model's device; cut with a warning if long.

        Raises FileNotFoundError where weights came without their vocabulary and none was found.
        """
        if self.tokenizer is None:
            raise FileNotFoundError(
                f"texts need CLIP's vocabulary: put {VOCABULARY} (openai/CLIP and open_clip keep "
                "it in their package's folder) or Hugging Face's vocab.json and merges.txt beside "
                "the weights, or name it")
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
        tower = (f"ResNet {c.image_size}, {','.join(map(str, c.vision_layers))}"
                 if isinstance(c.vision_layers, tuple) else
                 f"ViT {c.image_size}/{c.patch_size}, {c.vision_layers}")
        return (f"CLIP {tower} x {c.vision_width} and {c.text_layers} x {c.text_width}, "
                f"{c.activation}")

    def fingerprint(self) -> str:
        """16 hex digits that tell two CLIPs apart, the same for float32 and float16 files.

        Weights, config and vocabulary go in: two CLIPs with one fingerprint embed alike. The
        published vocabulary is one for all and may be absent: it is left out.
        """
        is_own = self.tokenizer is not None and len(self.tokenizer.words) != PUBLISHED_SIZE
        config = {name: value for name, value in asdict(self.config).items() if value}
        digest = hashlib.sha256(json.dumps(
            [config, self.tokenizer.merges if is_own else []]).encode())
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


# ---------------------------------------------------------------- published checkpoints
#
# Three projects publish CLIPs under three sets of names. All are turned into OpenAI's, then the
# sizes are read off the shapes; what shapes can't say (heads, activation) is read from a config
# beside the file, or known, or guessed with a warning.

# Hugging Face's names, piece by piece; q, k, v and the transposed projections are treated apart.
FROM_HUGGING_FACE = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),                     # their spelling
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    (".self_attn.", ".attn."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))
TEXT_TOWER = re.compile(r"(.*?)(text_model\.embeddings\.|text\.|)token_embedding.weight")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}      # OpenCLIP's H, g, bigG image towers; else 64


def to_openai_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the three layouts -> OpenAI's names, wrappers' prefixes stripped."""
    # "module.", "model." and the like: whatever stands in front of the text tower.
    found = [match.groups() for match in map(TEXT_TOWER.fullmatch, tensors) if match]
    require(found, "it has no token_embedding: no CLIP in OpenAI's, OpenCLIP's or Hugging Face's "
                 "layout")
    wrapper, text_tower = found[0]
    tensors = {name.removeprefix(wrapper).removeprefix("text."): t for name, t in tensors.items()
               if name.startswith(wrapper) and name.split(".")[-1] not in NOT_WEIGHTS}
    if text_tower != "text_model.embeddings.":
        return tensors
    renamed = {}
    for name, t in tensors.items():
        for theirs, ours in FROM_HUGGING_FACE:
            name = name.replace(theirs, ours)
        renamed[name] = t.T if name in ("visual.proj", "text_projection") else t
    for name in [name for name in renamed if ".attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return renamed


def sizes_from_shapes(tensors: dict[str, Tensor], activation: str, heads: dict[str, int]
                      ) -> ClipConfig:
    """The config of weights in OpenAI's names. heads: `vision_heads`, `text_heads` where known."""
    def shape(name: str) -> tuple[int, ...]:
        require(name in tensors, f"it lacks {name}")
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({found[1] for name in tensors if (found := re.match(pattern, name))})

    text_width = shape("ln_final.weight")[0]
    text = {"embed_dim": shape("text_projection")[1],
            "context_length": shape("positional_embedding")[0],
            "vocab_size": shape("token_embedding.weight")[0], "text_width": text_width,
            "text_layers": count(r"transformer\.resblocks\.(\d+)\."),
            "text_heads": text_width // 64,
            "text_hidden": shape("transformer.resblocks.0.mlp.c_fc.bias")[0],
            "activation": activation}
    if "visual.proj" in tensors:
        width, _, _, patch = shape("visual.conv1.weight")
        side = math.isqrt(shape("visual.positional_embedding")[0] - 1)
        vision = {"image_size": side * patch, "patch_size": patch, "vision_width": width,
                  "vision_layers": count(r"visual\.transformer\.resblocks\.(\d+)\."),
                  "vision_heads": width // HEAD_WIDTHS.get(width, 64),
                  "vision_hidden": shape("visual.transformer.resblocks.0.mlp.c_fc.bias")[0]}
    else:
        width = shape("visual.layer1.0.conv1.weight")[0]
        side = math.isqrt(shape("visual.attnpool.positional_embedding")[0] - 1)
        vision = {"image_size": 32 * side, "patch_size": 32, "vision_width": width,
                  "vision_layers": tuple(count(rf"visual\.layer{i}\.(\d+)\.") for i in range(1, 5)),
                  "vision_heads": width // 2, "vision_hidden": 0}
    return ClipConfig(**(text | vision | heads))


def read_json(path: Path) -> dict:
    """A small JSON table. Raises ValueError with one sentence where it is none."""
    try:
        table = json.loads(path.read_text("utf-8"))
        require(isinstance(table, dict), "it holds no table")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    return table


def config_beside(folder: Path, is_own: bool) -> tuple[str | None, dict[str, int]]:
    """Activation and heads as the folder's config tells: Hugging Face's or OpenCLIP's, else None.
    is_own: the folder is the model's; a file may lie beside a config.json of something else.

    Raises ValueError for a config that asks for what CLIP here is not.
    """
    try:
        if (folder / "open_clip_config.json").is_file():
            found = read_json(folder / "open_clip_config.json")
            model = found["model_cfg"]
            vision, text = model["vision_cfg"], model["text_cfg"]
            odd = {"timm_model_name", "hf_model_name", "norm_kwargs", "act_kwargs"} & (
                set(vision) | set(text))
            require(not odd and vision.get("pool_type", "tok") == "tok",
                  f"{', '.join(odd) or 'its pooling of pictures'}: towers of other projects are "
                  "not built here")
            require(not text.get("no_causal_mask") and text.get("pool_type", "argmax") == "argmax",
                  "its text tower looks ahead or is pooled elsewhere than at the end token")
            pixels = found.get("preprocess_cfg", {})
            for name, ours in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
                require(np.allclose(pixels.get(name, ours), ours, atol=1e-6),
                      f"its pixels have the {name} {pixels.get(name)}, CLIP's have {ours}")
            for name, ours in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
                require(pixels.get(name, ours) in (ours, None),
                      f"its {name} is {pixels.get(name)!r}, CLIP's is {ours}")
            heads = {"text_heads": text["heads"]}
            if isinstance(vision["layers"], int):
                heads["vision_heads"] = vision["width"] // vision.get("head_width", 64)
            return "quick_gelu" if model.get("quick_gelu") else "gelu", heads
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")
            if not is_own and not {"vision_config", "text_config"} <= set(found):
                return None, {}
            vision, text = found["vision_config"], found["text_config"]
            for part in (vision, text):
                require(part.get("layer_norm_eps", 1e-5) == 1e-5,
                      f"its layer_norm_eps is {part.get('layer_norm_eps')}, CLIP's is 1e-5")
            # Their class' defaults are ViT-B/32's: a config names what differs.
            activation = text.get("hidden_act", "quick_gelu")
            other = vision.get("hidden_act", "quick_gelu")
            require(activation == other and activation in ACTIVATIONS,
                  f"its towers' activations are {other!r} and {activation!r}")
            return activation, {"vision_heads": vision.get("num_attention_heads", 12),
                                "text_heads": text.get("num_attention_heads", 8)}
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"the config in {folder} is not one of a CLIP: "
                         f"{type(error).__name__} {error}") from None
    return None, {}


def weights_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as Hugging Face lays it out: one file, or shards and their table."""
    for name in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin",
                 "open_clip_pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)[0]
    table = folder / "model.safetensors.index.json"
    if not table.is_file():
        raise FileNotFoundError(f"no model.safetensors, nor shards of it, in {folder}")
    where = read_json(table).get("weight_map")
    require(isinstance(where, dict) and all(isinstance(name, str) and Path(name).name == name
                                          for name in where.values()),
          f"{table} has no weight_map of files in its folder")
    shards = {name: read_tensors(folder / name)[0] for name in sorted(set(where.values()))}
    missing = [name for name, shard in where.items() if name not in shards[shard]]
    require(not missing, f"{table} names {missing[:1]}, which is not in its shard")
    return {name: shards[shard][name] for name, shard in where.items()}


def load_foreign(path: Path, tensors: dict[str, Tensor], activation: str | None) -> CLIP:
    """A CLIP from weights that this project did not write, without its tokenizer."""
    told, heads = config_beside(path if path.is_dir() else path.parent, is_own=path.is_dir())
    try:
        tensors, activation = to_openai_names(tensors), activation or told
        if activation is None:
            is_half = tensors["token_embedding.weight"].dtype == torch.float16
            activation, whose = (("quick_gelu", "OpenAI's float16") if is_half else
                                 ("gelu", "most of OpenCLIP's float32"))
            warnings.warn(f"nothing beside {path} says which activation it wants: guessed "
                          f"{activation}, as {whose} weights do; say activation=... if you know",
                          stacklevel=3)
        config = sizes_from_shapes(tensors, activation, heads)
        with torch.device("meta"):
            model = CLIP(config)
        model.load_state_dict({name: (t.float() if t.is_floating_point() else t).contiguous()
                               for name, t in tensors.items()}, assign=True)
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit a CLIP: {reason}") from None
    return model


# ---------------------------------------------------------------- load, save

def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Raises ValueError for what is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError):    # the latter: a build of torch without CUDA
        raise ValueError(f"no device {name!r} here") from None


def save(path: str | os.PathLike, model: CLIP, metadata: dict[str, str]) -> None:
    """Write float16 weights, config and the tokenizer's merges in one file."""
    merges = "\n".join(" ".join(pair) for pair in model.tokenizer.merges)
    save_model(path, model, {**metadata, "merges": merges})


def load(path: str | os.PathLike, tokenizer: str | os.PathLike | None = None,
         activation: str | None = None, dtype: torch.dtype = torch.float32) -> CLIP:
    """Load a CLIP, ours or a published one, with its tokenizer, in eval mode, on the CPU.

    path: our .safetensors; OpenAI's TorchScript .pt; a state dict as .pt, .bin or .safetensors in
        OpenAI's, OpenCLIP's or Hugging Face's names; a folder as Hugging Face lays it out.
    tokenizer: the published vocabulary's file or folder, where it does not lie beside the weights
        and no CLIP package is installed. Without any, pictures can be embedded, texts can't.
    activation: "quick_gelu" or "gelu", where neither the file nor a config beside it tells; a guess
        is made with a warning. `describe()` says what was taken.
    Raises FileNotFoundError, or ValueError with one sentence for a file that does not fit.
    """
    path = Path(path)
    require(activation in (None, *ACTIVATIONS),
          f"activation is {activation!r}, wanted {' or '.join(ACTIVATIONS)}")
    tensors, metadata = (weights_in(path), {}) if os.path.isdir(path) else read_tensors(path)
    if metadata.get("format") == FORMAT:
        require(not (tokenizer or activation),
              f"{path} carries its own vocabulary and names its activation")
        model, metadata = load_model(path, {"CLIP": (CLIP, ClipConfig)})
        lines = metadata.get("merges", "").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line]
        require(514 + len(merges) == model.config.vocab_size and all(len(p) == 2 for p in merges),
              f"{path} has {len(merges)} merges for {model.config.vocab_size} ids")
        model.tokenizer = Tokenizer(merges, model.config.context_length)
    else:
        if metadata.get("format") == "TorchScript":    # OpenAI's; all of them use QuickGELU
            activation = activation or "quick_gelu"
        model = load_foreign(path, tensors, activation)
        where = Path(tokenizer) if tokenizer else None
        if where is None and model.config.vocab_size == PUBLISHED_SIZE:
            where = find_vocabulary(path if path.is_dir() else path.parent)
        if where is not None:
            model.tokenizer = read_vocabulary(where, model.config.context_length)
            require(model.config.vocab_size == PUBLISHED_SIZE, f"{where} has {PUBLISHED_SIZE} "
                  f"tokens, {path} wants {model.config.vocab_size}")
    return model.eval().requires_grad_(False).to(dtype)
