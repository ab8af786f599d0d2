"""16×16 or 8×8 tokens, with a patch discriminator or without?  python benchmarks/tokens.py

Trains the stickers' VQ-VAE three times from the same seed: 16×16 tokens of 512 codes, and 8×8 of
512 and of 2,048 (one level more, of the same width). Each is measured on the drawings kept out:
PSNR; how strong its edges are beside the originals'; what the judge of examples/evaluate.py still
names in the reconstructions. Over each a transformer is trained for equally many steps (with 8×8
tokens one a place, with 16×16 two by two, so that it sees 64 places each time), and the judge names
what it draws for the prompts of `evaluate.py table`.

At last the first VQ-VAE goes on twice, for equally many steps: with its own loss, and with VQGAN's
adversarial term beside it (2012.09841 Eq. 5 to 7), weighted as there: by the ratio of the gradients
of both terms at the last layer. The discriminator judges patches (1611.07004 Sec. 3.2.2).

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 python benchmarks/tokens.py
"""
from __future__ import annotations

import argparse
import copy
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import evaluate  # noqa: E402

import clip_model  # noqa: E402
import index as retrieval  # noqa: E402
import knn_diffusion  # noqa: E402
import train  # noqa: E402
import vqvae  # noqa: E402

STICKERS = vqvae.PRESETS["stickers"]
CODECS = {"16x16 of 512": STICKERS,
          "8x8 of 512": replace(STICKERS, multipliers=(1, 1)),
          "8x8 of 2,048": replace(STICKERS, multipliers=(1, 1), n_codes=2048)}


