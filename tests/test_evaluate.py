"""examples/evaluate.py: what the judge is asked and how its answers are counted."""

import argparse
import json
import re
from unittest.mock import Mock

import evaluate
import numpy as np
import pytest
import stickers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_stickers import drawing

NAMES = {"fox_face": ["fox face", "fox"], "a": ["a", "blood type a"], "flat_shoe": ["flat shoe"],
         "man": ["man"], "person": ["person"], "ufo": ["ufo"]}
GROUP_OF = {"fox_face": 0, "a": 1, "flat_shoe": 2, "man": 3, "person": 3, "ufo": 4}


class Fixed(torch.nn.Module):
    """A judge whose answer is written in the picture's first pixels: concept, style, background."""

    def forward(self, pictures):
        codes = (pictures[:, :, 0, 0] * 255).round().long()
        concept, style, background = (
            torch.nn.functional.one_hot(codes[:, i], n).float() for i, n in enumerate((6, 2, 10)))
        concept[:, :4] += torch.tensor([0.4, 0.3, 0.2, 0.1])
        return concept, style, background


def bench():
    return evaluate.Bench(Fixed(), GROUP_OF, NAMES, "")


@pytest.mark.parametrize("prompt, wanted", [
    ("fox", ({0}, None, None)), ("a fox face on an orange background", ({0}, None, "orange")),
    ("outlined fox on a red background", ({0}, "outlined", "red")), ("a", ({1}, None, None)),
    ("flat shoe", ({2}, None, None)), ("flat flat shoe", ({2}, "flat", None)),
    ("Person", ({3}, None, None))])
def test_prompts_are_parsed_into_concept_style_and_colour(prompt, wanted):
    assert bench().parse(prompt) == wanted


def test_shares_count_only_what_a_prompt_names():
    pictures = [Image.new("RGB", (64, 64), code) for code in ((0, 1, 2), (3, 0, 2), (5, 1, 0))]
    prompts = ["outlined fox on a red background", "fox on a blue background", "outlined ufo"]
    assert bench().hits(pictures, prompts) == {
        "top1": [True, False, False], "top5": [True, True, False],
        "style": [True, True], "both": [True, False], "background": [True, False]}


def test_an_interval_narrows_with_the_root_of_n():
    for n in (50, 5000):
        share, low, high = map(float, re.findall(r"[\d.]+", evaluate.interval([True, False] * n)))
        assert share == 50 and high - low == pytest.approx(2 * 1.96 * 50 / (2 * n) ** 0.5, rel=0.25)


def test_near_identical_drawings_join_and_others_stay_apart():
    drawings = [drawing("one", colour=(200, 10, 10)), drawing("same", colour=(202, 10, 10)),
                drawing("other", colour=(10, 10, 200))]
    groups = evaluate.merge_near_identical(drawings, stickers.render)
    assert groups["one"] == groups["same"] != groups["other"]


