"""Editing without a mask (kNN-Diffusion Sec. 3.3): the region swap that training needs, and the
command that edits a picture from a text.

A picture I, a region M of it, and its nearest neighbour, aligned with it:

    I_manip = I · (1 − M) + warp(neighbour) · M

A model learns to give I back from I_manip and the CLIP embedding of the *original* region. So it
learns to change a picture where an embedding asks for it, and only there. At inference the
user's picture takes I_manip's place, and a text's embedding the region's. The condition's
neighbours are the K nearest of that embedding; the neighbour swapped in comes from an index of
the training pictures. Departs: the paper's M is random, ours lies where picture and neighbour
differ (`most_different_regions`).

ECC aligns, the enhanced correlation coefficient (Evangelidis & Psarakis, PAMI 2008): it finds
the affine warp that maximises the correlation

    ρ(warp) = i_rᵀ i_w / (‖i_r‖ ‖i_w‖)

of the template I (i_r) and the warped neighbour (i_w), less their means, over the pixels that
both have. Brightness and contrast do not change it.

Shapes: B pictures, C channels, H W picture, P = H·W pixels; E CLIP dimension, K neighbours.
Warps are (B, 2, 3), torch's: pixel (x, y) shows the picture at warp · (x, y, 1). x runs right
and y down, from −1 to 1 over the picture: a warp fits every level of a pyramid."""
from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip_model
import sample
import vqvae
from clip_model import require

S_I = {"continuous": 1.0, "discrete": 1.5}  # towards the picture, from which tokens stray
LEVELS, ITERATIONS = 3, 50  # of ECC, at most

# ---------------- ECC

def warped(pictures: Tensor, warp: Tensor, outside: str = "border") -> Tensor:
    """Pictures (B, C, H, W) seen through warps (B, 2, 3), bilinear. outside: "border", its nearest
    pixel, or "zeros"."""
    points = F.affine_grid(warp, list(pictures.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(pictures, points, padding_mode=outside, align_corners=False)


def smoothed(pictures: Tensor) -> Tensor:
    """Grey pictures (B, 1, H, W) through a 5x5 Gaussian of OpenCV's width, σ = 1.1."""
    weights = torch.exp(-torch.arange(-2.0, 3.0) ** 2 / (2 * 1.1 ** 2)).to(pictures)
    weights = weights / weights.sum()
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights.view(1, 1, 5, 1)), weights.view(1, 1, 1, 5))


