"""How near are two folders of pictures?  python examples/compare.py SAMPLES REFERENCE --clip F

A CLIP embeds both, any that clip_model.load takes. In its space, N M pictures, E dimensions:

    Fréchet distance  ‖μ_x − μ_y‖² + tr Σ_x + tr Σ_y − 2 tr (Σ_x Σ_y)^½, between the Gaussians with
                      the embeddings' moments (Heusel et al., 1706.08500, Eq. 6). No FID: that is
                      of Inception's features. Unit-norm embeddings keep it below 4
    precision         the share of the samples that lie among the reference: are they good?
    recall            the share of the reference that lies among the samples: is nothing missing?
                      (Kynkäänniemi et al., 1904.06991, Sec. 2)
    CLIP score        with --captions: 100 times the mean cosine of a sample and its caption

The Fréchet distance of few pictures is too high: compare equal numbers only, some thousands at
least. A model conditioned on a CLIP pleases that CLIP: take another one where you have one.
"""
from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip_model  # noqa: E402
import index as retrieval  # noqa: E402
from clip_model import require  # noqa: E402

BLOCK = 2**24              # distances in memory at once: 128 MiB
TWINS = 1e-5               # two embeddings of the same picture differ by less: rounding


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Between the Gaussians with the moments of x (N, E) and y (M, E), in float64.

    AᵀA = Σ_x means A = U Σ_x^½ with an orthogonal U; so for B and y. The singular values of
    A Bᵀ are then those of Σ_x^½ Σ_y^½, the roots of the eigenvalues of Σ_x Σ_y: they sum to the
    trace of (Σ_x Σ_y)^½, and tr Σ_x is the sum of A's squares.
    """
    (mean_x, A), (mean_y, B) = moments(x.double()), moments(y.double())
    squares = (mean_x - mean_y).square().sum() + A.square().sum() + B.square().sum()
    return (squares - 2 * torch.linalg.svdvals(A @ B.T).sum()).item()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (E,), and a matrix A (E, E) with AᵀA = the covariance; fewer rows where N < E."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def precision_recall(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of samples x (N, E) against a reference y (M, E); N, M > k. A set covers
    a ball around each of its points, up to the k-th nearest other one. The time is quadratic, the
    memory is not."""
    x, y = x.double(), y.double()
    return share_covered(x, y, reach(y, k)), share_covered(y, x, reach(x, k))


def reach(points: Tensor, k: int) -> Tensor:
    """The distance of each point to its k-th nearest other one, (N,): the nearest is itself."""
    nearest = [torch.cdist(block, points).topk(k + 1, largest=False).values
               for block in points.split(max(1, BLOCK // len(points)))]
    return torch.cat(nearest)[:, -1]


def share_covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of the points that lie in at least one of the balls."""
    blocks = points.split(max(1, BLOCK // len(centres)))
    inside = [(torch.cdist(block, centres) <= radii + TWINS).any(1) for block in blocks]
    return torch.cat(inside).double().mean().item()


def by_number(name: str) -> list[str | int]:
    """A key to sort by: 2.png stands before 10.png."""
    parts = re.split(r"(\d+)", name)                       # text, number, text, number, …
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def read_captions(path: Path, folder: Path) -> dict[str, str]:
    """Picture name → caption. As sample.py --prompts reads a file: blank lines do not count."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read captions from {path} ({error})") from None
    captions = [line.strip() for line in lines if line.strip()]
    names = sorted(retrieval.list_images(folder), key=by_number)
    require(len(captions) == len(names),
            f"{path} holds {len(captions)} captions, {folder} {len(names)} pictures")
    return dict(zip(names, captions))


def run(args: argparse.Namespace) -> None:
    require(min(args.k, args.batch_size) >= 1, "--k and --batch-size want 1 or more")
    captions = read_captions(args.captions, args.samples) if args.captions else {}
    clip = clip_model.load(args.clip).to(clip_model.pick_device(args.device))
    print(f"{args.clip}: {clip.describe()}, {clip.logit_scale.device}", flush=True)
    x, names, bad = retrieval.embed_folder(clip, args.samples, args.batch_size)
    y, _, more_bad = retrieval.embed_folder(clip, args.reference, args.batch_size)
    print(f"{args.samples}: {len(x)} pictures, {args.reference}: {len(y)}, not readable: "
          f"{len(bad + more_bad)}", flush=True)
    require(min(len(x), len(y)) > args.k, f"wanted more than k = {args.k} pictures in each folder")
    precision, recall = precision_recall(x, y, args.k)
    print(f"Fréchet distance in CLIP's space; no FID   {frechet_distance(x, y):.4f}\n"
          f"precision (k = {args.k})   {precision:.4f}\nrecall (k = {args.k})      {recall:.4f}")
    if captions:
        texts = [captions[name] for name in names]
        t = torch.cat([clip.embed_texts(texts[i:i + args.batch_size]).cpu()        # (N, E)
                       for i in range(0, len(texts), args.batch_size)])
        print(f"CLIP score (100 × mean cosine)   {100 * (x * t).sum(1).mean():.2f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("samples", type=Path, help="a folder of pictures, read recursively")
    parser.add_argument("reference", type=Path)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--captions", type=Path,
                        help="of the samples, one per line, by name: 2.png before 10.png")
    parser.add_argument("--k", type=int, default=3, help="of precision and recall (default 3)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, …")
    return clip_model.run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