def test_the_judge_can_learn():
    """Four plain inks, eighty steps: it must tell them apart on fresh shifts and colours."""
    torch.manual_seed(0)
    inks = torch.zeros(4, 4, 64, 64)
    for i, (top, left) in enumerate(((8, 8), (8, 36), (36, 8), (36, 36))):
        inks[i, :, 20:44, 20:44] = 1
        inks[i, :, top:top + 20, left:left + 20] = torch.tensor([0.0, 0, 0, 1])[:, None, None]
    colours = torch.rand(10, 3, generator=torch.Generator().manual_seed(1))
    judge = evaluate.Judge(evaluate.JudgeConfig(4, width=8))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    for step in range(81):
        x, which, background = evaluate.judge_batch(
            inks, colours, 48 if step < 80 else 200, torch.Generator().manual_seed(step))
        concept, _, colour = judge.train(step < 80)(x)
        loss = sum(map(torch.nn.functional.cross_entropy, (concept, colour), (which, background)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert x.min() >= 0 and x.max() <= 1
    assert (concept.argmax(1) == which).float().mean() > 0.8
    assert (colour.argmax(1) == background).float().mean() > 0.6


def test_prompts_leave_out_flags_and_the_held_out_corner_and_seen_pairs(tmp_path):
    def row(folder, concept, category, background="white"):
        return {"path": f"{folder}/{concept}-0.png", "concept": concept, "category": category,
                "background": background, "captions": [concept]}

    seen = [c for c in evaluate.BACKGROUNDS if c != "pink"]
    rows = [row("images/flat", "es", "Flags"), row("images/flat", "fox", "Animals"),
            row("heldout/outlined", "fox", "Animals")]
    rows += [row("images/flat", "car", "Travel", colour) for colour in seen]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {concept: [f"the {concept}"] for concept in ("es", "car", "fox")}
    inside = evaluate.pick_prompts(tmp_path, names, 9, 0)
    assert inside == evaluate.pick_prompts(tmp_path, names, 9, 0) and len(inside) == 1
    assert inside[0].startswith("the car on a") and inside[0].endswith(" background")
    assert evaluate.pick_prompts(tmp_path, names, 9, 0, held_out=True)[0].startswith(
        "outlined the fox on a")
    assert evaluate.pick_prompts(tmp_path, names, 9, 0, unseen=True) == [
        "the car on a pink background"]


def test_two_indexes_are_searched_as_one():
    rows = np.eye(4, dtype=np.float16)
    one, two = (argparse.Namespace(rows=part, paths=names)
                for part, names in ((rows[:3], ["a", "b", "c"]), (rows[3:], ["d"])))
    both = evaluate.Union(one, two)
    scores, ids = both.search(torch.tensor([[0, 0.6, 0, 0.8]]), 2)
    assert [both.paths[i] for i in ids[0]] == ["d", "b"] and scores[0].tolist() == [
        pytest.approx(0.8), pytest.approx(0.6)]


def test_a_maker_hands_on_what_it_is_asked_for(monkeypatch):
    neighbors, draw = torch.arange(6.0).view(2, 1, 3), Mock(return_value=torch.zeros(2, 3, 8, 8))
    monkeypatch.setattr(evaluate.sample, "condition_on", lambda *_: ("q", neighbors, None, None))
    monkeypatch.setattr(evaluate.sample, "draw", draw)
    args = argparse.Namespace(seed=4, steps=7, guidance=3.0, sampler="ddim")
    evaluate.Maker("model", Mock(), None, None).draw(["a", "b"], args, others=True, next_seed=True)
    _, _, found, seeds, *_ = draw.call_args.args
    assert torch.equal(found, neighbors[[1, 0]]) and seeds == [5, 5]
    assert draw.call_args.kwargs == {"steps": 7, "guidance": 3.0, "sampler": "ddim"}


def test_tokens_are_measured_on_kept_out_drawings_of_both_styles(tmp_path, monkeypatch, capsys):
    """Every tenth drawing of either style; a codec that makes all grey has a PSNR known by hand."""
    for style, value in (("flat", 255), ("outlined", 0)):
        (tmp_path / "images" / style).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "images" / style / f"d{i}-0.png")
    codec = argparse.Namespace(
        config=evaluate.vqvae.VQVAEConfig(image_size=8, multipliers=(1,), n_codes=4),
        encode=lambda x: (x[:, 0, ::8, ::8] > 0).long().flatten(1),        # one token: 1 or 0
        decode=lambda tokens, height: torch.zeros(len(tokens), 3, 8, 8))
    monkeypatch.setattr(evaluate.vqvae, "load", lambda path: (codec, {}))
    assert evaluate.main(["vqvae", "--data", str(tmp_path)]) == 0
    flat, outlined, both = capsys.readouterr().out.splitlines()[:3]
    assert "flat: " in flat and "2 pictures" in flat and "2 pictures" in outlined
    assert "6.02 dB on 4 pictures, 2 of 4 codes used, perplexity 2" in both     # 20 log10 (2/1)


@pytest.mark.parametrize("argv", [["train-judge", "--steps", "10"], ["table", "--steps", "0"],
                                  ["judge"], ["table", "--judge", "missing.safetensors"]])
def test_bad_input_gives_one_sentence_and_status_2(argv, capsys):
    assert evaluate.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="no sticker called 'wolpertinger'"):
        bench().parse("a wolpertinger on a red background")


def test_roughened_pictures_stay_in_range_and_a_third_stays_sharp():
    """Of a checkerboard blur takes the contrast, light and grain little of it."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    pictures = board.float().expand(300, 3, 32, 32) * 0.6 + 0.2
    found = evaluate.roughened(pictures, torch.Generator().manual_seed(0))
    assert found.min() >= 0 and found.max() <= 1 and not torch.equal(found[0], found[1])
    contrast = (found[..., board == 1].mean((1, 2)) - found[..., board == 0].mean((1, 2))) / 0.6
    assert 0.25 < (contrast > 0.9).float().mean() < 0.45
    assert (contrast < 0.5).float().mean() > 0.3


def test_a_folder_is_judged_by_its_pictures_own_prompts_or_by_a_list(tmp_path, capsys):
    """The same prompt twice is two prompts; a picture that says nothing needs the list."""
    def judged(*more):
        status = evaluate.main(["judge", "--singles", str(tmp_path), *map(str, more)])
        return status, *capsys.readouterr()

    info, texts = PngInfo(), tmp_path / "list.txt"
    info.add_itxt("parameters", json.dumps({"prompt": "a red heart"}))
    for number in range(2):
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"00{number}-00.png", pnginfo=info)
    status, out, _ = judged()
    assert status == 0 and "n = 2:" in out
    Image.new("RGB", (64, 64), "red").save(tmp_path / "001-00.png")
    assert judged()[0] == 2
    for lines, wanted in (("a red heart\nrocket\n", 0), ("rocket\na red heart\n", 2)):
        texts.write_text(lines)
        assert judged("--prompts", texts)[0] == wanted
