"""sample.py: the command from a prompt to files."""

import argparse
import inspect
import json

import numpy as np
import pytest
import torch
from conftest import randomised, tiny_clip, tiny_unet, write_pictures
from PIL import Image

import clip_model
import index as retrieval
import knn_diffusion
import sample
import vqvae


def run(world, *extra):
    return sample.main(
        [
            *map(str, extra),
            "--weights",
            str(world / "continuous.safetensors"),
            "--clip",
            str(world / "clip.safetensors"),
            "--steps",
            "3",
        ]
        + ([] if "--index" in extra else ["--index", str(world / "index")])
    )


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_prompt_gives_a_grid_singles_and_neighbours(world, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("blue\n\n  fox \n")
    assert (
        run(
            world,
            "a red fox",
            "--prompts",
            tmp_path / "prompts.txt",
            "--n",
            2,
            "--k",
            4,
            "--out",
            tmp_path / "p.png",
            "--singles",
            tmp_path / "s",
            "--save-neighbors",
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        f"{i:03d}-{j:02d}.png" for i in range(3) for j in range(2)
    ]
    assert Image.open(tmp_path / "s" / "000-00.png").size == (16, 16)
    lines = [json.loads(x) for x in (tmp_path / "p.neighbors.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[4]["prompt"] == "blue" and lines[4]["rank"] == 1
    assert set(lines[0]) == {"prompt", "rank", "row", "score", "path"}
    parameters = json.loads(Image.open(tmp_path / "p.png").text["parameters"])
    assert parameters["prompts"] == ["a red fox", "blue", "fox"] and parameters["seed"] == 0
    assert "k = 4" in capsys.readouterr().out


def test_every_option_reaches_the_sampler(world, tmp_path):
    """Each makes another picture of the same prompt and seed."""
    def pixels_of(*options):
        assert run(world, *options, "--n", 1, "--k", 3, "--singles", tmp_path / "s",
                   "--out", tmp_path / "p.png") == 0
        return pixels(tmp_path / "s" / "000-00.png")

    base = pixels_of("fox")
    assert (pixels_of("fox") == base).all()
    for options in (["--guidance", 5], ["--sampler", "ddpm"], ["--sampler", "ddim"],
                    ["--dynamic-threshold", 1], ["--query", "text"],
                    ["--condition", "neighbors"], ["--condition", "query"], ["--seed", 1]):
        assert (pixels_of("fox", *options) != base).any(), options
    noisy = pixels_of("fox", "--sampler", "ddim", "--eta", 1)
    assert (noisy != pixels_of("fox", "--sampler", "ddim")).any()
    picture = next((world / "images").rglob("*.png"))
    assert (pixels_of("--image", picture) == pixels_of("--image", picture, "--query", "text")).all()


def test_an_index_without_names_draws_too(world, tmp_path):
    """Embeddings that came without a paths.txt: row numbers stand for names."""
    index = retrieval.open_index(world / "index")
    np.save(tmp_path / "rows.npy", np.asarray(index.embeddings))
    retrieval.index_files(tmp_path / "nameless", tmp_path / "rows.npy")
    with pytest.warns(UserWarning, match="which encoder"):
        assert run(world, "fox", "--index", tmp_path / "nameless", "--k", 2, "--save-neighbors",
                   "--out", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").is_file()
    first = json.loads((tmp_path / "p.neighbors.jsonl").read_text().splitlines()[0])
    assert first["path"] == first["row"]


def test_the_same_command_gives_the_same_bytes(world, tmp_path):
    for name in ("a.png", "b.png"):
        assert run(world, "fox", "--out", tmp_path / name) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_sample_j_depends_on_seed_plus_j_alone(world, tmp_path):
    assert (
        run(world, "fox", "red", "--n", 3, "--singles", tmp_path / "a", "--out", tmp_path / "a.png")
        == 0
    )
    assert (
        run(
            world,
            "red",
            "--n",
            2,
            "--seed",
            1,
            "--batch-size",
            1,
            "--singles",
            tmp_path / "b",
            "--out",
            tmp_path / "b.png",
        )
        == 0
    )
    for j in range(2):
        one, two = (
            pixels(tmp_path / f"a/001-{j + 1:02d}.png"),
            pixels(tmp_path / f"b/000-{j:02d}.png"),
        )
        assert np.abs(one - two).max() <= 2
    assert np.abs(pixels(tmp_path / "a/001-00.png") - pixels(tmp_path / "a/001-01.png")).max() > 2


def test_the_condition_is_the_texts_embedding_and_its_neighbours(world):
    clip = clip_model.load(world / "clip.safetensors")
    index = retrieval.open_index(world / "index")
    queries = clip.embed_texts(["red fox"])
    query, neighbors, scores, ids = sample.condition_on(queries, index, 4, "both", "text")
    nearest = (torch.from_numpy(index.embeddings.astype(np.float32)) @ queries[0]).argsort(
        descending=True
    )[:4]
    assert torch.equal(query, queries) and ids[0].tolist() == nearest.tolist()
    assert torch.equal(neighbors[0], torch.from_numpy(index.embeddings[nearest]).float())
    # or, with the same neighbours, the best of them in the text's place
    stand_in, same, _, _ = sample.condition_on(queries, index, 4, "both", "nearest")
    assert torch.equal(stand_in, neighbors[:, 0]) and torch.equal(same, neighbors)
    for way in ("text", "nearest"):
        alone, none, _, _ = sample.condition_on(queries, index, 4, "query", way)
        assert none is None and torch.equal(alone, queries)
        assert torch.equal(sample.condition_on(queries, index, 0, "both", way)[0], queries)
        assert sample.condition_on(queries, index, 4, "neighbors", way)[0] is None


def test_no_neighbours_is_the_same_as_condition_query(world, tmp_path):
    for name, extra in (("a", ["--k", 0]), ("b", ["--condition", "query"])):
        assert (
            run(
                world,
                "fox",
                "--n",
                1,
                *extra,
                "--singles",
                tmp_path / name,
                "--out",
                tmp_path / "g.png",
            )
            == 0
        )
    assert (pixels(tmp_path / "a/000-00.png") == pixels(tmp_path / "b/000-00.png")).all()
    assert (
        run(world, "fox", "--n", 1, "--singles", tmp_path / "c", "--out", tmp_path / "g.png") == 0
    )
    assert (pixels(tmp_path / "a/000-00.png") != pixels(tmp_path / "c/000-00.png")).any()


def test_another_index_changes_the_picture_with_the_same_weights(world, tmp_path):
    write_pictures(tmp_path / "other", 6, seed=9)
    clip = clip_model.load(world / "clip.safetensors")
    rows, names, _ = retrieval.embed_folder(clip, tmp_path / "other")
    retrieval.write_index(
        tmp_path / "idx", rows, names, "c", clip.fingerprint(), tmp_path / "other"
    )
    assert (
        run(world, "fox", "--n", 1, "--singles", tmp_path / "a", "--out", tmp_path / "g.png") == 0
    )
    assert (
        run(
            world,
            "fox",
            "--n",
            1,
            "--index",
            tmp_path / "idx",
            "--k",
            99,
            "--singles",
            tmp_path / "b",
            "--out",
            tmp_path / "g.png",
        )
        == 0
    )
    assert (pixels(tmp_path / "a/000-00.png") != pixels(tmp_path / "b/000-00.png")).any()


def test_a_picture_can_be_the_query(world, tmp_path):
    assert (
        run(
            world,
            "--image",
            world / "images" / "003.png",
            "--save-neighbors",
            "--out",
            tmp_path / "g.png",
        )
        == 0
    )
    first = json.loads((tmp_path / "g.neighbors.jsonl").read_text().splitlines()[0])
    assert first["path"] == "003.png" and first["score"] > 0.99


def test_a_no_knn_model_is_shown_what_it_was_trained_with(world, tmp_path, capsys):
    clip = clip_model.load(world / "clip.safetensors").fingerprint()
    knn_diffusion.save(tmp_path / "no-knn", tiny_unet(), {"clip": clip, "condition": "query"})
    argv = ["fox", "--weights", str(tmp_path / "no-knn"), "--clip", str(world / "clip.safetensors")]
    argv += ["--index", str(world / "index"), "--steps", "2", "--out", str(tmp_path / "g.png")]
    assert sample.main(argv) == 0
    assert "condition query" in capsys.readouterr().out


def test_k_larger_than_the_index_uses_all_rows_and_says_so(world, tmp_path, capsys):
    assert run(world, "fox", "--k", 99, "--n", 1, "--out", tmp_path / "g.png") == 0
    assert "the index has 20 rows" in capsys.readouterr().err


def test_a_long_prompt_is_cut_with_a_warning(world, tmp_path):
    with pytest.warns(UserWarning, match="was cut to 12"):
        assert run(world, "fox " * 2500, "--n", 1, "--out", tmp_path / "g.png") == 0


@pytest.mark.parametrize(
    "extra",
    [
        [""],
        ["  "],
        [],
        ["fox", "--k", -1],
        ["fox", "--n", 0],
        ["fox", "--steps", 0],
        ["fox", "--steps", 101],
        ["fox", "--guidance", "nan"],
        ["fox", "--eta", "1.5"],
        ["fox", "--guidance", "inf"],
        ["fox", "--weights", "nowhere"],
        ["fox", "--clip", "nowhere"],
        ["fox", "--index", "nowhere"],
        ["fox", "--prompts", "nowhere"],
        ["fox", "--image", "nowhere"],
        ["--image", "nowhere"],
        ["fox", "--seed", -1],
        ["fox", "--seed", 2**63],
        ["fox", "--k", 0, "--condition", "neighbors"],
        ["fox", "--out", "picture.jpg"],
        ["fox", "--backbone", "discrete"],
        ["fox", "--weights", "w" * 5000],
        ["fox", "--device", "abacus"],
        ["fox", "--batch-size", 0],
        ["fox", "--singles", "no/such/folder"],
        ["fox", "--dynamic-threshold", 2],
    ],
)
def test_user_mistakes_give_status_2_and_write_nothing(world, tmp_path, capsys, monkeypatch, extra):
    monkeypatch.chdir(tmp_path)
    defaults = {
        "--weights": world / "continuous.safetensors",
        "--clip": world / "clip.safetensors",
        "--index": world / "index",
        "--steps": 3,
    }
    argv = list(map(str, extra))
    for flag, value in defaults.items():
        argv += [] if flag in argv else [flag, str(value)]
    assert sample.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_clip_and_index_must_belong_together(world, tmp_path, capsys):
    clip_model.save(tmp_path / "other-clip", tiny_clip(seed=4), {})
    argv = ["fox", "--out", str(tmp_path / "g.png"), "--steps", "2", "--weights"]
    assert (
        sample.main(
            [
                *argv,
                str(world / "continuous.safetensors"),
                "--clip",
                str(tmp_path / "other-clip"),
                "--index",
                str(world / "index"),
            ]
        )
        == 2
    )
    assert "was trained with the CLIP" in capsys.readouterr().err
    knn_diffusion.save(tmp_path / "any", tiny_unet(), {})
    assert (
        sample.main(
            [
                *argv,
                str(tmp_path / "any"),
                "--clip",
                str(tmp_path / "other-clip"),
                "--index",
                str(world / "index"),
            ]
        )
        == 2
    )
    assert "was made by encoder some clip" in capsys.readouterr().err
    (tmp_path / "damaged").write_bytes((world / "continuous.safetensors").read_bytes()[:-9])
    assert (
        sample.main(
            [
                *argv,
                str(tmp_path / "damaged"),
                "--clip",
                str(world / "clip.safetensors"),
                "--index",
                str(world / "index"),
            ]
        )
        == 2
    )
    assert (
        sample.main(
            [
                *argv,
                str(world / "clip.safetensors"),
                "--clip",
                str(world / "clip.safetensors"),
                "--index",
                str(world / "index"),
            ]
        )
        == 2
    )
    assert "holds a CLIP, wanted UNet" in capsys.readouterr().err


# ---------------------------------------------------------------- the discrete backbone


@pytest.fixture(scope="module")
def discrete_world(world, tmp_path_factory):
    """A tiny transformer and the VQ-VAE that its tokens belong to."""
    folder = tmp_path_factory.mktemp("discrete")
    config = vqvae.VQVAEConfig(
        image_size=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(),
        latent_channels=8, embed_dim=4, n_codes=16, norm_groups=4)
    torch.manual_seed(0)
    codec = randomised(vqvae.VQVAE(config))
    torch.nn.init.normal_(codec.quantize.embedding.weight, std=5)    # codes that look different
    vqvae.save(folder / "vqvae.safetensors", codec, {})
    vqvae.save(folder / "other.safetensors", randomised(vqvae.VQVAE(config), 1), {})
    model = randomised(knn_diffusion.TokenTransformer(knn_diffusion.TransformerConfig(
        image_size=16, n_codes=16, tokens_a_side=8, embed_dim=16, n_neighbors=3, width=16,
        layers=1, heads=2, condition_width=12, T=6)))
    knn_diffusion.save(folder / "discrete.safetensors", model, {
        "vqvae": vqvae.fingerprint(codec),
        "clip": clip_model.load(world / "clip.safetensors").fingerprint()})
    return folder


def run_discrete(world, folder, *extra):
    return sample.main([
        "a fox", "--n", "2", "--clip", str(world / "clip.safetensors"),
        "--index", str(world / "index"), "--weights", str(folder / "discrete.safetensors"),
        "--vqvae", str(folder / "vqvae.safetensors"), *map(str, extra)])


def test_discrete_weights_draw_pictures_through_the_vqvae(world, discrete_world, tmp_path):
    for name, batch in (("a", 2), ("b", 1)):
        assert run_discrete(world, discrete_world, "--steps", 4, "--batch-size", batch,
                            "--out", tmp_path / f"{name}.png", "--singles", tmp_path / name) == 0
    one, two = (pixels(tmp_path / name / "000-01.png") for name in "ab")
    assert one.shape == (16, 16, 3) and one.std() > 5
    assert np.abs(one - two).max() <= 2                              # the seed rule holds here too
    assert np.abs(one - pixels(tmp_path / "a" / "000-00.png")).max() > 5
    settings = json.loads(Image.open(tmp_path / "a.png").info["parameters"])
    assert (settings["sampler"], settings["steps"]) == ("ancestral", 4)
    assert run_discrete(world, discrete_world, "--steps", 4, "--sampler", "purity",
                        "--truncation", 0.9, "--out", tmp_path / "c.png") == 0


def test_the_commands_defaults_are_the_functions(world, discrete_world, tmp_path):
    """Else the figures of evaluate.py, which calls the functions, were not sample.py's."""
    assert run_discrete(world, discrete_world, "--steps", 4, "--out", tmp_path / "d.png") == 0
    assert run(world, "a fox", "--n", 2, "--out", tmp_path / "c.png") == 0
    for name, function in (("d", knn_diffusion.sample_tokens), ("c", knn_diffusion.sample)):
        settings = json.loads(Image.open(tmp_path / f"{name}.png").info["parameters"])
        defaults = inspect.signature(function).parameters
        for option in {"guidance", "truncation", "eta", "dynamic_threshold"} & set(defaults):
            assert settings[option] == defaults[option].default, option
        assert settings["sampler"] == defaults["order" if name == "d" else "sampler"].default
        parser = argparse.ArgumentParser()
        sample.shared_flags(parser)
        parser.set_defaults(sampler=None, condition=None, out=tmp_path / "x.png")
        args = parser.parse_args([])
        sample.prepare(args, {"d": "discrete", "c": "continuous"}[name])      # the shipped weights
        assert args.steps == defaults["steps"].default


@pytest.mark.parametrize("extra, word", [
    (["--backbone", "continuous"], "is discrete"), (["--sampler", "ddim"], "ancestral"),
    (["--truncation", "1.5", "--steps", "4"], "truncation"), (["--steps", "7"], "1 to 6"),
    (["--vqvae", "OTHER"], "VQ-VAE"), (["--vqvae", "NONE"], "no weights")])
def test_discrete_contradictions_are_refused(world, discrete_world, tmp_path, capsys, extra, word):
    paths = {"OTHER": discrete_world / "other.safetensors", "NONE": tmp_path / "none"}
    extra = [paths.get(part, part) for part in extra]
    assert run_discrete(world, discrete_world, *extra, "--out", tmp_path / "p.png") == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1 and not (tmp_path / "p.png").exists()
