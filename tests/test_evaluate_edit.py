"""examples/evaluate_edit.py: what counts as changed, kept and done."""

import argparse
import math

import evaluate_edit
import numpy as np
import pytest
import stickers
import torch
from evaluate import Bench
from PIL import Image
from test_stickers import many_drawings

import clip_model
import edit
import knn_diffusion
import sample


def two():
    before = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return before, before.clone()


def test_the_changed_window_is_the_one_with_the_largest_summed_difference():
    before, after = two()
    after[0, :, 20:52, 7:39] += 0.1
    after[1] += 0.01 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(1))
    after[1, 0, 63, 63] += 5                                        # one strong pixel in a corner
    after[2, :, :, 5] += 0.2                                        # a column: every such window
    corners = evaluate_edit.changed_window(before, after).tolist()
    assert corners == [[7, 20], [32, 32], [0, 0], [0, 0]]           # ties: the first


def test_kept_is_the_psnr_outside_and_identical_pictures_fail():
    before, after = two()
    after[0, :, 16:48, 16:48] = 0                                   # inside the window only
    after[1, :, 16:48, 16:48] += 3
    after[1, :, :4] += 0.1                                          # 256 pixels a channel outside
    after[3] += 0.05                                                # everywhere the same
    psnr, error = evaluate_edit.kept(before, after), 256 * 0.1**2 / (64 * 64 - 32 * 32)
    assert psnr[0] == math.inf and psnr[2] == -math.inf
    assert math.isclose(psnr[1], -10 * math.log10(error), rel_tol=1e-4)
    assert math.isclose(psnr[3], -20 * math.log10(0.05), rel_tol=1e-4)


class Reads(torch.nn.Module):
    """A judge that answers with the number written in a window's red channel."""

    def forward(self, pictures):
        numbers = (pictures[:, 0].flatten(1).median(1).values * 255).round().long()
        return (torch.nn.functional.one_hot(numbers, 3).float(),)


def test_done_wants_the_named_thing_in_the_window_and_a_change():
    bench = Bench(Reads(), {"heart": 0, "bell": 1, evaluate_edit.NOTHING: 2},
                  {"heart": ["red heart"], "bell": ["bell"]}, "")
    before = torch.full((4, 3, 64, 64), 2 / 255)
    after = before.clone()
    after[0, 0, 10:42, 20:52] = 0                                   # a heart, as asked for
    after[1, 0, 10:42, 20:52] = 1 / 255                                 # a bell instead
    after[2, 1, 10:42, 20:52] = 1                                   # a change, nothing in it
    before[3], after[3] = 0, 0                                      # a heart, but there before
    psnr, done = evaluate_edit.measure(bench, before, after, ["a red heart"] * 4)
    assert done.tolist() == [True, False, False, False]
    assert psnr[0] == math.inf and psnr[3] == -math.inf


def test_windows_hold_the_small_sticker():
    boxes = torch.tensor([[0, 0, 22, 25], [40, 20, 63, 40], [20, 20, 44, 40], [3, 4, 60, 60]])
    is_small = torch.tensor([True, True, True, False])
    corners = torch.stack([evaluate_edit.random_windows(
        boxes, is_small, torch.Generator().manual_seed(seed)) for seed in range(300)])
    assert (corners >= 0).all() and (corners <= 32).all()
    for axis in range(2):
        first, last = corners[:, :3, axis], corners[:, :3, axis] + 32
        assert (first <= boxes[:3, axis] + 3).all() and (last >= boxes[:3, axis + 2] - 3).all()
    assert corners[:, 3].min() == 0 and corners[:, 3].max() == 32   # nothing small: anywhere
    assert len(corners[:, 2].unique(dim=0)) > 30
    picture = torch.arange(64.0).expand(1, 1, 64, 64)
    shown = evaluate_edit.windows(picture, torch.tensor([[10, 3]]))
    assert shown.shape == (1, 1, 64, 64) and abs(shown.mean().item() - 25.5) < 1e-4


def test_the_strength_with_a_kept_lies_between_the_measured_ones():
    found = {0.2: 30.0, 0.4: 24.0, 0.6: 18.0}
    assert math.isclose(evaluate_edit.with_kept(found, 27.0), 0.3)
    assert evaluate_edit.with_kept(found, 99.0) == 0.2
    assert evaluate_edit.with_kept(found, 1.0) == 0.6


