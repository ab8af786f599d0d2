"""Our ECC beside OpenCV's:  python benchmarks/ecc.py [--pairs 256] [--device cpu]

The pairs of tests/test_edit.py: sticker-like and texture pictures of 64x64 under affine warps of at
most 5 px, 5 degrees and 5 %. The same iterations and eps, the same threads: one batch here, a loop
over findTransformECC there, alternated; medians of --repeats. Printed: milliseconds per pair and
their ratio; in how many pairs that OpenCV converges on our rho, computed for both warps by one
function, is not below its by more than 0.002; and the displacement from the true warp in pixels.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_edit import correlations, displacements, opencv_warps, pairs, to_opencv  # noqa: E402

import edit  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    cv2.setNumThreads(torch.get_num_threads())
    print(f"{args.pairs} pairs of 64x64, up to 50 steps per level, eps 1e-3, "
          f"{torch.get_num_threads()} threads, {args.device}; OpenCV {cv2.__version__}\n")
    template, image, wanted = pairs(args.pairs)
    given = template.to(args.device), image.to(args.device)
    edit.ecc(*given)                                                             # warm up
    seconds: list[tuple[float, float]] = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        ours = to_opencv(edit.ecc(*given)[0].cpu())                     # read back: really done
        middle = time.perf_counter()
        theirs = opencv_warps(template, image)
        seconds.append((middle - begin, time.perf_counter() - middle))
    here, there = (1e3 * statistics.median(spent) / args.pairs for spent in zip(*seconds))
    ok = [i for i, found in enumerate(theirs) if found is not None]
    mine, its, truth = ([warps[i] for i in ok] for warps in (ours, theirs, wanted))
    rho, rho_its = (correlations(template[ok], image[ok], warps) for warps in (mine, its))
    errors, errors_its = (displacements(warps, truth) for warps in (mine, its))
    print("| | here | OpenCV |\n|---|---|---|")
    print(f"| ms per pair | {here:.2f} | {there:.2f} ({there / here:.2f} times) |")
    print(f"| displacement, median | {np.median(errors):.3f} px | {np.median(errors_its):.3f} px |")
    print(f"| displacement, mean | {np.mean(errors):.3f} px | {np.mean(errors_its):.3f} px |")
    print(f"\nOpenCV converges on {len(ok) / args.pairs:.0%}. There our rho is not below its in "
          f"{(rho >= rho_its - 0.002).mean():.1%}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
