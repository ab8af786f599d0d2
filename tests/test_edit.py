"""edit.py: ECC beside OpenCV's, its Jacobians, the swap; the models that edit."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKBONES, randomised, two_samples
from PIL import Image, ImageDraw, ImageFilter

import clip_model
import edit
import knn_diffusion
import sample

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


def random_warp(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) in OpenCV's pixels: up to 5 px, 5° and 5 % about the centre."""
    warp, angle, centre = np.eye(3), np.deg2rad(rng.uniform(-5, 5)), [(SIZE - 1) / 2] * 2
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    warp[:2, :2] = turn @ (np.eye(2) + rng.uniform(-0.05, 0.05, (2, 2)))
    warp[:2, 2] = centre - warp[:2, :2] @ centre + rng.uniform(-5, 5, 2)
    return warp


def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Templates, images (n, 1, H, W) and the true warps: the template is the image seen through."""
    rng, templates, images, warps = np.random.default_rng(0), [], [], []
    shift = np.eye(3)
    shift[:2, 2] = 16
    for i in range(n):
        scene = (texture, sticker)[i % 2](rng, SIZE + 32)
        warps.append(random_warp(rng))
        templates.append(cv2.warpPerspective(
            scene, shift @ warps[i], (SIZE, SIZE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP))
        images.append(scene[16:-16, 16:-16])
    return *(torch.from_numpy(np.stack(x))[:, None] for x in (templates, images)), warps


def opencv_warps(template: torch.Tensor, image: torch.Tensor) -> list[np.ndarray | None]:
    """findTransformECC's warps (3, 3) in its pixels, None where it gives up."""
    found = []
    for a, b in zip(template[:, 0].numpy(), image[:, 0].numpy()):
        try:
            warp = cv2.findTransformECC(a, b, np.eye(2, 3, dtype=np.float32),
                                        cv2.MOTION_AFFINE, (3, 50, 1e-3), None, 5)[1]
            found.append(np.vstack([warp, [0, 0, 1]]))
        except cv2.error:
            found.append(None)
    return found


def between(height: int, width: int) -> np.ndarray:
    """(3, 3): OpenCV's pixels, counted from the first one's centre → edit.py's −1 … 1."""
    return np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])


def to_opencv(warps: torch.Tensor, height: int = SIZE, width: int = SIZE) -> list[np.ndarray]:
    """edit.py's warps (B, 2, 3) in OpenCV's pixels, (3, 3) each."""
    change = between(height, width)
    return [np.linalg.inv(change) @ np.vstack([warp, [0, 0, 1]]) @ change
            for warp in warps.double().numpy()]


def displacements(found, wanted) -> list[float]:
    """Mean distance over all pixels between what pairs of affine warps (3, 3) do to them."""
    points = np.stack([*np.meshgrid(np.arange(SIZE), np.arange(SIZE)), np.ones((SIZE, SIZE))], -1)
    return [np.linalg.norm(points @ (a - b).T, axis=-1).mean() for a, b in zip(found, wanted)]


def correlations(template: torch.Tensor, image: torch.Tensor, warps: list[np.ndarray]
                 ) -> np.ndarray:
    """ρ of blurred pairs by OpenCV's warp and numpy's corrcoef, over the pixels that both have."""
    found, flags = [], cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for a, b, warp in zip(template[:, 0].numpy(), image[:, 0].numpy(), warps):
        a, b = (cv2.GaussianBlur(x, (5, 5), 0) for x in (a, b))
        b, inside = (cv2.warpAffine(x, warp[:2], (SIZE, SIZE), flags=flags)
                     for x in (b, np.ones_like(b)))
        found.append(np.corrcoef(a[inside > 0.99], b[inside > 0.99])[0, 1])
    return np.array(found)


def test_ecc_is_not_below_opencvs_and_finds_the_warp():
    template, image, wanted = pairs(100)
    theirs = opencv_warps(template, image)
    ok = [i for i, found in enumerate(theirs) if found is not None]
    warp, converged = edit.ecc(template, image)
    ours = to_opencv(warp)
    rho, rho_theirs = (correlations(template[ok], image[ok], [warps[i] for i in ok])
                       for warps in (ours, theirs))
    assert len(ok) > 80 and converged[ok].float().mean() > 0.9
    assert (rho >= rho_theirs - 0.002).mean() >= 0.95
    errors = displacements(ours, wanted)
    assert np.median(errors) < 0.05 and np.mean(np.array(errors) < 0.5) >= 0.98


