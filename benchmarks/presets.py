"""What the presets cost:  python benchmarks/presets.py  or  … --measure continuous/gpu

Without --measure all is computed, on *meta* tensors, which have shapes and no numbers: a picture's
forward pass (multiply and add are two FLOP); what it keeps for the backward pass under CUDA's
autocast; the state: weights, gradients, average, optimisers' means, bfloat16 copies; the batch that
fits beside state and RESERVE (the true peak is a little higher); speed at 20 – 35 % of a card's
peak, where a first training mostly lies, with three forward passes per picture and Muon's products
once per 64. --measure trains one preset on noise: the trainer's step, optimisers and average.
"""
import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip_model  # noqa: E402
import knn_diffusion  # noqa: E402
import train  # noqa: E402
import vqvae  # noqa: E402

PRESETS = {**{f"continuous/{name}": c for name, c in knn_diffusion.PRESETS.items()},
           **{f"discrete/{name}": c for name, c in knn_diffusion.DISCRETE_PRESETS.items()},
           **{f"vqvae/{name}": c for name, c in vqvae.PRESETS.items() if not c.gumbel}}
CARDS = {"RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 990e12}    # bf16 FLOP/s
MEMORY, RESERVE = (8, 12, 24, 80), 1.5           # GiB; CUDA and its workspaces take some
ATTENTION = "scaled_dot_product_attention"       # what CUDA's autocast does in which precision:
IN_BFLOAT16 = ("conv2d", "linear", "matmul", "__matmul__", "addmm", "bmm", ATTENTION)
IN_FLOAT32 = ("group_norm", "layer_norm", "softmax", "log_softmax", "mse_loss")


def prepare(name: str, batch: int, device: torch.device | str) -> tuple[nn.Module, Callable]:
    """A preset's model, and a function model → the loss of a batch of noise."""
    c, part = PRESETS[name], name.split("/")[0]
    if part == "continuous":
        schedule = knn_diffusion.Schedule(c.T, c.noise_shift, device)
    elif part == "discrete":
        schedule = knn_diffusion.MaskSchedule(c.T, c.n_codes, c.schedule, device)
    with torch.device(device):
        x0, eps = torch.randn(2, batch, 3, c.image_size, c.image_size)
        if part == "vqvae":
            return vqvae.VQVAE(c), lambda model: (vqvae.reconstruction_loss(
                (out := model(x0))[0], x0) + out[1])
        t, drops = torch.randint(1, c.T + 1, (batch,)), torch.rand(2, batch) < 0.2
        condition = [torch.randn(batch, *k, c.embed_dim) for k in ((), (c.n_neighbors,))]
        if part == "continuous":
            return knn_diffusion.UNet(c), lambda model: knn_diffusion.diffusion_loss(
                model, schedule, x0, *condition, t, eps, *drops)
        x0, xt = torch.randint(c.n_codes, (2, batch, c.tokens_a_side ** 2))
        return knn_diffusion.TokenTransformer(c), lambda model: knn_diffusion.discrete_loss(
            model, schedule, x0, xt, t, *condition, *drops)


class Autocast(TorchFunctionMode):
    """What CUDA's autocast and attention kernel would do, for meta tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in IN_BFLOAT16 + IN_FLOAT32:
            dtype = torch.float32 if func.__name__ in IN_FLOAT32 else torch.bfloat16
            args = [x.to(dtype) if isinstance(x, Tensor) else x for x in args]
        if func.__name__ != ATTENTION:
            return func(*args, **(kwargs or {}))
        heads = [x.reshape(len(x), -1, *x.shape[-2:]) for x in args]       # (B, heads, L, d)
        out = torch.ops.aten._scaled_dot_product_flash_attention(*heads)[0]
        return out.reshape(args[0].shape)


def kept_bytes(name: str, batch: int) -> int:
    """What stays for the backward pass, weights among it; each storage counts once."""
    (model, loss_of), kept = prepare(name, batch, "meta"), {}

    def keep(x: Tensor) -> None:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(keep, keep), Autocast():
        loss_of(model)
    return sum(storage.nbytes() for storage in kept.values())


@mock.patch("torch.autocast")       # torch's own knows no meta tensors, not even to be switched off
def compute(name: str, _: object) -> tuple[int, int, float, int, int]:
    """Parameters; FLOP of a forward pass and per trained picture; bytes of a picture, the state."""
    model, loss_of = prepare(name, 1, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(model)
    picture = kept_bytes(name, 2) - kept_bytes(name, 1)                    # weights cancel out
    matrices = [sorted((len(p), p[0].numel())) for p in model.parameters() if p.ndim >= 2]
    n, n_muon = sum(p.numel() for p in model.parameters()), sum(r * c for r, c in matrices)
    forward = counter.get_total_flops()
    muon = sum(5 * (4 * r * r * c + 2 * r ** 3) for r, c in matrices)     # r x r times r x c, …
    state = 12 * n + (4 + 2) * n_muon + 8 * (n - n_muon)                  # Muon has one mean
    return n, forward, 3 * forward + muon / 64, picture, state


def table() -> None:
    print("| preset, computed | parameters | GFLOP | MiB per picture | state, GiB | batch in "
          f"{' / '.join(map(str, MEMORY))} GiB | {' | '.join(CARDS)} |\n{'|---' * 10}|")
    for name in PRESETS:
        n, forward, flop, picture, state = compute(name)
        fits = [f"{max(0, (m - RESERVE) * 2**30 - state) // picture:.0f}" for m in MEMORY]
        rates = [(0.2 * peak / flop, 0.35 * peak / flop) for peak in CARDS.values()]
        speeds = [f"{low:.0f} – {high:.0f}/s, {1e6 / 3600 / low:.1f} – {1e6 / 3600 / high:.1f} h"
                  for low, high in rates]
        if name.endswith("stickers"):                      # its kernels take longer to launch
            speeds = ["–"] * len(CARDS)
        print(f"| {name} | {n / 1e6:.1f}M | {forward / 1e9:.1f} | {picture / 2**20:.1f} | "
              f"{state / 2**30:.2f} | {' / '.join(fits)} | {' | '.join(speeds)} |", flush=True)


def measure(name: str, batch: int, device: str) -> None:
    """The median of five training steps after one to warm up, and the peak memory."""
    device = clip_model.pick_device(device)
    model, loss_of = prepare(name, batch, device)
    ema, seconds = copy.deepcopy(model.to(memory_format=torch.channels_last)), []
    optimizers = train.muon_and_adam(model, 1e-4)
    for step in range(6):
        start = time.perf_counter()
        with train.autocast(device, True):
            loss = loss_of(model)
        loss.backward()
        train.take_step(model, optimizers, loss, 1e-4)
        train.average(ema, model, step, 0.9995)
        loss.item()                                                        # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"{name}, measured on {device}: batch {batch}, {statistics.median(seconds[1:]):.3f} s "
          f"per step, peak {peak / 2**30:.1f} GiB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", choices=PRESETS, metavar="PRESET", help=", ".join(PRESETS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    measure(args.measure, args.batch_size, args.device) if args.measure else table()


if __name__ == "__main__":
    main()
