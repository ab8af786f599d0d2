"""64 px at once, or a 32-px base below an upsampler?  python benchmarks/resolution.py [--steps 900]

Trains the stickers preset twice from the same seed, at 64 px and at 32 px (2×2 instead of 4×4
pixels a place, so both work at 16×16 inside and a step costs about the same; no shift towards high
noise at 32 px), and lets the judge of examples/evaluate.py name what each draws for the same
prompts. The 32-px pictures are enlarged with bicubic weights: an upsampler's training and time come
on top, and so does what it adds. To tell one from the other, two more rows: the 64-px samples
made 32 px small and enlarged the same way, and the nearest pictures after the same treatment.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import evaluate  # noqa: E402

import index as retrieval  # noqa: E402
import knn_diffusion  # noqa: E402
import train  # noqa: E402

BASE = knn_diffusion.PRESETS["stickers"]
SIZES = {64: BASE, 32: replace(BASE, image_size=32, unshuffle=2, noise_shift=1.0)}


def resized(pictures: list[Image.Image], size: int) -> list[Image.Image]:
    return [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="of training, batch 64")
    parser.add_argument("--n", type=int, default=200, help="prompts")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stickers")
    args = parser.parse_args()
    bench = evaluate.open_bench(evaluate.SHIPPED / "judge.safetensors")
    prompts = evaluate.pick_prompts(args.data, bench.names, args.n, 0, held_out=False)
    index = retrieval.open_index(evaluate.SHIPPED / "index")
    options = argparse.Namespace(clip=evaluate.SHIPPED / "clip.safetensors", vqvae=None,
                                 steps=20, seed=0, sampler=None, guidance=2.0)
    print("| | minutes | concept top 1 | top 5 | background |\n"
          "|---|---|---|---|---|", flush=True)

    def row(label: str, minutes: str, pictures: list[Image.Image]) -> None:
        evaluate.print_row(f"{label} | {minutes}", bench, pictures, prompts)

    with tempfile.TemporaryDirectory() as folder:
        for size, config in SIZES.items():
            out, start = Path(folder) / str(size), time.time()
            train.PRESETS["continuous"]["benchmark"] = config
            if train.main(["continuous", "--preset=benchmark", f"--data={args.data / 'images'}",
                           f"--out={out}", f"--index={index.folder}", f"--steps={args.steps}",
                           "--batch-size=64", "--lr=2.5e-3"]):
                raise SystemExit(1)
            minutes = f"{(time.time() - start) / 60:.1f}"
            maker = evaluate.open_maker(options, out / "continuous.safetensors", index.folder)
            pictures = maker.draw(prompts, options)
            row(f"{size} px", minutes, resized(pictures, 64))
            if size == 64:
                row("64 px, made 32 px small and enlarged", "", resized(resized(pictures, 32), 64))
    ids = index.search(maker.clip.embed_texts(prompts), 1)[1][:, 0].tolist()
    nearest = retrieval.neighbor_pictures(index, ids)
    row("the nearest pictures, made small and enlarged", "", resized(resized(nearest, 32), 64))


if __name__ == "__main__":
    main()