def test_a_step_climbs_to_where_the_correlation_is_highest():
    """The linearised ρ: against a search along random directions, in both of λ's cases."""
    generator = torch.Generator().manual_seed(0)
    i_r, i_w, gx, gy = torch.randn(4, 60, 90, generator=generator)
    x, y = torch.rand(2, 90, generator=generator) * 2 - 1
    i_r, i_w, gx, gy = (part - part.mean(1, keepdim=True) for part in (i_r, i_w, gx, gy))
    G = torch.stack([gx * x, gx * y, gx, gy * x, gy * y, gy], 2)                 # (B, P, 6)
    step = edit.ecc_step(i_r, i_w, gx, gy, x, y).view(-1, 6)

    def rho(step):
        seen = i_w + (G @ step[:, :, None])[..., 0]
        return (i_r * seen).sum(1) / (i_r.norm(dim=1) * seen.norm(dim=1))

    unexplained = i_w - (G @ torch.linalg.lstsq(G, i_w[:, :, None]).solution)[..., 0]
    is_usual = (i_r * unexplained).sum(1) > 0
    assert is_usual.any() and not is_usual.all()
    best = rho(step)[is_usual]
    for size in (1e-2, 1e-1, 1):
        other = step + size * torch.randn(step.shape, generator=generator)
        assert (best >= rho(other)[is_usual] - 1e-5).all()
    assert (rho(step) >= rho(torch.zeros_like(step)) - 1e-5).all()               # ρ never falls


