"""weights/stickers/: what ships fits together, stays small, and says how it was made."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import clip_model
import edit
import index as retrieval
import knn_diffusion
import sample
import vqvae

SHIPPED = Path(__file__).parent.parent / "weights" / "stickers"
WEIGHTS = {"clip": 12, "continuous": 16, "vqvae": 4, "discrete": 16, "edit": 16,
           "edit-discrete": 16, "judge": 6, "judge-edit": 6}
CEILINGS = {f"{name}.safetensors": most for name, most in WEIGHTS.items()} | {
    "index": 14, "index-heldout": 3}                               # MB


def opened(name, index="index"):
    return sample.open_all(
        SHIPPED / f"{name}.safetensors", SHIPPED / "clip.safetensors", SHIPPED / index)


@pytest.mark.parametrize("name", CEILINGS)
def test_files_stay_under_their_ceilings(name):
    path = SHIPPED / name
    cached = ("neighbors-", "tokens-", "pictures-")  # made in training, not shipped
    files = path.iterdir() if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith(cached)]
    assert 0 < sum(file.stat().st_size for file in files) <= CEILINGS[name] * 1e6


@pytest.mark.parametrize("name, index", [
    ("continuous", "index"), ("continuous", "index-heldout"), ("discrete", "index"),
    ("edit", "index"), ("edit-discrete", "index")])
def test_weights_clip_index_and_vqvae_belong_together(name, index):
    """The editing weights are the generators', widened."""
    model, metadata, clip, found, codec = opened(name, index)
    assert metadata["clip"] == clip.fingerprint() == found.manifest["encoder_hash"]
    assert metadata["condition"] == "both"
    backbone, edits = "discrete" if "discrete" in name else "continuous", "edit" in name
    presets = {"continuous": knn_diffusion.PRESETS, "discrete": knn_diffusion.DISCRETE_PRESETS}
    assert model.config == replace(presets[backbone]["stickers"], edit=edits)
    if backbone == "discrete":
        assert codec.config == vqvae.PRESETS["stickers"]
    commands = metadata["command"].splitlines()
    assert all(command.startswith("python train.py ") for command in commands)
    kinds = [command.split()[2] for command in commands]
    assert kinds[0] == backbone and kinds[-1] == ("edit" if edits else backbone)
    assert kinds == sorted(kinds, key=[backbone, "edit"].index)         # then only editing


def test_a_prompt_is_all_that_is_needed_or_a_picture_and_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["a red heart", "--n", "1", "--steps", "2", "--singles", "out"]) == 0
    assert Path("picture.png").is_file()
    with Image.open("out/000-00.png") as picture:
        assert picture.size == (64, 64)
        assert json.loads(picture.text["parameters"])["prompt"] == "a red heart"
    Image.new("RGB", (90, 70), "purple").save("plain.png")
    for backbone in ("continuous", "discrete"):
        argv = ["plain.png", "a red heart", "--n", "1", "--steps", "2", "--backbone", backbone]
        assert edit.main([*argv, "--out", f"{backbone}.png"]) == 0
        with Image.open(f"{backbone}.png") as picture:
            assert json.loads(picture.text["parameters"])["texts"] == ["a red heart"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_carry_the_command_that_made_them(name):
    metadata = clip_model.read_weights(SHIPPED / f"{name}.safetensors")[1]
    assert metadata["command"].startswith("python ") and int(metadata["step"]) > 0


def test_the_default_index_lacks_the_held_out_corner():
    held = set(retrieval.open_index(SHIPPED / "index-heldout").paths)
    default = retrieval.open_index(SHIPPED / "index").paths
    assert held and not held & set(default)
    assert {path.split("/")[0] for path in default} == {"flat", "outlined"}
    names = {Path(path).name.rsplit("-", 1)[0] for path in default if path.startswith("outlined")}
    assert "heart" in names and not {"fox_face", "apple", "pizza"} & names


def test_the_sticker_clip_finds_a_red_heart():
    _, _, clip, index, _ = opened("continuous")
    _, ids = index.search(clip.embed_texts(["red heart on a white background"]), 10)
    assert sum("heart" in index.paths[i] for i in ids[0].tolist()) >= 5
