"""500 damaged files of each of our formats through the public doors: refused, or sound."""

import numpy as np
import pytest
import torch
from conftest import tiny_clip, tiny_unet, tiny_vqvae

import clip_model
import index as retrieval
import knn_diffusion
import train
import vqvae

pytestmark = pytest.mark.slow
REFUSALS = (ValueError, FileNotFoundError)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bits flipped, bytes zeroed, the end cut off, or a piece doubled."""
    raw, kind = bytearray(content), rng.integers(4)
    place = int(rng.integers(len(raw))) if rng.random() < 0.5 else int(rng.integers(200))
    place = min(place, len(raw) - 1)
    if kind == 0:
        raw[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        raw[place:place + 64] = bytes(len(raw[place:place + 64]))
    elif kind == 2:
        del raw[place:]
    else:
        raw[place:place] = raw[place:place + int(rng.integers(1, 64))]
    return bytes(raw)


WEIGHTS = {
    "clip": (lambda path: clip_model.save(path, tiny_clip(), {}), clip_model.load),
    "archive": (lambda path: torch.save({"state_dict": tiny_clip().state_dict()}, path),
                lambda path: clip_model.load(path, activation="gelu")),
    "unet": (lambda path: clip_model.save_model(path, tiny_unet(), {}), knn_diffusion.load),
    "vqvae": (lambda path: clip_model.save_model(path, tiny_vqvae(), {}), vqvae.load)}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damaged_weights_are_refused_or_finite(tmp_path, kind):
    path, rng, (save, load) = tmp_path / "w", np.random.default_rng(0), WEIGHTS[kind]
    save(path)
    sound, refused = path.read_bytes(), 0
    for _ in range(500):
        path.write_bytes(mutated(sound, rng))
        try:
            found = load(path)
        except REFUSALS as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
        else:
            model = found[0] if isinstance(found, tuple) else found
            assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert refused > 150


@pytest.mark.parametrize("name", ["manifest.json", "embeddings.npy", "paths.txt", "lists.npy",
                                  "offsets.npy", "centroids.npy"])
def test_a_damaged_index_is_refused_or_answers_with_cosines(tmp_path, name):
    rows = np.random.default_rng(1).normal(size=(60, 8))
    made = retrieval.write_index(tmp_path / "idx", torch.from_numpy(rows), [f"{i}" for i in
                                 range(60)], "some clip", "abc", tmp_path, n_lists=5)
    path, rng, refused = made.folder / name, np.random.default_rng(2), 0
    sound = path.read_bytes()
    for _ in range(500):
        path.write_bytes(mutated(sound, rng))
        try:
            index = retrieval.open_index(made.folder)
            for nprobe in (None, 2):
                scores, ids = index.search(torch.ones(1, 8), 3, nprobe=nprobe)
                assert (scores.abs() < 1.01).all() and ((0 <= ids) & (ids < 60)).all()
        except REFUSALS as error:
            refused += 1
            assert str(error)
    assert refused > 50


def test_a_damaged_state_is_refused_or_equal(world, tmp_path, capsys):
    argv = ["continuous", "--data", str(world / "images"), "--index", str(world / "index"),
            "--init", str(world / "continuous.safetensors"), "--batch-size", "2", "--no-bf16"]
    assert train.main([*argv, "--out", str(tmp_path / "a"), "--steps", "1"]) == 0
    path, rng = tmp_path / "a" / "state.pt", np.random.default_rng(3)
    sound = torch.load(path, weights_only=True)
    content = path.read_bytes()
    model, ema = (knn_diffusion.load(world / "continuous.safetensors")[0] for _ in range(2))
    for _ in range(500):
        path.write_bytes(mutated(content, rng))
        optimizers = train.muon_and_adam(model, 1e-3)
        try:
            train.load_state(path, 9, sound["settings"], model, ema, optimizers)
        except ValueError as error:
            assert "can't resume" in str(error)
        else:
            assert all(torch.equal(tensor, sound["model"][name])
                       for name, tensor in model.state_dict().items())
