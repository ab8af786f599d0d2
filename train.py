"""Train the parts of kNN-Diffusion on one machine:  python train.py WHAT

WHAT is one of

    clip         a small CLIP from captions.jsonl: the only training that ever reads a word
    vqvae        pictures <-> tokens, from any folder of pictures
    continuous   the U-Net, from pictures, cached embeddings and cached neighbours alone
    discrete     the transformer, from the same and cached tokens
    edit         either of them further (--init), to put back what a region swap took away

Each loop is flat: draw a batch, compute the loss, step, average, log, save. All randomness of a
step comes from a generator seeded with (seed, step), so that a resumed run goes on as if it had
never stopped.

Shapes: B batch, C channels, H W picture, L tokens, E CLIP dimension, K neighbours, N pictures.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import pickle
import shlex
import sys
import time
import warnings
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import clip_model
import edit
import index as retrieval
import knn_diffusion
import vqvae
from clip_model import require
from knn_diffusion import TransformerConfig, UNetConfig

SHIPPED = Path(__file__).parent / "weights" / "stickers"
CHECKPOINT_EVERY, SAMPLES_EVERY, REVIVE_EVERY = 500, 1000, 100             # steps
DEFAULTS = {"clip": {"steps": 2600, "batch_size": 512, "lr": 1e-3},
            "vqvae": {"steps": 10000, "batch_size": 64, "lr": 2e-3},
            "discrete": {"steps": 20000, "batch_size": 64, "lr": 2e-3},
            "edit": {"steps": 5000, "batch_size": 64, "lr": 1e-3},
            "continuous": {"steps": 20000, "batch_size": 64, "lr": 2e-3}}

# ---------------------------------------------------------------- stages that every loop shares

def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to 2 % of it at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and convolutions only: not norms, biases, single vectors."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


class Muon(torch.optim.Optimizer):
    """Momentum with every singular value of a matrix's update made about 1 (Jordan et al., 2024).

    So directions that few pictures ask for move as far as those that all of them ask for: what has
    to be learned by heart is learned sooner. A convolution counts as the matrix (C', C·h·w). The
    factor 0.2 √max(rows, columns) gives AdamW's usual update size, and so its learning rates and
    decay (Liu et al., 2502.16982 Eq. 4).
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float,
                 momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay,
                                      "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                if "mean" not in self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"]
                mean.lerp_(p.grad, 1 - momentum)
                matrix = p.grad.lerp(mean, momentum).flatten(1)            # Nesterov's look ahead
                scale = 0.2 * math.sqrt(max(matrix.shape))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(orthogonal(matrix).view(p.shape), alpha=-lr * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of the matrix U S Vᵀ, roughly: five Newton-Schulz steps in bfloat16 bring every singular
    value to between about 0.7 and 1.2. Coefficients: Jordan et al. (2024)."""
    x = matrix.bfloat16() if len(matrix) <= matrix.shape[1] else matrix.T.bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T                                     # x ← (3.4445 − 4.7750 G + 2.0315 G²) x
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x,
                        beta=3.4445)
    return (x if len(matrix) <= matrix.shape[1] else x.T).to(matrix)


def muon_and_adam(model: nn.Module, lr: float, at_the_ends: tuple[str, ...]
                  ) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside, AdamW for vectors, maps, and the layers at the
    ends that `at_the_ends` names."""
    inside = {name: p for name, p in model.named_parameters()
              if p.ndim >= 2 and name.endswith("weight") and not name.startswith(at_the_ends)}
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [Muon(list(inside.values()), lr=lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def descend(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float,
            max_norm: float) -> bool:
    """One optimiser step with a clipped gradient. False, and no step, where a gradient or the loss
    is not finite."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        return False
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return True


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema ← d·ema + (1 − d)·weights with d = min(decay, (1 + step)/(10 + step)): early weights,
    still far off, are forgotten fast."""
    d = min(decay, (1 + step) / (10 + step))
    for slow, fast in zip(ema.state_dict().values(), model.state_dict().values()):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - d)
        else:
            slow.copy_(fast)


def step_seed(seed: int, step: int) -> int:
    """One seed per (seed, step), well mixed, below 2^63."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


class Progress:
    """log.csv, a progress line on a terminal, the clock, and the count of skipped steps."""

    def __init__(self, out: Path, first_step: int, steps: int, minutes: float | None) -> None:
        self.path, self.first, self.steps = out / "log.csv", first_step, steps
        self.start = time.time()
        self.deadline = self.start + 60 * (math.inf if minutes is None else minutes)
        self.skipped_in_a_row = 0
        self.recent: list[float] = []
        # A new run starts a new log; a resumed one drops what a crash wrote beyond its state.
        rows = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        rows = [row for row in rows if int(row.split(",")[0]) <= first_step]
        self.path.write_text("\n".join(["step,loss,lr,images_per_second", *rows, ""]))

    def update(self, step: int, loss: float, lr: float, batch_size: int, finite: bool) -> None:
        """Count a finished step; every 50th goes to the log. Raises FloatingPointError after 20
        non-finite steps in a row."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= 20:
            raise FloatingPointError("the loss or its gradient was not finite 20 times in a row: "
                                     "lower --lr, or resume from an earlier state")
        if finite:
            self.recent.append(loss)
        if (step + 1) % 50 and step + 1 != self.steps:
            return
        seconds = (time.time() - self.start) / (step + 1 - self.first)
        mean = sum(self.recent) / max(1, len(self.recent))
        self.recent = []
        with open(self.path, "a") as file:
            file.write(f"{step + 1},{mean:.5f},{lr:.2e},{batch_size / seconds:.1f}\n")
        if sys.stderr.isatty():
            left = (self.steps - step - 1) * seconds / 60
            print(f"\rstep {step + 1}/{self.steps}  loss {mean:.4f}  "
                  f"{batch_size / seconds:.0f} images/s  {left:.0f} min left ", end="",
                  file=sys.stderr, flush=True)

    def out_of_time(self) -> bool:
        return time.time() > self.deadline


def save_state(path: Path, step: int, settings: dict, model: nn.Module, ema: nn.Module,
               others: list) -> None:
    """Write all that a resumed run needs, atomically; seed and step are the random state. others:
    optimisers and whatever else has a state_dict."""
    part = path.with_name(path.name + ".part")
    torch.save({"step": step, "settings": settings, "model": model.state_dict(),
                "ema": ema.state_dict(),
                "others": [other.state_dict() for other in others]}, part)
    os.replace(part, path)


def load_state(path: Path, steps: int, settings: dict, model: nn.Module, ema: nn.Module,
               others: list) -> int:
    """Restore weights, average, optimisers and the rest in place; return the steps done.

    Raises ValueError with one sentence where the file is damaged or of another model, where the run
    was started with other settings, or has all its steps behind it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        done, then = int(state["step"]), dict(state["settings"])
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for other, then_was in zip(others, state["others"], strict=True):
            other.load_state_dict(then_was)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"can't resume from {path}: {reason}") from None
    changed = [f"{name} was {then[name]}, is {value}" for name, value in settings.items()
               if name in then and then[name] != value]
    require(not changed, f"can't resume from {path}: {'; '.join(changed)}")
    require(done < steps, f"nothing left to do: {path} has {done} steps, --steps is {steps}")
    return done


def all_commands(weights: Path | None, command: str) -> str:
    """The commands that made some weights, a line each, and now this one."""
    before = clip_model.read_tensors(weights)[1].get("command", "") if weights else ""
    return f"{before}\n{command}".strip()


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---------------------------------------------------------------- pictures

def read_pictures(folder: Path, names: list[str], size: int) -> np.ndarray:
    """Pictures of a folder, squares of `size`: uint8 (N, H, W, 3)."""
    pictures = np.empty((len(names), size, size, 3), np.uint8)
    for i, name in enumerate(names):
        picture = clip_model.read_image(folder / name)
        pictures[i] = np.asarray(clip_model.fit_square(picture, size))
    return pictures


def to_x(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def is_readable(path: Path) -> bool:
    try:
        clip_model.read_image(path)
        return True
    except ValueError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return False


# ---------------------------------------------------------------- CLIP

def learn_merges(captions: list[str], n_merges: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges: again and again, join the most frequent pair of neighbours.

    Source: Sennrich et al. (1508.07909) Alg. 1; ties go to the alphabetically first pair.
    """
    counts = Counter(word for caption in captions for word in clip_model.split_words(caption))
    words = {word: (*word[:-1], word[-1] + "</w>") for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: clip_model.merge_pair(parts, best) if best[0] in parts else parts
                 for word, parts in words.items()}
    return merges


def read_captions(path: Path) -> list[dict]:
    """Rows of captions.jsonl. Raises ValueError, naming the line, for a row that can't be used."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
                usable = isinstance(rows[-1]["path"], str) and len(rows[-1]["captions"]) > 0
            except (ValueError, KeyError, TypeError):
                usable = False
            require(usable, f"{path} line {number} is no row with a path and captions")
    require(len(rows) > 0, f"{path} is empty")
    return rows


class CaptionedPictures:
    """Pictures with captions (captions.jsonl), drawn in batches that a contrastive loss can use."""

    def __init__(self, folder: Path, size: int) -> None:
        self.rows = read_captions(folder / "captions.jsonl")
        self.pictures = read_pictures(folder, [row["path"] for row in self.rows], size)
        self.members: dict[str, list[int]] = {}          # concept -> rows with one thing in them
        self.scenes = [i for i, row in enumerate(self.rows) if "parts" in row]
        for i, row in enumerate(self.rows):
            if "parts" not in row:
                self.members.setdefault(row.get("concept", row["path"]), []).append(i)
        self.concepts = sorted(self.members)
        self.has_twins = any(len(rows) > 1 and self.exact_captions(rows[0])
                             for rows in self.members.values())

    def exact_captions(self, i: int) -> list[str]:
        """The captions that name style and background: they tell twins apart."""
        style, colour = (self.rows[i].get(key, "\0") for key in ("style", "background"))
        return [caption for caption in self.rows[i]["captions"]
                if caption.startswith(style + " ") and caption.endswith(f" {colour} background")]

    def crop_of(self, i: int, part: dict, rng: np.random.Generator) -> np.ndarray:
        """A window around a scene's part, up to half wider than it, scaled up to a whole picture.

        A square, but cut at the picture's border. The boxes are in pixels of the model's size.
        """
        left, top, right, bottom = part["box"]
        half = max(right - left, bottom - top) * rng.uniform(1.0, 1.5) / 2
        x, y = (left + right) / 2, (top + bottom) / 2
        size = self.pictures.shape[1]
        box = np.clip([x - half, y - half, x + half, y + half], 0, size).round().astype(int)
        crop = Image.fromarray(self.pictures[i]).crop(tuple(box))
        return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))

    def batch(self, n: int, rng: np.random.Generator
              ) -> tuple[np.ndarray, list[str], list[str], np.ndarray]:
        """n pictures uint8 (n, H, W, 3), a caption each, their concepts, and which captions are
        exact. Half of them are pairs of twins: one concept, but another style or another
        background, with exact captions (a concept with one picture: that one twice, no negative of
        itself); an eighth are scenes and crops of them."""
        n_pairs = n // 4 if self.has_twins else 0            # concepts that give two pictures
        n_scenes = n // 8 if self.scenes else 0
        n_concepts = n - n_pairs - n_scenes                  # 2·pairs + single ones + scenes = n
        # A shuffled deck of concepts: none comes again before all have come.
        deck = rng.permutation(max(n_concepts, len(self.concepts)))[:n_concepts]
        order = [self.concepts[card % len(self.concepts)] for card in deck]
        pictures, captions, concepts, is_exact = [], [], [], []

        def add(picture: np.ndarray, options: list[str], concept: str, exact: bool) -> None:
            pictures.append(picture)
            captions.append(options[rng.integers(len(options))])
            concepts.append(concept)
            is_exact.append(exact)

        for j, concept in enumerate(order):
            rows = self.members[concept]
            if j < n_pairs:
                pair = rng.permutation(len(rows))[[0, -1]]     # two different ones, if there are
                for i in (rows[p] for p in pair):
                    exact = self.exact_captions(i) if len(rows) > 1 else []
                    add(self.pictures[i], exact or self.rows[i]["captions"], concept, bool(exact))
            else:
                i = rows[rng.integers(len(rows))]
                add(self.pictures[i], self.rows[i]["captions"], concept, False)
        for _ in range(n_scenes):
            i = self.scenes[rng.integers(len(self.scenes))]
            if rng.random() < 0.3:
                add(self.pictures[i], self.rows[i]["captions"], self.rows[i]["concept"], False)
            else:
                part = self.rows[i]["parts"][rng.integers(len(self.rows[i]["parts"]))]
                add(self.crop_of(i, part, rng), part["captions"], part["concept"], False)
        return np.stack(pictures), captions, concepts, np.array(is_exact)


def contrastive_loss(logits: Tensor, concepts: list[str], is_exact: np.ndarray) -> Tensor:
    """CLIP's symmetric cross-entropy over logits (B, B), the pairs on the diagonal.

    Ours: a pair of the same concept that is no pair of exact captions is no negative: left out.
    """
    codes = torch.tensor(np.unique(concepts, return_inverse=True)[1], device=logits.device)
    exact = torch.from_numpy(is_exact).to(logits.device)
    same = codes[:, None] == codes[None]                                          # (B, B)
    false_negative = same & ~(exact[:, None] & exact[None])
    false_negative.fill_diagonal_(False)
    logits = logits.float().masked_fill(false_negative, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(data: Path, out: Path, config: clip_model.ClipConfig, steps: int, batch_size: int,
               lr: float, seed: int, resume: bool, init: Path | None, minutes: float | None,
               device: torch.device, bf16: bool, command: str) -> None:
    """Train a CLIP from captions.jsonl; write out/clip.safetensors (EMA) and out/state.pt."""
    weights = out / "clip.safetensors" if resume else init
    model = clip_model.load(weights).requires_grad_(True) if weights else None
    require(model is None or model.tokenizer is not None, f"no vocabulary was found for {weights}")
    pictures = CaptionedPictures(data, (model.config if model else config).image_size)
    captions = [caption for row in pictures.rows for caption in row["captions"]]
    if model is None:
        torch.manual_seed(seed)
        merges = learn_merges(captions, config.vocab_size - 514)
        model = clip_model.CLIP(replace(config, vocab_size=514 + len(merges)))
        model.tokenizer = clip_model.Tokenizer(merges, config.context_length)
    model, tokenizer = model.to(device), model.tokenizer
    ema = copy.deepcopy(model).eval()
    optimizers = [torch.optim.AdamW(weight_groups(model, 0.1), lr=lr, betas=(0.9, 0.98), eps=1e-6,
                                    fused=True)]
    settings = {"seed": seed, "batch_size": batch_size, "lr": lr}
    first = load_state(out / "state.pt", steps, settings, model, ema, optimizers) if resume else 0
    command = all_commands(weights, command)
    out.mkdir(parents=True, exist_ok=True)
    print(f"clip: {data} ({len(pictures.rows)} pictures, {len(captions)} captions) -> {out}, "
          f"{len(tokenizer.words)} tokens, {sum(p.numel() for p in model.parameters()):,} "
          f"parameters, steps {first} to {steps} of {batch_size}, {device}", flush=True)

    def checkpoint(step: int) -> None:
        clip_model.save(out / "clip.safetensors", ema, {"step": str(step), "command": command})
        save_state(out / "state.pt", step, settings, model, ema, optimizers)

    progress = Progress(out, first, steps, minutes)
    for step in range(first, steps):
        rng = np.random.default_rng((seed, step))
        images, texts, concepts, is_exact = pictures.batch(batch_size, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # a few captions are cut: no news here
            tokens = tokenizer(texts).to(device)
        pixels = clip_model.to_pixels(images).to(device)
        with autocast(device, bf16):
            logits = model(pixels, tokens)
        loss = contrastive_loss(logits, concepts, is_exact)
        rate = learning_rate(step, lr, 200, steps)
        finite = descend(model, optimizers, loss, rate, max_norm=1.0)
        average(ema, model, step, 0.998)
        progress.update(step, loss.item(), rate, batch_size, finite)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint(step + 1)
        if progress.out_of_time():
            break
    if (step + 1) % CHECKPOINT_EVERY:
        checkpoint(step + 1)


# ---------------------------------------------------------------- the VQ-VAE

def split_by_drawing(names: list[str], every: int) -> tuple[list[str], list[str]]:
    """File names to train on, and those kept out: each `every`-th drawing in all its renderings,
    "fox-0.png", "fox-1.png", … (a drawing is a name up to its last hyphen); 0 keeps none out."""
    drawing = {name: name.rpartition("-")[0] or name for name in names}
    kept_out = set(sorted(set(drawing.values()))[every - 1::every]) if every else set()
    return ([name for name in names if drawing[name] not in kept_out],
            [name for name in names if drawing[name] in kept_out])


def some(names: list[str], n: int) -> list[str]:
    """At most n names from all over a list: its head alone would be one folder."""
    return names[::-(-len(names) // n)] if names else []


@torch.no_grad()
def reconstruct(model: vqvae.VQVAE, pictures: np.ndarray, device: torch.device
                ) -> tuple[Tensor, float, Tensor]:
    """Some reconstructions, the mean PSNR in dB, and how often each code was used (V,)."""
    counts = torch.zeros(model.config.n_codes, dtype=torch.int64)
    first, quality = torch.zeros(0), []
    for i in range(0, len(pictures), 128):
        x = to_x(pictures[i:i + 128]).to(device)
        tokens = model.encode(x)
        found = model.decode(tokens, x.shape[2] // model.config.factor)
        counts += tokens.flatten().cpu().bincount(minlength=len(counts))
        quality.append(vqvae.psnr(found, x).cpu())
        first = found[:12].cpu() if i == 0 else first
    return first, torch.cat(quality).mean().item(), counts


def train_vqvae(data: Path, out: Path, config: vqvae.VQVAEConfig, keep_out: int, steps: int,
                batch_size: int, lr: float, seed: int, resume: bool, init: Path | None,
                minutes: float | None, device: torch.device, bf16: bool, command: str) -> None:
    """Train the VQ-VAE on a folder of pictures; write out/vqvae.safetensors and out/state.pt.

    keep_out: every so many drawings one is not trained on and measured instead.
    """
    torch.manual_seed(seed)
    weights = out / "vqvae.safetensors" if resume else init
    model = vqvae.load(weights)[0] if weights else vqvae.VQVAE(config)
    config = model.config
    require(not config.gumbel, "the Gumbel codebook loads and runs here; training it is left out")
    names = [name for name in retrieval.list_images(data) if is_readable(data / name)]
    train_names, test_names = split_by_drawing(names, keep_out)
    require(len(train_names) > 0, f"no readable picture to train on below {data}")
    pictures = read_pictures(data, train_names, config.image_size)
    tests = read_pictures(data, some(test_names or train_names, 1000), config.image_size)
    model = model.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = muon_and_adam(model, lr, ("encoder.conv_in", "decoder.conv_out", "quantize"))
    settings = {"seed": seed, "batch_size": batch_size, "lr": lr, "keep_out": keep_out}
    first = load_state(out / "state.pt", steps, settings, model, ema, optimizers) if resume else 0
    command = all_commands(weights, command)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    print(f"vqvae: {data} ({len(pictures)} pictures, {len(test_names)} kept out) -> {out}, "
          f"{config.image_size} px, factor {config.factor}, V {config.n_codes}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {steps} of "
          f"{batch_size}, {device}", flush=True)

    def draw_batch(seeded: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch_size,), generator=seeded)
        return to_x(pictures[rows.numpy()]).to(device, memory_format=torch.channels_last)

    def revive(step: int) -> int:
        """Restart the codes that eight batches do not use. The weights and (seed, step) decide
        alone, so a resumed run does the same."""
        seeded = torch.Generator().manual_seed(step_seed(seed + 1, step))
        counts = torch.zeros(config.n_codes, dtype=torch.int64)
        with torch.no_grad(), autocast(device, bf16):
            for _ in range(8):
                z = model.latents(draw_batch(seeded)).float()
                counts += model.quantize.nearest(z).flatten().cpu().bincount(minlength=len(counts))
        return vqvae.restart_dead_codes(model.quantize, counts, z, seeded)

    def checkpoint(step: int) -> None:
        x, quality, counts = reconstruct(ema, tests, device)
        report = (f"PSNR {quality:.2f} dB on {len(tests)} pictures of drawings "
                  f"{'kept out' if test_names else 'trained on'}, {int((counts > 0).sum())} of "
                  f"{len(counts)} codes used, perplexity {vqvae.perplexity(counts):.0f}")
        print(f"step {step}: {report}", flush=True)
        originals = to_x(tests[: len(x)])
        clip_model.grid([clip_model.to_pictures(part) for part in (originals, x)],
                        config.image_size).save(out / "samples" / f"{step:07d}.png")
        vqvae.save(out / "vqvae.safetensors", ema, {"step": str(step), "command": command,
                                                    "measured": report})
        save_state(out / "state.pt", step, settings, model, ema, optimizers)

    progress = Progress(out, first, steps, minutes)
    for step in range(first, steps):
        if step % REVIVE_EVERY == 0 and step < 0.8 * steps:      # codes settle in the last fifth
            revive(step)
        x = draw_batch(torch.Generator().manual_seed(step_seed(seed, step)))
        with autocast(device, bf16):
            found, codebook_loss, _ = model(x)
            loss = vqvae.reconstruction_loss(found, x) + codebook_loss
        rate = learning_rate(step, lr, 300, steps)
        finite = descend(model, optimizers, loss, rate, max_norm=1.0)
        average(ema, model, step, 0.999)
        progress.update(step, loss.item(), rate, batch_size, finite)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint(step + 1)
        if progress.out_of_time():
            break
    if (step + 1) % CHECKPOINT_EVERY:
        checkpoint(step + 1)


# ---------------------------------------------------------------- both backbones

class CachedPictures:
    """Pictures with cached embeddings and neighbours: all that a diffusion training may see."""

    def __init__(self, folder: Path, index: retrieval.Index, size: int, k: int,
                 device: torch.device | str = "cpu") -> None:
        check_same_files(folder, index)
        self.pictures = read_pictures(folder, index.paths, size)
        self.embeddings = np.array(index.embeddings)                       # (N, E), in memory
        self.queries = self.embeddings                                     # each asks for itself
        self.neighbors = retrieval.neighbor_table(index, k, device=device)            # (N, K)

    def __len__(self) -> int:
        return len(self.queries)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to learn, x_0 in [-1, 1] (B, 3, H, W), and its conditions. A picture may stand in
        several rows, N apart (`SwappedPictures`)."""
        return to_x(self.pictures[rows.numpy() % len(self.pictures)]), *self.conditions(rows)

    def conditions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The query, f_img(x_0) or that of x_0's region (B, E), and kNN(query) (B, K, E),
        float32."""
        near = self.embeddings[self.neighbors[rows.numpy()].astype(np.int64)]
        return torch.from_numpy(self.queries[rows.numpy()]).float(), torch.from_numpy(near).float()


def check_same_files(folder: Path, index: retrieval.Index) -> None:
    """Raise ValueError where a picture folder and an index do not name the same files. What is no
    readable picture is said and does not count: the index skipped it, too."""
    there, wanted = set(retrieval.list_images(folder)), set(index.paths)
    more = sum(is_readable(folder / name) for name in sorted(there - wanted))
    require(not (wanted - there or more),
          f"{folder} and the index at {index.folder} do not name the same files: "
          f"{len(wanted - there)} of the index's are missing, {more} of the folder's are not in it")


def what_is_dropped(stages: Continuous | Discrete, rows: Tensor, null: int,
                    seeded: torch.Generator) -> tuple[Tensor, ...]:
    """Which samples lose their query and their neighbours, bool (B,); for a model that edits also
    I_manip, `null` everywhere where it is dropped."""
    if not stages.config.edit:
        return knn_diffusion.draw_drops(len(rows), seeded, stages.condition)
    *lost, is_null = knn_diffusion.draw_edit_drops(len(rows), seeded, stages.condition)
    picture = stages.picture(rows)
    picture[is_null] = null
    return *lost, picture


@dataclass
class Continuous:
    """What a step and a glance at the samples are with the U-Net."""
    pictures: CachedPictures | SwappedPictures
    config: UNetConfig
    condition: str
    device: torch.device
    at_the_ends = ("conv_in.", "conv_out.")

    def __post_init__(self) -> None:
        self.schedule = knn_diffusion.Schedule(self.config.T, self.config.noise_shift)
        self.state: list = []                                              # none beside the weights

    def loss(self, model: nn.Module, rows: Tensor, seeded: torch.Generator) -> Tensor:
        x0, query, neighbors = self.pictures.batch(rows)
        t = torch.randint(1, self.config.T + 1, (len(rows),), generator=seeded)
        eps = torch.randn(x0.shape, generator=seeded)
        dropped = what_is_dropped(self, rows, 0, seeded)
        return knn_diffusion.diffusion_loss(model, self.schedule, *(
            part.to(self.device) for part in (x0, query, neighbors, t, eps, *dropped)))

    def picture(self, rows: Tensor) -> Tensor:
        """I_manip (B, 3, H, W)."""
        return to_x(self.pictures.manipulated[rows.numpy()])

    def draw(self, model: nn.Module, query: Tensor | None, neighbors: Tensor | None,
             seeds: list[int], **picture: Tensor) -> Tensor:
        return deque(knn_diffusion.sample(model, query, neighbors, seeds, min(20, self.config.T),
                                          **picture), maxlen=1).pop()              # the last x_t


@dataclass
class Discrete:
    """The same with the transformer over the VQ-VAE's tokens, which are kept in index's folder."""
    pictures: CachedPictures | SwappedPictures
    config: TransformerConfig
    condition: str
    device: torch.device
    codec: vqvae.VQVAE
    index: retrieval.Index
    at_the_ends = ("token.", "row.", "column.", "time.", "out.")

    def __post_init__(self) -> None:
        self.schedule = knn_diffusion.MaskSchedule(self.config.T, self.config.n_codes,
                                                   self.config.schedule)
        self.times = knn_diffusion.TimeSampler(self.config.T)
        self.state = [self.times]
        files = self.codec, self.index, self.device
        self.tokens = token_table(self.pictures.pictures, *files)          # (N, L)
        if self.config.edit:
            self.manipulated = token_table(self.pictures.manipulated, *files)         # (S, L)

    def loss(self, model: nn.Module, rows: Tensor, seeded: torch.Generator) -> Tensor:
        x0 = self.tokens[rows % len(self.tokens)].long()                   # (B, L)
        query, neighbors = self.pictures.conditions(rows)
        t, weight = self.times.draw(len(rows), seeded)
        u = torch.rand(x0.shape, generator=seeded)
        codes = torch.randint(self.config.n_codes, x0.shape, generator=seeded)
        dropped = what_is_dropped(self, rows, self.config.n_codes, seeded)         # MASK = V
        xt = knn_diffusion.mask_and_replace(x0, t, self.schedule, u, codes)
        terms, auxiliary = knn_diffusion.discrete_loss(model, self.schedule, *(
            part.to(self.device) for part in (x0, xt, t, query, neighbors, *dropped)))
        self.times.update(t, terms)
        return ((terms + auxiliary) * weight.to(self.device)).mean()

    def picture(self, rows: Tensor) -> Tensor:
        """I_manip's tokens (B, L)."""
        return self.manipulated[rows].long()

    def draw(self, model: nn.Module, query: Tensor | None, neighbors: Tensor | None,
             seeds: list[int], **picture: Tensor) -> Tensor:
        return self.codec.decode(deque(knn_diffusion.sample_tokens(
            model, query, neighbors, seeds, min(25, self.config.T), **picture), maxlen=1).pop())


@torch.no_grad()
def token_table(pictures: np.ndarray, codec: vqvae.VQVAE, index: retrieval.Index,
                device: torch.device) -> Tensor:
    """int32 (N, L): every picture's tokens, read from tokens-<digest>.npy in the index's folder, or
    computed and written there. The digest is of the pictures and the VQ-VAE: where one of them
    changes, so does the name."""
    digest = hashlib.sha256(vqvae.fingerprint(codec).encode())
    digest.update(pictures)
    path = index.folder / f"tokens-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    tokens = np.concatenate([
        codec.encode(to_x(pictures[i:i + 256]).to(device)).cpu().numpy().astype(np.int32)
        for i in range(0, len(pictures), 256)])
    retrieval.save_array(path, tokens)
    return torch.from_numpy(tokens)