def test_pairs_are_kept_apart_and_the_wanted_picture_shows_both(monkeypatch):
    props, big = many_drawings()
    monkeypatch.setattr(stickers, "all_drawings", lambda: ([*props, *big], {}))
    pictures, texts, wanted = evaluate_edit.edit_pairs(10, 0)
    assert len(pictures) == len(texts) == len(wanted) == 10
    assert evaluate_edit.edit_pairs(10, 0)[1] == texts          # the seed alone decides
    # a prop's own picture is asked for nothing: as a small one it may stand beside any other
    apart = [(b.concept, s.concept) for b in big for s in props
             if stickers.is_kept_apart(b.concept, s.concept)]
    assert len(evaluate_edit.edit_pairs(1000, 0)[1]) == len(apart)
    for before, after in zip(pictures, wanted):
        assert before.size == (64, 64) and before.tobytes() != after.tobytes()
    kept = evaluate_edit.kept(evaluate_edit.to_unit(pictures), evaluate_edit.to_unit(wanted))
    assert (kept == math.inf).all()                                 # a small one fits a window


def test_an_older_rendering_is_refused(tmp_path):
    big, small = next((b, s) for b in ("fox", "cat", "dog", "cow", "owl") for s in stickers.PROPS
                      if stickers.is_kept_apart(b, s))
    row = '{"path": "scenes/0.png", "parts": [{"concept": "%s"}, {"concept": "%s"}]}\n'
    (tmp_path / "captions.jsonl").write_text(row % (small, "none") + row % (big, small))
    with pytest.raises(ValueError, match=f"a scene of {big}"):
        evaluate_edit.check_kept_apart(tmp_path)


@pytest.mark.parametrize("argv", [["--n", "0"], ["--strengths", "0.019"], ["--data", "missing"]])
def test_bad_input_gives_one_sentence_and_status_2(argv, capsys, tmp_path):
    (tmp_path / "captions.jsonl").write_text("")
    assert evaluate_edit.main(["table", "--data", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (argv[0] in error or argv[1] in error)


def test_the_results_measured_are_the_command_s_own(world, tmp_path, monkeypatch):
    """`edited` draws what edit.py --singles writes, and the baseline starts where its strength
    says, with the same guidance and query."""
    files = world / "edit.safetensors", world / "clip.safetensors", world / "index"
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    argv = [tmp_path / "picture.png", "a crown", "--weights", files[0], "--clip", files[1],
            "--index", files[2], "--n", 1, "--seed", 3, "--steps", 4, "--k", 3,
            "--singles", tmp_path / "s", "--out", tmp_path / "out.png"]
    assert edit.main(list(map(str, argv))) == 0
    written = Image.open(tmp_path / "s" / "000-00.png")
    args = argparse.Namespace(seed=3, steps=4, k=3, query="text", guidance_text=2.0,
                              guidance_image=1.0)
    model, _, clip, index, _ = sample.open_all(*files)
    maker, size = evaluate_edit.Maker(model, clip, index, None), model.config.image_size
    monkeypatch.setattr(evaluate_edit, "to_unit", lambda pictures: torch.stack([
        torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in pictures]))  # 16 px
    [found] = evaluate_edit.edited(maker, [clip_model.fit_square(picture, size)], ["a crown"], args)
    assert found.tobytes() == written.tobytes()

    asked, draw = [], knn_diffusion.sample
    monkeypatch.setattr(knn_diffusion, "sample", lambda *given, **options: (
        asked.append((given[1], options)), draw(*given, **{**options, "steps": 2}))[1])
    monkeypatch.setattr(evaluate_edit, "BASELINE_STEPS", 2)
    args.guidance_text = 3.0
    maker.model = knn_diffusion.load(world / "continuous.safetensors")[0]
    evaluate_edit.noise_and_denoise(maker, [clip_model.fit_square(picture, size)], ["a crown"], 0.5,
                                    args)
    [(query, options)] = asked
    assert torch.equal(query, maker.clip.embed_texts(["a crown"]))
    assert options["guidance"] == 3.0 and options["start_at"] == 0.5 and options["steps"] == 2
