"""What the presets cost here:  python benchmarks/presets.py [continuous/stickers discrete/paper …]

One warm-up and then --repeats real training steps each (bf16, Muon, random data of the right
shapes): parameters, seconds a step (median), and the process's peak memory, each preset in a
process of its own.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import knn_diffusion  # noqa: E402
import train  # noqa: E402

PRESETS = {"continuous": knn_diffusion.PRESETS, "discrete": knn_diffusion.DISCRETE_PRESETS}


def continuous(config: knn_diffusion.UNetConfig, batch: int) -> tuple[torch.nn.Module, Callable]:
    """The model, and a function (model, device) → the loss of one batch."""
    schedule = knn_diffusion.Schedule(config.T, config.noise_shift)
    size = config.image_size
    x0, eps = torch.rand(batch, 3, size, size) * 2 - 1, torch.randn(batch, 3, size, size)
    inputs = (x0, *condition(config, batch), torch.randint(1, config.T + 1, (batch,)), eps,
              *knn_diffusion.draw_drops(batch, torch.Generator().manual_seed(0)))
    return knn_diffusion.UNet(config), lambda model, device: knn_diffusion.diffusion_loss(
        model, schedule, *(part.to(device) for part in inputs))


def discrete(config: knn_diffusion.TransformerConfig, batch: int
             ) -> tuple[torch.nn.Module, Callable]:
    schedule = knn_diffusion.MaskSchedule(config.T, config.n_codes, config.schedule)
    x0 = torch.randint(config.n_codes, (batch, config.tokens_a_side ** 2))
    t = torch.randint(1, config.T + 1, (batch,))
    xt = knn_diffusion.mask_and_replace(x0, t, schedule, torch.rand(x0.shape), x0)
    inputs = (x0, xt, t, *condition(config, batch),
              *knn_diffusion.draw_drops(batch, torch.Generator().manual_seed(0)))
    return knn_diffusion.TokenTransformer(config), lambda model, device: sum(
        knn_diffusion.discrete_loss(model, schedule, *(part.to(device) for part in inputs))).mean()


def condition(config: knn_diffusion.UNetConfig | knn_diffusion.TransformerConfig, batch: int
              ) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(F.normalize(torch.randn(batch, *shape, config.embed_dim), dim=-1)
                 for shape in ((), (config.n_neighbors,)))


def measure(backbone: str, preset: str, batch: int, repeats: int, device: torch.device) -> str:
    """One row of the table."""
    config = PRESETS[backbone][preset]
    model, loss_of = (continuous if backbone == "continuous" else discrete)(config, batch)
    model = model.to(device, memory_format=torch.channels_last)
    stages = train.Continuous if backbone == "continuous" else train.Discrete
    optimizers = train.muon_and_adam(model, 1e-4, stages.at_the_ends)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with train.autocast(device, True):
            loss = loss_of(model, device)
        train.descend(model, optimizers, loss, 1e-4, 1.0)
        loss.item()                                           # wait for the device
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    return (f"| {backbone} | {preset} | {parameters / 1e6:.1f}M | {config.image_size} px | {batch} "
            f"| {statistics.median(seconds[1:]):.2f} | {peak:.1f} GiB |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", help="backbone/preset (default: all)")
    parser.add_argument("--batch-size", type=int, help="default: stickers 64, gpu 8, paper 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    names = args.presets or [f"{backbone}/{preset}" for backbone in PRESETS
                             for preset in PRESETS[backbone]]
    for name in names:
        if name not in {f"{b}/{p}" for b in PRESETS for p in PRESETS[b]}:
            parser.error(f"no preset {name}")
    if len(names) > 1:                                        # a process each: peaks do not mix
        print("| backbone | preset | parameters | size | batch | s a step | peak memory |\n"
              "|---|---|---|---|---|---|---|", flush=True)
        rest = sys.argv[1:] if argv is None else argv
        flags = [a for a in rest if a not in args.presets]
        return max(subprocess.run([sys.executable, __file__, name, *flags]).returncode
                   for name in names)
    backbone, preset = names[0].split("/")
    batch = args.batch_size or {"stickers": 64, "gpu": 8, "paper": 1}[preset]
    device = train.clip_model.pick_device(args.device)
    print(measure(backbone, preset, batch, args.repeats, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