# ---------------------------------------------------------------- editing (Sec. 3.3)

class SwappedPictures:
    """Pictures of which a region was swapped for the aligned nearest neighbour's, row by row.

    The condition is the *original* region's embedding and its neighbours in the ordinary index. No
    text is read, and CLIP runs here once: what it says is cached in `cache`, swaps-<digest>.npz,
    named after the pictures, their partners, the CLIP, the index, the numbers below and the rule.
    """

    RULE = 3                    # one more whenever edit.region_swap changes: older caches are stale

    def __init__(self, folder: Path, swap_index: retrieval.Index, index: retrieval.Index,
                 clip: clip_model.CLIP, size: int, k: int, per_picture: int, seed: int,
                 cache: Path) -> None:
        check_same_files(folder, swap_index)
        require(len(swap_index) > 1, f"{folder} holds one picture, and a swap wants another one")
        self.index, self.embeddings = index, index.embeddings
        self.pictures = read_pictures(folder, swap_index.paths, size)
        self.partner = retrieval.neighbor_table(swap_index, 1)[:, 0]       # (N,), never itself
        digest = hashlib.sha256(json.dumps(
            [self.RULE, size, k, per_picture, seed, clip.fingerprint(), len(index)]).encode())
        for array in (self.pictures, self.partner, index.embeddings):
            digest.update(np.ascontiguousarray(array))
        self.digest = digest.hexdigest()[:16]
        path = cache / f"swaps-{self.digest}.npz"
        if not path.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            made, part = self.make(clip, k, per_picture, seed), path.with_suffix(".part")
            with open(part, "wb") as file:
                np.savez(file, **made)
            os.replace(part, path)
        with np.load(path, allow_pickle=False) as found:
            self.manipulated, self.queries, self.neighbors = (
                found[name] for name in ("manipulated", "queries", "neighbors"))

    def make(self, clip: clip_model.CLIP, k: int, per_picture: int, seed: int
             ) -> dict[str, np.ndarray]:
        """I_manip uint8 (S, H, W, 3), the regions' embeddings float16 (S, E), their neighbours'
        rows int32 (S, k); S = per_picture·N swaps, pictures in turn."""
        generator = torch.Generator().manual_seed(seed)
        N, size = self.pictures.shape[:2]
        manipulated, queries, failed, moved = [], [], 0, 0
        for _ in range(per_picture):
            for start in range(0, N, 256):
                rows = np.arange(start, min(start + 256, N))
                x, boxes, found = edit.region_swap(
                    to_x(self.pictures[rows]), to_x(self.pictures[self.partner[rows]]),
                    generator)
                failed += int((~found.converged).sum())
                moved += int((found.warp != torch.eye(3)).flatten(1).any(1).sum())
                manipulated.append(np.stack([np.asarray(p) for p in clip_model.to_pictures(x)]))
                crops = [Image.fromarray(self.pictures[row]).crop(
                    edit.region_crop(tuple(box), size, size))
                    for row, box in zip(rows, boxes.tolist())]
                queries.append(clip.embed_pictures(crops).cpu())
        queries = torch.cat(queries)
        print(f"{len(queries)} swaps: {moved} neighbours aligned, {len(queries) - moved} left as "
              f"they were ({failed} where ECC did not converge, else no nearer)", flush=True)
        return {"manipulated": np.concatenate(manipulated), "queries": queries.half().numpy(),
                "neighbors": self.index.search(queries, k)[1].numpy().astype(np.int32)}

    __len__, conditions = CachedPictures.__len__, CachedPictures.conditions
    batch = CachedPictures.batch                # the original, its region's embedding, neighbours