def centred(values: Tensor, weight: Tensor) -> Tensor:
    """values (B, P) less their mean over weight (B, P); 0 where the weight is 0."""
    mean = (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return (values - mean) * weight


def view(template: Tensor, layers: Tensor, warp: Tensor) -> tuple[Tensor, ...]:
    """i_r, i_w and the slopes of i_w to the right and down, (B, P) each; 0 where not seen whole.
    template: (B, 1, H, W); layers (B, 4, H, W): image, slopes, ones."""
    i_w, gx, gy, inside = warped(layers, warp, "zeros").flatten(2).unbind(1)  # (B, P) each
    weight = (inside > 0.99).to(i_w)
    return centred(template.flatten(1), weight), centred(i_w, weight), gx * weight, gy * weight


def ecc_step(i_r: Tensor, i_w: Tensor, gx: Tensor, gy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """One Gauss-Newton step of warps, (B, 2, 3) (Evangelidis & Psarakis, forward additive).

    G (P, 6) holds the slopes of i_w along the warp's six numbers; N = GᵀG, a = Gᵀi_w, b = Gᵀi_r.
    With i_w + GΔ in i_w's place, not centred anew, ρ is largest at Δ = N⁻¹Gᵀ(λ i_r − i_w) with

        λ = (‖i_w‖² − aᵀN⁻¹a) / (i_rᵀi_w − bᵀN⁻¹a)          where the denominator is positive, else
        λ = max(√(aᵀN⁻¹a / bᵀN⁻¹b), (bᵀN⁻¹a − i_rᵀi_w) / bᵀN⁻¹b)."""
    Gt = torch.stack([gx * x, gx * y, gx, gy * x, gy * y, gy], 1)         # (B, 6, P)
    # A little on the diagonal: a picture without edges gives no step, no error.
    N = (Gt @ Gt.transpose(1, 2)).double()                                # (B, 6, 6)
    size = N.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    N = N + 1e-9 * size[:, None, None] * torch.eye(6).to(N)
    a, b = ((Gt @ i[:, :, None]).double() for i in (i_w, i_r))            # (B, 6, 1)
    Na, Nb = torch.linalg.solve(N, torch.cat([a, b], 2)).split(1, dim=2)  # N⁻¹a, N⁻¹b
    aNa, bNa, bNb = ((p * q).sum((1, 2)) for p, q in ((a, Na), (b, Na), (b, Nb)))
    denominator = (i_r * i_w).sum(1).double() - bNa                       # (B,)
    usual = (i_w.square().sum(1).double() - aNa) / denominator
    bNb = bNb.clamp(min=1e-12)
    other = torch.maximum((aNa / bNb).clamp(min=0).sqrt(), -denominator / bNb)
    lam = torch.where(denominator > 0, usual, other)[:, None, None]
    return (lam * Nb - Na).view(-1, 2, 3).to(i_r)


def fit_level(template: Tensor, image: Tensor, start: Tensor, eps: float
              ) -> tuple[Tensor, Tensor]:
    """Steps from a start on one level of the pyramid: warps, and which of them settled (B,).
    Ours: a warp that sees less than half of the picture, or changes areas by more than a factor of
    2, gives way to its start: over a few pixels anything correlates."""
    B, _, height, width = image.shape
    down, right = torch.gradient(image, dim=(2, 3))  # per pixel
    layers = torch.cat([image, right * width / 2, down * height / 2, torch.ones_like(image)], 1)
    identity = torch.eye(2, 3).to(image)[None]
    x, y = F.affine_grid(identity, [1, 1, height, width], align_corners=False).view(-1, 2).unbind(1)
    warp, settled = start.clone(), torch.zeros(B, dtype=torch.bool, device=image.device)
    before, rows = torch.full((B,), -2.0).to(image), torch.arange(B, device=image.device)
    for _ in range(ITERATIONS):           # rows: the pairs that still move
        i_r, i_w, *slopes = view(template[rows], layers[rows], warp[rows])
        norms = i_r.norm(dim=1) * i_w.norm(dim=1)
        rho = (i_r * i_w).sum(1) / norms  # (B,)
        has_edges = torch.isfinite(rho)
        settled[rows] = has_edges & ((rho - before[rows]).abs() < eps)
        before[rows] = rho
        goes_on = has_edges & ~settled[rows]
        rows = rows[goes_on]
        if not len(rows):
            break
        warp[rows] += ecc_step(i_r, i_w, *slopes, x, y)[goes_on]
    seen = warped(torch.ones_like(image), warp, "zeros").mean((1, 2, 3))  # (B,)
    area = torch.linalg.det(warp[:, :, :2])
    is_plausible = (seen > 0.5) & (area > 0.5) & (area < 2)
    return torch.where(is_plausible[:, None, None], warp, start), settled & is_plausible


@torch.no_grad()
def ecc(template: Tensor, image: Tensor, eps: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Warps (B, 2, 3) under which images look most like their templates; which converged (B,).

    template, image: grey, (B, 1, H, W), any range. Coarse to fine: at most LEVELS levels, each
    half as large, none below 16 pixels; up to ITERATIONS steps on each, until ρ changes by less
    than eps. A pair without edges keeps the identity and does not converge."""
    require(template.shape == image.shape and template.ndim == 4 and template.shape[1] == 1,
            f"template {tuple(template.shape)}, image {tuple(image.shape)}: not (B, 1, H, W)")
    template, image = smoothed(template.float()), smoothed(image.float())
    warp = torch.eye(2, 3, device=image.device).repeat(len(image), 1, 1)
    n_levels = max(1, min(LEVELS, min(image.shape[-2:]).bit_length() - 4))
    for level in reversed(range(n_levels)):
        small = (F.avg_pool2d(x, 2 ** level) for x in (template, image))
        warp, converged = fit_level(*small, warp, eps)
    return warp, converged


# ---------------- the swap

def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W), ITU-R 601 luma."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def aligned(pictures: Tensor, neighbors: Tensor) -> Tensor:
    """Neighbours (B, 3, H, W) warped onto such pictures.
    Ours: one stays as it is if ECC does not converge, or brings it no nearer. A seam at
    the region's border would tell a model where to look; a user's picture has none."""
    warp, converged = ecc(grey(pictures), grey(neighbors))
    moved = warped(neighbors, warp)
    before, after = ((pictures - each).abs().mean((1, 2, 3))
                     for each in (neighbors, moved))
    has_moved = converged & (after < before)  # (B,)
    return torch.where(has_moved[:, None, None, None], moved, neighbors)


def random_regions(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes int64 (n, 4): left, top, right, bottom, the last two exclusive.
    Ours: the area is uniform in 5–50 % of the picture, the ratio of sides log-uniform in
    1/2 … 2, the place uniform."""
    area, ratio, across, down = torch.rand(4, n, generator=generator, dtype=torch.float64)
    area = (0.05 + 0.45 * area) * height * width
    ratio = 2 ** (2 * ratio - 1)
    w = (area * ratio).sqrt().clamp(max=width)
    h = (area / w).clamp(max=height)
    w, h = w.round().long().clamp(1, width), h.round().long().clamp(1, height)
    left = (across * (width - w + 1)).long()
    top = (down * (height - h + 1)).long()
    return torch.stack([left, top, left + w, top + h], dim=1)


def region_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """M, bool (B, 1, H, W): True inside the boxes (B, 4)."""
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # (B, 1) each
    column, row = (torch.arange(n, device=boxes.device) for n in (width, height))
    across, down = (column >= left) & (column < right), (row >= top) & (row < bottom)
    return (down[:, :, None] & across[:, None])[:, None]


def most_different_regions(pictures: Tensor, neighbors: Tensor, n_candidates: int,
                           generator: torch.Generator) -> Tensor:
    """Boxes (B, 4) where pictures (B, 3, H, W) and aligned neighbours differ.

    The best of n_candidates random regions, each edge then moved to where that is best, twice
    around. n_candidates = 1 is the paper's random region.

    Departs: most random regions show the same in both pictures and teach nothing. One that holds
    a whole thing, and little else, shows what its embedding means. Best is where mask and
    difference correlate most: up to a factor (D − a·S) / √(a·(1 − a)), with D the difference
    inside, S everywhere, a the region's share of the area. Differences are capped at 0.25, an
    eighth of [-1, 1]: shapes count, not contrasts."""
    B, (height, width) = len(pictures), pictures.shape[-2:]
    difference = (pictures - neighbors).abs().mean(1).clamp(max=0.25).double().cpu()  # (B, H, W)
    total = F.pad(difference.cumsum(1).cumsum(2), (1, 0, 1, 0))  # (B, H+1, W+1)
    row = torch.arange(B)

    def best(boxes: Tensor) -> Tensor:                                 # (n, B, 4)
        left, top, right, bottom = boxes.unbind(2)                     # (n, B) each
        inside = (total[row, bottom, right] - total[row, top, right]
                  - total[row, bottom, left] + total[row, top, left])  # (n, B)
        share = ((right - left) * (bottom - top)).double() / (height * width)
        excess = inside - share * total[:, -1, -1]
        score = excess / (share * (1 - share)).clamp(min=1e-9).sqrt()
        return boxes[score.where((right > left) & (bottom > top), -math.inf).argmax(0), row]

    boxes = best(random_regions(n_candidates * B, height, width, generator).view(-1, B, 4))
    for edge in (0, 1, 2, 3) * 2 if n_candidates > 1 else ():
        places = torch.arange((height if edge % 2 else width) + 1)
        candidates = boxes.repeat(1 + len(places), 1, 1)  # itself, then all
        candidates[1:, :, edge] = places[:, None]
        boxes = best(candidates)
    return boxes


def region_swap(pictures: Tensor, neighbors: Tensor, generator: torch.Generator,
                n_candidates: int = 256) -> tuple[Tensor, Tensor]:
    """I_manip (B, 3, H, W) of pictures and their nearest neighbours (B, 3, H, W) in [-1, 1], and
    the regions (B, 4)."""
    neighbors = aligned(pictures, neighbors)
    boxes = most_different_regions(pictures, neighbors, n_candidates, generator)
    mask = region_mask(boxes.to(pictures.device), *pictures.shape[-2:])  # M (B, 1, H, W)
    return torch.where(mask, neighbors, pictures), boxes


def region_crop(box: tuple[int, int, int, int], height: int, width: int
                ) -> tuple[int, int, int, int]:
    """What CLIP embeds of a region: the tight square around it, moved inside where it fits."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    left = max(0, min((left + right - side) // 2, width - side))
    top = max(0, min((top + bottom - side) // 2, height - side))
    return left, top, min(left + side, width), min(top + side, height)


# ---------------- text in, edited picture out

def edit_picture(model: sample.Network, x: Tensor, query: Tensor | None, neighbors: Tensor | None,
                 seeds: list[int], codec: vqvae.VQVAE | None = None, steps: int = 20,
                 guidance: float = 2.0, guidance_picture: float = 1.0, start: float = 1.0
                 ) -> Tensor:
    """One edited picture per seed, float32 (B, 3, H, W), about in [-1, 1].

    x: the picture (1, 3, H, W) in [-1, 1], of the model's size; query (1 or B, E), neighbors
    (1 or B, K, E), unit-norm. guidance: towards the text. start: the share of the T steps to
    begin at, from the noised picture; U-Nets only."""
    require(start == 1 or codec is None, "--start is for continuous weights")
    options = {} if start == 1 else {"start": x, "start_at": start}
    return sample.draw(model, query, neighbors, seeds, codec, steps=steps, guidance=guidance,
                       guidance_picture=guidance_picture, picture=codec.encode(x) if codec else x,
                       **options)


def change_mask(before: Tensor, after: Tensor) -> Tensor:
    """Where two pictures (B, 3, H, W) in [-1, 1] differ, softly: (B, 1, H, W), 0 … 1.
    Ours: the largest channel's difference, averaged over 3x3, counts from 0.15 on, fully from
    0.4. It reaches two pixels further, not to cut outlines, and is blurred."""
    difference = (after - before).abs().amax(1, keepdim=True)  # (B, 1, H, W)
    difference = F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    soft = ((difference - 0.15) / 0.25).clamp(0, 1)
    return F.avg_pool2d(F.max_pool2d(soft, 5, 1, 2), 3, 1, 1, count_include_pad=False)


def kept_box(size_before: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    """What `clip_model.fit_square` keeps, in the picture's pixels: left, top, right, bottom."""
    sides = []
    for side in size_before:
        resized = int(size * side / min(size_before))
        first = round((resized - size) / 2)
        begin, end = (round(place * side / resized) for place in (first, first + size))
        sides.append((begin, max(end, begin + 1)))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def paste(picture: Image.Image, result: Image.Image, mask: np.ndarray) -> Image.Image:
    """Put a result back where `fit_square` took it from, at the picture's own resolution.
    Where the mask, float (H, W) in 0 … 1, enlarged, is 0 the picture stays to the last bit."""
    ramp = np.minimum(np.arange(result.width) / 4, 1)
    ramp = np.minimum(ramp, ramp[::-1])  # 0 where the picture goes on beside the crop
    if picture.width != picture.height:
        mask = mask * (ramp if picture.width > picture.height else ramp[:, None])
    box = kept_box(picture.size, result.width)
    size = box[2] - box[0], box[3] - box[1]
    soft = Image.fromarray((mask * 255).round().astype(np.uint8))
    whole = Image.fromarray(np.array(picture))  # pixels alone, without a colour profile
    whole.paste(result.resize(size, Image.Resampling.BICUBIC), box[:2],
                soft.resize(size, Image.Resampling.BILINEAR))
    return whole


# ---------------- the command

def run(args: argparse.Namespace) -> None:
    """Open, embed, search, edit, write."""
    begin, n = time.time(), args.n
    picture = clip_model.read_image(args.image)
    require(all(map(str.strip, args.text)), "a text is empty")
    require(max(n, len(args.text)) <= sample.GRID_ROWS, "too many pictures for one grid")
    require(0 < args.start <= 1, f"--start is {args.start}, wanted above 0, to 1")
    require(args.image != args.out and args.image.parent != args.singles,
            f"{args.image} would be lost: give another --out or --singles")

    # Open what belongs together, settle what was left open.
    default = "edit-discrete" if args.backbone == "discrete" else "edit"
    weights = args.weights or sample.SHIPPED / f"{default}.safetensors"
    model, condition, clip, index, codec = sample.open_models(args, weights, edits=True)
    kind = "discrete" if codec else "continuous"
    steps = sample.OPTIONS[kind]["steps"] if args.steps is None else args.steps
    guidance_image = S_I[kind] if args.guidance_image is None else args.guidance_image
    settings = {"k": args.k, "query": args.query, "steps": steps, "seed": args.seed,
                "guidance_text": args.guidance_text, "guidance_image": guidance_image,
                "start": args.start, "paste": args.paste, "image": args.image, "weights": weights,
                "clip": args.clip, "index": args.index}
    settings |= {"vqvae": args.vqvae} if codec else {}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))

    # Embed and search, then a row of the grid per text. Of a picture the central square is edited.
    size = model.config.image_size
    square = clip_model.fit_square(picture, size)
    x = clip_model.to_x(np.array(square)[None], clip.logit_scale.device)  # (1, 3, H, W)
    before = codec.decode(codec.encode(x)) if codec else x  # what tokens can say
    query, neighbors, _, _ = sample.condition_on(
        clip.embed_texts(args.text), index, args.k, condition, args.query)
    rows, seeds = [], [args.seed + j for j in range(n)]
    for i, text in enumerate(args.text):
        shown = (part if part is None else part[i:i + 1] for part in (query, neighbors))
        found = edit_picture(model, x, *shown, seeds, codec, steps, args.guidance_text,
                             guidance_image, args.start)
        masks = change_mask(before.expand_as(found), found)
        row = [square]
        for j, result in enumerate(clip_model.to_pictures(found)):
            name, own = f"{i:03d}-{j:02d}.png", {"text": text, **settings, "seed": seeds[j]}
            mask = masks[j, 0].cpu().numpy()
            print(f"{text}, seed {seeds[j]}: {(mask > 0.5).mean():.0%} changed")
            if args.singles:
                sample.save_png(result, args.singles / name, own)
            if args.paste:
                result = paste(picture, result, mask)
                sample.save_png(result, args.out.with_name(f"{args.out.stem}-{name}"), own)
            row += [result, Image.fromarray((mask * 255).round().astype(np.uint8)).convert("RGB")]
        rows.append(row)
    sample.save_png(clip_model.grid(rows, 192, args.text), args.out,
                    {"texts": args.text, **settings})
    print(f"wrote {args.out}, {time.time() - begin:.1f} s")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Edit a picture from a text, with no mask. The grid: the picture, each "
                    "result, where it changed.",
        epilog="guidance: e(0,0) + S_I·[e(I,0) − e(0,0)] + S_T·[e(I,c) − e(I,0)], with I the "
               "picture, c the text and its neighbours, 0 for none.")
    flag = sample.add_flags(parser, "edited.png")
    flag("image", type=Path, metavar="IMAGE")
    flag("text", nargs="+", metavar="TEXT", help='a thing that is to be there, "a red heart"; '
         'no instructions ("make it red")')
    flag("--guidance-text", type=float, default=2.0, metavar="S_T",
         help="how far towards the text (default 2; 1: off)")
    flag("--guidance-image", type=float, metavar="S_I",
         help="how far towards the picture (default 1, discrete 1.5; 1: off)")
    flag("--start", type=float, default=1.0, metavar="SHARE", help="continuous: begin at this "
         "share of the T steps, from the noised picture (default 1: noise alone)")
    flag("--paste", action=argparse.BooleanOptionalAction, default=False, help="also put "
         "changes back at the picture's own resolution: OUT-000-00.png, ... beside OUT")
    return clip_model.run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