def test_warped_pictures_are_opencvs():
    rng = np.random.default_rng(0)
    for height, width in ((40, 40), (30, 50)):
        picture = rng.random((height, width)).astype(np.float32)
        warp = np.array([[1.02, 0.03, -1.5], [-0.02, 0.97, 2.0], [0, 0, 1]])
        wanted = cv2.warpAffine(picture, warp[:2], (width, height), borderMode=cv2.BORDER_REPLICATE,
                                flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        change = between(height, width)
        ours = torch.from_numpy(change @ warp @ np.linalg.inv(change)).float()[None, :2]
        found = edit.warped(torch.from_numpy(picture)[None, None], ours)[0, 0]
        assert np.abs(found.numpy() - wanted).max() < 0.06       # OpenCV's weights: 1/32 each
        assert np.allclose(to_opencv(ours, height, width)[0], warp, atol=1e-5)


def test_ecc_is_blind_to_brightness_and_contrast_and_alone_or_in_a_batch():
    template, image, _ = pairs(6)
    together = edit.ecc(template, image, eps=1e-6)[0]
    assert torch.allclose(together, edit.ecc(template, 0.4 * image + 0.3, eps=1e-6)[0], atol=1e-3)
    for i in range(6):
        alone = edit.ecc(template[i:i + 1], image[i:i + 1], eps=1e-6)[0]
        assert torch.allclose(alone[0], together[i], atol=1e-3)


def test_hopeless_pairs_are_reported_and_harmless():
    flat, edge = torch.full((1, 1, 32, 32), 0.5), torch.zeros(1, 1, 32, 32)
    edge[..., 10:20, 12:25] = 1
    for template, image in ((flat, flat), (flat, edge), (edge, flat), (edge, 1 - edge),
                            (edge, torch.rand(1, 1, 32, 32))):
        warp, converged = edit.ecc(template, image)
        assert 0.5 < torch.linalg.det(warp[0, :, :2]) < 2        # finite, and none nobody meant
        if template is flat or image is flat:
            assert not converged and torch.equal(warp[0], torch.eye(2, 3))


# ---------------------------------------------------------------- the swap

def test_swap_keeps_the_picture_to_the_last_bit_outside_and_shows_the_neighbour_inside():
    pictures, neighbors = (each.repeat(1, 3, 1, 1) for each in pairs(8)[:2])
    pictures[2] = 0.25                                             # constant: can't be aligned
    found, boxes = edit.region_swap(pictures, neighbors, torch.Generator(), 16)
    warp, _ = edit.ecc(edit.grey(pictures), edit.grey(neighbors))
    wanted = edit.warped(neighbors, warp)
    wanted[2] = neighbors[2]
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(found[i][:, ~inside], pictures[i][:, ~inside])
        assert torch.allclose(found[i][:, inside], wanted[i][:, inside], atol=1e-6)
    again = edit.most_different_regions(pictures, wanted, 16, torch.Generator())
    assert torch.equal(boxes, again)


def test_a_neighbour_that_lies_right_already_is_not_moved():
    """One more thing in it and ECC would shift the whole picture a little to meet it."""
    pictures = pairs(6)[0].repeat(1, 3, 1, 1)
    neighbors, shift = pictures.clone(), torch.tensor([[[1, 0, 0.1], [0, 1, 0]]])
    neighbors[:, :, 30:50, 40:60] = pictures.flip(2)[:, :, 30:50, 40:60]
    neighbors[3:] = edit.warped(neighbors[3:], shift.repeat(3, 1, 1))
    warp, _ = edit.ecc(edit.grey(pictures), edit.grey(neighbors))
    found = edit.aligned(pictures, neighbors)
    assert (warp[:3] != torch.eye(2, 3)).any()
    assert torch.equal(found[:3], neighbors[:3])
    assert torch.equal(found[3:], edit.warped(neighbors[3:], warp[3:]))


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


def test_the_most_different_region_correlates_best_with_the_difference():
    """The choice is numpy's corrcoef's: of the drawn regions, then of each edge's places."""
    pictures = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    warped = torch.rand(4, 3, 32, 40, generator=torch.Generator().manual_seed(2))
    warped = 2 * F.avg_pool2d(warped, 9, 1, 4) - 0.8 + pictures     # differences everywhere
    drawn = edit.random_regions(16 * 4, 32, 40, torch.Generator().manual_seed(0)).view(16, 4, 4)
    boxes = edit.most_different_regions(pictures, warped, 16, torch.Generator().manual_seed(0))
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
    single = edit.most_different_regions(pictures, warped, 1, torch.Generator().manual_seed(3))
    assert torch.equal(single, edit.random_regions(4, 32, 40, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("box, wanted", [
    ((10, 20, 20, 24), (10, 17, 20, 27)), ((0, 0, 4, 10), (0, 0, 10, 10)),
    ((60, 60, 64, 62), (60, 59, 64, 63)), ((5, 5, 6, 6), (5, 5, 6, 6)),
    ((0, 10, 64, 20), (0, 0, 64, 64))])
def test_the_crop_of_a_region_is_a_tight_square_inside(box, wanted):
    assert edit.region_crop(box, 64, 64) == wanted


# ---------------------------------------------------------------- the widened models

@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_widened_model_starts_as_the_generator_and_can_learn_the_picture(backbone):
    model, xt, t, query, neighbors, picture = two_samples(backbone)
    wide, wanted = knn_diffusion.widened(model), model(xt, t, query, neighbors)
    for given in (picture, None):
        assert (wide(xt, t, query, neighbors, picture=given) - wanted).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="train.py edit"):
        knn_diffusion.guided(model, xt, 3, knn_diffusion.Guide(query, neighbors, picture=picture))
    wide(xt, t, query, neighbors, picture=picture).square().sum().backward()
    new = (wide.picture_in.weight.grad if backbone == "discrete" else
           wide.conv_in.weight.grad[:, model.conv_in.in_channels:])
    assert new.abs().sum() > 0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_guidance_of_text_and_picture_is_its_formula(backbone):
    """Both at 1 are the conditional model; else the formula, term by term."""
    model, xt, _, query, neighbors, picture = two_samples(backbone)
    wide = randomised(knn_diffusion.widened(model), 1).requires_grad_(False)

    def e(condition, image):
        return wide(xt, torch.full((2,), 9), *((query, neighbors) if condition else (None, None)),
                    picture=picture if image else None)

    def guided(s_text, s_image):
        guide = knn_diffusion.Guide(query, neighbors, s_text, picture, s_image)
        return knn_diffusion.guided(wide, xt, 9, guide)

    assert (guided(1.0, 1.0) - e(True, True)).abs().max() <= 1e-6
    assert (e(True, True) - e(False, True)).abs().max() > 1e-3
    assert (e(False, True) - e(False, False)).abs().max() > 1e-3
    for s_text, s_image in ((2.0, 1.0), (1.0, 1.5), (3.0, 0.5), (0.0, 0.0)):
        wanted = (e(False, False) + s_image * (e(False, True) - e(False, False))
                  + s_text * (e(True, True) - e(False, True)))
        assert (guided(s_text, s_image) - wanted).abs().max() < 1e-4


def test_drops_give_all_three_terms_of_the_formula():
    query, neighbors, picture = knn_diffusion.draw_edit_drops(
        100_000, torch.Generator().manual_seed(0))
    everything = query & neighbors
    assert everything.float().mean() == pytest.approx(0.1, abs=0.005)
    assert (picture & ~everything).sum() == 0                  # e(∅,T) is never asked for
    assert picture.float().mean() == pytest.approx(0.05, abs=0.005)


def test_a_start_from_a_picture_is_that_picture_noised(monkeypatch):
    model, *_, query, neighbors, start = two_samples("continuous")
    schedule = knn_diffusion.Schedule(model.config.T, model.config.noise_shift)
    seen, real = [], knn_diffusion.guided
    monkeypatch.setattr(knn_diffusion, "guided", lambda model, xt, t, guide: (
        seen.append((t, xt.clone())), real(model, xt, t, guide))[1])
    list(knn_diffusion.sample(model, query, neighbors, [3, 4], steps=5, start=start, start_at=0.2))
    assert [t for t, _ in seen] == [20, 16, 12, 8, 4]
    eps = knn_diffusion.noise_source([3, 4])(3, 16, 16)
    wanted = knn_diffusion.add_noise(start, eps, schedule.at(20, start))
    assert torch.allclose(seen[0][1], wanted)


# ---------------------------------------------------------------- the command

@pytest.fixture
def editor(world):
    """What names the tiny world's files."""
    return ["--weights", str(world / "edit.safetensors"), "--clip", str(world / "clip.safetensors"),
            "--index", str(world / "index"), "--steps", "3"]


@pytest.fixture
def odd(tmp_path):
    """A folder of pictures of many kinds."""
    noise = Image.effect_noise((40, 30), 80)
    noise.convert("RGB").save(tmp_path / "wide.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (1, 50), "red").save(tmp_path / "thread.png")
    noise.convert("CMYK").save(tmp_path / "print.jpg", icc_profile=b"CMYK, of another mode")
    return tmp_path


def test_command_edits_odd_pictures(editor, odd):
    for name in sorted(path.name for path in odd.iterdir()):
        argv = [str(odd / name), "red", "fo", *editor, "--n", "2", "--out", str(odd / "o.png"),
                "--singles", str(odd / "s"), "--paste"]
        assert edit.main(argv) == 0, name
        picture, pasted = clip_model.read_image(odd / name), Image.open(odd / "o-001-01.png")
        assert pasted.size == picture.size and "icc_profile" not in pasted.info
        assert Image.open(odd / "s" / "001-01.png").size == (16, 16)
        sheet = Image.open(odd / "o.png")
        assert sheet.size == (5 * 194 + 2, 2 * (192 + 26) + 2)   # picture, 2 x (result, change)
        told = json.loads(sheet.text["parameters"])
        assert told["texts"] == ["red", "fo"] and told["image"] == name


def test_the_same_command_gives_the_same_pixels_and_seeds_are_the_samples_own(editor, odd):
    def singles(name, *more):
        argv = [str(odd / "wide.png"), "red", *editor, "--out", str(odd / "o.png"),
                "--singles", str(odd / name), *more]
        assert edit.main(argv) == 0
        return [np.asarray(Image.open(path), np.int16) for path in sorted((odd / name).iterdir())]

    first, again = (np.stack(singles(name, "--n", "3")) for name in "ab")
    assert (again == first).all() and (first[0] != first[1]).any()
    [other] = singles("c", "--n", "1", "--seed", "2")
    assert np.abs(other - first[2]).max() <= 2
    for options in (["--guidance-image", "1.5"], ["--guidance-text", "1"], ["--start", "0.5"],
                    ["--k", "0"]):
        assert (singles(options[0], "--n", "1", *options)[0] != first[0]).any(), options


@pytest.mark.parametrize("kind, scale", edit.S_I.items())
def test_the_backbone_says_how_far_towards_the_picture(editor, world, odd, kind, scale):
    files = {"continuous": [], "discrete": ["--weights", str(world / "edit-discrete.safetensors"),
                                            "--vqvae", str(world / "vqvae.safetensors")]}
    argv = [str(odd / "wide.png"), "red", *editor, *files[kind], "--n", "1"]
    assert edit.main([*argv, "--out", str(odd / "o.png")]) == 0
    assert json.loads(Image.open(odd / "o.png").text["parameters"])["guidance_image"] == scale


def test_pasting_touches_nothing_outside_the_mask_and_fades_where_the_crop_ends():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8))
    result, mask = Image.new("RGB", (16, 16), "red"), np.zeros((16, 16))
    mask[6:10, 6:10] = 1
    pasted = np.asarray(edit.paste(picture, result, mask))
    rows, columns = np.nonzero((pasted != np.asarray(picture)).any(-1))
    assert 28 <= rows.min() and rows.max() <= 61                # a pixel of 5.6 around 6 … 10
    assert 20 + 28 <= columns.min() and columns.max() <= 20 + 61
    assert (pasted[42:48, 20 + 42:20 + 48] == (255, 0, 0)).all()
    black = Image.new("RGB", (130, 90))
    red = np.asarray(edit.paste(black, result, np.ones((16, 16))))[:, :, 0].astype(int)
    assert (red[:, :25] == 0).all() and (red[:, 111:] == 0).all() and (red[:, 60] == 255).all()
    assert np.abs(np.diff(red, axis=1)).max() < 20              # no edge in the picture


@pytest.mark.parametrize("size", [(655, 640), (959, 640), (95, 64), (64, 97), (40, 51)])
def test_pasting_puts_a_thing_where_it_was_taken_from(size):
    """A grey square through `fit_square` and back: its centre within a tenth of a model's pixel, or
    the rounding to the picture's own."""
    width, height = size
    side = min(size)
    values, half = np.zeros((height, width, 3), np.uint8), side // 8
    values[height // 2 - half:height // 2 + half, width // 2 - half:width // 2 + half] = 200
    picture = Image.fromarray(values)
    small = clip_model.fit_square(picture, 64)
    found = np.asarray(edit.paste(picture, small, np.ones((64, 64))))[..., 0]
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


def test_user_mistakes_give_status_2_and_write_nothing(editor, world, odd, capsys):
    (odd / "text.png").write_text("hello")
    there = sorted(odd.rglob("*"))
    good = str(odd / "wide.png")
    mistakes = [[str(odd / "text.png"), "red"], [str(odd / "none.png"), "red"], [good, " "],
                [good, "red", "--out", good], [good, "red", "--singles", str(odd)]]
    mistakes += [[good, "red", *more.split()] for more in (
        "--n 0", "--steps 101", "--start 0", "--start 1.5", "--start 0.001",
        "--guidance-text inf", "--guidance-image nan", "--backbone discrete",
        f"--weights {world / 'continuous.safetensors'}",
        f"--weights {world / 'edit-discrete.safetensors'} --start 0.5 "
        f"--vqvae {world / 'vqvae.safetensors'}")]
    for argv in mistakes:
        where = [] if "--out" in argv else ["--out", str(odd / "out.png")]
        assert edit.main([argv[0], argv[1], *editor, *argv[2:], *where]) == 2, argv
        error = capsys.readouterr().err.strip()
        assert error and len(error.splitlines()) == 1 and "Traceback" not in error
        assert sorted(odd.rglob("*")) == there
    assert sample.main(["red", *editor[:6], *where]) == 2 and "edit.py" in capsys.readouterr().err