# ---------------------------------------------------------------- the loop of all three

def start_model(what: str, weights: Path | None, config: UNetConfig | TransformerConfig | None,
                index: retrieval.Index, target: str | None, k: int | None
                ) -> knn_diffusion.UNet | knn_diffusion.TokenTransformer:
    """The model to train: a new one, or from weights, which keep their sizes, their K, and what
    they predict, unless `target` names something else.

    Raises ValueError where the weights are another kind of model, of another CLIP than the index,
    or of another K than `k`, where that is given.
    """
    kind = {"continuous": knn_diffusion.UNet, "discrete": knn_diffusion.TokenTransformer}.get(what)
    if weights is None:
        return kind(replace(config, target=target) if target else config)
    model, metadata = knn_diffusion.load(weights)
    config, E = model.config, index.rows.shape[1]
    if kind:                                                 # `edit` takes either kind
        require(type(model) is kind and not config.edit,
              f"{weights} holds a {type(model).__name__}{' that edits' * config.edit}, "
              f"{what} wants a {kind.__name__}")
    wanted, found = metadata.get("clip", ""), index.manifest.get("encoder_hash", "")
    require(config.embed_dim == E and wanted in ("", found),
          f"{weights} was trained with the CLIP {wanted or 'of an unknown name'} "
          f"({config.embed_dim} dimensions), the index at {index.folder} was made by "
          f"{found or 'an unknown one'} ({E} dimensions)")
    require(k in (None, config.n_neighbors),
          f"{weights} has {config.n_neighbors} neighbours, --k is {k}")
    if what == "edit" and not config.edit:
        return knn_diffusion.widened(model)
    if target:
        model.config = replace(model.config, target=target)
    return model


