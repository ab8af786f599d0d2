"""What the continuous presets cost here:  python benchmarks/presets.py [stickers gpu paper]

One warm-up and then --repeats real training steps each (bf16, Muon, random data of the right
shapes): parameters, pictures a second (median), and the process's peak memory, each preset in a
process of its own.
"""
from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import knn_diffusion  # noqa: E402
import train  # noqa: E402


def measure(name: str, batch: int, repeats: int, device: torch.device) -> str:
    """One row of the table."""
    config = knn_diffusion.PRESETS[name]
    model = knn_diffusion.UNet(config).to(device, memory_format=torch.channels_last)
    optimizers = train.muon_and_adam(model, 1e-4, at_the_ends=("conv_in.", "conv_out."))
    schedule = knn_diffusion.Schedule(config.T, config.noise_shift)
    size = config.image_size
    x0, eps = torch.rand(batch, 3, size, size) * 2 - 1, torch.randn(batch, 3, size, size)
    query = F.normalize(torch.randn(batch, config.embed_dim), dim=-1)
    neighbors = F.normalize(torch.randn(batch, 10, config.embed_dim), dim=-1)
    t = torch.randint(1, config.T + 1, (batch,))
    drops = knn_diffusion.draw_drops(batch, torch.Generator().manual_seed(0))
    inputs = [part.to(device) for part in (x0, query, neighbors, t, eps, *drops)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with train.autocast(device, True):
            loss = knn_diffusion.diffusion_loss(model, schedule, *inputs)
        train.descend(model, optimizers, loss, 1e-4, 1.0)
        loss.item()                                           # wait for the device
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    return (f"| {name} | {parameters / 1e6:.1f}M | {size} px | {batch} | "
            f"{batch / statistics.median(seconds[1:]):.2f} | {peak:.1f} GiB |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", help="default: all")
    parser.add_argument("--batch-size", type=int, help="default: stickers 64, gpu 8, paper 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    names = args.presets or list(knn_diffusion.PRESETS)
    if len(names) > 1:                                        # a process each: peaks do not mix
        print("| preset | parameters | size | batch | pictures/s | peak memory |\n"
              "|---|---|---|---|---|---|", flush=True)
        rest = sys.argv[1:] if argv is None else argv
        flags = [a for a in rest if a not in args.presets]
        return max(subprocess.run([sys.executable, __file__, name, *flags]).returncode
                   for name in names)
    batch = args.batch_size or {"stickers": 64, "gpu": 8, "paper": 1}[names[0]]
    device = train.clip_model.pick_device(args.device)
    print(measure(names[0], batch, args.repeats, device), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
