"""edit.py: ECC beside OpenCV's, its Jacobians, the swap; the models that edit."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

import clip_model
import edit
import knn_diffusion
import sample
import vqvae

SIZE = 64


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    noise = rng.integers(0, 256, (size, size), np.uint8)
    found = np.asarray(Image.fromarray(noise).filter(
        ImageFilter.GaussianBlur(rng.uniform(1.5, 4)))).astype(np.float32)
    return (found - found.min()) / (found.max() - found.min())


def sticker(rng: np.random.Generator, size: int) -> np.ndarray:
    """A few shapes on a plain ground, in the middle half."""
    picture = Image.new("L", (4 * size, 4 * size), int(rng.integers(150, 256)))
    draw = ImageDraw.Draw(picture)
    for i in range(5):
        x, y = rng.uniform(1.2, 2.2, 2) * size
        w, h = rng.uniform(0.3, 1.0, 2) * size
        shape = (draw.ellipse, draw.rectangle)[i % 2]
        shape((x, y, x + w, y + h), fill=int(rng.integers(0, 140)))
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX)).astype(np.float32) / 255


def random_warp(motion: str, rng: np.random.Generator) -> np.ndarray:
    """OpenCV's pixel coordinates: up to 5 px, 5°, 5 %, perspective 1e-3, about the centre."""
    c = (SIZE - 1) / 2
    to, back = np.eye(3), np.eye(3)
    to[:2, 2], back[:2, 2] = c, -c
    warp, angle = np.eye(3), np.deg2rad(rng.uniform(-5, 5))
    warp[:2, 2] = rng.uniform(-5, 5, 2)
    inner = np.eye(3)
    if motion != "translation":
        inner[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    if motion in ("affine", "homography"):
        inner[:2, :2] = inner[:2, :2] @ (np.eye(2) + rng.uniform(-0.05, 0.05, (2, 2)))
    if motion == "homography":
        inner[2, :2] = rng.uniform(-1e-3, 1e-3, 2)
    warp = warp @ to @ inner @ back
    return warp / warp[2, 2]


def pairs(motion: str, n: int) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Templates, images (n, 1, H, W) and the true warps: the template is the image seen through."""
    rng, templates, images, warps = np.random.default_rng(0), [], [], []
    shift = np.eye(3)
    shift[:2, 2] = 16
    for i in range(n):
        scene = (texture, sticker)[i % 2](rng, SIZE + 32)
        warp = random_warp(motion, rng)
        templates.append(cv2.warpPerspective(
            scene, shift @ warp, (SIZE, SIZE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
        images.append(scene[16:-16, 16:-16])
        warps.append(warp)
    return *(torch.from_numpy(np.stack(x))[:, None] for x in (templates, images)), warps


def opencv_warps(template: torch.Tensor, image: torch.Tensor, motion: str
                 ) -> list[np.ndarray | None]:
    """findTransformECC's warps (3, 3) in its pixels, None where it gives up."""
    found = []
    for a, b in zip(template[:, 0].numpy(), image[:, 0].numpy()):
        start = np.eye(3 if motion == "homography" else 2, 3, dtype=np.float32)
        try:
            _, warp = cv2.findTransformECC(a, b, start, getattr(cv2, f"MOTION_{motion.upper()}"),
                                           (3, 50, 1e-3), None, 5)
            found.append(np.vstack([warp, [0, 0, 1]])[:3])
        except cv2.error:
            found.append(None)
    return found


def to_ours(warp: np.ndarray) -> torch.Tensor:
    """A warp (3, 3) of OpenCV's pixels in edit.py's coordinates."""
    half = SIZE / 2
    change = np.array([[1 / half, 0, (1 - SIZE) / SIZE], [0, 1 / half, (1 - SIZE) / SIZE],
                       [0, 0, 1]])
    return torch.from_numpy(change @ warp @ np.linalg.inv(change))


def displacements(found, wanted) -> list[float]:
    """Mean distance over all pixels between what pairs of warps (3, 3) do to them."""
    points = np.stack([*np.meshgrid(np.arange(SIZE), np.arange(SIZE)), np.ones((SIZE, SIZE))], -1)
    errors = []
    for pair in zip(found, wanted):
        a, b = (points.reshape(-1, 3) @ warp.T for warp in pair)
        errors.append(np.linalg.norm(a[:, :2] / a[:, 2:] - b[:, :2] / b[:, 2:], axis=1).mean())
    return errors


@pytest.mark.parametrize("motion", edit.MOTIONS)
def test_ecc_is_not_below_opencvs_and_finds_the_warp(motion):
    template, image, warps = pairs(motion, 100)
    theirs = opencv_warps(template, image, motion)
    ok = [i for i, found in enumerate(theirs) if found is not None]
    assert len(ok) > 80
    ours = edit.ecc(template, image, motion, iterations=50, eps=1e-3)
    same = torch.stack([to_ours(theirs[i]) for i in ok])
    rho = edit.correlation(template[ok], image[ok], ours.warp[ok])
    rho_theirs = edit.correlation(template[ok], image[ok], same.float())
    assert (rho >= rho_theirs - 0.002).float().mean() >= 0.95
    assert torch.allclose(rho, ours.rho[ok], atol=1e-4)
    assert ours.converged[ok].float().mean() > 0.9
    found = edit.to_pixels(ours.warp.double(), SIZE, SIZE).numpy()
    assert np.mean(displacements(found[ok], [warps[i] for i in ok])) < 0.1


def smooth_picture(height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    return ((2 * x).sin() + (1.5 * y).cos() + 0.3 * (x * y).sin())[None, None]


@pytest.mark.parametrize("motion", edit.MOTIONS)
def test_jacobians_equal_finite_differences(motion):
    """Columns of G against the change of the warped picture, parameter by parameter."""
    picture = smooth_picture(90, 120).double()
    generator, P = torch.Generator().manual_seed(0), edit.MOTIONS[motion]
    warp = edit.moved(motion, torch.eye(3).double()[None],
                      0.03 * torch.randn(1, P, generator=generator).double())
    x, y = edit.grid_of(torch.zeros(1, 1, 90, 120, dtype=torch.float64))
    u, v, _ = edit.warp_points(warp, x, y)
    gx, gy = edit.look_up(edit.gradients(picture), u, v).unbind(1)
    G = edit.jacobian(motion, warp, gx, gy, x, y)[0]
    inner = (x.abs() < 0.7) & (y.abs() < 0.5)
    for i in range(P):
        step, h = torch.zeros(1, P).double(), 1e-3
        step[0, i] = h
        ends = [edit.look_up(picture, *edit.warp_points(edit.moved(motion, warp, s), x, y)[:2])
                for s in (step, -step)]
        change = ((ends[0] - ends[1]) / (2 * h))[0, 0]
        error = (G[i] - change)[inner].norm() / change[inner].norm()
        assert error < 0.05, (motion, i)           # bilinear look-up bends the change a little


def test_warped_pictures_are_opencvs():
    rng = np.random.default_rng(0)
    for height, width in ((40, 40), (30, 50)):
        picture = rng.random((height, width)).astype(np.float32)
        warp = np.array([[1.02, 0.03, -1.5], [-0.02, 0.97, 2.0], [2e-4, -1e-4, 1]])
        wanted = cv2.warpPerspective(
            picture, warp, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE)
        longer = max(height, width)
        to = np.array([[2 / longer, 0, (1 - width) / longer],
                       [0, 2 / longer, (1 - height) / longer], [0, 0, 1]])
        ours = torch.from_numpy(to @ warp @ np.linalg.inv(to))[None]
        found = edit.warp_pictures(torch.from_numpy(picture)[None, None], ours.float())[0, 0]
        # OpenCV's bilinear weights are multiples of 1/32
        assert np.abs(found.numpy() - wanted).max() < 0.06
        assert np.allclose(edit.to_pixels(ours, height, width)[0].numpy(), warp, atol=1e-9)


def test_ecc_is_blind_to_brightness_and_contrast_and_alone_or_in_a_batch():
    template, image, _ = pairs("affine", 6)
    together = edit.ecc(template, image, eps=1e-6)
    changed = edit.ecc(template, 0.4 * image + 0.3, eps=1e-6)
    assert torch.allclose(together.warp, changed.warp, atol=1e-3)
    for i in range(6):
        alone = edit.ecc(template[i:i + 1], image[i:i + 1], eps=1e-6)
        assert torch.allclose(alone.warp[0], together.warp[i], atol=1e-3)
    # pixels outside the mask have no say
    mask = torch.ones_like(image)
    mask[:, :, :20] = 0
    spoiled = image.clone()
    spoiled[:, :, :16] = torch.rand(6, 1, 16, 64)
    masked = edit.ecc(template, spoiled, mask=mask, levels=1)
    clean = edit.ecc(template, image, mask=mask, levels=1)
    assert torch.allclose(masked.warp, clean.warp, atol=2e-3)
    # a mask over less than half is no reason to give up
    mask[:, :, :36] = 0
    assert edit.ecc(template, image, mask=mask, eps=1e-6).converged.sum() >= 5
    # and a start is where it begins: from the end there is nothing left to do
    again, anew = (edit.ecc(template, image, levels=1, iterations=2, start=start).warp
                   for start in (together.warp, None))
    assert torch.allclose(again, together.warp, atol=1e-3)
    assert not torch.allclose(anew, together.warp, atol=1e-2)


def test_hopeless_pairs_are_reported_and_harmless():
    flat, edge = torch.full((1, 1, 32, 32), 0.5), torch.zeros(1, 1, 32, 32)
    edge[..., 10:20, 12:25] = 1
    for template, image in ((flat, flat), (flat, edge), (edge, flat), (edge, 1 - edge),
                            (edge, torch.rand(1, 1, 32, 32))):
        for motion in edit.MOTIONS:
            found = edit.ecc(template, image, motion)
            assert torch.isfinite(found.warp).all() and torch.isfinite(found.rho).all()
            assert (found.rho.abs() <= 1.001).all()
            assert 0.5 < torch.linalg.det(found.warp).item() < 2         # none that nobody meant
    assert not edit.ecc(flat, edge).converged and not edit.ecc(edge, flat).converged
    with pytest.raises(ValueError, match="motion is 'rigid'"):
        edit.ecc(edge, edge, "rigid")
    with pytest.raises(ValueError, match="wanted \\(B, 1, H, W\\)"):
        edit.ecc(edge, torch.zeros(1, 3, 32, 32))


# ---------------------------------------------------------------- the swap


def test_swap_keeps_the_picture_to_the_last_bit_outside_and_shows_the_neighbour_inside():
    template, image, _ = pairs("affine", 8)
    pictures, neighbors = template.repeat(1, 3, 1, 1), image.repeat(1, 3, 1, 1).clone()
    boxes = edit.random_regions(8, SIZE, SIZE, torch.Generator().manual_seed(0))
    boxes[0] = torch.tensor([0, 0, 1, 1])                          # one pixel, at the border
    boxes[1] = torch.tensor([40, 50, 64, 64])                      # at the border
    pictures[2] = 0.25                                             # constant: can't be aligned
    warped, alignment = edit.aligned(pictures, neighbors)
    found = edit.composed(pictures, warped, boxes)
    assert not alignment.converged[2] and alignment.converged[3:].all()
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(found[i][:, ~inside], pictures[i][:, ~inside])
        warp = alignment.warp[i:i + 1] if alignment.converged[i] else torch.eye(3)[None]
        wanted = edit.warp_pictures(neighbors[i:i + 1], warp)[0]
        assert torch.allclose(found[i][:, inside], wanted[:, inside], atol=1e-6)
    unaligned = F.mse_loss(neighbors[3:], pictures[3:])
    aligned = F.mse_loss(edit.warp_pictures(neighbors[3:], alignment.warp[3:]), pictures[3:])
    assert aligned < 0.2 * unaligned


def test_a_neighbour_that_lies_right_already_is_not_moved():
    """One more thing in it and ECC would shift the whole picture a little to meet it."""
    pictures = pairs("affine", 6)[0].repeat(1, 3, 1, 1)
    neighbors = pictures.clone()
    neighbors[:, :, 30:50, 40:60] = pictures.flip(2)[:, :, 30:50, 40:60]
    neighbors[3:] = edit.warp_pictures(neighbors[3:], torch.tensor(
        [[[1, 0, 0.1], [0, 1, 0], [0, 0, 1.0]]]).expand(3, 3, 3))
    warped, alignment = edit.aligned(pictures, neighbors)
    found = edit.ecc(edit.grey(pictures), edit.grey(neighbors)).warp
    assert (found[:3] != torch.eye(3)).any()
    assert (alignment.warp[:3] == torch.eye(3)).all()
    assert torch.equal(warped[:3], neighbors[:3])
    assert torch.equal(alignment.warp[3:], found[3:])
    assert torch.equal(warped[3:], edit.warp_pictures(neighbors[3:], found[3:]))
    assert torch.equal(alignment.rho, edit.correlation(
        edit.grey(pictures), edit.grey(neighbors), alignment.warp))


def test_regions_have_their_areas_and_lie_inside():
    boxes = edit.random_regions(4000, 64, 48, torch.Generator().manual_seed(0))
    left, top, right, bottom = boxes.unbind(1)
    assert (left >= 0).all() and (top >= 0).all() and (right <= 48).all() and (bottom <= 64).all()
    share = ((right - left) * (bottom - top)).double() / (64 * 48)
    assert share.min() > 0.04 and share.max() < 0.52
    assert abs(share.mean().item() - 0.275) < 0.01                 # uniform in 5 … 50 %
    assert (left == 0).any() and (right == 48).any()
    masks = edit.region_mask(boxes[:50], 64, 48)
    assert torch.equal(masks.flatten(1).sum(1), ((right - left) * (bottom - top))[:50])


def test_the_telling_region_correlates_best_with_the_difference():
    """A small thing in one corner is found to the pixel, and the choice is numpy's corrcoef's."""
    pictures = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    warped = pictures.clone()
    warped[:3, :, 20:, 26:38] += 1
    boxes = edit.telling_regions(pictures, warped, 64, torch.Generator().manual_seed(0))
    assert boxes[:3].tolist() == 3 * [[26, 20, 38, 32]]
    left, top, right, bottom = boxes[3].tolist()                   # no difference: any will do
    assert 0 <= left < right <= 40 and 0 <= top < bottom <= 32

    warped = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(2))
    warped = 2 * F.avg_pool2d(warped, 9, 1, 4) - 0.8 + pictures     # differences everywhere
    drawn = edit.random_regions(16 * 4, 32, 40, torch.Generator().manual_seed(0)).view(16, 4, 4)
    boxes = edit.telling_regions(pictures, warped, 16, torch.Generator().manual_seed(0))
    for i in range(4):
        difference = (warped - pictures)[i].abs().mean(0).clamp(max=0.25).flatten().numpy()
        assert (difference == 0.25).any() and (difference < 0.2).any()

        def score(box, difference=difference):
            if box[0] >= box[2] or box[1] >= box[3]:
                return -1.0
            mask = edit.region_mask(torch.tensor([box]), 32, 40).flatten().numpy()
            return np.corrcoef(mask, difference)[0, 1]

        box = max(drawn[:, i].tolist(), key=score)
        for edge in (0, 1, 2, 3, 0, 1, 2, 3):
            places = range((32 if edge % 2 else 40) + 1)
            moved = (box[:edge] + [place] + box[edge + 1:] for place in places)
            box = max((box, *moved), key=score)
        assert boxes[i].tolist() == box
    single = edit.telling_regions(pictures, warped, 1, torch.Generator().manual_seed(3))
    assert torch.equal(single, edit.random_regions(4, 32, 40, torch.Generator().manual_seed(3)))


def test_a_region_swap_is_its_parts():
    template, image, _ = pairs("affine", 6)
    pictures, neighbors = template.repeat(1, 3, 1, 1), image.repeat(1, 3, 1, 1)
    found, boxes, alignment = edit.region_swap(pictures, neighbors,
                                               torch.Generator().manual_seed(5))
    warped = edit.aligned(pictures, neighbors)[0]
    again = edit.telling_regions(pictures, warped, 256, torch.Generator().manual_seed(5))
    assert torch.equal(boxes, again)
    assert torch.equal(found, edit.composed(pictures, warped, boxes))
    assert alignment.converged.all()
    anywhere = edit.region_swap(pictures, neighbors, torch.Generator().manual_seed(5), of=1)[1]
    assert torch.equal(anywhere, edit.random_regions(6, 64, 64, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("box, wanted", [
    ((10, 20, 20, 24), (10, 17, 20, 27)), ((0, 0, 4, 10), (0, 0, 10, 10)),
    ((60, 60, 64, 62), (60, 59, 64, 63)), ((5, 5, 6, 6), (5, 5, 6, 6)),
    ((0, 10, 64, 20), (0, 0, 64, 64))])
def test_the_crop_of_a_region_is_a_tight_square_inside(box, wanted):
    assert edit.region_crop(box, 64, 64) == wanted


# ---------------------------------------------------------------- the widened models


def edit_parts(backbone, seed=0):
    """A small random model, its widened twin, x_t, t, condition, picture."""
    generator = torch.Generator().manual_seed(seed)
    if backbone == "continuous":
        config = replace(knn_diffusion.PRESETS["stickers"], image_size=32, widths=(32, 32),
                         embed_dim=8, n_neighbors=3, head_channels=16, condition_width=16,
                         time_width=16, attention=(8, 4), self_attention=(4,), query_map=2)
        model = knn_diffusion.UNet(config)
        x = torch.randn(2, 2, 3, 32, 32, generator=generator)
    else:
        config = replace(knn_diffusion.DISCRETE_PRESETS["stickers"], n_codes=7, tokens_a_side=4,
                         embed_dim=8, n_neighbors=3, width=16, heads=2, layers=2,
                         condition_width=8, query_map=2)
        model = knn_diffusion.TokenTransformer(config)
        x = torch.randint(7, (2, 2, 16), generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    query, neighbors = (torch.nn.functional.normalize(torch.randn(2, *n, 8, generator=generator),
                                                      dim=-1) for n in ((), (3,)))
    return model, knn_diffusion.widened(model), x[0], torch.tensor([5, 60]), query, neighbors, x[1]


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_the_widened_model_starts_as_the_generator(backbone):
    model, wide, xt, t, query, neighbors, picture = edit_parts(backbone)
    assert wide.config.edit and not model.config.edit
    wanted = model(xt, t, query, neighbors)
    for given in (picture, None):
        assert (wide(xt, t, query, neighbors, picture=given) - wanted).abs().max() <= 1e-6
    wide(xt, t, query, neighbors, picture=picture).square().sum().backward()
    name = "conv_in.weight" if backbone == "continuous" else "picture_in.weight"
    new = dict(wide.named_parameters())[name].grad
    assert (new[:, new.shape[1] // 2:] if backbone == "continuous" else new).abs().sum() > 0


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_two_scales(backbone):
    """Both at 1 are the conditional model; else the formula, term by term."""
    _, wide, xt, _, query, neighbors, picture = edit_parts(backbone)
    with torch.no_grad():
        for p in wide.parameters():
            p.add_(0.1 * torch.randn_like(p))

    def e(condition, image):
        return wide(xt, torch.full((2,), 9), *((query, neighbors) if condition else (None, None)),
                    picture=picture if image else None)

    def guided(s_text, s_image):
        if backbone == "discrete":
            return knn_diffusion.denoise_tokens(wide, xt, 9, query, neighbors, s_text,
                                                picture=picture, guidance_picture=s_image)
        schedule = knn_diffusion.Schedule(wide.config.T, wide.config.noise_shift)
        return knn_diffusion.denoise(wide, schedule, xt, 9, query, neighbors, s_text,
                                     picture=picture, guidance_picture=s_image).x0

    def finished(out):
        return out.log_softmax(-1).clamp(min=knn_diffusion.LOG_ZERO) if backbone == (
            "discrete") else out.clamp(-1, 1)

    with torch.no_grad():
        assert (guided(1.0, 1.0) - finished(e(True, True))).abs().max() <= 1e-6
        assert (e(True, True) - e(False, True)).abs().max() > 1e-3
        assert (e(False, True) - e(False, False)).abs().max() > 1e-3
        for s_text, s_image in ((2.0, 1.0), (1.0, 1.5), (3.0, 0.5), (0.0, 0.0)):
            wanted = (e(False, False) + s_image * (e(False, True) - e(False, False))
                      + s_text * (e(True, True) - e(False, True)))
            assert (guided(s_text, s_image) - finished(wanted)).abs().max() < 1e-4


def test_drops_give_all_three_terms_of_the_formula():
    query, neighbors, picture = knn_diffusion.draw_edit_drops(
        100_000, torch.Generator().manual_seed(0))
    everything = query & neighbors
    assert everything.float().mean() == pytest.approx(0.1, abs=0.005)
    assert (picture & ~everything).sum() == 0                  # e(∅,T) is never asked for
    assert picture.float().mean() == pytest.approx(0.05, abs=0.005)


def test_a_start_from_a_picture_is_that_picture_noised(monkeypatch):
    """At a small start the sample stays near the picture; its first x_t is add_noise's."""
    model, *_, query, neighbors, _ = edit_parts("continuous")
    start = torch.rand(2, 3, 32, 32) * 2 - 1
    schedule = knn_diffusion.Schedule(model.config.T, model.config.noise_shift)
    seen, real = [], knn_diffusion.denoise

    def spy(model, schedule, xt, t, *args):
        seen.append((t, xt.clone()))
        return real(model, schedule, xt, t, *args)

    monkeypatch.setattr(knn_diffusion, "denoise", spy)
    list(knn_diffusion.sample(model, query, neighbors, [3, 4], steps=5, start=start, start_at=0.2))
    assert [t for t, _ in seen] == [200, 160, 120, 80, 40]
    eps = knn_diffusion.noise_source([3, 4])(3, 32, 32)
    wanted = knn_diffusion.add_noise(start, eps, schedule.at(200, start))
    assert torch.allclose(seen[0][1], wanted)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def editor(world, tmp_path_factory):
    """edit.safetensors beside the world's CLIP and index: an editing U-Net of 16 px, random."""
    folder = tmp_path_factory.mktemp("editor")
    model, metadata = knn_diffusion.load(world / "continuous.safetensors")
    wide = knn_diffusion.widened(model)
    with torch.no_grad():
        wide.conv_in.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    knn_diffusion.save(folder / "edit.safetensors", wide, {"clip": metadata["clip"]})
    return ["--weights", str(folder / "edit.safetensors"), "--clip",
            str(world / "clip.safetensors"), "--index", str(world / "index"), "--steps", "3"]


def odd_pictures(folder):
    noise = Image.effect_noise((40, 30), 80)
    noise.convert("RGB").save(folder / "wide.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    noise.save(folder / "grey.png")
    rgba = noise.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((40, 30)))
    rgba.save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise.convert("RGB").save(folder / "turned.jpg", exif=exif)
    noise.convert("P").save(folder / "moving.gif", save_all=True,
                            append_images=[noise.rotate(90).convert("P")])
    return ["wide.png", "dot.png", "grey.png", "alpha.png", "turned.jpg", "moving.gif"]


def test_command_edits_odd_pictures(editor, tmp_path, capsys):
    for name in odd_pictures(tmp_path):
        out = tmp_path / "o.png"
        argv = [str(tmp_path / name), "red", "fo", *editor, "--n", "2", "--out", str(out),
                "--singles", str(tmp_path / "s"), "--paste"]
        assert edit.main(argv) == 0, name
        picture = clip_model.read_image(tmp_path / name)
        assert Image.open(tmp_path / "o-001-01.png").size == picture.size
        assert Image.open(tmp_path / "s" / "001-01.png").size == (16, 16)
        sheet = Image.open(out)
        assert sheet.size == (5 * 194 + 2, 2 * 194 + 2)        # picture, 2 x (result, change)
        assert json.loads(sheet.text["parameters"])["texts"] == ["red", "fo"]
        assert "wrote" in capsys.readouterr().out


def test_the_same_command_gives_the_same_bytes_and_seeds_are_the_samples_own(editor, tmp_path):
    odd_pictures(tmp_path)

    def singles(name, *more):
        argv = [str(tmp_path / "wide.png"), "red", *editor, "--out", str(tmp_path / "o.png"),
                "--singles", str(tmp_path / name), *more]
        assert edit.main(argv) == 0
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    first = singles("a", "--n", "3")
    assert singles("b", "--n", "3") == first and len(set(first)) == 3
    singles("c", "--n", "1", "--seed", "2")
    other = np.asarray(Image.open(tmp_path / "c/000-00.png"), np.int16)
    here = np.asarray(Image.open(tmp_path / "a/000-02.png"), np.int16)
    assert np.abs(other - here).max() <= 2
    assert singles("d", "--n", "3", "--guidance-image", "1.5") != first
    assert singles("e", "--n", "3", "--start", "0.5") != first


def test_pasting_touches_nothing_outside_the_mask():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8))
    result = Image.new("RGB", (16, 16), "red")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    pasted = np.asarray(edit.paste(picture, result, Image.fromarray(mask)))
    changed = (pasted != np.asarray(picture)).any(-1)
    assert pasted.shape == (90, 130, 3) and changed.any()
    rows, columns = np.nonzero(changed)
    assert 14 <= rows.min() and rows.max() <= 53                # a pixel of 5.6 around 4…8
    assert 20 + 14 <= columns.min() and columns.max() <= 20 + 53
    assert (pasted[30:40, 20 + 30:20 + 40] == (255, 0, 0)).all()
    empty = Image.new("L", (16, 16))
    assert (np.asarray(edit.paste(picture, result, empty)) == np.asarray(picture)).all()


@pytest.mark.parametrize("size", [(655, 640), (959, 640), (95, 64), (64, 97), (40, 51)])
def test_pasting_puts_a_thing_where_it_was_taken_from(size):
    """A grey square through `fit_square` and back: its centre within a tenth of a model's pixel, or
    the rounding to the picture's own."""
    width, height = size
    side = min(size)
    values = np.zeros((height, width, 3), np.uint8)
    middle = height // 2, width // 2
    half = side // 8
    values[middle[0] - half:middle[0] + half, middle[1] - half:middle[1] + half] = 200
    picture = Image.fromarray(values)
    small = clip_model.fit_square(picture, 64)
    found = np.asarray(edit.paste(picture, small, Image.new("L", (64, 64), 255)))[..., 0]
    for axis in (0, 1):
        centre, was = (np.average(np.arange(v.shape[axis]), weights=v.sum(1 - axis, dtype=float))
                       for v in (found, values[..., 0]))
        assert abs(centre - was) < max(0.1 * side / 64, 0.25)


def test_the_change_mask_finds_what_changed_and_nothing_else():
    before = torch.zeros(1, 3, 32, 32)
    after = before + 0.05 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    after[:, 0, 10:16, 12:20] = 1.0
    mask = edit.change_mask(before, after)
    assert (mask[:, :, 11:15, 13:19] == 1).all()
    far = torch.ones(32, 32, dtype=torch.bool)
    far[5:21, 7:25] = False
    assert (mask[0, 0][far] == 0).all()
    assert edit.change_mask(before, before).max() == 0


def test_the_changed_area_is_told_in_words():
    mask = torch.zeros(1, 64, 64)
    assert edit.changed_area(mask) == "nothing changed"
    mask[0, 10:26, 40:56] = 0.9
    mask[0, 0, 0] = 0.4
    assert edit.changed_area(mask) == "6% changed, x 40 to 56, y 10 to 26"


def test_user_mistakes_give_status_2_and_write_nothing(editor, world, tmp_path, capsys):
    odd_pictures(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    good, out = str(tmp_path / "wide.png"), ["--out", str(tmp_path / "out.png")]
    for argv in (
        [str(tmp_path / "text.png"), "red", *editor],
        [str(tmp_path / "none.png"), "red", *editor],
        [str(tmp_path), "red", *editor],
        [good, " ", *editor],
        [good, "red", *editor, "--n", "0"],
        [good, "red", *editor, "--k", "-1"],
        [good, "red", *editor, "--steps", "0"],
        [good, "red", *editor, "--start", "0"],
        [good, "red", *editor, "--start", "1.5"],
        [good, "red", *editor, "--start", "nan"],
        [good, "red", *editor, "--guidance-text", "inf"],
        [good, "red", *editor, "--guidance-image", "nan"],
        [good, "red", *editor, "--backbone", "discrete"],
        [good, "red", *editor, "--weights", str(world / "continuous.safetensors")],
        [good, "red", *editor, "--weights", str(tmp_path / "none")],
        [good, "red", *editor, "--index", str(tmp_path)],
    ):
        assert edit.main([*argv, *out]) == 2, argv
        error = capsys.readouterr().err.strip()
        assert error and len(error.splitlines()) == 1 and "Traceback" not in error
        assert not (tmp_path / "out.png").exists()
    assert sample.main(["red", *editor[:6], *out]) == 2 and "edit.py" in capsys.readouterr().err
    assert edit.main([good, "red", *editor, "--start", "0.001", *out]) == 2
    assert "--start 0.001 leaves" in capsys.readouterr().err


def test_discrete_weights_edit_too(world, tmp_path, capsys):
    codec = vqvae.VQVAE(vqvae.VQVAEConfig(
        image_size=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(),
        latent_channels=8, embed_dim=4, n_codes=16, norm_groups=4)).eval()
    vqvae.save(tmp_path / "vqvae.safetensors", codec, {})
    codec = vqvae.load(tmp_path / "vqvae.safetensors")[0]
    clip = clip_model.load(world / "clip.safetensors")
    config = replace(knn_diffusion.DISCRETE_PRESETS["stickers"], image_size=16, n_codes=16,
                     tokens_a_side=8, embed_dim=clip.config.embed_dim, width=16, heads=2, layers=1,
                     condition_width=8, query_map=2, query_hidden=8)
    model = knn_diffusion.widened(knn_diffusion.TokenTransformer(config))
    knn_diffusion.save(tmp_path / "edit.safetensors", model,
                       {"clip": clip.fingerprint(), "vqvae": vqvae.fingerprint(codec)})
    odd_pictures(tmp_path)
    argv = [str(tmp_path / "wide.png"), "red", "--weights", str(tmp_path / "edit.safetensors"),
            "--vqvae", str(tmp_path / "vqvae.safetensors"), "--clip",
            str(world / "clip.safetensors"), "--index", str(world / "index"), "--steps", "3",
            "--out", str(tmp_path / "out.png")]
    assert edit.main([*argv, "--n", "2"]) == 0 and (tmp_path / "out.png").exists()
    capsys.readouterr()
    assert edit.main([*argv, "--n", "1", "--k", "99"]) == 0
    assert "k is 99, the index has 20 rows: using all" in capsys.readouterr().err
    assert edit.main([*argv, "--start", "0.5"]) == 2
