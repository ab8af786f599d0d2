"""Editing without a mask (kNN-Diffusion Sec. 3.3): the region swap that training needs, and the
command that edits a picture from a text.

A picture I, a region M of it, and its nearest neighbour, aligned:

    I_manip = I · (1 − M) + warp(neighbour) · M

A model that learns to give I back, from I_manip and the CLIP embedding of the *original* region,
has learned to change a picture where an embedding asks for it and to leave the rest alone.

At inference the user's picture takes I_manip's place and the text's embedding the region's
(Departs: by default its nearest picture's, see `sample.condition_on`). The condition's neighbours
are in both cases the k nearest of that embedding in the ordinary index; the one that the region is
swapped for comes from an index of the pictures themselves. Departs: the paper's M is random, ours
lies where picture and neighbour differ (`telling_regions`).

The alignment is ECC (Evangelidis & Psarakis, PAMI 2008): the warp p that maximises the correlation

    ρ(p) = ī_rᵀ ī_w(p) / (‖ī_r‖ ‖ī_w(p)‖)

of the template I (ī_r) and the warped neighbour (ī_w), both with their mean taken off, over the
pixels that both have. It does not mind brightness and contrast.

Shapes: B pictures, C channels, H W picture, N = H·W its pixels, P parameters of a warp; E CLIP
dimension, K neighbours.

Coordinates: x to the right, y down, from the picture's centre, in units of half its longer side: so
a warp stays the same from one level of a pyramid to the next. `to_pixels` converts to OpenCV's.

    python edit.py fox.png "a red heart"
"""
from __future__ import annotations

import argparse
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip_model
import knn_diffusion
import sample
import vqvae
from clip_model import require

MOTIONS = {"translation": 2, "euclidean": 3, "affine": 6, "homography": 8}       # name -> P


# ---------------------------------------------------------------- warps

