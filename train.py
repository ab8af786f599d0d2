"""Train the parts of kNN-Diffusion on one machine:  python train.py WHAT

    vqvae        pictures <-> tokens, from any folder of pictures
    continuous   the U-Net, from pictures, their embeddings and their neighbours (Sec. 3.2)
    discrete     the transformer, from the VQ-VAE's tokens and the same
    edit         either of them further, to put back what a region swap took away (Sec. 3.3)

No training reads a word, and only the swaps of `edit` run CLIP. Pictures, tokens, neighbours and
swaps are made once and kept in files.

Each loop is flat: rows → x_0, query, neighbours → t, ε, drops → loss → step → average → log. The
generators of a step are seeded with (seed, step): a resumed run goes on as if never stopped.
From 100 pictures on, every 50th is held out (but may be a neighbour); its loss is in log.csv.
Left out: more than one GPU, float16.

Shapes: B pictures per step, C channels, S pixels per side, L tokens, V codes, E CLIP dimension,
K neighbours, N pictures, R rows to learn from: R = N, or several swaps per picture."""
from __future__ import annotations

import argparse
import copy
import hashlib
import math
import shlex
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import clip_model
import edit
import index as retrieval
import knn_diffusion
import vqvae
from clip_model import SHIPPED, require, to_x
from knn_diffusion import TokenTransformer, TransformerConfig, UNet

REVIVE_EVERY, LOG_EVERY = 100, 50       # steps
SWAPS = 4                               # of each picture, to learn editing
PIXELS = 2**20                          # that a VQ-VAE encodes in one pass
PRESETS = {"vqvae": vqvae.PRESETS, "continuous": knn_diffusion.PRESETS,
           "discrete": knn_diffusion.DISCRETE_PRESETS,
           "edit": {"stickers": None}}  # an editing model keeps its sizes
STEPS = {"vqvae": 10000, "continuous": 20000, "discrete": 20000, "edit": 5000}
# Pictures at once, else 64. Computed for 12 GB (gpu, f16) and 24 GB (paper), not measured.
BATCH_SIZES = {("continuous", "gpu"): 32, ("continuous", "paper"): 16, ("discrete", "paper"): 8,
               ("vqvae", "f16-1024"): 6, ("vqvae", "f16-16384"): 6}
# Layers at a model's ends, see `muon_and_adam`.
ENDS = {vqvae.VQVAE: ("encoder.conv_in", "decoder.conv_out", "quantize"),
        UNet: ("conv_in.", "conv_out."),
        TokenTransformer: ("token.", "row.", "column.", "time.", "out.")}

# ---------------- stages that every loop shares

