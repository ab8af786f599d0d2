"""Train the parts of kNN-Diffusion on one machine:  python train.py WHAT

    vqvae        pictures <-> tokens, from any folder of pictures
    continuous   the U-Net, from pictures, their embeddings and their neighbours (Sec. 3.2)
    discrete     the transformer, from the VQ-VAE's tokens and the same
    edit         either of them further, to put back what a region swap took away (Sec. 3.3)

No training reads a word, and only the swaps of `edit` run CLIP. Pictures, tokens, neighbours and
swaps are made once and kept in files.

Each loop is flat: rows → x_0, query, neighbours → t, ε, drops → loss → step → average → log. The
generators of a step are seeded with (seed, step), so a resumed run goes on as if it had never
stopped. Left out: more than one GPU, held-out losses, float16.

Shapes: B pictures per step, C channels, S pixels per side, L tokens, V codes, E CLIP dimension,
K neighbours, N pictures, R rows to learn from: R = N, or several swaps per picture.
"""
from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import math
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, nn

import clip_model
import edit
import index as retrieval
import knn_diffusion
import vqvae
from clip_model import SHIPPED, require, to_x
from knn_diffusion import TokenTransformer, TransformerConfig, UNet

REVIVE_EVERY, LOG_EVERY = 100, 50      # steps
PIXELS = 2**20                         # that a VQ-VAE encodes in one pass
PRESETS = {"vqvae": vqvae.PRESETS, "continuous": knn_diffusion.PRESETS,
           "discrete": knn_diffusion.DISCRETE_PRESETS,
           "edit": {"stickers": None}}                       # an editing model keeps its sizes
STEPS = {"vqvae": 10000, "continuous": 20000, "discrete": 20000, "edit": 5000}
# Pictures at once, else 64. Computed, not measured, for 12 GB (gpu, f16) and 24 GB (paper).
BATCH_SIZES = {("continuous", "gpu"): 32, ("continuous", "paper"): 16, ("discrete", "paper"): 8,
               ("vqvae", "f16-1024"): 6, ("vqvae", "f16-16384"): 6}
# The layers at a model's ends: see `muon_and_adam`.
ENDS = {vqvae.VQVAE: ("encoder.conv_in", "decoder.conv_out", "quantize"),
        UNet: ("conv_in.", "conv_out."),
        TokenTransformer: ("token.", "row.", "column.", "time.", "out.")}

# ---------------------------------------------------------------- stages that every loop shares

