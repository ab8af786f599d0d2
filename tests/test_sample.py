"""sample.py: the command from a prompt to files."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_clip, tiny_unet, tiny_vqvae, unit
from PIL import Image

import clip_model
import index as retrieval
import knn_diffusion
import sample


def run(world, *extra):
    """The command with the tiny world's files, where nothing else is named; its status."""
    argv = list(map(str, extra))
    defaults = {"--weights": world / "continuous.safetensors", "--steps": 3,
                "--clip": world / "clip.safetensors", "--index": world / "index"}
    for flag, value in defaults.items():
        argv += [] if flag in argv else [flag, str(value)]
    return sample.main(argv)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_prompt_gives_a_grid_singles_and_neighbours(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffblue\r\n\r\n  fox \r\n", "utf-8")
    assert run(world, "a red fox", "--prompts", tmp_path / "prompts.txt", "--n", 2, "--k", 4,
               "--out", tmp_path / "p.png", "--singles", tmp_path / "s", "--save-neighbors") == 0
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == [f"{i:03d}-{j:02d}.png" for i in range(3) for j in range(2)]
    assert Image.open(tmp_path / "s" / "000-00.png").size == (16, 16)
    lines = [json.loads(x) for x in (tmp_path / "p.neighbors.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[4]["prompt"] == "blue" and lines[4]["rank"] == 1
    assert set(lines[0]) == {"prompt", "rank", "row", "score", "path"}
    told = json.loads(Image.open(tmp_path / "p.png").text["parameters"])
    assert told["prompts"] == ["a red fox", "blue", "fox"] and told["seed"] == 0
    assert told["weights"] == "continuous.safetensors"             # and no folder of this machine
    own = json.loads(Image.open(tmp_path / "s" / "001-01.png").text["parameters"])
    assert own["prompt"] == "blue" and own["seed"] == 3
    sheet = Image.open(tmp_path / "p.png")                         # four neighbours, two samples
    assert sheet.size == (6 * 98 + 2, 3 * (96 + 26) + 2)


def test_every_option_reaches_the_sampler(world, tmp_path):
    """Each makes another picture of the same prompt and seed."""
    def pixels_of(*options):
        name = "-".join(map(str, options)) or "base"
        assert run(world, "fox", *options, "--n", 1, "--singles", tmp_path / name,
                   "--out", tmp_path / "p.png", *([] if "--k" in options else ["--k", 3])) == 0
        return pixels(tmp_path / name / "000-00.png")

    base = pixels_of()
    for options in (["--guidance", 5], ["--sampler", "ddpm"], ["--sampler", "ddim"],
                    ["--query", "nearest"], ["--condition", "neighbors"], ["--k", 9],
                    ["--condition", "query"], ["--seed", 1], ["--steps", 4]):
        assert (pixels_of(*options) != base).any(), options
    assert (pixels_of("--k", 0) == pixels_of("--condition", "query")).all()


def test_picture_m_of_a_run_of_singles_depends_on_seed_plus_m_alone(world, tmp_path):
    out = ["--out", tmp_path / "p.png"]
    assert run(world, "fox", "red", "--n", 3, "--singles", tmp_path / "a", *out) == 0
    assert run(world, "red", "--n", 2, "--seed", 4, "--batch-size", 1,
               "--singles", tmp_path / "b", *out) == 0
    first, *a = (pixels(tmp_path / f"a/001-{j:02d}.png") for j in range(3))
    b = [pixels(tmp_path / f"b/000-{j:02d}.png") for j in range(2)]
    assert np.abs(np.subtract(a, b)).max() <= 2 < np.abs(first - a[0]).max()


def test_without_singles_sample_j_of_every_prompt_uses_seed_plus_j(world, tmp_path, monkeypatch):
    asked, draw = [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda model, query, neighbors, seeds, *rest, **options: (
        asked.extend(seeds), draw(model, query, neighbors, seeds, *rest, **options))[1])
    assert run(world, "a", "b", "--n", 3, "--seed", 7, "--batch-size", 4,
               "--out", tmp_path / "p.png") == 0
    assert asked == [7, 8, 9, 7, 8, 9]


def test_a_killed_run_of_singles_goes_on_and_equals_an_undisturbed_one(
        world, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("".join(f"fox {i}\n" for i in range(101)))
    argv = ["--prompts", tmp_path / "prompts.txt", "--n", 1, "--batch-size", 20, "--steps", 1,
            "--out", tmp_path / "p.png"]
    assert run(world, *argv, "--singles", tmp_path / "whole") == 0
    drawn, draw = [], sample.draw

    def killed(model, query, neighbors, seeds, *rest, **options):
        drawn.append(seeds[0])
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return draw(model, query, neighbors, seeds, *rest, **options)

    monkeypatch.setattr(sample, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, *argv, "--singles", tmp_path / "parts")
    (tmp_path / "parts" / "059-00.png").unlink()                   # killed between two files
    assert run(world, *argv, "--singles", tmp_path / "parts") == 0
    assert drawn == [0, 20, 40, 60, 40, 60, 80, 100]
    whole, parts = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                    for name in ("whole", "parts"))
    assert whole == parts and len(parts) == 101
    assert not (tmp_path / "p.png").exists()                       # no grid of 101 rows


def test_the_same_command_gives_the_same_bytes_whether_singles_are_drawn_or_there(
        world, tmp_path, monkeypatch):
    def drawn(singles, out):
        assert run(world, "fox", "red", "--n", 2, "--singles", tmp_path / singles,
                   "--out", tmp_path / out) == 0

    drawn("a", "a.png")
    drawn("b", "b.png")
    monkeypatch.setattr(sample, "draw", None)                      # nothing is drawn again
    drawn("a", "c.png")
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abc"}) == 1


def test_the_condition_is_the_texts_embedding_and_its_neighbours(world):
    clip = clip_model.load(world / "clip.safetensors")
    index = retrieval.open_index(world / "index")
    queries, rows = clip.embed_texts(["red fox"]), torch.from_numpy(np.array(index.rows)).float()
    query, neighbors, _, ids = sample.condition_on(queries, index, 4)      # the paper's way
    nearest = (rows @ queries[0]).argsort(descending=True)[:4]
    assert torch.equal(query, queries) and ids[0].tolist() == nearest.tolist()
    assert torch.equal(neighbors[0], rows[nearest])
    # or, with the same neighbours, the best of them in the text's place
    stand_in, same, _, _ = sample.condition_on(queries, index, 4, "both", "nearest")
    assert torch.equal(stand_in, neighbors[:, 0]) and torch.equal(same, neighbors)
    for way in ("text", "nearest"):
        alone, none, _, _ = sample.condition_on(queries, index, 4, "query", way)
        assert none is None and torch.equal(alone, queries)
        assert torch.equal(sample.condition_on(queries, index, 0, "both", way)[0], queries)
        assert sample.condition_on(queries, index, 4, "neighbors", way)[0] is None


def test_one_condition_serves_many_seeds(world):
    """In a notebook: one text, four seeds; equal to four equal texts."""
    index, model = retrieval.open_index(world / "index"), tiny_unet()
    query, neighbors, _, _ = sample.condition_on(torch.ones(1, 16), index, 3)
    seeds = [0, 1, 2, 3]
    wanted = sample.draw(model, query.repeat(4, 1), neighbors.repeat(4, 1, 1), seeds, steps=2)
    found = sample.draw(model, query, neighbors, seeds, steps=2)
    assert torch.allclose(found, wanted, atol=1e-5) and found.shape == (4, 3, 16, 16)
    parts = sample.draw(model, query, neighbors, seeds, batch_size=3, steps=2)
    assert torch.allclose(parts, wanted, atol=1e-5)
    torch.nn.init.constant_(model.conv_in.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample.draw(model, query, neighbors, seeds, steps=2)


def test_another_index_changes_the_picture_even_one_without_names(world, tmp_path):
    """Embeddings that came without a paths.txt: row numbers stand for names."""
    np.save(tmp_path / "rows.npy", unit(6, 16).numpy())
    retrieval.index_files(tmp_path / "nameless", tmp_path / "rows.npy")
    argv = ["fox", "--n", 1, "--k", 6, "--save-neighbors", "--out", tmp_path / "p.png"]
    assert run(world, *argv, "--singles", tmp_path / "a") == 0
    with pytest.warns(UserWarning, match="which encoder"):
        assert run(world, *argv, "--singles", tmp_path / "b", "--index", tmp_path / "nameless") == 0
    one, two = (pixels(tmp_path / name / "000-00.png") for name in "ab")
    assert (one != two).any()
    first = json.loads((tmp_path / "p.neighbors.jsonl").read_text().splitlines()[0])
    assert first["path"] == str(first["row"])


def test_a_no_knn_model_is_shown_what_it_was_trained_with(world, tmp_path, capsys):
    clip = clip_model.load(world / "clip.safetensors").fingerprint()
    clip_model.save_model(tmp_path / "no-knn", tiny_unet(), {"clip": clip, "condition": "query"})
    assert run(world, "fox", "--weights", tmp_path / "no-knn", "--out", tmp_path / "g.png") == 0
    assert "condition query" in capsys.readouterr().out


def test_what_a_user_should_know_is_said(world, tmp_path, capsys, monkeypatch):
    encoder = clip_model.load(world / "clip.safetensors").fingerprint()
    monkeypatch.setattr(sample, "NEAR", {encoder: 2.0})
    with pytest.warns(UserWarning, match="was cut to 12"):
        assert run(world, "fox " * 25, "--k", 99, "--n", 1, "--out", tmp_path / "g.png") == 0
    error = capsys.readouterr().err
    assert "the index has 20 rows" in error and "is near nothing" in error
    monkeypatch.setattr(sample, "NEAR", {encoder: -2.0})
    assert run(world, "fox", "--n", 1, "--out", tmp_path / "g.png") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("extra", [
    ["  "], [], ["fox", "--k", -1], ["fox", "--n", 0], ["fox", "--steps", 0],
    ["fox", "--steps", 101], ["fox", "--guidance", "nan"], ["fox", "--weights", "nowhere"],
    ["fox", "--clip", "nowhere"], ["fox", "--index", "nowhere"], ["fox", "--prompts", "nowhere"],
    ["fox", "--seed", -1], ["fox", "--k", 0, "--condition", "neighbors"],
    ["fox", "--k", 0, "--query", "nearest"], ["fox", "--truncation", 0.9],
    ["fox", "--condition", "query", "--query", "nearest"], ["fox", "--sampler", "euler"],
    ["fox", "--out", "picture.jpg"], ["fox", "--singles", "FILE"], ["fox", "--device", "abacus"],
    ["fox", "--backbone", "discrete"], ["fox", "--batch-size", 0],
    ["--prompts", "FILE", "--out", "FILE"]])
def test_user_mistakes_give_status_2_and_write_nothing(world, tmp_path, capsys, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    Path("file.png").write_text("a fox")
    extra = ["file.png" if part == "FILE" else part for part in extra]
    assert run(world, *extra) == 2
    error = capsys.readouterr().err.strip()
    assert error and "Traceback" not in error and len(error.splitlines()) == 1
    assert Path("file.png").read_text() == "a fox" and len(list(tmp_path.iterdir())) == 1


def test_weights_clip_and_index_must_belong_together(world, tmp_path, capsys):
    clip_model.save(tmp_path / "other-clip", tiny_clip(seed=4), {})
    clip_model.save_model(tmp_path / "any", tiny_unet(), {})
    (tmp_path / "damaged").write_bytes((world / "continuous.safetensors").read_bytes()[:-9])
    for extra, words in (
        (["--clip", tmp_path / "other-clip"], "was trained with the CLIP"),
        (["--clip", tmp_path / "other-clip", "--weights", tmp_path / "any"],
         "was made by encoder some clip"),
        (["--weights", tmp_path / "damaged"], "damaged"),
        (["--weights", world / "clip.safetensors"], "holds a CLIP, wanted UNet")):
        assert run(world, "fox", "--out", tmp_path / "g.png", *extra) == 2
        assert words in capsys.readouterr().err


# ---------------------------------------------------------------- the discrete backbone

def run_discrete(world, *extra):
    vae = [] if "--vqvae" in extra else ["--vqvae", world / "vqvae.safetensors"]
    return run(world, "a fox", "--n", 2, "--weights", world / "discrete.safetensors", *vae, *extra)


def test_discrete_weights_draw_pictures_through_the_vqvae(world, tmp_path):
    for name, batch in (("a", 2), ("b", 1)):
        assert run_discrete(world, "--steps", 4, "--batch-size", batch,
                            "--out", tmp_path / f"{name}.png", "--singles", tmp_path / name) == 0
    one, two = (pixels(tmp_path / name / "000-01.png") for name in "ab")
    assert one.shape == (16, 16, 3) and one.std() > 5
    assert np.abs(one - two).max() <= 2                              # the seed rule holds here too
    assert np.abs(one - pixels(tmp_path / "a" / "000-00.png")).max() > 5
    settings = json.loads(Image.open(tmp_path / "a.png").info["parameters"])
    assert (settings["sampler"], settings["steps"]) == ("ancestral", 4)
    assert run_discrete(world, "--steps", 4, "--truncation", 0.05, "--sampler", "ancestral",
                        "--singles", tmp_path / "c", "--out", tmp_path / "c.png") == 0
    assert (pixels(tmp_path / "c" / "000-01.png") != one).any()


def test_the_commands_defaults_are_the_functions(world):
    """Else the figures of evaluate.py, which calls the functions, were not sample.py's."""
    for backbone, function in (("discrete", knn_diffusion.sample_tokens),
                               ("continuous", knn_diffusion.sample)):
        defaults = inspect.signature(function).parameters
        for option in set(sample.OPTIONS[backbone]) - ({"sampler"} - set(defaults)):
            assert sample.OPTIONS[backbone][option] == defaults[option].default, option


@pytest.mark.parametrize("extra, word", [
    (["--backbone", "continuous"], "is discrete"), (["--sampler", "ddim"], "ancestral"),
    (["--truncation", "1.5"], "truncation"), (["--steps", "11"], "1 to 10"),
    (["--vqvae", "other"], "VQ-VAE"), (["--vqvae", "none"], "no weights")])
def test_discrete_contradictions_are_refused(world, tmp_path, capsys, extra, word):
    clip_model.save_model(tmp_path / "other", tiny_vqvae(1), {})
    extra = [tmp_path / part if part in ("other", "none") else part for part in extra]
    assert run_discrete(world, *extra, "--out", tmp_path / "p.png") == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "p.png").exists()