def learning_rate(step: int, peak: float, warmup: int, total: int) -> float:
    """Linear up to `peak` in `warmup` steps, then half a cosine to 2 % of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Muon(torch.optim.Muon):
    """torch's Muon, for convolutions, too: every singular value of a matrix's update is about 1
    (Jordan et al., 2024). Directions that few pictures ask for move as far as the others: what
    has to be learned by heart is learned sooner. A convolution counts as the matrix
    (C', h·w·C), a view in channels_last. "match_rms_adamw" gives updates AdamW's usual size, and
    so its learning rates and decay (Liu et al., 2502.16982 Eq. 4)."""
    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.weights = weights
        super().__init__([nn.Parameter(self.matrix(weight.detach())) for weight in weights], lr,
                         weight_decay, adjust_lr_fn="match_rms_adamw")

    def matrix(self, weight: Tensor) -> Tensor:
        return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).view(len(weight), -1)

    def step(self) -> None:
        for weight, matrix in zip(self.weights, self.param_groups[0]["params"]):
            matrix.grad = None if weight.grad is None else self.matrix(weight.grad)
        super().step()


def muon_and_adam(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices and convolutions inside, AdamW for the rest and what ENDS names."""
    inside = {name: p for name, p in model.named_parameters()
              if p.ndim >= 2 and name.endswith("weight")
              and not name.startswith(ENDS[type(model)])}
    others = [p for name, p in model.named_parameters() if name not in inside]
    return [Muon(list(inside.values()), lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]


def on_device(inputs: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Pictures, uint8 (B, S, S, 3), as x (bytes are copied, not floats); others as they are."""
    return [to_x(each, device) if each.dtype == torch.uint8 else each.to(device)
            for each in inputs]


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def take_step(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float
              ) -> tuple[float, float]:
    """Step down the gradients that backward() left, clipped to a norm of 1; not where loss or
    norm is not finite. Returns both, in one read-back: a GPU runs out of work in each."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    loss, norm = torch.stack([loss.detach(), norm]).tolist()
    if math.isfinite(loss + norm):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """ema ← d·ema + (1 − d)·weights, d = min(decay, (1 + step)/(10 + step)): early weights are
    still far off, and forgotten fast."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def step_seed(seed: int, step: int) -> int:
    """One seed per (seed, step), well mixed, below 2^63."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> 1)


def load_state(path: Path, steps: int, settings: dict, model: nn.Module, ema: nn.Module,
               optimizers: list) -> int:
    """Restore weights, average and optimisers in place; return the steps done. Raises ValueError
    for a damaged file, another model, other settings, or no step left."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself believes a flipped bit
            require(archive.testzip() is None, "its checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        done, then = state["step"], state["settings"]
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, its_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
    except Exception as error:  # torch raises many kinds on a damaged file
        raise ValueError(f"can't resume from {path}: {clip_model.reason(error)}") from None
    for name, value in settings.items():
        require(then.get(name) == value,
                f"can't resume from {path}: {name} was {then.get(name)}, is {value}")
    require(done < steps, f"{path} has {done} steps, --steps is {steps}")
    return done


class Run:
    """A training under way: what all loops begin, log, save and resume alike.
    The clock, Ctrl-C and SIGTERM end it early: the step at work is finished and saved, unless a
    second signal comes. settings: what may not change on a resume, and the weights' metadata."""
    def __init__(self, args: argparse.Namespace, model: nn.Module, settings: dict,
                 optimizers: list[torch.optim.Optimizer] | None = None) -> None:
        self.args = args
        self.settings = {"seed": args.seed, "preset": args.preset, **settings}
        self.model = model.to(args.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        model.train().requires_grad_(True)
        self.optimizers = optimizers or muon_and_adam(model, args.lr)
        self.n = args.accumulate * args.batch_size          # pictures per step
        before = clip_model.read_weights(args.weights)[1].get("command", "") if args.weights else ""
        self.command = f"{before}\n{args.command}".strip()  # all that made these weights
        self.first = load_state(args.out / "state.pt", args.steps, self.settings, model, self.ema,
                                self.optimizers) if args.resume else 0
        self.losses, self.skipped, self.in_a_row, self.is_stopped = [], 0, 0, False
        (args.out / "samples").mkdir(parents=True, exist_ok=True)
        if self.first == 0:
            (args.out / "log.csv").write_text(
                "step,loss,lr,images_per_second,gradient_norm,skipped,held_out_loss\n")
        print(f"{args.what}: {args.data} -> {args.out}, "
              f"{sum(p.numel() for p in model.parameters()):,} parameters, steps {self.first} to "
              f"{args.steps} of {args.accumulate} x {args.batch_size}, {args.device}, "
              f"{'bfloat16' if args.bf16 else 'float32'}", flush=True)

    def stop(self, number: int, _: object) -> None:
        self.is_stopped = True
        signal.signal(number, signal.SIG_DFL)

    def steps(self, look: Callable[[int], Tensor | None]) -> Iterator[tuple[int, torch.Generator]]:
        """The steps to do, each with its generator. Now and then, and at the end, all is saved and
        `look` draws and returns the held-out loss, if any."""
        args, self.start = self.args, time.time()
        handlers = {n: signal.signal(n, self.stop)
                    for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.first, args.steps):
                torch.manual_seed(step_seed(args.seed + 1, step))  # dropout in the model
                yield step, torch.Generator().manual_seed(step_seed(args.seed, step))
                is_late = time.time() - self.start > 60 * args.minutes
                is_last = self.is_stopped or is_late or step + 1 == args.steps
                is_saved = is_last or (step + 1) % args.save_every == 0
                if is_saved:
                    self.save(step + 1)
                if is_saved or (step + 1) % LOG_EVERY == 0:
                    self.log(step + 1, look(step + 1) if is_saved else None)
                if is_last:
                    break
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        print(f"wrote {args.out / args.what}.safetensors, {(time.time() - self.start) / 60:.1f} min"
              if step + 1 == args.steps else
              f"stopped at step {step + 1}, saved; --resume goes on", flush=True)

    def loss(self, model: nn.Module, loss_of: Callable, *inputs: Tensor) -> Tensor:
        """The mean of `loss_of(model, *inputs)` over the rows, in batches of --batch-size. A model
        that learns is left with its gradients."""
        total = 0
        for batch in zip(*(each.split(self.args.batch_size) for each in inputs)):
            with autocast(self.args.device, self.args.bf16):
                loss = loss_of(model, *on_device(batch, self.args.device))
            loss = loss * (len(batch[0]) / len(inputs[0]))
            if loss.requires_grad:
                loss.backward()
            total += loss.detach()
        return total

    def advance(self, step: int, loss: Tensor, decay: float, warmup: int = 300) -> None:
        """Step, average, count. Raises FloatingPointError after 20 non-finite steps in a row."""
        self.rate = learning_rate(step, self.args.lr, warmup, self.args.steps)
        loss, self.norm = take_step(self.model, self.optimizers, loss, self.rate)
        average(self.ema, self.model, step, decay)
        is_finite = math.isfinite(loss + self.norm)
        self.losses += [loss] * is_finite
        self.skipped += not is_finite
        self.in_a_row = 0 if is_finite else self.in_a_row + 1
        if self.in_a_row == 20:
            raise FloatingPointError("20 steps were not finite: lower --lr, --resume")

    def log(self, step: int, held_out: Tensor | None) -> None:
        """A line on stdout and in log.csv; the loss is the mean since the last one."""
        seconds = (time.time() - self.start) / (step - self.first)
        speed, mean = self.n / seconds, np.mean(self.losses or math.nan)
        left, self.losses = (self.args.steps - step) * seconds / 60, []
        held = "" if held_out is None else f"{held_out:.5f}"
        with open(self.args.out / "log.csv", "a") as file:
            print(f"{step},{mean:.5f},{self.rate:.2e},{speed:.1f},{self.norm:.3g},{self.skipped}",
                  held, sep=",", file=file)
        print(f"step {step}/{self.args.steps}  loss {mean:.4f}{'  held-out loss ' * bool(held)}"
              f"{held}  gradient {self.norm:.3g}  {speed:.1f} images/s  {self.skipped} skipped  "
              f"{left:.0f} min left", flush=True)

    def save(self, step: int) -> None:
        """WHAT.safetensors, the averaged weights, with --keep also under the step's number; then
        state.pt, all that a resumed run needs. Seed and step are the random state."""
        path = self.args.out / f"{self.args.what}.safetensors"
        told = {name: str(value) for name, value in self.settings.items()}
        told |= {"step": str(step), "command": self.command}
        clip_model.save_model(path, self.ema, told)
        if self.args.keep:
            shutil.copyfile(path, path.with_stem(f"{self.args.what}-{step:07d}"))
        with clip_model.replacing(self.args.out / "state.pt") as file:
            torch.save({"step": step, "settings": self.settings, "model": self.model.state_dict(),
                        "ema": self.ema.state_dict(),
                        "optimizers": [each.state_dict() for each in self.optimizers]}, file)

    def save_grid(self, step: int, rows: list[Tensor]) -> None:
        """samples/STEP.png, a row of pictures per batch x (n, 3, S, S)."""
        sheet = clip_model.grid([clip_model.to_pictures(x) for x in rows], rows[0].shape[-1])
        sheet.save(self.args.out / "samples" / f"{step:07d}.png")


# ---------------- pictures, made ready once

def read_pictures(folder: Path, names: list[str], size: int, skip: bool = False) -> np.ndarray:
    """Pictures of a folder, squares of `size`: uint8 (N, S, S, 3). An unreadable one raises
    ValueError; with `skip` it is said and left out."""
    def read(name):
        try:
            return [clip_model.fit_square(clip_model.read_image(folder / name, 2 * size), size)]
        except ValueError as error:
            require(skip, str(error))
            print(f"skipped: {error}", file=sys.stderr)
            return []

    with ThreadPoolExecutor(8) as pool:  # Pillow lets threads run
        found = sum(pool.map(read, names), [])
    return np.array([np.asarray(each) for each in found], np.uint8).reshape(-1, size, size, 3)


def prepared(path: Path, key: str, folder: Path, names: list[str], size: int, skip: bool = False
             ) -> np.ndarray:
    """`read_pictures`, kept in `path` under `key`."""
    blocks = (read_pictures(folder, names[i:i + 256], size, skip)
              for i in range(0, len(names), 256))
    return retrieval.cached(path, key, blocks)


# ---------------- the VQ-VAE

def split_by_drawing(names: list[str], every: int, are_stickers: bool = True
                     ) -> tuple[list[str], list[str]]:
    """File names to train on, and those kept out: each `every`-th drawing, in all its renderings
    "fox-0.png", "fox-1.png", … (a drawing is a name up to its last hyphen). Of other pictures:
    each `every`-th file. 0 keeps none out."""
    drawing = {name: are_stickers and name.rpartition("-")[0] or name for name in names}
    kept_out = set(sorted(set(drawing.values()))[every - 1::every]) if every else set()
    return ([name for name in names if drawing[name] not in kept_out],
            [name for name in names if drawing[name] in kept_out])


def train_vqvae(args: argparse.Namespace) -> None:
    """Train the VQ-VAE on a folder of pictures."""
    torch.manual_seed(args.seed)
    model = (vqvae.load(args.weights)[0] if args.weights else
             vqvae.VQVAE(vqvae.PRESETS[args.preset]))
    config, device, size = model.config, args.device, model.config.image_size
    require(not config.gumbel, "training the Gumbel codebook is left out")
    are_stickers = (args.data.parent / "captions.jsonl").is_file()
    names, others = split_by_drawing(retrieval.list_images(args.data), args.keep_out, are_stickers)
    key = hashlib.sha256(repr(names).encode()).hexdigest()
    pictures = prepared(args.out / f"pictures-{size}.npy", key, args.data, names, size, skip=True)
    tests = read_pictures(args.data, others[::len(others) // 256 + 1], size, skip=True)
    print(f"{len(pictures)} pictures, {len(others)} kept out, {config}")
    run = Run(args, model, {"keep_out": args.keep_out})

    def draw(n, seeded):
        return pictures[torch.randint(len(pictures), (n,), generator=seeded).numpy()]

    def revive(step):
        """Restart the codes that eight batches, drawn from (seed, step), do not use."""
        seeded = torch.Generator().manual_seed(step_seed(args.seed + 1, step))
        counts = torch.zeros(config.n_codes, dtype=torch.int64)
        with torch.no_grad(), autocast(device, args.bf16):
            for _ in range(8):
                z = model.latents(to_x(draw(args.batch_size, seeded), device)).float()
                counts += model.quantize.nearest(z).flatten().cpu().bincount(minlength=len(counts))
        vqvae.restart_dead_codes(model.quantize, counts, z, seeded)

    def loss_of(model, x):
        found, codebook_loss = model(x)
        return vqvae.reconstruction_loss(found, x) + codebook_loss

    def look(step):
        x = to_x((tests if len(tests) else pictures)[:12], device)
        run.save_grid(step, [x, run.ema(x)[0]])
        return run.loss(run.ema, loss_of, torch.from_numpy(tests)) if len(tests) else None

    for step, seeded in run.steps(look):
        if step % REVIVE_EVERY == 0 and step < 0.8 * args.steps:  # codes settle
            revive(step)
        loss = run.loss(model, loss_of, torch.from_numpy(draw(run.n, seeded)))
        run.advance(step, loss, decay=0.999)


# ---------------- what a diffusion may see

@dataclass
class Data:
    """All that a diffusion training reads. Row i tells of picture i modulo N."""
    x0: np.ndarray                 # uint8 (N, S, S, 3), or tokens int32 (N, L)
    queries: np.ndarray            # float16 (R, E): f_img(x_0), or its region's
    neighbors: np.ndarray          # int32 (R, K): rows of the database
    database: retrieval.Rows       # float16, the rows of an index
    manipulated: list[np.ndarray]  # I_manip, as x0 but (R, ...); may be empty

    def __post_init__(self) -> None:
        picture = np.arange(len(self.queries)) % len(self.x0)
        is_out = (picture % 50 == 49) & (len(self.x0) >= 100)
        self.rows, held_out = np.flatnonzero(~is_out), np.flatnonzero(is_out)
        self.held_out = held_out[::len(held_out) // 256 + 1]  # at most 256

    def draw(self, n: int, seeded: torch.Generator) -> list[Tensor]:
        """`batch` of n random rows that are not kept out."""
        return self.batch(self.rows[torch.randint(len(self.rows), (n,), generator=seeded).numpy()])

    def batch(self, rows: np.ndarray) -> list[Tensor]:
        """Of rows (B,): x_0, the query (B, E), kNN(query) (B, K, E), I_manip if edited."""
        found = [self.x0[rows % len(self.x0)], *(each[rows] for each in self.manipulated)]
        x0, *picture = [torch.from_numpy(each if each.ndim == 4 else each.astype(np.int64))
                        for each in found]
        query, near = self.queries[rows], self.database[self.neighbors[rows]]
        return [x0, torch.from_numpy(query).float(), torch.from_numpy(near).float(), *picture]


def swaps(args: argparse.Namespace, own: retrieval.Index, pictures: np.ndarray
          ) -> tuple[np.ndarray, np.ndarray]:
    """I_manip uint8 (R, S, S, 3), and the *original* regions' embeddings float16 (R, E) (Sec. 3.3).
    R is SWAPS times N, all pictures in turn. A resumed run reads out/swaps.npz."""
    path, device = args.out / "swaps.npz", args.device
    if args.resume:
        with np.load(path) as made:
            return made["manipulated"], made["queries"]
    (N, size), step = pictures.shape[:2], PIXELS // pictures.shape[1]**2
    clip = clip_model.load(args.clip or SHIPPED / "clip.safetensors").to(device)
    retrieval.check_encoder(own, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    partner = retrieval.neighbor_table(own, 1, device=device)[:, 0]  # (N,), never itself
    generator = torch.Generator().manual_seed(args.seed)
    manipulated, queries = [], []
    for rows in [slice(i, i + step) for i in range(0, N, step)] * SWAPS:
        shown = [to_x(pictures[each], device) for each in (rows, partner[rows])]
        x, boxes = edit.region_swap(*shown, generator)
        manipulated += clip_model.to_pictures(x)
        crops = [Image.fromarray(picture).crop(edit.region_crop(tuple(box), size, size))
                 for picture, box in zip(pictures[rows], boxes.tolist())]
        queries.append(clip.embed_pictures(crops))
    queries, manipulated = torch.cat(queries).half().cpu().numpy(), np.stack(manipulated)
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(path, manipulated=manipulated, queries=queries)
    return manipulated, queries


def samples(args: argparse.Namespace, model: nn.Module, data: Data, sample: Callable
            ) -> list[Tensor]:
    """x_0, I_manip if any, and what is drawn for them, of twelve rows from all over."""
    rows = np.arange(12) * (len(data.queries) // 13)  # 12 divides R: some would be of one picture
    x0, query, neighbors, *picture = on_device(data.batch(rows), args.device)
    query = None if args.condition == "neighbors" else query
    neighbors = None if args.condition == "query" else neighbors
    with autocast(args.device, args.bf16):
        *_, x = sample(model, query, neighbors, list(range(12)), steps=min(20, model.config.T),
                       picture=picture[0] if picture else None)
    return [x0, *picture, x]


def held_out_loss(run: Run, data: Data, draw_noise: Callable, loss_of: Callable) -> Tensor | None:
    """The averaged model's loss on rows kept out, with the same noise each time and no drops but
    --condition's."""
    if len(data.held_out) == 0:
        return None
    x0, query, neighbors, *picture = data.batch(data.held_out)
    noise = draw_noise(x0, torch.Generator().manual_seed(run.args.seed))
    drops = [torch.full((len(x0),), run.args.condition == only)
             for only in ("neighbors", "query")]
    return run.loss(run.ema, loss_of, x0, query, neighbors, *noise, *drops, *picture)


# ---------------- the U-Net (Sec. 3.2)

def train_continuous(args: argparse.Namespace, model: UNet, data: Data, settings: dict) -> None:
    """Train the U-Net, to draw or to edit."""
    T = model.config.T
    schedule = knn_diffusion.Schedule(T, model.config.noise_shift, args.device)
    draw_drops = knn_diffusion.draw_edit_drops if model.config.edit else knn_diffusion.draw_drops
    run = Run(args, model, settings)

    def draw_noise(x0, seeded):
        t = torch.randint(1, T + 1, (len(x0),), generator=seeded)
        return t, torch.randn(len(x0), 3, *x0.shape[1:3], generator=seeded)  # ε

    def loss_of(model, x0, query, neighbors, t, eps, drop_query, drop_neighbors, *edited):
        picture, *is_null = edited or [None]
        if is_null:
            picture = picture.masked_fill(is_null[0][:, None, None, None], 0)  # null: grey
        return knn_diffusion.diffusion_loss(model, schedule, x0, query, neighbors, t, eps,
                                            drop_query, drop_neighbors, picture)

    def look(step):
        run.save_grid(step, samples(args, run.ema, data, knn_diffusion.sample))
        return held_out_loss(run, data, draw_noise, loss_of)

    for step, seeded in run.steps(look):
        x0, query, neighbors, *picture = data.draw(run.n, seeded)
        t, eps = draw_noise(x0, seeded)
        drop_query, drop_neighbors, *drop_picture = draw_drops(run.n, seeded, args.condition)
        if args.flip:  # the embeddings stay unflipped
            is_flipped = torch.rand(run.n, generator=seeded) < 0.5
            for x in (x0, *picture):
                x[is_flipped] = x[is_flipped].flip(2)
        if args.query_noise:
            query = knn_diffusion.add_query_noise(query, args.query_noise, seeded)
        loss = run.loss(model, loss_of, x0, query, neighbors, t, eps, drop_query, drop_neighbors,
                        *picture, *drop_picture)
        run.advance(step, loss, decay=0.9995)


# ---------------- the transformer

def train_discrete(args: argparse.Namespace, model: TokenTransformer, data: Data,
                   codec: vqvae.VQVAE, settings: dict) -> None:
    """Train the transformer, to draw or to edit."""
    T, V = model.config.T, model.config.n_codes
    schedule = knn_diffusion.MaskSchedule(T, V, model.config.schedule, args.device)
    draw_drops = knn_diffusion.draw_edit_drops if model.config.edit else knn_diffusion.draw_drops
    run = Run(args, model, settings)

    def draw_noise(x0, seeded):
        t = torch.randint(1, T + 1, (len(x0),), generator=seeded)
        u = torch.rand(x0.shape, generator=seeded)  # (n, L)
        return t, u, torch.randint(V, x0.shape, generator=seeded)

    def loss_of(model, x0, query, neighbors, t, u, codes, *drops_and_picture):
        xt = knn_diffusion.mask_and_replace(x0, t, schedule, u, codes)
        return knn_diffusion.discrete_loss(model, schedule, x0, xt, t, query, neighbors,
                                           *drops_and_picture)

    def look(step):
        found = samples(args, run.ema, data, knn_diffusion.sample_tokens)
        run.save_grid(step, [codec.decode(tokens) for tokens in found])
        return held_out_loss(run, data, draw_noise, loss_of)

    for step, seeded in run.steps(look):
        x0, query, neighbors, *picture = data.draw(run.n, seeded)
        t, u, codes = draw_noise(x0, seeded)
        drop_query, drop_neighbors, *drop_picture = draw_drops(run.n, seeded, args.condition)
        if args.query_noise:
            query = knn_diffusion.add_query_noise(query, args.query_noise, seeded)
        for tokens, is_null in zip(picture, drop_picture):
            tokens[is_null] = V  # a null picture: MASK
        loss = run.loss(model, loss_of, x0, query, neighbors, t, u, codes, drop_query,
                        drop_neighbors, *picture)
        run.advance(step, loss, decay=0.9995)


# ---------------- the command

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=list(PRESETS))
    add("--data", type=Path, required=True, help="a folder of pictures")
    add("--out", type=Path, required=True, help="folder: WHAT.safetensors, state.pt, ...")
    add("--preset", default="stickers", help="or gpu, paper; vqvae: f16-1024, f16-16384")
    add("--steps", type=int, help="total, with resumed ones (20000; vqvae 10000, edit 5000)")
    add("--batch-size", type=int, help="pictures at once (default 64; large presets: less)")
    add("--accumulate", type=int, default=1, metavar="A", help="A batches per step")
    add("--lr", type=float, help="peak learning rate (default 2e-3; edit: 1e-3)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on; --steps, --lr, --batch-size may change")
    add("--init", type=Path, help="start weights (edit: default the shipped U-Net)")
    add("--minutes", type=float, default=math.inf, help="save and stop after this long")
    add("--save-every", type=int, default=500, metavar="N", help="steps (default 500)")
    add("--keep", action="store_true", help="keep the weights of every save")
    add("--index", type=Path, default=SHIPPED / "index", help="of --data; edit: the neighbours'")
    add("--neighbors-from", type=Path, metavar="DIR", help="the neighbours' index")
    add("--swap-index", type=Path, help="edit: the index of --data")
    add("--vqvae", type=Path, help="of tokens (default: the stickers')")
    add("--clip", type=Path, help="edit: embeds regions (default: the stickers')")
    add("--k", type=int, help="a new model's neighbours (default 10)")
    add("--condition", choices=["both", "query", "neighbors"], default="both",
        help="query trains the paper's no-kNN baseline")
    add("--query-noise", type=float, default=0.0, help="largest norm, on half the queries")
    add("--flip", action="store_true", help="U-Net: mirror half of the pictures")
    add("--keep-out", type=int, default=10, help="vqvae: N-th files are tests (default 10)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--no-bf16", action="store_true", help="train in float32")
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(command="python train.py " + shlex.join(argv))
    return clip_model.run_command(parser, run, argv)


def run(args: argparse.Namespace) -> None:
    """Complete and check what was asked for, then train. Raises ValueError or FileNotFoundError
    before the first step, with only caches written."""
    require(args.preset in PRESETS[args.what],
            f"{args.what} has no preset {args.preset!r}, but {', '.join(PRESETS[args.what])}")
    for name in ("steps", "batch_size", "accumulate", "k", "save_every", "lr", "minutes"):
        value = getattr(args, name)
        require(value is None or value > 0,
                f"--{name.replace('_', '-')} is {value}, wanted more than 0")
    args.batch_size = args.batch_size or BATCH_SIZES.get((args.what, args.preset), 64)
    args.steps = args.steps or STEPS[args.what]
    args.lr = args.lr or (1e-3 if args.what == "edit" else 2e-3)
    require((args.what == "edit") == bool(args.swap_index), "edit, and nothing else, needs "
            "--swap-index: an index of --data (python index.py build)")
    require(args.resume or not (args.out / "state.pt").exists(), f"{args.out} holds a run: "
            "--resume goes on, another --out begins anew")
    args.device = clip_model.pick_device(args.device)
    args.bf16 = not args.no_bf16
    if args.device.type == "cuda":                  # imitated before Ampere
        args.bf16 &= torch.cuda.is_bf16_supported(including_emulation=False)
        torch.set_float32_matmul_precision("high")  # TF32 for float32
        torch.backends.cudnn.benchmark = True
    default = SHIPPED / "continuous.safetensors" if args.what == "edit" else None
    args.weights = args.out / f"{args.what}.safetensors" if args.resume else args.init or default
    (train_vqvae if args.what == "vqvae" else train_backbone)(args)


def train_backbone(args: argparse.Namespace) -> None:
    """Open or make all that a backbone learns from, check that it fits, and train."""
    # own: the index of the pictures in --data; database: that of the neighbours.
    own = database = retrieval.open_index(args.swap_index or args.index)
    made_by = own.manifest.get("encoder", "unknown"), own.manifest.get("encoder_hash", "")
    if args.neighbors_from or args.swap_index:
        database = retrieval.open_index(args.neighbors_from or args.index)
        retrieval.check_encoder(database, *made_by, own.rows.shape[1])
    for name in own.paths:
        require((args.data / name).is_file(), f"{args.data} has no {name}: give the --index (edit: "
                "--swap-index) of this folder (python index.py build)")
    model, codec = start_model(args, database, made_by[1])
    size, k, queries, manipulated = model.config.image_size, model.config.n_neighbors, own.rows, []
    digest = retrieval.rows_digest(own.rows)
    settings = {"condition": args.condition, "k": k, "clip": made_by[1], "pictures": digest[:16],
                "index": retrieval.rows_digest(database.rows)[:16],
                "query_noise": args.query_noise, "flip": args.flip}

    def pictures():  # not called where there are tokens
        return prepared(own.folder / f"pictures-{size}.npy", digest, args.data, own.paths, size)

    if args.what == "edit":
        swapped, queries = swaps(args, own, pictures())
        manipulated = [swapped]
    if database is own:
        neighbors = retrieval.neighbor_table(own, k, device=args.device)
    else:
        # A picture of both indexes is no neighbour of itself.
        names = [[index.root.resolve() / str(path) for path in index.paths]
                 for index in (own, database)]
        row_of = {name: row for row, name in enumerate(names[1])}
        itself = torch.tensor([row_of.get(name, -1) for name in names[0]])  # (N,)
        near = (database.search(torch.from_numpy(queries[ids]).to(args.device), k,
                                exclude=itself[ids % len(own)])[1].int().cpu().numpy()
                for ids in torch.arange(len(queries)).split(1024))
        path = own.folder / f"neighbors-{k}-from-{settings['index']}.npy"
        neighbors = retrieval.cached(path, retrieval.rows_digest(queries), near)
    print(f"{len(own)} pictures, {len(queries)} queries, K {k} of {database.folder}")
    if codec is None:
        data = Data(pictures(), queries, neighbors, database.rows, manipulated)
        return train_continuous(args, model, data, settings)
    settings["vqvae"] = vqvae.fingerprint(codec)
    path = own.folder / f"tokens-{settings['vqvae']}.npy"
    x0 = retrieval.cached(path, digest, token_blocks(codec, pictures, args.device))
    if args.what == "edit":
        manipulated = [np.concatenate(list(token_blocks(codec, lambda: swapped, args.device)))]
    data = Data(x0, queries, neighbors, database.rows, manipulated)
    train_discrete(args, model, data, codec, settings)


@torch.no_grad()
def token_blocks(codec: vqvae.VQVAE, pictures: Callable[[], np.ndarray], device: torch.device
                 ) -> Iterator[np.ndarray]:
    """Tokens int32 (n, L). `pictures`, which opens files, is called only if they are wanted."""
    found = pictures()
    step = PIXELS // found.shape[1]**2
    for i in range(0, len(found), step):
        yield codec.encode(to_x(found[i:i + step], device)).int().cpu().numpy()


def start_model(args: argparse.Namespace, database: retrieval.Index, made_by: str
                ) -> tuple[UNet | TokenTransformer, vqvae.VQVAE | None]:
    """The model to train, and for tokens the VQ-VAE. A new model has the preset's sizes, one from
    weights its own. Raises ValueError where CLIP, VQ-VAE and kind do not fit."""
    E, k = database.rows.shape[1], min(args.k or 10, len(database) - 1)
    kind, codec = {"continuous": UNet, "discrete": TokenTransformer}.get(args.what), None
    if args.weights is None:
        config = replace(PRESETS[args.what][args.preset], embed_dim=E, n_neighbors=k)
    else:
        model, metadata = knn_diffusion.load(args.weights)
        if args.what == "edit" and not model.config.edit:
            model = knn_diffusion.widened(model)
        config, made_with = model.config, metadata.get("clip") or made_by
        require(kind is None or type(model) is kind and not config.edit, f"{args.weights} holds a "
                f"{type(model).__name__}{' that edits' * config.edit}, no start for {args.what}")
        require(made_with == made_by and config.embed_dim == E, f"{args.weights} was trained with "
                f"another CLIP ({made_with}) than the index at {database.folder}")
    if isinstance(config, TransformerConfig):
        require(not args.flip, "--flip is the U-Net's: tokens can't be mirrored")
        codec = vqvae.load(args.vqvae or SHIPPED / "vqvae.safetensors")[0].to(args.device)
        side, n_codes = config.image_size // codec.config.factor, codec.config.n_codes
        fitting = replace(config, n_codes=n_codes, tokens_a_side=side)
        require(fitting == config or args.vqvae and not args.weights,
                f"--vqvae makes {side}x{side} tokens of {n_codes}, wanted one that makes "
                f"{config.tokens_a_side}x{config.tokens_a_side} of {config.n_codes}")
        config = fitting
    if args.weights is None:
        torch.manual_seed(args.seed)
        model = kind(config)
    model.config = config
    return model, codec


if __name__ == "__main__":
    sys.exit(main())