def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` in `warmup` steps, then half a cosine to 2 % of it at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon(torch.optim.Optimizer):
    """Momentum with every singular value of a matrix's update made about 1 (Jordan et al., 2024).

    So directions that few pictures ask for move as far as those that all of them ask for: what has
    to be learned by heart is learned sooner. A convolution counts as the matrix (C', C·h·w). The
    factor 0.2 √max(rows, columns) gives AdamW's usual update size, and so its learning rates and
    decay (Liu et al., 2502.16982 Eq. 4). Matrices of one shape are one stack: a GPU needs longer to
    start a hundred small products than to compute them.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float,
                 momentum: float = 0.95) -> None:
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in parameters:
            self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum, alike = group["lr"], group["momentum"], defaultdict(list)
            for p in (p for p in group["params"] if p.grad is not None):
                alike[p.shape].append(p)
            for shape, parameters in alike.items():
                gradients = [p.grad for p in parameters]
                means = [self.state[p]["mean"] for p in parameters]
                torch._foreach_lerp_(means, gradients, 1 - momentum)
                ahead = torch._foreach_lerp(gradients, means, momentum)    # Nesterov's look ahead
                matrices = torch.stack(ahead).flatten(2)                   # (n, C', C·h·w)
                scale = 0.2 * math.sqrt(max(matrices.shape[1:]))
                updates = orthogonal(matrices.squeeze(0)).reshape(-1, *shape).unbind()
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-lr * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ (..., rows, columns), roughly: five Newton-Schulz steps bring
    every singular value to between about 0.7 and 1.2. Coefficients: Jordan et al. (2024). They bear
    bfloat16, which is taken where the device multiplies it."""
    is_wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if is_wide else matrices.mT
    x = x.to(torch.bfloat16 if has_bf16(x.device) else torch.float32)
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=1e-7)[..., None, None]
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(5):
        gram = x @ x.mT                                    # x ← (3.4445 − 4.7750 G + 2.0315 G²) x
        factor = add_product(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = add_product(x, factor, x, beta=3.4445)
    return (x if is_wide else x.mT).to(matrices)


def muon_and_adam(model: nn.Module, lr: float, at_the_ends: tuple[str, ...]
                  ) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and convolutions inside, AdamW for vectors, maps, and the layers at the
    ends that `at_the_ends` names."""
    inside = {name: p for name, p in model.named_parameters()
              if p.ndim >= 2 and name.endswith("weight") and not name.startswith(at_the_ends)}
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [Muon(list(inside.values()), lr=lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself. GPUs before Ampere only imitate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def take_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float,
              max_norm: float) -> tuple[float, float]:
    """One step down the gradients that backward() left, clipped; none where the loss or their norm
    is not finite. Returns both, in the one read-back of a step: a GPU runs out of work in each."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    loss, norm = torch.stack([loss.detach(), norm]).tolist()
    if math.isfinite(loss + norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss, norm


def descend(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float,
            max_norm: float) -> bool:
    """`take_step` down one loss, nothing accumulated. False where no step was taken."""
    loss.backward()
    return math.isfinite(sum(take_step(model, optimizers, loss, lr, max_norm)))


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema ← d·ema + (1 − d)·weights with d = min(decay, (1 + step)/(10 + step)): early weights,
    still far off, are forgotten fast."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def step_seed(seed: int, step: int) -> int:
    """One seed per (seed, step), well mixed, below 2^63."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


class Progress:
    """A line per LOG_EVERY steps, on stdout and in log.csv; and what ends a run early: the clock,
    Ctrl-C, SIGTERM. The first signal lets the step end and be saved, a second one does not."""

    def __init__(self, out: Path, first_step: int, steps: int, minutes: float | None) -> None:
        self.path, self.first, self.steps = out / "log.csv", first_step, steps
        self.start = time.time()
        self.deadline = self.start + 60 * (math.inf if minutes is None else minutes)
        self.skipped, self.in_a_row, self.stopped = 0, 0, False
        self.recent: list[float] = []
        if first_step == 0:
            self.path.write_text("step,loss,lr,images_per_second,gradient_norm,skipped\n")
        self.handlers = {number: signal.signal(number, self.stop)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(self, number: int, _: object) -> None:
        self.stopped = True
        signal.signal(number, signal.SIG_DFL)

    def update(self, step: int, loss: float, lr: float, batch_size: int, finite: bool,
               norm: float = math.nan) -> None:
        """Count a finished step, and log some. norm: the gradient's. Raises
        FloatingPointError after 20 non-finite steps in a row."""
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row >= 20:
            raise FloatingPointError("the loss or its gradient was not finite 20 times in a row: "
                                     "--resume with a lower --lr")
        self.recent += [loss] * finite
        if (step + 1) % LOG_EVERY == 0 or step + 1 == self.steps:
            seconds = (time.time() - self.start) / (step + 1 - self.first)
            speed, mean = batch_size / seconds, sum(self.recent) / max(1, len(self.recent))
            left, self.recent = (self.steps - step - 1) * seconds / 60, []
            with open(self.path, "a") as file:
                print(step + 1, f"{mean:.5f},{lr:.2e},{speed:.1f},{norm:.3g}", self.skipped,
                      sep=",", file=file)
            print(f"step {step + 1}/{self.steps}  loss {mean:.4f}  gradient {norm:.3g}  {speed:.1f}"
                  f" images/s  {self.skipped} skipped  {left:.0f} min left", flush=True)

    def out_of_time(self) -> bool:
        """Whether the step just done has to be the last one."""
        return self.stopped or time.time() > self.deadline

    def finish(self, step: int, weights: Path) -> None:
        """Say where the run ended, and hand the signals back."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        print(f"wrote {weights}, {(time.time() - self.start) / 60:.1f} min" if step == self.steps
              else f"stopped at step {step}, saved; --resume goes on", flush=True)


def save_state(path: Path, step: int, settings: dict, model: nn.Module, ema: nn.Module,
               optimizers: list) -> None:
    """Write all that a resumed run needs, atomically; seed and step are the random state."""
    with clip_model.replacing(path) as file:
        torch.save({"step": step, "settings": settings, "model": model.state_dict(),
                    "ema": ema.state_dict(),
                    "optimizers": [each.state_dict() for each in optimizers]}, file)


def load_state(path: Path, steps: int, settings: dict, model: nn.Module, ema: nn.Module,
               optimizers: list) -> int:
    """Restore weights, average and optimisers in place; return the steps done. Raises ValueError
    for a damaged file, another model or other settings, or where all steps are done."""
    try:
        with zipfile.ZipFile(path) as archive:              # torch itself believes a flipped bit
            require(archive.testzip() is None, "its checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        done, then = state["step"], state["settings"]
        for one, name in ((model, "model"), (ema, "ema")):
            one.load_state_dict(state[name])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
    except Exception as error:                # torch's reader raises many kinds on a damaged file
        raise ValueError(f"can't resume from {path}: {clip_model.reason(error)}") from None
    changed = [f"{name} was {then.get(name)}, is {value}" for name, value in settings.items()
               if then.get(name) != value]
    require(not changed, f"can't resume from {path}: {'; '.join(changed)}")
    require(done < steps, f"nothing left to do: {path} has {done} steps, --steps is {steps}")
    return done


def all_commands(weights: Path | None, command: str) -> str:
    """The commands that made some weights, a line each, and now this one."""
    before = clip_model.read_weights(weights)[1].get("command", "") if weights else ""
    return f"{before}\n{command}".strip()


class Run:
    """A training under way: what all loops begin, save and resume alike. settings: what may not
    change when it is resumed."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, settings: dict) -> None:
        self.args, self.settings = args, {"seed": args.seed, "preset": args.preset, **settings}
        self.model = model.to(args.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        model.train().requires_grad_(True)
        self.optimizers = muon_and_adam(model, args.lr, ENDS[type(model)])
        self.n = args.accumulate * args.batch_size                         # pictures per step
        self.parts = [slice(i, i + args.batch_size) for i in range(0, self.n, args.batch_size)]
        self.first = load_state(args.out / "state.pt", args.steps, self.settings, model, self.ema,
                                self.optimizers) if args.resume else 0
        (args.out / "samples").mkdir(parents=True, exist_ok=True)
        print(f"{args.what}: {args.data} -> {args.out}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {self.first} to "
              f"{args.steps} of {args.accumulate} x {args.batch_size}, {args.device}, "
              f"{'bfloat16' if args.bf16 else 'float32'}", flush=True)

    def steps(self, show: Callable[[int], None]) -> Iterator[tuple[int, torch.Generator]]:
        """The steps to do, each with its generator. Now and then, and at the end, the training is
        saved; then `show` draws or measures, and may run out of memory."""
        args = self.args
        self.progress = Progress(args.out, self.first, args.steps, args.minutes)
        for step in range(self.first, args.steps):
            torch.manual_seed(step_seed(args.seed + 1, step))              # dropout in the model
            yield step, torch.Generator().manual_seed(step_seed(args.seed, step))
            is_last = self.progress.out_of_time() or step + 1 == args.steps
            if is_last or (step + 1) % args.save_every == 0:
                self.save(step + 1)
                show(step + 1)
            if is_last:
                break
        self.progress.finish(step + 1, args.out / f"{args.what}.safetensors")

    def advance(self, step: int, loss: Tensor, rate: float, decay: float) -> None:
        """Step, average, log."""
        loss, norm = take_step(self.model, self.optimizers, loss, rate, max_norm=1.0)
        average(self.ema, self.model, step, decay)
        self.progress.update(step, loss, rate, self.n, math.isfinite(loss + norm), norm)

    def save(self, step: int) -> None:
        """WHAT.safetensors, the averaged weights; with --keep also under the step's number."""
        path = self.args.out / f"{self.args.what}.safetensors"
        metadata = {"step": str(step), "command": self.args.command}
        for name in {"condition", "clip", "vqvae"} & set(self.settings):
            metadata[name] = self.settings[name]
        clip_model.save_model(path, self.ema, metadata)
        if self.args.keep:
            shutil.copyfile(path, path.with_stem(f"{self.args.what}-{step:07d}"))
        save_state(path.with_name("state.pt"), step, self.settings, self.model, self.ema,
                   self.optimizers)

    def save_grid(self, step: int, rows: list[Tensor]) -> None:
        """samples/STEP.png, a row of pictures per batch x (n, 3, S, S)."""
        sheet = clip_model.grid([clip_model.to_pictures(x) for x in rows], rows[0].shape[-1])
        sheet.save(self.args.out / "samples" / f"{step:07d}.png")


# ---------------------------------------------------------------- pictures, made ready once

def read_square(path: Path, size: int) -> np.ndarray:
    """A picture as a square, uint8 (size, size, 3)."""
    try:               # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, six times as fast.
        with JpegImageFile(path) as picture:
            picture.draft(None, (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception:                                     # another format, or a damaged one
        picture = clip_model.read_image(path)
    return np.asarray(clip_model.fit_square(picture, size))


def read_pictures(folder: Path, names: list[str], size: int, skip: bool = False) -> np.ndarray:
    """Pictures of a folder, squares of `size`: uint8 (N, S, S, 3). One that can't be read raises
    ValueError; with `skip` it is said and left out."""
    def read(name: str) -> np.ndarray | None:
        try:
            return read_square(folder / name, size)
        except ValueError as error:
            require(skip, str(error))
            print(f"skipped: {error}", file=sys.stderr)

    with ThreadPoolExecutor(8) as pool:                   # Pillow lets other threads run meanwhile
        found = [picture for picture in pool.map(read, names) if picture is not None]
    return np.array(found, np.uint8).reshape(-1, size, size, 3)


def prepared(folder: Path, names: list[str], size: int, path: Path, skip: bool = False
             ) -> np.ndarray:
    """`read_pictures`, kept in `path`: made anew where names or sizes of the files change."""
    missing = [name for name in names if not (folder / name).is_file()]
    require(not missing, f"{folder} has no {missing[:1]}: give the --index (edit: --swap-index) of "
            "this folder, `python index.py build` makes it")
    files = [(name, (folder / name).stat().st_size) for name in names]
    blocks = (read_pictures(folder, names[i:i + 256], size, skip)
              for i in range(0, len(names), 256))
    return retrieval.cached(path, hashlib.sha256(repr(files).encode()).hexdigest(), blocks)


# ---------------------------------------------------------------- the VQ-VAE

def split_by_drawing(names: list[str], every: int, are_stickers: bool = True
                     ) -> tuple[list[str], list[str]]:
    """File names to train on, and those kept out: each `every`-th drawing in all its renderings,
    "fox-0.png", "fox-1.png", … (a drawing is a name up to its last hyphen). Of other pictures than
    the stickers: each `every`-th file. 0 keeps none out."""
    drawing = {name: are_stickers and name.rpartition("-")[0] or name for name in names}
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
    first, quality, step = torch.zeros(0), [], PIXELS // pictures.shape[1]**2
    for i in range(0, len(pictures), step):
        x = to_x(pictures[i:i + step], device)
        tokens = model.encode(x)
        found = model.decode(tokens, x.shape[2] // model.config.factor)
        counts += tokens.flatten().cpu().bincount(minlength=len(counts))
        quality.append(vqvae.psnr(found, x).cpu())
        first = found[:12].cpu() if i == 0 else first
    return first, torch.cat(quality).mean().item(), counts


def train_vqvae(args: argparse.Namespace) -> None:
    """Train the VQ-VAE on a folder of pictures."""
    torch.manual_seed(args.seed)
    model = (vqvae.load(args.weights)[0] if args.weights else
             vqvae.VQVAE(vqvae.PRESETS[args.preset]))
    config, device, size = model.config, args.device, model.config.image_size
    require(not config.gumbel, "the Gumbel codebook loads and runs here; training it is left out")
    are_stickers = (args.data.parent / "captions.jsonl").is_file()
    names, others = split_by_drawing(retrieval.list_images(args.data), args.keep_out, are_stickers)
    require(len(names) > 0, f"no picture to train on below {args.data}")
    pictures = prepared(args.data, names, size, args.out / f"pictures-{size}.npy", skip=True)
    tests = prepared(args.data, some(others or names, 1000), size,
                     args.out / f"measured-{size}.npy", skip=True)
    print(f"{len(pictures)} pictures, {len(others)} kept out, {size} px, factor {config.factor}, "
          f"V {config.n_codes}")
    run = Run(args, model, {"keep_out": args.keep_out})

    def draw(n: int, seeded: torch.Generator) -> np.ndarray:
        return pictures[torch.randint(len(pictures), (n,), generator=seeded).numpy()]

    def revive(step: int) -> None:
        """Restart the codes that eight batches do not use. The weights and (seed, step) decide
        alone, so a resumed run does the same."""
        seeded = torch.Generator().manual_seed(step_seed(args.seed + 1, step))
        counts = torch.zeros(config.n_codes, dtype=torch.int64)
        with torch.no_grad(), autocast(device, args.bf16):
            for _ in range(8):
                z = model.latents(to_x(draw(args.batch_size, seeded), device)).float()
                counts += model.quantize.nearest(z).flatten().cpu().bincount(minlength=len(counts))
        vqvae.restart_dead_codes(model.quantize, counts, z, seeded)

    def measure(step: int) -> None:
        x, quality, counts = reconstruct(run.ema, tests, device)
        print(f"step {step}: PSNR {quality:.2f} dB on {len(tests)} pictures "
              f"{'kept out' if others else 'trained on'}, {int((counts > 0).sum())} of "
              f"{len(counts)} codes used, perplexity {vqvae.perplexity(counts):.0f}", flush=True)
        run.save_grid(step, [to_x(tests[:len(x)]), x])

    for step, seeded in run.steps(show=measure):
        if step % REVIVE_EVERY == 0 and step < 0.8 * args.steps:       # codes settle in the end
            revive(step)
        batch, total = draw(run.n, seeded), 0
        for part in run.parts:
            x = to_x(batch[part], device)
            with autocast(device, args.bf16):
                found, codebook_loss, _ = model(x)
                loss = vqvae.reconstruction_loss(found, x) + codebook_loss
            (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        rate = learning_rate(step, args.lr, 300, args.steps)
        run.advance(step, total, rate, decay=0.999)


# ---------------------------------------------------------------- what a diffusion may see

@dataclass(frozen=True)
class Data:
    """All that a diffusion training reads. Row i tells of picture i modulo N."""
    x0: np.ndarray                   # what to learn: uint8 (N, S, S, 3), or tokens int32 (N, L)
    queries: np.ndarray              # float16 (R, E): f_img(x_0), or of x_0's swapped region
    neighbors: np.ndarray            # int32 (R, K): rows of the database
    database: np.ndarray             # float16, E columns: the rows of an index
    swapped: np.ndarray | None       # I_manip, as x0 but (R, ...); None where nothing is edited

    def condition(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """The query (B, E) and kNN(query) (B, K, E), float32, of rows (B,)."""
        near = self.database[self.neighbors[rows].astype(np.int64)]
        return torch.from_numpy(self.queries[rows]).float(), torch.from_numpy(near).float()

    def pictures(self, rows: np.ndarray) -> list[np.ndarray]:
        """x_0 of rows (B,), and for a model that edits their I_manip."""
        x0 = self.x0[rows % len(self.x0)]
        return [x0] if self.swapped is None else [x0, self.swapped[rows]]

    def twelve(self, args: argparse.Namespace
               ) -> tuple[list[np.ndarray], Tensor | None, Tensor | None]:
        """Twelve rows from all over to draw samples for; None for what --condition blinds."""
        rows = np.arange(12) * (len(self.queries) // 13)  # of 12 some would be of one picture
        query, neighbors = (part.to(args.device) for part in self.condition(rows))
        return (self.pictures(rows), None if args.condition == "neighbors" else query,
                None if args.condition == "query" else neighbors)


def swaps(args: argparse.Namespace, own: retrieval.Index, database: retrieval.Index, k: int,
          clip: clip_model.CLIP, pictures: np.ndarray
          ) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of which a region was swapped for the aligned nearest neighbour's (Sec. 3.3).

    Returns a name for the lot; I_manip uint8 (R, S, S, 3); the *original* regions' embeddings
    float16 (R, E); their rows in the database int32 (R, K). R is --swaps times N, all pictures in
    turn. Kept in out/swaps-NAME.npz; NAME is a digest of all that they depend on, edit.py too.
    """
    (N, size), step = pictures.shape[:2], PIXELS // pictures.shape[1]**2
    require(N > 1, f"{args.data} holds one picture, and a swap needs another one")
    digests = [retrieval.rows_digest(each.rows) for each in (own, database)]
    told = size, k, args.swaps, args.seed, clip.fingerprint(), digests
    source = Path(edit.__file__).read_text("utf-8")
    name = hashlib.sha256(f"{told} {source}".encode()).hexdigest()[:16]
    path = args.out / f"swaps-{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as found:
            return name, *(found[part] for part in ("manipulated", "queries", "neighbors"))
    except Exception:                                     # missing, or damaged: made anew
        pass
    generator = torch.Generator().manual_seed(args.seed)
    partner = retrieval.neighbor_table(own, 1, device=args.device)[:, 0]   # (N,), never itself
    manipulated, queries, n_moved = [], [], 0
    for start in list(range(0, N, step)) * args.swaps:
        rows = np.arange(start, min(start + step, N))
        x, boxes, moved = edit.region_swap(to_x(pictures[rows], args.device),
                                           to_x(pictures[partner[rows]], args.device), generator)
        n_moved += int(moved.sum())
        manipulated += clip_model.to_pictures(x)
        crops = [Image.fromarray(pictures[row]).crop(edit.region_crop(tuple(box), size, size))
                 for row, box in zip(rows, boxes.tolist())]
        queries.append(clip.embed_pictures(crops))
    queries = torch.cat(queries)
    print(f"{len(queries)} swaps, {n_moved} of neighbours that could be aligned", flush=True)
    ids = database.search(queries, k)[1].int().cpu().numpy()
    made = np.stack(manipulated), queries.half().cpu().numpy(), ids
    args.out.mkdir(parents=True, exist_ok=True)
    with clip_model.replacing(path) as file:
        np.savez(file, manipulated=made[0], queries=made[1], neighbors=made[2])
    return name, *made


# ---------------------------------------------------------------- the U-Net (Sec. 3.2)

def train_continuous(args: argparse.Namespace, model: UNet, data: Data, settings: dict) -> None:
    """Train the U-Net, to draw or to edit."""
    config, device, size = model.config, args.device, model.config.image_size
    schedule = knn_diffusion.Schedule(config.T, config.noise_shift, device)
    draw_drops = knn_diffusion.draw_edit_drops if config.edit else knn_diffusion.draw_drops
    run = Run(args, model, {**settings, "target": config.target})

    def draw_samples(step: int) -> None:
        pictures, query, neighbors = data.twelve(args)
        shown = [to_x(each, device) for each in pictures]
        with autocast(device, args.bf16):
            *_, x = knn_diffusion.sample(run.ema, query, neighbors, list(range(12)),
                                         steps=min(20, config.T), picture=(*shown, None)[1])
        run.save_grid(step, [*shown, x])

    for step, seeded in run.steps(show=draw_samples):
        rows = torch.randint(len(data.queries), (run.n,), generator=seeded).numpy()
        x0, *manipulated = data.pictures(rows)                             # uint8 (n, S, S, 3)
        query, neighbors = data.condition(rows)                            # (n, E), (n, K, E)
        t = torch.randint(1, config.T + 1, (run.n,), generator=seeded)
        eps = torch.randn(run.n, 3, size, size, generator=seeded)
        drop_query, drop_neighbors, *drop_picture = draw_drops(run.n, seeded, args.condition)
        if args.flip:                         # the embeddings stay those of the unflipped picture
            flip = (torch.rand(run.n, generator=seeded) < 0.5).numpy()
            for pictures in (x0, *manipulated):
                pictures[flip] = pictures[flip, :, ::-1]
        if args.query_noise:
            query = knn_diffusion.add_query_noise(query, args.query_noise, seeded)
        inputs, total = (query, neighbors, t, eps, drop_query, drop_neighbors), 0
        for part in run.parts:
            picture = None
            if config.edit:                                                # a null picture is grey
                is_null = drop_picture[0][part, None, None, None].to(device)
                picture = to_x(manipulated[0][part], device).masked_fill(is_null, 0)
            with autocast(device, args.bf16):
                loss = knn_diffusion.diffusion_loss(
                    model, schedule, to_x(x0[part], device),
                    *(each[part].to(device) for each in inputs), picture)
            (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        rate = learning_rate(step, args.lr, 300, args.steps)
        run.advance(step, total, rate, decay=0.9995)


# ---------------------------------------------------------------- the transformer

def train_discrete(args: argparse.Namespace, model: TokenTransformer, data: Data,
                   codec: vqvae.VQVAE, settings: dict) -> None:
    """Train the transformer, to draw or to edit."""
    config, device, V = model.config, args.device, model.config.n_codes
    schedule = knn_diffusion.MaskSchedule(config.T, V, config.schedule, device)
    draw_drops = knn_diffusion.draw_edit_drops if config.edit else knn_diffusion.draw_drops
    run = Run(args, model, settings)

    def draw_samples(step: int) -> None:
        pictures, query, neighbors = data.twelve(args)
        shown = [torch.from_numpy(each).long().to(device) for each in pictures]
        with autocast(device, args.bf16):
            *_, tokens = knn_diffusion.sample_tokens(
                run.ema, query, neighbors, list(range(12)), steps=min(25, config.T),
                picture=(*shown, None)[1])
            run.save_grid(step, [codec.decode(each) for each in (*shown, tokens)])

    for step, seeded in run.steps(show=draw_samples):
        rows = torch.randint(len(data.queries), (run.n,), generator=seeded).numpy()
        x0, *manipulated = (torch.from_numpy(each).long() for each in data.pictures(rows))
        query, neighbors = data.condition(rows)                            # (n, E), (n, K, E)
        t = torch.randint(1, config.T + 1, (run.n,), generator=seeded)
        u = torch.rand(x0.shape, generator=seeded)                         # (n, L)
        codes = torch.randint(V, x0.shape, generator=seeded)
        drop_query, drop_neighbors, *drop_picture = draw_drops(run.n, seeded, args.condition)
        if config.edit:
            manipulated[0][drop_picture[0]] = V                            # a null picture: MASK
        if args.query_noise:
            query = knn_diffusion.add_query_noise(query, args.query_noise, seeded)
        inputs = x0, t, u, codes, query, neighbors, drop_query, drop_neighbors, *manipulated
        total = 0
        for part in run.parts:
            x0, t, u, codes, *condition = (each[part].to(device) for each in inputs)
            xt = knn_diffusion.mask_and_replace(x0, t, schedule, u, codes)
            with autocast(device, args.bf16):
                loss = knn_diffusion.discrete_loss(model, schedule, x0, xt, t, *condition)
            (loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        rate = learning_rate(step, args.lr, 300, args.steps)
        run.advance(step, total, rate, decay=0.9995)


# ---------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=list(PRESETS))
    add("--data", type=Path, required=True, help="a folder of pictures")
    add("--out", type=Path, required=True, help="folder to write: WHAT.safetensors, state.pt, ...")
    add("--preset", default="stickers",
        help="stickers; continuous, discrete: gpu, paper; vqvae: f16-1024, f16-16384")
    add("--steps", type=int, help=f"total, resumed ones included; the rate falls to it ({STEPS})")
    add("--batch-size", type=int, help="pictures at once (default 64, less for large presets)")
    add("--accumulate", type=int, default=1, metavar="A", help="batches per step: one of A·B")
    add("--lr", type=float, help="peak learning rate (default 2e-3; edit: 1e-3)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true",
        help="go on; all arguments as they were, but for --steps, --lr, --batch-size")
    add("--init", type=Path, help="start from these weights, of their sizes, k and target, "
        "optimiser fresh (default: none; edit: the shipped continuous ones)")
    add("--minutes", type=float, help="save and stop after this long")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default 500)")
    add("--keep", action="store_true", help="keep the weights of every save")
    add("--index", type=Path, default=SHIPPED / "index", help="the index of the pictures in "
        "--data; edit: the one that the condition's neighbours come from")
    add("--neighbors-from", type=Path, metavar="DIR",
        help="another index, whose rows are the neighbours, none excluded")
    add("--swap-index", type=Path, help="edit: the index of the pictures in --data, whose nearest "
        "neighbours the regions are swapped for")
    add("--swaps", type=int, default=4, metavar="N", help="edit: swaps per picture (default 4)")
    add("--vqvae", type=Path, help="what makes tokens (default: the stickers', for their preset)")
    add("--clip", type=Path, help="edit: embeds regions (default: the stickers'); else: checked")
    add("--k", type=int, help="neighbours (default 10, at most all others)")
    add("--condition", choices=["both", "query", "neighbors"], default="both",
        help="query trains the paper's no-kNN baseline")
    add("--query-noise", type=float, default=0.0, metavar="S",
        help="half of the queries get noise of a norm up to S (default 0)")
    add("--flip", action="store_true",
        help="U-Net: mirror half of the pictures; embeddings stay the unmirrored ones'")
    add("--target", choices=["eps", "v", "x0"], help="what the U-Net predicts (default: preset's)")
    add("--keep-out", type=int, default=10, metavar="N", help="vqvae: measure on every N-th file "
        "(stickers: drawing) instead of training on it (default 10; 0: none)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--no-bf16", action="store_true", help="train in float32")
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command="python train.py " + shlex.join(argv))
    return clip_model.run_command(parser, run, argv)


def run(args: argparse.Namespace) -> None:
    """Complete and check what was asked for, then train. Raises ValueError or FileNotFoundError
    before the first step; by then only caches are written."""
    require(args.preset in PRESETS[args.what], f"no preset {args.preset!r} for {args.what}; there "
            f"is {', '.join(PRESETS[args.what])}")
    if args.batch_size is None:
        args.batch_size = BATCH_SIZES.get((args.what, args.preset), 64)
    args.steps = STEPS[args.what] if args.steps is None else args.steps
    args.lr = (1e-3 if args.what == "edit" else 2e-3) if args.lr is None else args.lr
    for name, least in {"steps": 1, "batch_size": 1, "accumulate": 1, "k": 1, "save_every": 1,
                        "swaps": 1, "seed": 0, "keep_out": 0, "query_noise": 0, "lr": 1e-12,
                        "minutes": 1e-9}.items():
        value, most = getattr(args, name), 2**16 if name in ("batch_size", "accumulate") else 2**62
        require(value is None or least <= value <= most,
                f"--{name.replace('_', '-')} is {value}, wanted {least} to {most}")
    for name, those in {"swap_index": "edit", "neighbors_from": "continuous, discrete",
                        "flip": "continuous, edit", "target": "continuous"}.items():
        require(not getattr(args, name) or args.what in those,
                f"--{name.replace('_', '-')} is for {those}, not for {args.what}")
    require(args.what != "edit" or args.swap_index, "edit needs --swap-index, an index of the "
            "pictures in --data (python index.py build makes one)")
    require(args.data.is_dir(), f"no folder of pictures at {args.data}")
    require(args.out.is_dir() or not args.out.exists(), f"{args.out} is a file, not a folder")
    state = args.out / "state.pt"
    require(args.resume or not state.exists(), f"{args.out} holds a run: --resume goes on with it, "
            "another --out begins a new one")
    require(not args.resume or state.is_file(), f"nothing to resume: {state} does not exist")
    args.device = clip_model.pick_device(args.device)
    args.bf16 = not args.no_bf16 and has_bf16(args.device)
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")        # TF32 for what is left in float32
        torch.backends.cudnn.benchmark = True
    default = SHIPPED / "continuous.safetensors" if args.what == "edit" else None
    args.weights = args.out / f"{args.what}.safetensors" if args.resume else args.init or default
    args.command = all_commands(args.weights, args.command)
    (train_vqvae if args.what == "vqvae" else train_backbone)(args)


def train_backbone(args: argparse.Namespace) -> None:
    """Open or make all that a backbone learns from, see that it belongs together, and train."""
    # own: the index of the pictures in --data; database: the one that neighbours come from.
    own = database = retrieval.open_index(args.swap_index or args.index)
    made_by = own.manifest.get("encoder", "unknown"), own.manifest.get("encoder_hash", "")
    if args.neighbors_from or args.swap_index:
        database = retrieval.open_index(args.neighbors_from or args.index)
        retrieval.check_encoder(database, *made_by, own.rows.shape[1])
    if args.clip or args.what == "edit":
        clip = clip_model.load(args.clip or SHIPPED / "clip.safetensors").to(args.device)
        retrieval.check_encoder(own, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    model, codec = start_model(args, database, made_by[1])
    size, k, N = model.config.image_size, model.config.n_neighbors, len(own)
    digest = retrieval.rows_digest(own.rows)
    settings = {"condition": args.condition, "k": k, "clip": made_by[1], "pictures": digest[:16],
                "index": retrieval.rows_digest(database.rows)[:16],
                "query_noise": args.query_noise, "flip": args.flip}

    @functools.cache                                      # not called where there are tokens
    def pictures() -> np.ndarray:
        return prepared(args.data, own.paths, size, own.folder / f"pictures-{size}.npy")

    queries, swapped = own.rows, None
    if args.what == "edit":
        name, swapped, queries, neighbors = swaps(args, own, database, k, clip, pictures())
        settings["swaps"] = name
    elif args.neighbors_from:
        neighbors = retrieval.cached(
            own.folder / f"neighbors-{k}-from-{settings['index']}.npy", digest,
            (database.search(torch.from_numpy(own.rows[ids]).to(args.device).float(), k)[1].int()
             .cpu().numpy() for ids in np.split(np.arange(N), range(1024, N, 1024))))
    else:
        neighbors = retrieval.neighbor_table(own, k, device=args.device)
    about = f"{N} pictures, {len(queries)} queries, K {neighbors.shape[1]} of {database.folder}"
    if codec is None:
        print(about)
        data = Data(pictures(), queries, neighbors, database.rows, swapped)
        return train_continuous(args, model, data, settings)
    settings["vqvae"] = vqvae.fingerprint(codec)
    name = f"tokens-{settings['vqvae']}.npy"
    x0 = retrieval.cached(own.folder / name, digest, token_blocks(codec, pictures, args.device))
    require(int(x0.max()) < codec.config.n_codes, f"{own.folder / name} is damaged: delete it")
    if swapped is not None:
        blocks = token_blocks(codec, functools.partial(np.asarray, swapped), args.device)
        swapped = retrieval.cached(args.out / name, settings["swaps"], blocks)
    print(about)
    train_discrete(args, model, Data(x0, queries, neighbors, database.rows, swapped), codec,
                   settings)


@torch.no_grad()
def token_blocks(codec: vqvae.VQVAE, pictures: Callable[[], np.ndarray], device: torch.device
                 ) -> Iterator[np.ndarray]:
    """Tokens int32 (n, L). `pictures` is called, and opens files, only where tokens are made."""
    found = pictures()
    step = PIXELS // found.shape[1]**2
    for i in range(0, len(found), step):
        yield codec.encode(to_x(found[i:i + step], device)).int().cpu().numpy()


def start_model(args: argparse.Namespace, database: retrieval.Index, made_by: str
                ) -> tuple[UNet | TokenTransformer, vqvae.VQVAE | None]:
    """The model to train, and for tokens the VQ-VAE. A new model has the preset's sizes, one from
    weights its own, and its K and target, unless --target names another.

    Raises ValueError where the weights are of another kind, CLIP, K or VQ-VAE than the rest.
    """
    E, k = database.rows.shape[1], min(args.k or 10, max(1, len(database) - 1))
    kind, codec = {"continuous": UNet, "discrete": TokenTransformer}.get(args.what), None
    if args.weights is None:
        config = replace(PRESETS[args.what][args.preset], embed_dim=E, n_neighbors=k)
    else:
        model, metadata = knn_diffusion.load(args.weights)
        config, wanted = model.config, metadata.get("clip", "")
        require(kind is None or type(model) is kind and not config.edit,
                f"{args.weights} holds a {type(model).__name__}{' that edits' * config.edit}, "
                f"{args.what} trains a {kind and kind.__name__}")
        require(config.embed_dim == E and wanted in ("", made_by),
                f"{args.weights} was trained with the CLIP {wanted} ({config.embed_dim} "
                f"dimensions), the index at {database.folder} is of {made_by} ({E} dimensions)")
        require(args.k is None or k == config.n_neighbors,
                f"{args.weights} has {config.n_neighbors} neighbours, --k is {args.k}")
        model = knn_diffusion.widened(model) if kind is None and not config.edit else model
        config = model.config
    if args.target:
        config = replace(config, target=args.target)
    if isinstance(config, TransformerConfig):
        require(not args.flip, "--flip is the U-Net's: tokens can't be mirrored")
        side = config.tokens_a_side
        ours = f"{side}x{side} tokens of {config.n_codes} from {config.image_size} px"
        require(args.vqvae or args.preset == "stickers", f"preset {args.preset} needs --vqvae, "
                f"best of {ours}; the stickers' is another size")
        codec = vqvae.load(args.vqvae or SHIPPED / "vqvae.safetensors")[0].to(args.device)
        side, n_codes = config.image_size // codec.config.factor, codec.config.n_codes
        config = replace(config, n_codes=n_codes, tokens_a_side=side)
        require(args.weights is None or config == model.config,
                f"{args.weights} draws {ours}, the VQ-VAE makes {side}x{side} of {n_codes}")
    if args.weights is None:
        torch.manual_seed(args.seed)
        model = kind(config)
    model.config = config
    return model, codec


if __name__ == "__main__":
    sys.exit(main())