class KeptOut:
    """The drawings that no VQ-VAE is trained on, and rows of a table about their
    reconstructions."""

    def __init__(self, data: Path) -> None:
        self.bench = evaluate.open_bench(evaluate.SHIPPED / "judge.safetensors")
        names = retrieval.list_images(data / "images")
        self.train_names, names = train.split_by_drawing(names, 10)
        self.x = train.to_x(train.read_pictures(data / "images", names, 64))   # (n, 3, 64, 64)
        rows = {row["path"]: row for row in evaluate.read_rows(data)}
        said = [rows[f"images/{name}"] for name in names]
        self.prompts = [f"{row['style']} {row['captions'][0]} on a {row['background']} background"
                        for row in said]
        self.shown = list(range(0, len(names), len(names) // 12))[:12]
        self.grid = [clip_model.to_pictures(self.x[self.shown])]
        print("| | minutes | PSNR | edges | codes used | concept top 1 | top 5 | style |\n"
              "|---|---|---|---|---|---|---|---|", flush=True)

    @torch.no_grad()
    def row(self, label: str, minutes: float, codec: vqvae.VQVAE | None) -> None:
        """codec: None for the originals themselves."""
        x, codes = self.x, torch.zeros(0)
        if codec:
            tokens = torch.cat([codec.encode(part) for part in x.split(256)])
            found = torch.cat([codec.decode(part) for part in tokens.split(256)])
            psnr, codes = f"{evaluate.psnr(found, x).mean():.2f} dB", tokens.unique()
            self.grid.append(clip_model.to_pictures(found[self.shown]))
        else:
            found, psnr = x, ""
        hits = self.bench.hits(clip_model.to_pictures(found), self.prompts)
        named = " | ".join(f"{np.mean(hits[name]):.1%}" for name in ("top1", "top5", "style"))
        print(f"| {label} | {minutes:.1f} | {psnr} | {edges(found) / edges(x):.1%} | {len(codes)} "
              f"| {named} |", flush=True)


def edges(x: Tensor) -> float:
    """The mean absolute difference of neighbouring pixels of pictures (B, 3, H, W), the sum of
    both directions."""
    x = x.clamp(-1, 1)
    return (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()).item()


def patch_discriminator(width: int = 64) -> nn.Sequential:
    """x (B, 3, 64, 64) → a score of each patch of 34 pixels (B, 1, 14, 14), high for originals."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),                             # 32 x 32
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width),
        nn.LeakyReLU(0.2),                                                           # 16 x 16
        nn.Conv2d(2 * width, 4 * width, 4, 1, 1, bias=False), nn.BatchNorm2d(4 * width),
        nn.LeakyReLU(0.2), nn.Conv2d(4 * width, 1, 4, 1, 1))                         # 14 x 14


def trained_on(codec: vqvae.VQVAE, pictures: np.ndarray, steps: int, adversarial: bool
               ) -> vqvae.VQVAE:
    """A copy of a VQ-VAE after further steps of 64, with the adversarial term or without it."""
    torch.manual_seed(0)
    codec = copy.deepcopy(codec).train().requires_grad_(True).to(memory_format=torch.channels_last)
    judge = patch_discriminator().to(memory_format=torch.channels_last)
    optimizer, its_optimizer = (torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.5, 0.9))
                                for net in (codec, judge))
    last = codec.decoder.conv_out.weight
    for step in range(steps):
        for group in optimizer.param_groups + its_optimizer.param_groups:
            group["lr"] = train.learning_rate(step, 2e-4, 50, steps)
        rows = torch.randint(len(pictures), (64,), generator=torch.Generator().manual_seed(step))
        x = train.to_x(pictures[rows.numpy()]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            found, codebook_loss = codec(x)
            loss = vqvae.reconstruction_loss(found, x)
            if adversarial and step >= steps // 5:       # by then it tells originals from others
                fooled = -judge(found).float().mean()
                norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm()
                         for term in (loss, fooled)]
                loss = loss + 0.8 * norms[0] / (norms[1] + 1e-4) * fooled     # 0.8: taming's
        optimizer.zero_grad()
        (loss + codebook_loss).backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        if adversarial:
            with torch.autocast("cpu", torch.bfloat16):
                real, fake = (judge(part).float() for part in (x, found.detach()))
            its_optimizer.zero_grad()
            (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).backward()           # hinge
            its_optimizer.step()
    return codec.eval().requires_grad_(False)


def trained(what: str, config: object, data: Path, out: Path, **options: object) -> None:
    """Run train.py with a preset of this configuration."""
    train.PRESETS[what]["benchmark"] = config
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    if train.main([what, "--preset=benchmark", f"--data={data}/images", f"--out={out}", *named]):
        raise SystemExit(1)


def minutes_since(start: float) -> float:
    return (time.time() - start) / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600, help="of each VQ-VAE, batch 64")
    parser.add_argument("--more", type=int, default=400, help="further ones, with the "
                        "discriminator and without")
    parser.add_argument("--draw-steps", type=int, default=600, help="of each transformer, batch "
                        "128; 0 for none")
    parser.add_argument("--n", type=int, default=200, help="prompts")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stickers")
    parser.add_argument("--out", type=Path, default=Path("tokens.png"), help="a grid: originals, "
                        "then a row of reconstructions for each VQ-VAE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kept_out, files = KeptOut(args.data), {}
        kept_out.row("originals", 0, None)
        for label, config in CODECS.items():
            out, start = Path(folder) / label, time.time()
            trained("vqvae", config, args.data, out, steps=args.steps, batch_size=64, lr=2e-3)
            files[label] = out / "vqvae.safetensors"
            kept_out.row(label, minutes_since(start), vqvae.load(files[label])[0])

        codec = vqvae.load(files["16x16 of 512"])[0]
        pictures = train.read_pictures(args.data / "images", kept_out.train_names, 64)
        for adversarial, what in ((False, "its own loss"), (True, "a discriminator as well")):
            start = time.time()
            found = trained_on(codec, pictures, args.more, adversarial)
            kept_out.row(f"16x16 of 512, {args.more} further steps, {what}", minutes_since(start),
                         found)
        clip_model.grid(kept_out.grid, 64).save(args.out)
        if args.draw_steps:
            draw(args, Path(folder), files)


def draw(args: argparse.Namespace, folder: Path, files: dict[str, Path]) -> None:
    """Train a transformer over each VQ-VAE and print what the judge names in its pictures."""
    bench = evaluate.open_bench(evaluate.SHIPPED / "judge.safetensors")
    prompts = evaluate.pick_prompts(args.data, bench.names, args.n, 0, held_out=False)
    index = retrieval.open_index(evaluate.SHIPPED / "index")
    apart = shutil.copytree(index.folder, folder / "index")    # the caches go there
    print("\n| | minutes | concept top 1 | top 5 | background |\n"
          "|---|---|---|---|---|", flush=True)
    for label, path in files.items():
        codec, start = vqvae.load(path)[0], time.time()
        side = 64 // codec.config.factor
        config = replace(knn_diffusion.DISCRETE_PRESETS["stickers"], tokens_a_side=side,
                         patch=side // 8, n_codes=codec.config.n_codes)
        out = folder / f"{label}, drawn"
        trained("discrete", config, args.data, out, steps=args.draw_steps, batch_size=128,
                lr=2.5e-3, index=apart, vqvae=path)
        options = argparse.Namespace(clip=evaluate.SHIPPED / "clip.safetensors", vqvae=path,
                                     steps=25, seed=0, sampler=None, guidance=2.0)
        maker = evaluate.open_maker(options, out / "discrete.safetensors", index.folder)
        minutes = f"{minutes_since(start):.1f}"
        evaluate.print_row(f"{label} | {minutes}", bench, maker.draw(prompts, options), prompts)


if __name__ == "__main__":
    main()