def train_diffusion(what: str, data: Path, out: Path, index: retrieval.Index,
                    config: UNetConfig | TransformerConfig | None, condition: str, steps: int,
                    batch_size: int, lr: float, seed: int, resume: bool, init: Path | None,
                    minutes: float | None, device: torch.device, bf16: bool, command: str,
                    codec: vqvae.VQVAE | None = None, swaps: dict | None = None,
                    target: str | None = None, k: int | None = None) -> None:
    """Train either backbone on pictures alone; write out/WHAT.safetensors (EMA) and out/state.pt.

    what: "continuous", or "discrete" with a VQ-VAE as `codec`, or "edit", either of them with
    `swaps` (swap_index, clip, per_picture: see `SwappedPictures`), from weights. condition: "both",
    or "query" for the paper's no-kNN model, whose neighbours are always null ("neighbors" blinds
    the query instead). target and k: see `start_model`.
    """
    torch.manual_seed(seed)
    weights = out / f"{what}.safetensors" if resume else init
    model = start_model(what, weights, config, index, target, k)
    config, is_continuous = model.config, isinstance(model, knn_diffusion.UNet)
    settings = {"seed": seed, "batch_size": batch_size, "lr": lr, "condition": condition,
                "k": config.n_neighbors, "index": retrieval.rows_digest(index.rows)[:16]}
    made_with = {"condition": condition, "clip": index.manifest.get("encoder_hash", "")}
    if is_continuous:
        settings["target"] = config.target
    else:
        check_tokens(config, codec.config)
        made_with["vqvae"] = settings["vqvae"] = vqvae.fingerprint(codec)
    if what == "edit":
        pictures = SwappedPictures(data, index=index, size=config.image_size, k=config.n_neighbors,
                                   seed=seed, cache=out, **swaps)
        settings["swaps"] = pictures.digest
    else:
        pictures = CachedPictures(data, index, config.image_size, config.n_neighbors, device)
    stages = (Continuous(pictures, config, condition, device) if is_continuous else
              Discrete(pictures, config, condition, device, codec.to(device),
                       swaps["swap_index"] if swaps else index))
    model = model.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = muon_and_adam(model, lr, stages.at_the_ends)
    others = [*optimizers, *stages.state]
    first = load_state(out / "state.pt", steps, settings, model, ema, others) if resume else 0
    command = all_commands(weights, command)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    print(f"{what} ({condition}): {data} ({len(pictures)} pictures), {index.folder} -> {out}, "
          f"K {pictures.neighbors.shape[1]}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {first} to {steps} of "
          f"{batch_size}, {device}", flush=True)

    def checkpoint(step: int) -> None:
        knn_diffusion.save(out / f"{what}.safetensors", ema,
                           {"step": str(step), "command": command, **made_with})
        save_state(out / "state.pt", step, settings, model, ema, others)

    def draw_samples(step: int) -> None:
        # Twelve from all over; steps of a 12th could come back to a picture, in another swap.
        rows = torch.arange(12) * (len(pictures) // 13)
        x0, query, neighbors = (part.to(device) for part in pictures.batch(rows))
        manipulated = {"picture": stages.picture(rows).to(device)} if what == "edit" else {}
        with autocast(device, bf16):
            x = stages.draw(ema, None if condition == "neighbors" else query,
                            None if condition == "query" else neighbors, list(range(12)),
                            **manipulated)
        shown = [to_x(pictures.manipulated[rows.numpy()])] if what == "edit" else []
        clip_model.grid([clip_model.to_pictures(part) for part in (x0, *shown, x)],
                        config.image_size).save(out / "samples" / f"{step:07d}.png")

    progress = Progress(out, first, steps, minutes)
    for step in range(first, steps):
        # One generator a step: rows, times, noise and drops are the same after a resume.
        seeded = torch.Generator().manual_seed(step_seed(seed, step))
        torch.manual_seed(step_seed(seed + 1, step))                   # dropout inside the model
        rows = torch.randint(len(pictures), (batch_size,), generator=seeded)
        with autocast(device, bf16):
            loss = stages.loss(model, rows, seeded)
        rate = learning_rate(step, lr, 300, steps)
        finite = descend(model, optimizers, loss, rate, max_norm=1.0)
        average(ema, model, step, 0.9995)
        progress.update(step, loss.item(), rate, batch_size, finite)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            checkpoint(step + 1)
        if (step + 1) % SAMPLES_EVERY == 0:
            draw_samples(step + 1)
        if progress.out_of_time():
            break
    if (step + 1) % CHECKPOINT_EVERY:
        checkpoint(step + 1)
    if (step + 1) % SAMPLES_EVERY:
        draw_samples(step + 1)


def check_tokens(config: TransformerConfig, codec: vqvae.VQVAEConfig) -> None:
    """Raise ValueError where a transformer and a VQ-VAE do not speak the same tokens."""
    side = config.image_size // codec.factor
    require((config.tokens_a_side, config.n_codes) == (side, codec.n_codes),
          f"the transformer draws {config.tokens_a_side}x{config.tokens_a_side} tokens of "
          f"{config.n_codes}, the VQ-VAE makes {side}x{side} of {codec.n_codes} from "
          f"{config.image_size} px")


# ---------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["clip", "vqvae", "continuous", "discrete", "edit"])
    parser.add_argument("--data", type=Path, required=True,
                        help="clip: a folder with captions.jsonl; else: a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: "
                        "WHAT.safetensors and state.pt every 500 steps, samples/, log.csv")
    parser.add_argument("--preset", default="stickers",
                        help="stickers; for continuous and discrete also gpu, paper; for vqvae "
                             "f16-1024, f16-16384")
    for name, kind, what in (("steps", int, "total number, resumed ones included"),
                             ("batch_size", int, "pictures a step"),
                             ("lr", float, "peak learning rate")):
        defaults = ", ".join(f"{each} {DEFAULTS[each][name]:g}" for each in DEFAULTS)
        parser.add_argument("--" + name.replace("_", "-"), type=kind,
                            help=f"{what} (default: {defaults}; for the stickers preset)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, all other "
                        "arguments as they were; --steps may differ")
    parser.add_argument("--init", type=Path, help="start from these weights, of their sizes, k "
                        "and target, optimiser fresh (default: none; edit: the shipped continuous "
                        "ones)")
    parser.add_argument("--minutes", type=float, help="stop after this long, state written; the "
                        "learning rate still falls towards --steps")
    parser.add_argument("--index", type=Path, default=SHIPPED / "index",
                        help="both backbones: the index of the pictures in --data; edit: the one "
                             "that the condition's neighbours come from")
    parser.add_argument("--swap-index", type=Path, help="edit: the index of the pictures in "
                        "--data, whose nearest neighbours the regions are swapped for")
    parser.add_argument("--swaps", type=int, default=4, metavar="N",
                        help="edit: swaps made of each picture (default 4)")
    parser.add_argument("--vqvae", type=Path, help="discrete, and edit from discrete weights: what "
                        "makes the tokens (default: the stickers', for their preset only)")
    parser.add_argument("--clip", type=Path, help="edit: embeds the regions (default: the "
                        "stickers'); both backbones: refuse an index of another CLIP; training "
                        "itself runs none")
    parser.add_argument("--k", type=int, help="both backbones: neighbours (default 10)")
    parser.add_argument("--condition", choices=["both", "query", "neighbors"], default="both",
                        help="both backbones: query trains the paper's no-kNN baseline")
    parser.add_argument("--target", choices=["eps", "v", "x0"],
                        help="continuous: what the U-Net predicts (default: the preset's)")
    parser.add_argument("--keep-out", type=int, default=10, metavar="N", help="vqvae: measure on "
                        "every N-th drawing instead of training on it; DRAWING-3.png is one of "
                        "DRAWING's pictures (default 10; 0: none)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--no-bf16", action="store_true", help="train in float32")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    start = time.time()
    try:
        run(args, "python train.py " + shlex.join(argv))
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {args.out / args.what}.safetensors, {(time.time() - start) / 60:.1f} min")
    return 0


def run(args: argparse.Namespace, command: str) -> None:
    """Check what was asked for, then train. Raises ValueError or FileNotFoundError before the first
    step; by then only caches are written (neighbours, tokens, swaps)."""
    presets = {"clip": {"stickers": clip_model.STICKERS}, "vqvae": vqvae.PRESETS,
               "continuous": knn_diffusion.PRESETS, "discrete": knn_diffusion.DISCRETE_PRESETS,
               "edit": {"stickers": None}}                     # an editing model keeps its sizes
    require(args.preset in presets[args.what],
          f"no preset {args.preset!r} for {args.what}; there is {', '.join(presets[args.what])}")
    config = presets[args.what][args.preset]
    steps, batch_size, lr = (DEFAULTS[args.what][name] if getattr(args, name) is None
                             else getattr(args, name) for name in ("steps", "batch_size", "lr"))
    k = 10 if args.k is None else args.k
    require(steps >= 1 and batch_size >= 1 and lr > 0 and k >= 1 and 0 <= args.seed < 2**63 and
          args.swaps >= 1 and args.keep_out >= 0 and args.keep_out != 1 and
          (args.minutes is None or args.minutes > 0),
          "--steps, --batch-size, --k, --swaps want 1 or more, --lr and --minutes more than 0, "
          "--seed 0 to 2^63 - 1, --keep-out 0 or 2 and more")
    require(not args.resume or (args.out / "state.pt").is_file(),
          f"nothing to resume: {args.out / 'state.pt'} does not exist")
    require(args.out.is_dir() or not args.out.exists(),
          f"{args.out} is a file, wanted a folder to write")
    device = clip_model.pick_device(args.device)
    common = dict(steps=steps, batch_size=batch_size, lr=lr, seed=args.seed, resume=args.resume,
                  init=args.init, minutes=args.minutes, device=device, bf16=not args.no_bf16,
                  command=command)
    if args.what == "clip":
        require((args.data / "captions.jsonl").is_file(), f"no captions.jsonl in {args.data}")
        train_clip(args.data, args.out, config, **common)
    elif args.what == "vqvae":
        train_vqvae(args.data, args.out, config, args.keep_out, **common)
    elif args.what == "edit":
        train_edit(args, common)
    else:
        index = retrieval.open_index(args.index)
        if args.clip:
            clip = clip_model.load(args.clip)
            retrieval.check_encoder(index, clip.describe(), clip.fingerprint(),
                                    clip.config.embed_dim)
        config, codec = replace(config, embed_dim=index.rows.shape[1], n_neighbors=k), None
        if args.what == "discrete":
            codec, config = open_codec(args, config)
        train_diffusion(args.what, args.data, args.out, index, config, args.condition, **common,
                        codec=codec, k=args.k,
                        target=args.target if args.what == "continuous" else None)


def open_codec(args: argparse.Namespace, config: TransformerConfig
               ) -> tuple[vqvae.VQVAE, TransformerConfig]:
    """The VQ-VAE, and the transformer's config with its tokens, said where they are others."""
    wanted = f"{config.tokens_a_side}x{config.tokens_a_side} tokens of {config.n_codes}"
    require(args.vqvae is not None or args.preset == "stickers", f"preset {args.preset} wants "
          f"--vqvae, of {wanted} from {config.image_size} px; the stickers' is another size")
    codec = vqvae.load(args.vqvae or SHIPPED / "vqvae.safetensors")[0]
    side, n_codes = config.image_size // codec.config.factor, codec.config.n_codes
    if (side, n_codes) != (config.tokens_a_side, config.n_codes):
        print(f"{side}x{side} tokens of {n_codes}, as {args.vqvae} makes them; the preset "
              f"{args.preset} has {wanted}")
    return codec, replace(config, n_codes=n_codes, tokens_a_side=side)


def train_edit(args: argparse.Namespace, common: dict) -> None:
    """`train_diffusion` with swaps, after their files are opened and found to belong together."""
    require(args.swap_index is not None, "edit wants --swap-index, an index of the pictures in "
                                       "--data (python index.py build makes one)")
    common["init"] = args.init or SHIPPED / "continuous.safetensors"
    clip = clip_model.load(args.clip or SHIPPED / "clip.safetensors").to(common["device"])
    index, swap_index = retrieval.open_index(args.index), retrieval.open_index(args.swap_index)
    for each in (index, swap_index):
        retrieval.check_encoder(each, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    begin = args.out / "edit.safetensors" if args.resume else common["init"]
    is_discrete = clip_model.read_weights(begin)[1].get("class") == "TokenTransformer"
    codec = vqvae.load(args.vqvae or SHIPPED / "vqvae.safetensors")[0] if is_discrete else None
    train_diffusion("edit", args.data, args.out, index, None, args.condition, **common, k=args.k,
                    codec=codec, swaps={"swap_index": swap_index, "clip": clip,
                                        "per_picture": args.swaps})


if __name__ == "__main__":
    sys.exit(main())
