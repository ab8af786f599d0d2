"""Our ECC beside OpenCV's:  python benchmarks/ecc.py [--pairs 256] [--device cpu]

The pairs of tests/test_edit.py (sticker-like and texture pictures of 64x64, warped by at most 5 px,
5 degrees, 5 % and a perspective of 1e-3), the same iterations and eps, the same threads: one batch
here, a loop over findTransformECC there, alternated; medians of --repeats. Printed for each motion
model: milliseconds a pair and their ratio; in how many pairs that OpenCV converges on our rho,
computed for both warps by one function, is not below its by more than 0.002; and the mean
displacement from the true warp in pixels.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_edit import displacements, opencv_warps, pairs, to_ours  # noqa: E402

import edit  # noqa: E402


def timed(call: Callable, *given) -> tuple:
    """What a call gives, and its seconds; a device's queue is emptied by reading the result."""
    start = time.perf_counter()
    found = call(*given)
    if isinstance(found, edit.Alignment):
        found.warp.cpu()
    return found, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    cv2.setNumThreads(torch.get_num_threads())
    print(f"{args.pairs} pairs of 64x64, up to 50 steps a level, eps 1e-3, "
          f"{torch.get_num_threads()} threads, {args.device}; OpenCV {cv2.__version__}\n")
    print("| motion | here, ms a pair | OpenCV | OpenCV / here | it converges on | rho not below "
          "its | displacement here | OpenCV's |\n|---|---|---|---|---|---|---|---|")
    for motion in edit.MOTIONS:
        template, image, warps = pairs(motion, args.pairs)
        given = template.to(args.device), image.to(args.device)
        edit.ecc(*given, motion)                                                       # warm up
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(args.repeats):
            found, spent = timed(edit.ecc, *given, motion)
            seconds[0].append(spent)
            theirs, spent = timed(opencv_warps, template, image, motion)
            seconds[1].append(spent)
        here, there = (1e3 * statistics.median(spent) / args.pairs for spent in seconds)
        warp = found.warp.cpu()
        ok = [i for i, their_warp in enumerate(theirs) if their_warp is not None]
        same = torch.stack([to_ours(theirs[i]) for i in ok])
        rho, rho_theirs = (edit.correlation(template[ok], image[ok], each.float())
                           for each in (warp[ok], same))
        wanted = [warps[i] for i in ok]
        errors = displacements(edit.to_pixels(warp[ok].double(), 64, 64).numpy(), wanted)
        their_errors = displacements([theirs[i] for i in ok], wanted)
        print(f"| {motion} | {here:.2f} | {there:.2f} | {there / here:.2f} | "
              f"{len(ok) / args.pairs:.0%} | {(rho >= rho_theirs - 0.002).float().mean():.1%} | "
              f"{np.mean(errors):.3f} px | {np.mean(their_errors):.3f} px |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
