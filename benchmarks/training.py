"""Training and sampling beside two well-known U-Nets:  python benchmarks/training.py

64-pixel networks of about 9 million parameters, with the same batch, precision, threads and AdamW.
They take turns, medians count, and each gets its faster memory format:
    ours, gpu       the layout of the `gpu` preset, made small: all sizes from 64 to 8
    ours, stickers  the layout of the `stickers` preset, made wide: 4 x 4 pixels per place
    diffusers       huggingface's UNet2DConditionModel, with the condition's tokens
    ddp             lucidrains' denoising-diffusion-pytorch, Unet, which takes no condition

A step is forward, backward and AdamW; sampling is 20 forwards without gradients. The peers must
bring no torch of their own:
    pip install --no-deps --target peers diffusers==0.42.1 einops tqdm huggingface_hub anyio \\
        denoising-diffusion-pytorch==2.3.4 safetensors importlib_metadata requests urllib3 idna \\
        certifi charset_normalizer pyyaml httpx2 httpcore2 h11 truststore
    OMP_NUM_THREADS=1 PYTHONPATH=peers python benchmarks/training.py

ddp imports torchvision, scipy, accelerate and ema_pytorch, which its U-Net does not use: empty
modules stand in for them meanwhile.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

NOT_NEEDED = ("torchvision", "scipy", "scipy.optimize", "accelerate", "ema_pytorch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import knn_diffusion  # noqa: E402

FORWARDS, E, K = 20, 256, 10                     # of sampling; CLIP's dimension; neighbours
OURS = "ours, gpu", "ours, stickers"
Network = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def networks(batch: int) -> dict[str, Network]:
    """Each with a function that calls it on the same x_t (B, 3, 64, 64), t and condition."""
    from diffusers import UNet2DConditionModel
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in NOT_NEEDED}):
        from denoising_diffusion_pytorch import Unet

    xt, t = torch.randn(batch, 3, 64, 64), torch.randint(1, 1000, (batch,))
    tokens = F.normalize(torch.randn(batch, 1 + K, E), dim=-1)
    query, neighbors = tokens[:, 0], tokens[:, 1:]
    shared = dict(embed_dim=E, condition_width=256, time_width=256, dropout=0.0, norm_groups=8)
    small = replace(knn_diffusion.PRESETS["gpu"], widths=(32, 64, 128, 192), blocks=1,
                    head_channels=32, **shared)
    wide = replace(knn_diffusion.PRESETS["stickers"], widths=(112, 176), head_channels=16, **shared)
    blocks = ["DownBlock2D"] * 2 + ["CrossAttnDownBlock2D"] * 2
    theirs = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, block_out_channels=(32, 64, 128, 160),
        layers_per_block=1, down_block_types=blocks, cross_attention_dim=E, norm_num_groups=8,
        up_block_types=[name.replace("Down", "Up") for name in reversed(blocks)],
        attention_head_dim=(1, 2, 4, 5))         # so it calls the number of heads: 32 channels each
    ours = {name: (knn_diffusion.UNet(config), lambda model: model(xt, t, query, neighbors))
            for name, config in zip(OURS, (small, wide))}
    return ours | {"diffusers": (theirs, lambda model: model(xt, t, tokens).sample),
                   "ddp": (Unet(dim=32), lambda model: model(xt, t))}


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def steps_of(network: Network, bf16: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step, and a forward pass of sampling."""
    model, call = network
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = call(model).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            call(model)
    return train, forward


def faster_format(network: Network, bf16: bool) -> None:
    """Leave the network in the memory format in which its training step is faster."""
    taken = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        network[0].to(memory_format=layout)
        train, _ = steps_of(network, bf16)
        taken[layout] = min(seconds(train), seconds(train))                # the first warms up
    network[0].to(memory_format=min(taken, key=taken.get))


def compare(nets: dict[str, Network], bf16: bool, repeats: int) -> None:
    """Rows of a table: medians in seconds, and how many times as long as ours each takes."""
    for network in nets.values():
        faster_format(network, bf16)
    runs = {name: steps_of(network, bf16) for name, network in nets.items()}
    taken = {name: ([], []) for name in nets}
    for i in [0] * repeats + [1] * FORWARDS:                               # training, sampling
        for name in nets:                                                  # in turns
            taken[name][i].append(seconds(runs[name][i]))
    step = {name: statistics.median(both[0]) for name, both in taken.items()}
    forward = {name: statistics.median(both[1]) for name, both in taken.items()}
    for name, (model, call) in nets.items():
        with FlopCounterMode(display=False) as counter:
            call(model)
        ratios = [f"{took[name] / took[ours]:.2f}" for took in (step, forward) for ours in OURS]
        print(f"| {'bf16' if bf16 else 'float32'} | {name} "
              f"| {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M "
              f"| {counter.get_total_flops() / 1e9:.1f} | {step[name]:.2f} "
              f"| {FORWARDS * forward[name]:.2f} | {' | '.join(ratios)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7, help="training steps (default 7)")
    args = parser.parse_args()
    print(f"batch {args.batch_size}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
          "\n| | network | parameters | GFLOP per batch | s per step | s per 20 forwards "
          "| step / ours, gpu | / ours, stickers | forwards / ours, gpu | / ours, stickers |\n"
          + "|---" * 10 + "|", flush=True)
    for bf16 in (True, False):
        compare(networks(args.batch_size), bf16, args.repeats)


if __name__ == "__main__":
    main()
