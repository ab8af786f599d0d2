"""examples/train_clip.py: vocabulary, captions, batches, loss, resume, the frozen picture tower."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import train_clip
from conftest import CLIP_CONFIG, tiny_clip, write_pictures

import clip_model

F = torch.nn.functional


def test_merges_join_the_most_frequent_pair_first():
    """low ×5, lower ×2, newest ×6, widest ×3: the example of Sennrich et al., by hand."""
    captions = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    wanted = [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w")]
    assert train_clip.learn_merges(captions, 4) == wanted
    known = clip_model.Tokenizer(wanted[:2])
    assert train_clip.learn_merges(captions, 4, known) == wanted      # goes on where they end
    assert len(train_clip.learn_merges(["ab"], 50)) == 1              # nothing left to merge


def test_a_grown_vocabulary_keeps_what_it_had_and_halves_new_ones():
    old = tiny_clip()
    grown = train_clip.grow_vocabulary(old, ["xy"] * 3, 518)
    assert grown.tokenizer.merges == [*old.tokenizer.merges, ("x", "y</w>")]
    before, after = old.token_embedding.weight, grown.token_embedding.weight
    ids = grown.tokenizer.ids
    assert torch.equal(after[:515], before[:515]) and torch.equal(after[-2:], before[-2:])
    assert torch.equal(after[515], (before[ids["x"]] + before[ids["y</w>"]]) / 2)
    assert torch.equal(grown.embed_texts(["red fo"]), old.embed_texts(["red fo"]))


def test_contrastive_loss_is_clips_without_false_negatives():
    """Twins with exact captions tell each other apart, two loose captions of one concept do not."""
    logits, target = torch.randn(4, 4), torch.arange(4)
    masked, exact = logits.clone(), np.array([True, True, False, False])
    masked[2, 3] = masked[3, 2] = -torch.inf
    for concepts, seen in (("abcd", logits), ("aacd", logits), ("abcc", masked)):
        wanted = (F.cross_entropy(seen, target) + F.cross_entropy(seen.T, target)) / 2
        found = train_clip.contrastive_loss(logits, list(concepts), exact)
        assert torch.allclose(found, wanted)


def test_parts_of_like_length_give_the_same_embeddings():
    clip = tiny_clip()
    tokens = clip.tokenizer(["red", "a red fox on blue", "fo"] * 100)
    found = train_clip.embed_by_length(clip, tokens)
    assert torch.allclose(found, clip.embed_tokens(tokens), atol=1e-6)


# ---------------------------------------------------------------- captioned pictures

@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Six things, the last one in one picture alone, and a scene."""
    folder = tmp_path_factory.mktemp("captioned")
    write_pictures(folder / "images", 12)
    rows = [{"path": f"images/{i:03d}.png", "concept": f"thing {i // 2}", "background": "red",
             "style": ("flat", "outlined")[i % 2]} for i in range(12)]
    for row in rows:
        row["captions"] = [row["concept"], f"{row['style']} {row['concept']} on a red background"]
    rows[11]["parts"] = [{"concept": "thing 0", "box": [2, 2, 9, 8], "captions": ["thing 0"]}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_batches_hold_twins_with_exact_captions_and_crops(captioned):
    """A concept with one picture is no twin: as a pair it would be its own negative."""
    data = train_clip.CaptionedPictures(captioned, 16)
    for seed in range(20):
        pictures, captions, concepts, is_exact = data.batch(8, np.random.default_rng(seed))
        assert np.shape(pictures) == (8, 16, 16, 3)
        assert concepts[0] == concepts[1] and captions[0] != captions[1] and is_exact[:4].all()
        assert all("background" in caption for caption in captions[:4])
        assert "thing 5" not in concepts[:4]
    again = data.batch(8, np.random.default_rng(seed))
    assert again[1] == captions and np.array_equal(again[0], pictures)
    crop = data.crop_of(11, data.rows[11]["parts"][0], np.random.default_rng(0))
    assert crop.shape == (16, 16, 3)


def test_embedded_batches_say_the_same_of_the_pictures_own_embeddings(captioned, monkeypatch):
    monkeypatch.setattr(train_clip, "SCENES", 5)
    clip, data = tiny_clip(), train_clip.CaptionedPictures(captioned, 16)
    wanted = clip.embed_images(clip_model.to_pixels(data.shown))
    data.embed(clip, np.random.default_rng(0))
    assert torch.allclose(data.shown, wanted, atol=1e-6) and len(data.crops) == 5
    embeddings, captions, concepts, is_exact = data.batch(16, np.random.default_rng(0))
    assert is_exact.sum() == 4 and len(captions) == len(concepts) == 16
    for i in np.flatnonzero(is_exact):                   # such a caption belongs to one picture
        row = [captions[i] in row["captions"] for row in data.rows].index(True)
        assert torch.equal(embeddings[i], data.shown[row])


@pytest.mark.parametrize("line", [
    "{bad", "[]", "[" * 100_000, '{"path": "x.png"}', '{"path": "x.png", "captions": ["a"]}',
    '{"path": "x.png", "captions": [], "concept": "a"}',
    '{"path": "x.png", "captions": ["a"], "concept": null}',
    '{"path": "x.png", "captions": ["a"], "concept": "a", "parts": [1]}'])
def test_a_broken_row_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "captions.jsonl"
    path.write_text(f'{{"path": "x.png", "concept": "a", "captions": ["a"]}}\n{line}\n')
    with pytest.raises(ValueError, match="captions.jsonl line 2 "):
        train_clip.read_captions(path)
    path.write_text('{"path": "x.png", "captions": ["a"], "concept": "a", "parts": []}')
    with pytest.raises(ValueError, match="no picture of one thing"):
        train_clip.read_captions(path)


# ---------------------------------------------------------------- the loop

def run(captioned, out, steps, *more):
    """Train a tiny one through the command line; the state it leaves."""
    argv = ["--data", captioned, "--out", out, "--steps", steps, "--batch-size", 8, "--seed", 3,
            "--no-bf16", "--device", "cpu", *more]
    assert train_clip.main([str(part) for part in argv]) == 0
    return torch.load(out / "state.pt", weights_only=True)


@pytest.mark.parametrize("text_only", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(captioned, tmp_path, monkeypatch, text_only):
    """And --text-only leaves the picture tower as it was, bit for bit."""
    for name, value in (("STICKERS", CLIP_CONFIG), ("VOCABULARY", 520), ("SCENES", 5)):
        monkeypatch.setattr(train_clip, name, value)
    monkeypatch.setattr(train_clip.train, "learning_rate", lambda step, *_: 1e-3)
    start = tmp_path / "clip.safetensors"
    clip_model.save(start, tiny_clip(), {})
    more = ["--text-only", "--init", start] if text_only else []
    whole = run(captioned, tmp_path / "a", 6, *more)
    run(captioned, tmp_path / "b", 3, *more)
    resumed = run(captioned, tmp_path / "b", 6, "--resume", *more)
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in resumed[part].items())
    path = tmp_path / "b" / "clip.safetensors"
    clip = clip_model.load(path)
    assert clip.config.vocab_size == 514 + len(clip.tokenizer.merges) <= 520
    before, after = (clip_model.read_weights(each)[0] for each in (start, path))
    visual = [name for name in before if name.startswith("visual.")]
    assert all(torch.equal(after[name], before[name]) for name in visual) == text_only
    assert not torch.equal(after["text_projection"], before["text_projection"])


def test_what_is_no_start_is_said_in_a_sentence(captioned, tmp_path, monkeypatch, capsys):
    lacking = clip_model.CLIP(replace(CLIP_CONFIG))
    monkeypatch.setattr(clip_model, "load", lambda path: lacking)
    base = ["--data", str(captioned), "--out", str(tmp_path / "out")]
    for more, said in ((["--init", "x.pt"], "no vocabulary"), (["--text-only"], "--init"),
                       (["--steps", "0"], "--steps"),
                       (["--lr", "nan"], "--lr"), (["--data", str(tmp_path)], "captions.jsonl")):
        assert train_clip.main([*base, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