def grid_of(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of every pixel's centre, (H·W,) each."""
    height, width = pictures.shape[-2:]
    x, y = ((2 * torch.arange(n) + 1 - n) / max(height, width) for n in (width, height))
    return x.repeat(height).to(pictures), y.repeat_interleave(width).to(pictures)


def warp_points(warp: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where warps (B, 3, 3) take points (N,): u, v and the projective denominator, (B, N) each."""
    u, v, w = (warp @ torch.stack([x, y, torch.ones_like(x)])).unbind(1)         # (B, N) each
    return u / w, v / w, w


def look_up(pictures: Tensor, u: Tensor, v: Tensor, outside: str = "zeros") -> Tensor:
    """Bilinear values of pictures (B, C, H, W) at points (B, N): (B, C, N). outside: "zeros", or
    "border", the nearest pixel of the border."""
    height, width = pictures.shape[-2:]
    longer = max(height, width)
    grid = torch.stack([u * longer / width, v * longer / height], dim=-1)        # (B, N, 2)
    return F.grid_sample(pictures, grid[:, None], padding_mode=outside,
                         align_corners=False)[:, :, 0]


def warp_pictures(pictures: Tensor, warp: Tensor) -> Tensor:
    """Pictures (B, C, H, W) seen through warps (B, 3, 3): pixel p shows the picture at warp(p).
    Outside, the nearest pixel of the border."""
    u, v, _ = warp_points(warp.to(pictures), *grid_of(pictures))
    return look_up(pictures, u, v, "border").view(pictures.shape)


def to_pixels(warp: Tensor, height: int, width: int) -> Tensor:
    """Warps (B, 3, 3) in OpenCV's coordinates, pixels from the first one's centre, last entry 1."""
    longer = max(height, width)
    to_ours = warp.new_tensor([[2 / longer, 0, (1 - width) / longer],
                               [0, 2 / longer, (1 - height) / longer], [0, 0, 1]])
    warp = torch.linalg.inv(to_ours) @ warp @ to_ours
    return warp / warp[:, 2:, 2:]


def jacobian(motion: str, warp: Tensor, gx: Tensor, gy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """d(warped picture)/d(parameters): (B, P, N), from the warped gradients (B, N).

    translation: tx, ty. euclidean: θ, tx, ty. affine: the matrix' first two rows, column by column.
    homography: all but the last entry, column by column; the gradients are divided by the
    denominator w, and the last row moves both u and v.
    """
    if motion == "translation":
        return torch.stack([gx, gy], 1)
    if motion == "euclidean":
        cos, sin = warp[:, 0, :1], warp[:, 1, :1]
        return torch.stack([gx * (-x * sin - y * cos) + gy * (x * cos - y * sin), gx, gy], 1)
    if motion == "affine":
        return torch.stack([gx * x, gy * x, gx * y, gy * y, gx, gy], 1)
    u, v, w = warp_points(warp, x, y)
    gx, gy = gx / w, gy / w
    last = -(gx * u + gy * v)
    return torch.stack([gx * x, gy * x, last * x, gx * y, gy * y, last * y, gx, gy], 1)


def moved(motion: str, warp: Tensor, step: Tensor) -> Tensor:
    """The warps (B, 3, 3) after a step (B, P) in their parameters."""
    warp = warp.clone()
    if motion == "euclidean":
        angle = torch.atan2(warp[:, 1, 0], warp[:, 0, 0]) + step[:, 0]
        warp[:, 0, 0] = warp[:, 1, 1] = angle.cos()
        warp[:, 1, 0], warp[:, 0, 1] = angle.sin(), -angle.sin()
        warp[:, :2, 2] += step[:, 1:]
    elif motion == "translation":
        warp[:, :2, 2] += step
    elif motion == "affine":
        warp[:, :2] += step.view(-1, 3, 2).transpose(1, 2)
    else:
        whole = torch.cat([step, step.new_zeros(len(step), 1)], 1)
        warp += whole.view(-1, 3, 3).transpose(1, 2)
    return warp


# ---------------------------------------------------------------- ECC

@dataclass
class Alignment:
    """warp (B, 3, 3) from template's to input's coordinates; ρ (B,); converged bool (B,)."""
    warp: Tensor
    rho: Tensor
    converged: Tensor


def smoothed(pictures: Tensor) -> Tensor:
    """A 5x5 Gaussian of OpenCV's default width for that size, σ = 0.3·(2 − 1) + 0.8 = 1.1."""
    weights = torch.exp(-torch.arange(-2.0, 3.0) ** 2 / (2 * 1.1 ** 2)).to(pictures)
    weights = weights / weights.sum()
    C = pictures.shape[1]
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, weights.view(1, 1, 5, 1).expand(C, 1, 5, 1), groups=C)
    return F.conv2d(rows, weights.view(1, 1, 1, 5).expand(C, 1, 1, 5), groups=C)


def gradients(pictures: Tensor) -> Tensor:
    """∂/∂x and ∂/∂y by central differences, per half longer side: (B, 1, H, W) → (B, 2, H, W)."""
    scale = max(pictures.shape[-2:]) / 2
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    gx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    gy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    return scale * torch.cat([gx, gy], dim=1)


def centred(values: Tensor, weight: Tensor) -> Tensor:
    """values (B, N) less their mean over weight (B, N), and 0 where the weight is."""
    mean = (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return (values - mean) * weight


def correlation(template: Tensor, image: Tensor, warp: Tensor, mask: Tensor | None = None
                ) -> Tensor:
    """ρ (B,) of smoothed templates and smoothed, warped images (B, 1, H, W)."""
    scene = scene_of(smoothed(template), smoothed(image), mask)
    return masked_rho(*look_through(scene, warp)[:2])


def scene_of(template: Tensor, image: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """Template (B, N); image, its gradients and its mask (B, 4, H, W); the grid (N,) twice."""
    inside = torch.ones_like(image) if mask is None else mask.to(image)
    return template.flatten(1), torch.cat([image, gradients(image), inside], 1), *grid_of(image)


def look_through(scene: tuple[Tensor, ...], warp: Tensor) -> tuple[Tensor, ...]:
    """ī_r and ī_w (B, N), the masked gradients gx, gy (B, N), for warps (B, 3, 3)."""
    template, layers, x, y = scene
    u, v, _ = warp_points(warp, x, y)
    i_w, gx, gy, inside = look_up(layers, u, v).unbind(1)                        # (B, N) each
    # Outside the picture the looked-up mask is below 1: only whole pixels count.
    weight = (inside > 0.99).to(i_w)
    return centred(template, weight), centred(i_w, weight), gx * weight, gy * weight


def is_plausible(scene: tuple[Tensor, ...], warp: Tensor) -> Tensor:
    """Whether warps (B, 3, 3) keep half of the picture (of its mask) in sight and the area at its
    centre within a factor of 2: over a few pixels anything correlates. Ours; bool (B,)."""
    _, layers, x, y = scene
    seen = look_up(layers[:, 3:], *warp_points(warp, x, y)[:2])[:, 0]            # (B, N)
    seen, whole = ((part > 0.99).float().mean(1) for part in (seen, layers[:, 3].flatten(1)))
    area = torch.linalg.det(warp)
    return (seen > 0.5 * whole) & (area > 0.5) & (area < 2)


def masked_rho(i_r: Tensor, i_w: Tensor) -> Tensor:
    return (i_r * i_w).sum(1) / (i_r.norm(dim=1) * i_w.norm(dim=1)).clamp(min=1e-12)


def ecc_step(motion: str, warp: Tensor, i_r: Tensor, i_w: Tensor, gx: Tensor, gy: Tensor,
             x: Tensor, y: Tensor) -> Tensor:
    """One Gauss-Newton step of the parameters, (B, P) (Evangelidis & Psarakis, forward additive).

    G is the Jacobian (N, P), here transposed, H = GᵀG, a = Gᵀi_w, b = Gᵀi_r. Linearised, ρ is
    largest at Δp = H⁻¹Gᵀ(λ i_r − i_w) with

        λ = (‖i_w‖² − aᵀH⁻¹a) / (i_rᵀi_w − bᵀH⁻¹a)          where the denominator is positive, else
        λ = max(√(aᵀH⁻¹a / bᵀH⁻¹b), (bᵀH⁻¹a − i_rᵀi_w) / bᵀH⁻¹b).
    """
    Gt = jacobian(motion, warp, gx, gy, x, y)                                    # (B, P, N)
    # Small systems, badly scaled for a homography: solved in float64, with a little on the
    # diagonal, so that a picture without edges gives no step and no error.
    H = (Gt @ Gt.transpose(1, 2)).double()                                       # (B, P, P)
    scale = H.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]
    H = H + 1e-9 * scale * torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    a, b = ((Gt @ i[:, :, None]).double() for i in (i_w, i_r))                   # (B, P, 1)
    Ha, Hb = torch.linalg.solve(H, torch.cat([a, b], 2)).split(1, dim=2)
    aHa, bHa, bHb = ((p * q).sum((1, 2)) for p, q in ((a, Ha), (b, Ha), (b, Hb)))
    cross = (i_r * i_w).sum(1).double()
    denominator = cross - bHa
    usual = (i_w.square().sum(1).double() - aHa) / denominator
    least = bHb.clamp(min=1e-12)
    other = torch.maximum((aHa / least).clamp(min=0).sqrt(), -denominator / least)
    lam = torch.where(denominator > 0, usual, other)[:, None]                    # (B, 1)
    return (lam * Hb[:, :, 0] - Ha[:, :, 0]).to(i_r)


@torch.no_grad()
def ecc(template: Tensor, image: Tensor, motion: str = "affine", iterations: int = 50,
        eps: float = 1e-3, levels: int = 3, mask: Tensor | None = None,
        start: Tensor | None = None) -> Alignment:
    """Find the warps under which images look most like their templates.

    template, image: grey, (B, 1, H, W), any range; mask: (B, 1, H, W), 1 where the image counts;
    start: warps (B, 3, 3), identity by default. Coarse to fine over at most `levels` levels, each
    half as large, none below 16 pixels; at each, up to `iterations` steps a pair, until ρ changes
    by less than eps: then the pair leaves the batch. A pair without an edge, or whose every end is
    implausible or less alike than its start, keeps the start and counts as not converged; one that
    never settles gets the best warp it came to, and doesn't count as converged either. Raises
    ValueError for shapes or names that do not fit.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion is {motion!r}, wanted {', '.join(MOTIONS)}")
    if template.shape != image.shape or template.ndim != 4 or template.shape[1] != 1:
        raise ValueError(f"template and image have shapes {tuple(template.shape)} and "
                         f"{tuple(image.shape)}, wanted (B, 1, H, W) twice")
    template, image = smoothed(template.float()), smoothed(image.float())
    mask = None if mask is None else mask.float()
    B, device = len(template), template.device
    begin = torch.eye(3, device=device).repeat(B, 1, 1) if start is None else start.to(template)
    warp = begin
    n_levels = max(1, min(levels, min(template.shape[-2:]).bit_length() - 4))
    for level in reversed(range(1, n_levels)):
        by = 2 ** level
        small = [None if x is None else F.avg_pool2d(x, by) for x in (template, image, mask)]
        warp, _ = climb(scene_of(*small), motion, warp, iterations, eps)
    # Far from the goal the coarse levels help; near it they can lead astray: the finest level
    # goes on from where they ended and from the start, and the better end counts.
    scene = scene_of(template, image, mask)
    starts = [warp, begin] if n_levels > 1 else [begin]
    ends = [climb(scene, motion, w, iterations, eps) for w in starts]
    rho = [masked_rho(*look_through(scene, w)[:2]).where(is_plausible(scene, w), -2.0)
           for w, _ in ends]                                               # below any correlation
    ends.append((begin, torch.zeros(B, dtype=torch.bool, device=device)))
    rho = torch.stack([*rho, masked_rho(*look_through(scene, begin)[:2])])            # (n, B)
    warps, settled = (torch.stack(parts) for parts in zip(*ends))          # (n, B, 3, 3), (n, B)
    best = rho.nan_to_num(-2.0).argmax(0), torch.arange(B, device=device)
    return Alignment(warps[best], rho[best], settled[best])


def climb(scene: tuple[Tensor, ...], motion: str, warp: Tensor, iterations: int, eps: float
          ) -> tuple[Tensor, Tensor]:
    """Steps at one level: the warps, and which pairs settled (B,)."""
    template, layers, x, y = scene
    warp, B = warp.clone(), len(warp)
    settled = torch.zeros(B, dtype=torch.bool, device=warp.device)
    before = torch.full((B,), -2.0, device=warp.device)
    active = torch.arange(B, device=warp.device)
    for _ in range(iterations):
        part = (template[active], layers[active], x, y)
        i_r, i_w, gx, gy = look_through(part, warp[active])
        rho = masked_rho(i_r, i_w)
        done = (rho - before[active]).abs() < eps
        lost = ~torch.isfinite(rho) | (i_r.abs().amax(1) == 0) | (i_w.abs().amax(1) == 0)
        settled[active[done & ~lost]] = True
        before[active] = rho
        keep = ~done & ~lost
        if not keep.any():
            break
        active = active[keep]
        step = ecc_step(motion, warp[active], *(v[keep] for v in (i_r, i_w, gx, gy)), x, y)
        warp[active] = moved(motion, warp[active], step)
    return warp, settled


# ---------------------------------------------------------------- the swap

def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, 1, H, W), ITU-R 601 luma."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def random_regions(n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Boxes int64 (n, 4): left, top, right, bottom, the last two exclusive.

    Ours: the area uniform in 5–50 % of the picture, the ratio of the sides log-uniform in 1/2 … 2,
    the place uniform among those inside.
    """
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
    left, top, right, bottom = boxes[:, :, None].unbind(1)                       # (B, 1) each
    column, row = (torch.arange(n, device=boxes.device) for n in (width, height))
    across, down = (column >= left) & (column < right), (row >= top) & (row < bottom)
    return (down[:, :, None] & across[:, None])[:, None]


def aligned(pictures: Tensor, neighbors: Tensor, motion: str = "affine"
            ) -> tuple[Tensor, Alignment]:
    """Neighbours (B, 3, H, W) warped onto pictures of the same shape and range. One that ECC can't
    align, or only farther away than it was (by the mean absolute difference), stays as it is, its
    warp the identity: a seam at the region's border would tell a model where to look, and an edit
    has none."""
    template, image = grey(pictures), grey(neighbors)
    found = ecc(template, image, motion)
    warped = warp_pictures(neighbors, found.warp)
    before, after = ((pictures - each).abs().mean((1, 2, 3)) for each in (neighbors, warped))
    is_nearer = (found.converged & (after < before))[:, None, None]
    warp = torch.where(is_nearer, found.warp, torch.eye(3, device=pictures.device))
    warped = torch.where(is_nearer[..., None], warped, neighbors)
    return warped, Alignment(warp, correlation(template, image, warp), found.converged)


def telling_regions(pictures: Tensor, warped: Tensor, of: int, generator: torch.Generator
                    ) -> Tensor:
    """Boxes (B, 4) whose masks correlate with where pictures (B, 3, H, W) and their aligned
    neighbours differ: of so many random regions the best, each edge then moved to where that is
    best, twice around, be the box as small as it will; of = 1 is the paper's random region.
    Departs: of a random region most often nothing can be learned; one that holds a whole thing, and
    little else, tells what its embedding stands for. A pixel's difference counts up to 0.25, an
    eighth of [-1, 1]: shapes count, not contrasts.

    With D the difference summed inside, S everywhere, a the region's share of the area:
    correlation = (D − a·S) / √(a·(1 − a)), but for a factor that is the picture's alone.
    """
    B, (height, width) = len(pictures), pictures.shape[-2:]
    difference = (pictures - warped).abs().mean(1).clamp(max=0.25)               # (B, H, W)
    difference = difference.double().cpu()
    total = F.pad(difference.cumsum(1).cumsum(2), (1, 0, 1, 0))                  # (B, H+1, W+1)
    row = torch.arange(B)

    def best(boxes: Tensor) -> Tensor:                                           # (n, B, 4)
        left, top, right, bottom = boxes.unbind(2)                               # (n, B) each
        inside = (total[row, bottom, right] - total[row, top, right]
                  - total[row, bottom, left] + total[row, top, left])            # (n, B)
        share = ((right - left) * (bottom - top)).double() / (height * width)
        excess = inside - share * total[:, -1, -1]
        score = excess / (share * (1 - share)).clamp(min=1e-9).sqrt()
        return boxes[score.where((right > left) & (bottom > top), -math.inf).argmax(0), row]

    boxes = best(random_regions(of * B, height, width, generator).view(of, B, 4))
    for edge in (0, 1, 2, 3) * 2 if of > 1 else ():
        places = torch.arange((height if edge % 2 else width) + 1)
        candidates = boxes.repeat(1 + len(places), 1, 1)                         # itself, then all
        candidates[1:, :, edge] = places[:, None]
        boxes = best(candidates)
    return boxes


def composed(pictures: Tensor, warped: Tensor, boxes: Tensor) -> Tensor:
    """I_manip (B, C, H, W): in each box (B, 4) the warped neighbour, outside the picture itself to
    the last bit."""
    return torch.where(region_mask(boxes.to(pictures.device), *pictures.shape[-2:]), warped,
                       pictures)


def region_swap(pictures: Tensor, neighbors: Tensor, generator: torch.Generator, of: int = 256,
                motion: str = "affine") -> tuple[Tensor, Tensor, Alignment]:
    """I_manip (B, 3, H, W), the regions (B, 4) and the alignment of pictures and their nearest
    neighbours, (B, 3, H, W) in [-1, 1]. of: see `telling_regions`; 1 takes any region."""
    warped, found = aligned(pictures, neighbors, motion)
    boxes = telling_regions(pictures, warped, of, generator)
    return composed(pictures, warped, boxes), boxes, found


def region_crop(box: tuple[int, int, int, int], height: int, width: int
                ) -> tuple[int, int, int, int]:
    """The tight square around a box, moved inside the picture where it fits, else cut: what CLIP
    embeds of a region."""
    left, top, right, bottom = box
    side = max(right - left, bottom - top)

    def fit(first: int, last: int, room: int) -> tuple[int, int]:
        begin = (first + last - side) // 2
        begin = max(0, min(begin, room - side))
        return begin, min(room, begin + side)

    (left, right), (top, bottom) = fit(left, right, width), fit(top, bottom, height)
    return left, top, right, bottom


# ---------------------------------------------------------------- text in, edited picture out

def edit_picture(model: knn_diffusion.UNet | knn_diffusion.TokenTransformer, x: Tensor,
                 query: Tensor | None, neighbors: Tensor | None, seeds: list[int],
                 codec: vqvae.VQVAE | None = None, **options) -> Tensor:
    """One edited picture a seed, float32 (B, 3, H, W) in [-1, 1].

    x: the picture (1, 3, H, W) in [-1, 1], of the model's size; query (1, E) and neighbors
    (1, K, E), unit-norm: the condition; or (B, ...), one of each a seed. `options` go to
    `knn_diffusion.sample`, or with a `codec`, for a transformer, to `sample_tokens`.
    """
    given = codec.encode(x) if codec else x
    query, neighbors, given = (part if part is None else part.expand(len(seeds), *part.shape[1:])
                               for part in (query, neighbors, given))
    return sample.draw(model, query, neighbors, seeds, codec, picture=given, **options)


def change_mask(before: Tensor, after: Tensor) -> Tensor:
    """Where two pictures (B, 3, H, W) in [-1, 1] differ, softly: (B, 1, H, W), 0 … 1.

    Ours: the largest channel's difference, averaged over 3x3, counts from 0.15 on and fully from
    0.4; what counts reaches two pixels further, so that outlines are not cut, and is blurred.
    """
    difference = (after - before).abs().amax(1, keepdim=True)              # (B, 1, H, W)
    difference = F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    soft = ((difference - 0.15) / 0.25).clamp(0, 1)
    return F.avg_pool2d(F.max_pool2d(soft, 5, 1, 2), 3, 1, 1, count_include_pad=False)


def changed_area(mask: Tensor) -> str:
    """In words: the share of a mask (1, H, W) that is above one half, and the box around it."""
    rows, columns = (mask[0] > 0.5).nonzero(as_tuple=True)
    if not len(rows):
        return "nothing changed"
    left, top, right, bottom = (int(v) for v in (columns.min(), rows.min(), columns.max() + 1,
                                                 rows.max() + 1))
    return f"{len(rows) / mask[0].numel():.0%} changed, x {left} to {right}, y {top} to {bottom}"


def paste(picture: Image.Image, result: Image.Image, mask: Image.Image) -> Image.Image:
    """A result of the model's size put back where `fit_square` took it from, at the picture's own
    resolution; where the mask (grey, 0 … 255) is 0 the picture stays as it is, to the last bit."""
    left, top, right, bottom = map(round, clip_model.kept_box(picture.size, result.width))
    size = right - left, bottom - top
    square = Image.composite(result.resize(size, Image.Resampling.BICUBIC),
                             picture.crop((left, top, right, bottom)),
                             mask.resize(size, Image.Resampling.BILINEAR))
    whole = picture.copy()
    whole.paste(square, (left, top))
    return whole


def to_grey(mask: Tensor) -> list[Image.Image]:
    """Masks (B, 1, H, W) in 0 … 1 → grey pictures."""
    return [Image.fromarray(part) for part in (mask[:, 0] * 255).round().byte().cpu().numpy()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Edit a picture from a text, with no mask.",
        epilog="guidance: e(0,0) + s_I·[e(I,0) − e(0,0)] + s_T·[e(I,T) − e(I,0)] at every step, "
               "with I the picture, T the text and its neighbours, 0 for none; both scales at 1 "
               "are the plain model.")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("text", nargs="+", metavar="TEXT", help="each makes a row of its own")
    sample.shared_flags(parser)
    parser.set_defaults(sampler=None, condition=None)            # what sample.py asks for
    parser.add_argument("--guidance-text", type=float, default=2.0, metavar="S_T",
                        help="how far towards what the text asks for (default 2; 1: none)")
    parser.add_argument("--guidance-image", type=float, default=1.0, metavar="S_I",
                        help="how far towards the picture (default 1: none)")
    parser.add_argument("--start", type=float, default=1.0, metavar="SHARE", help="continuous: "
                        "begin at this share of the T steps, from the picture noised so far "
                        "(default 1: noise alone)")
    parser.add_argument("--paste", action=argparse.BooleanOptionalAction, default=False,
                        help="put results back at the picture's own resolution, changed places "
                             "only: OUT-000-00.png, ... beside OUT")
    parser.add_argument("--out", type=Path, default=Path("edited.png"),
                        help="a row a text: the picture, then each result and where it changed")
    return sample.finish(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load, search, edit, write. Raises ValueError or FileNotFoundError before writing."""
    if any(not text.strip() for text in args.text):
        raise ValueError("a text is empty")
    picture = clip_model.read_image(args.image)
    require(math.isfinite(args.guidance_text),
          f"--guidance-text is {args.guidance_text}, wanted a finite number")
    require(math.isfinite(args.guidance_image),
          f"--guidance-image is {args.guidance_image}, wanted a finite number")
    require(0 < args.start <= 1, f"--start is {args.start}, wanted more than 0, at most 1")
    default = "edit-discrete" if args.backbone == "discrete" else "edit"
    model, clip, index, codec = sample.prepare(args, default, edits=True)
    require(args.start == 1 or not codec, "--start goes with continuous weights only")
    T, left = model.config.T, round(args.start * model.config.T)
    require(args.start == 1 or left >= args.steps,
          f"--start {args.start:g} leaves {left} of the {T} steps, --steps asks for {args.steps}")
    print(f"{args.image} ({picture.width}x{picture.height}), guidance {args.guidance_text:g} "
          f"(text) {args.guidance_image:g} (picture), start {args.start:g}")
    size = model.config.image_size
    square = clip_model.fit_square(picture, size)
    x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x = x.to(clip.logit_scale.device)
    before = codec.decode(codec.encode(x)) if codec else x     # what the tokens can say of it
    queries = clip.embed_texts(args.text)                                              # (texts, E)
    condition = sample.condition_on(queries, index, args.k, args.condition, args.query)[:2]
    options = {"steps": args.steps, "guidance": args.guidance_text,
               "guidance_picture": args.guidance_image}
    if args.start < 1:
        options |= {"start": x.expand(args.n, -1, -1, -1), "start_at": args.start}
    rows, results = [], []
    for i in range(len(args.text)):
        query, neighbors = (part if part is None else part[i:i + 1] for part in condition)
        found = edit_picture(model, x, query, neighbors, [args.seed + j for j in range(args.n)],
                             codec, **options)
        soft = change_mask(before.expand_as(found), found)
        for j, part in enumerate(soft):
            print(f"{args.text[i]}, seed {args.seed + j}: {changed_area(part)} of {size}x{size}")
        masks = to_grey(soft)
        pictures = clip_model.to_pictures(found)
        pasted = [paste(picture, *both) for both in zip(pictures, masks)] if args.paste else []
        results.append((pictures, pasted))
        rows.append([square, *(cell for shown, mask in zip(pasted or pictures, masks)
                               for cell in (shown, mask.convert("RGB")))])
    write(args, rows, results)


def write(args: argparse.Namespace, rows: list[list[Image.Image]],
          results: list[tuple[list[Image.Image], list[Image.Image]]]) -> None:
    """The grid, the results alone and the pasted ones, as asked for; settings as JSON in each."""
    chunk = functools.partial(sample.text_chunk, args, "n k query steps guidance_text "
                              "guidance_image start paste image weights vqvae clip index")
    clip_model.grid(rows, 192).save(args.out, pnginfo=chunk(texts=args.text, seed=args.seed))
    if args.singles:
        args.singles.mkdir(exist_ok=True)
    for i, (pictures, pasted) in enumerate(results):
        for j, picture in enumerate(pictures):
            info, name = chunk(text=args.text[i], seed=args.seed + j), f"{i:03d}-{j:02d}.png"
            if args.singles:
                picture.save(args.singles / name, pnginfo=info)
            if pasted:
                pasted[j].save(args.out.with_name(f"{args.out.stem}-{name}"), pnginfo=info)


if __name__ == "__main__":
    sys.exit(main())
