"""examples/compare.py against closed forms, written-out loops and folders whose answer is known."""
from __future__ import annotations

import compare
import numpy as np
import pytest
import torch
from conftest import write_pictures
from torch import Tensor

import clip_model


def with_moments(mean: list[float], covariance: Tensor, n: int = 50, seed: int = 0) -> Tensor:
    """n points (n, E) that have exactly this mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=generator)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T           # covariance: identity
    return x @ torch.linalg.cholesky(covariance).T + torch.tensor(mean)


def test_frechet_distance_of_any_gaussians_uses_the_root_of_the_product():
    cov_x = torch.tensor([[2.0, 1.5], [1.5, 3.0]]).double()
    cov_y = torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    product = cov_x @ cov_y
    # A 2 x 2 matrix: tr √P = √(tr P + 2 √det P)
    trace_of_root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    wanted = 9 + 16 + cov_x.trace() + cov_y.trace() - 2 * trace_of_root    # ‖Δμ‖² = 25
    x, y = with_moments([1.0, 1.0], cov_x), with_moments([4.0, -3.0], cov_y, 80, 1)
    assert compare.frechet_distance(x, y) == pytest.approx(wanted.item(), abs=1e-9)
    assert compare.frechet_distance(y, x) == pytest.approx(wanted.item(), abs=1e-9)


def test_frechet_distance_of_fewer_points_than_dimensions_does_not_break():
    """Flat Gaussians on orthogonal lines: nothing overlaps, so both variances count in full."""
    x, y = torch.zeros(4, 10), torch.zeros(5, 10)
    x[:, 0], y[:, 1] = torch.tensor([-3.0, -1, 1, 3]), torch.tensor([-2.0, -1, 0, 1, 2])
    assert compare.frechet_distance(x, y) == pytest.approx(20 / 3 + 10 / 4)
    assert compare.frechet_distance(x, x + 2) == pytest.approx(10 * 4)


def covered_by_loops(points: Tensor, centres: Tensor, k: int) -> float:
    """1904.06991 Eq. 1, word for word."""
    hits = 0
    for point in points:
        for centre in centres:
            radius = (centres - centre).norm(dim=1).sort().values[k]
            if (point - centre).norm() <= radius:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("block", [1, 150, 2**24])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_loops_whatever_the_block(k, block, monkeypatch):
    monkeypatch.setattr(compare, "BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    y = 1.5 * torch.randn(30, 3, dtype=torch.float64, generator=generator) + 0.5
    wanted = covered_by_loops(x, y, k), covered_by_loops(y, x, k)
    assert 0 < min(wanted) and max(wanted) < 1 and wanted[0] != wanted[1]
    assert compare.precision_recall(x, y, k) == pytest.approx(wanted)


def test_equal_pictures_cover_each_other_although_batches_round_differently():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 64, generator=generator) / 8
    x[:10] = x[0]                                                          # radii of 0
    y = x + 1e-7 * torch.randn(30, 64, generator=generator)
    assert compare.precision_recall(x, x, 3) == compare.precision_recall(x, y, 3) == (1.0, 1.0)


# ---------------------------------------------------------------- the command

def run(capsys, world, *argv: object) -> tuple[int, str, str]:
    status = compare.main([*map(str, argv), "--clip", str(world / "clip.safetensors")])
    return status, *capsys.readouterr()


def number(out: str, name: str) -> float:
    return float(next(line for line in out.splitlines() if line.startswith(name)).split()[-1])


def test_a_folder_and_itself(world, capsys):
    status, out, _ = run(capsys, world, world / "images", world / "images", "--batch-size", 7)
    assert status == 0 and "CLIP score" not in out
    assert number(out, "Fréchet distance in CLIP's space") == 0
    assert number(out, "precision (k = 3)") == number(out, "recall (k = 3)") == 1


def test_caption_i_belongs_to_picture_i_counted_as_numbers(world, tmp_path, capsys):
    samples, texts = tmp_path / "samples", tmp_path / "captions.txt"
    write_pictures(samples, 12)
    for i in range(12):                                           # 2.png before 10.png
        (samples / f"{i:03d}.png").rename(samples / f"{i}.png")
    captions = [f"a {letter}" for letter in "abcdefghijkl"]
    texts.write_text("\ufeff\n" + "\n\n".join(captions), "utf-8")
    clip = clip_model.load(world / "clip.safetensors")
    pictures = [clip_model.read_image(samples / f"{i}.png") for i in range(12)]
    cosines = (clip.embed_pictures(pictures) * clip.embed_texts(captions)).sum(1)
    status, out, _ = run(capsys, world, samples, world / "images", "--k", 2, "--batch-size", 5,
                         "--captions", texts)
    assert status == 0
    assert number(out, "CLIP score") == pytest.approx(100 * np.mean(cosines.numpy()), abs=0.006)


def test_what_can_not_be_compared_is_said_in_one_sentence(world, tmp_path, capsys):
    few, one = tmp_path / "few", tmp_path / "one.txt"
    write_pictures(few, 3)
    one.write_text("a fox\n")
    for sentence, *argv in (
            ("nowhere", tmp_path / "nowhere", few),
            ("wanted more than k = 3", few, world / "images"),
            ("1 captions", world / "images", few, "--captions", one),
            ("--k", few, few, "--k", 0)):
        status, _, err = run(capsys, world, *argv)
        assert status == 2 and sentence in err and len(err.splitlines()) == 1
