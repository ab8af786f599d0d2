"""Draw the README's figures again, from the shipped weights:  python examples/figures.py

    denoise.png         x_t on its way from noise to a picture, pixels above and tokens below
    edit-training.png   one training example of editing

The second needs the rendered stickers (examples/stickers.py).
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clip_model  # noqa: E402
import edit  # noqa: E402
import index as retrieval  # noqa: E402
import knn_diffusion  # noqa: E402
import sample  # noqa: E402
import vqvae  # noqa: E402

SHIPPED = ROOT / "weights" / "stickers"
PROMPT, SEED = "rocket on a yellow background", 3
SCENES, CHOSEN = 1000, 750               # scenes that are searched; the example's place among them


def labelled(rows: list[list[Image.Image | None]], left: tuple = (), top: tuple = (),
             cell: int = 64) -> Image.Image:
    """Rows of pictures, `cell` pixels per side, with words beside and above them."""
    sheet = clip_model.grid(rows, cell)
    x, y = 120 * bool(left), 18 * bool(top)
    page = Image.new("RGB", (x + sheet.width, y + sheet.height), "white")
    page.paste(sheet, (x, y))
    draw = ImageDraw.Draw(page)
    for i, word in enumerate(left):
        draw.text((2, y + (i + 0.4) * (cell + 2)), str(word), "black", font_size=12)
    for i, word in enumerate(top):
        draw.text((x + 4 + i * (cell + 2), 3), str(word), "black", font_size=12)
    return page


def visible(xt: Tensor, codec: vqvae.VQVAE) -> list[Image.Image]:
    """Tokens int64 (B, L) as pictures, MASK in grey."""
    V, side = codec.config.n_codes, int(xt.shape[1] ** 0.5)
    masked = (xt == V).view(-1, 1, side, side)
    for axis in (2, 3):
        masked = masked.repeat_interleave(codec.config.factor, axis)      # (B, 1, H, W)
    return clip_model.to_pictures(codec.decode(xt.where(xt < V, 0)).masked_fill(masked, 0))


def denoise(clip: clip_model.CLIP) -> Image.Image:
    """x_t of both backbones after some of 20 steps, from left to right."""
    index = retrieval.open_index(SHIPPED / "index")
    query, neighbors, *_ = sample.condition_on(clip.embed_texts([PROMPT]), index, 10)
    unet, transformer = (knn_diffusion.load(SHIPPED / f"{name}.safetensors")[0]
                         for name in ("continuous", "discrete"))
    codec = vqvae.load(SHIPPED / "vqvae.safetensors")[0]
    pixels = list(knn_diffusion.sample(unet, query, neighbors, [SEED], steps=20))
    tokens = list(knn_diffusion.sample_tokens(transformer, query, neighbors, [SEED], steps=20))
    steps = (1, 4, 7, 10, 13, 15, 17, 19, 20)
    pixels, tokens = (torch.cat([path[i - 1] for i in steps]) for path in (pixels, tokens))
    return labelled([clip_model.to_pictures(pixels), visible(tokens, codec)],
                    ("pixels", "tokens"), [f"step {i}" for i in steps])


def edit_training(clip: clip_model.CLIP, scenes: Path) -> Image.Image:
    """I, its nearest neighbour, the same aligned, the region M, I_manip."""
    paths = retrieval.list_images(scenes)[:SCENES]
    pictures = [clip_model.read_image(scenes / path) for path in paths]
    rows = clip.embed_pictures(pictures)                                  # (n, E)
    cosines = rows[CHOSEN] @ rows.T
    cosines[CHOSEN] = -2                                                  # itself
    x = clip_model.to_x(np.stack([pictures[CHOSEN], pictures[cosines.argmax()]]))
    shown, neighbor = x.split(1)                                          # (1, 3, H, W)
    warped = edit.aligned(shown, neighbor)
    manipulated, boxes = edit.region_swap(shown, neighbor, torch.Generator().manual_seed(SEED))
    left, top, right, bottom = boxes[0].tolist()
    region = torch.full_like(shown, -1)
    region[:, :, top:bottom, left:right] = 1
    cells = torch.cat([shown, neighbor, warped, region, manipulated])
    names = ("I: the answer", "neighbour", "aligned", "region M", "I_manip: given")
    return labelled([clip_model.to_pictures(cells)], top=names, cell=128)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stickers")
    parser.add_argument("--out", type=Path, default=ROOT / "examples", help="folder to write into")
    return clip_model.run_command(parser, run, argv)


def run(args: argparse.Namespace) -> None:
    clip = clip_model.load(SHIPPED / "clip.safetensors")
    denoise(clip).quantize(256).save(args.out / "denoise.png", optimize=True)
    edit_training(clip, args.data / "scenes").save(args.out / "edit-training.png", optimize=True)


if __name__ == "__main__":
    sys.exit(main())
