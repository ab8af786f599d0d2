"""train.py: shared stages, CLIP's loss and vocabulary, resume, what the diffusion may see."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLIP_CONFIG, UNET_CONFIG, tiny_unet, write_pictures
from PIL import Image

import clip_model
import index as index_module
import knn_diffusion
import train
import vqvae
from index import neighbor_table, open_index

CPU = torch.device("cpu")


# ---------------------------------------------------------------- shared stages


def test_learning_rate_warms_up_and_decays():
    rate = [train.learning_rate(step, 1.0, 10, 110) for step in range(111)]
    assert rate[0] == 0.1 and rate[9] == 1.0 and rate[110] == pytest.approx(0.02)
    assert rate[60] == pytest.approx(0.51) and all(a >= b for a, b in zip(rate[9:], rate[10:]))


def test_average_forgets_early_weights_fast():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    start = ema.weight.item()
    train.average(ema, model, 0, 0.99)  # d = 1/10
    assert ema.weight.item() == pytest.approx(0.1 * start + 0.9 * model.weight.item(), abs=1e-6)
    start = ema.weight.item()
    train.average(ema, model, 10**6, 0.99)  # d = 0.99
    assert ema.weight.item() == pytest.approx(0.99 * start + 0.01 * model.weight.item(), abs=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(train.weight_groups(model, 0.1), lr=1.0)
    before = model.weight.clone()
    nan = model(torch.ones(1, 2)).sum() * torch.nan
    assert not train.descend(model, [optimizer], nan, 0.1, 1.0)
    assert torch.equal(model.weight, before)
    assert train.descend(model, [optimizer], model(torch.ones(1, 2)).sum(), 0.1, 1.0)
    assert not torch.equal(model.weight, before) and optimizer.param_groups[0]["lr"] == 0.1


def test_twenty_such_steps_in_a_row_stop_the_run(tmp_path):
    progress = train.Progress(tmp_path, 0, 100, None)
    for step in range(19):
        progress.update(step, math.nan, 0.1, 4, finite=False)
    progress.update(19, 1.0, 0.1, 4, finite=True)  # one good step resets
    for step in range(20, 39):
        progress.update(step, math.nan, 0.1, 4, finite=False)
    with pytest.raises(FloatingPointError, match="20 times"):
        progress.update(39, math.nan, 0.1, 4, finite=False)


def test_only_matrices_are_decayed():
    groups = train.weight_groups(torch.nn.Linear(3, 2), 0.3)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert [p.shape for g in groups for p in g["params"]] == [(2, 3), (2,)]


def test_muon_moves_every_singular_direction_alike():
    """Five Newton-Schulz steps against the singular value decomposition, and one step by hand."""
    torch.manual_seed(0)
    for shape in ((6, 40), (40, 6), (16, 32)):
        gradient = torch.randn(shape)
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        turned = u.T @ train.orthogonal(gradient) @ vt.T
        assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.3)).all()
        assert (turned - turned.diagonal().diag()).abs().max() < 0.05
    weight = torch.nn.Parameter(torch.randn(4, 2, 3, 3))
    before, weight.grad = weight.detach().clone(), torch.randn(4, 2, 3, 3)
    train.Muon([weight], lr=0.1, weight_decay=0.5).step()
    update = train.orthogonal(weight.grad.flatten(1)).view(4, 2, 3, 3)
    wanted = before * 0.95 - 0.1 * 0.2 * math.sqrt(18) * update  # 18 columns are the longer side
    assert torch.allclose(weight, wanted, atol=2e-3)  # bfloat16 inside


def test_muon_gets_matrices_inside_and_adam_the_rest():
    model = tiny_unet()
    muon, adam = train.muon_and_adam(model, 0.1, at_the_ends=("conv_in.", "conv_out."))
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in (muon, adam)]
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) and sizes[0] > sizes[1]
    by_adam = {id(p) for g in adam.param_groups for p in g["params"]}
    for ends in (model.conv_in, model.conv_out):
        assert all(id(p) in by_adam for p in ends.parameters())
    assert id(model.condition.type_embedding) in by_adam and id(model.position_map) in by_adam


# ---------------------------------------------------------------- CLIP


def test_merges_join_the_most_frequent_pair_first():
    """low ×5, lower ×2, newest ×6, widest ×3: the example of Sennrich et al., by hand."""
    captions = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    assert train.learn_merges(captions, 4) == [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w")]
    assert len(train.learn_merges(["ab"], 50)) == 1  # nothing left to merge


def test_contrastive_loss_is_clips_without_false_negatives():
    logits = torch.randn(4, 4)
    target = torch.arange(4)
    wanted = (
        torch.nn.functional.cross_entropy(logits, target)
        + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    exact = np.array([True, True, False, False])
    assert torch.allclose(train.contrastive_loss(logits, ["a", "b", "c", "d"], exact), wanted)
    # twins with exact captions do tell each other apart; two loose captions of one concept do not
    assert torch.allclose(train.contrastive_loss(logits, ["a", "a", "c", "d"], exact), wanted)
    masked = logits.clone()
    masked[2, 3] = masked[3, 2] = -torch.inf
    wanted = (
        torch.nn.functional.cross_entropy(masked, target)
        + torch.nn.functional.cross_entropy(masked.T, target)
    ) / 2
    assert torch.allclose(train.contrastive_loss(logits, ["a", "b", "c", "c"], exact), wanted)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    write_pictures(folder / "images", 12)
    rows = []
    for i in range(12):
        name, style, colour = f"thing {i // 2}", ("flat", "outlined")[i % 2], "red"
        rows.append(
            {
                "path": f"images/{i:03d}.png",
                "concept": name,
                "style": style,
                "background": colour,
                "plain": True,
                "captions": [name, f"{style} {name} on a {colour} background"],
            }
        )
    rows[11]["parts"] = [{"concept": "thing 0", "box": [2, 2, 9, 8], "captions": ["thing 0"]}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_batches_hold_twins_with_exact_captions_and_crops(captioned):
    data = train.CaptionedPictures(captioned, 16)
    pictures, captions, concepts, is_exact = data.batch(8, np.random.default_rng(0))
    assert pictures.shape == (8, 16, 16, 3) and pictures.dtype == np.uint8
    assert concepts[0] == concepts[1] and captions[0] != captions[1] and is_exact[:4].all()
    assert all("background" in caption for caption in captions[:4])
    again = data.batch(8, np.random.default_rng(0))
    assert again[1] == captions and (again[0] == pictures).all()
    crop = data.crop_of(11, data.rows[11]["parts"][0], np.random.default_rng(0))
    assert crop.shape == (16, 16, 3)


def test_a_concept_with_one_picture_is_no_twin_of_itself(captioned):
    """As a pair of exact captions it would be its own negative."""
    data = train.CaptionedPictures(captioned, 16)
    alone = [name for name, rows in data.members.items() if len(rows) == 1]
    assert alone == ["thing 5"]
    for seed in range(20):
        _, _, concepts, is_exact = data.batch(8, np.random.default_rng(seed))
        assert is_exact[:4].tolist() == [name not in alone for name in concepts[:4]]


def test_a_clip_without_a_vocabulary_is_no_start(captioned, tmp_path, monkeypatch):
    lacking = clip_model.CLIP(CLIP_CONFIG)
    lacking.tokenizer = None
    monkeypatch.setattr(clip_model, "load", lambda path: lacking)
    with pytest.raises(ValueError, match="no vocabulary"):
        train.train_clip(captioned, tmp_path / "out", CLIP_CONFIG, 1, 8, 1e-3, 3, False,
                         tmp_path / "x.pt", None, CPU, False, "a test")
    assert not (tmp_path / "out").exists()


def train_tiny_clip(captioned, out, steps, **options):
    options = {"resume": False, "init": None, "minutes": None, **options}
    out.mkdir(exist_ok=True)
    train.train_clip(
        captioned,
        out,
        CLIP_CONFIG,
        steps=steps,
        batch_size=8,
        lr=1e-3,
        seed=3,
        device=CPU,
        bf16=False,
        command="a test",
        **options,
    )
    return torch.load(out / "state.pt", weights_only=True)


def equal_states(one, two):
    return one["step"] == two["step"] and all(
        torch.equal(one[part][name], two[part][name])
        for part in ("model", "ema")
        for name in one[part]
    )


def test_a_resumed_clip_equals_an_uninterrupted_one(captioned, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)
    whole = train_tiny_clip(captioned, tmp_path / "a", 6)
    train_tiny_clip(captioned, tmp_path / "b", 3)
    resumed = train_tiny_clip(captioned, tmp_path / "b", 6, resume=True)
    assert equal_states(whole, resumed)
    model = clip_model.load(tmp_path / "b" / "clip.safetensors")
    assert model.tokenizer.merges and model.config.vocab_size == 514 + len(model.tokenizer.merges)


# ---------------------------------------------------------------- the continuous backbone


def train_tiny_unet(world, out, steps, config=UNET_CONFIG, **options):
    options = {"resume": False, "init": None, "minutes": None, "condition": "both", **options}
    (out / "samples").mkdir(parents=True, exist_ok=True)
    train.train_diffusion(
        "continuous", world / "images", out, open_index(world / "index"), config, steps=steps,
        batch_size=4, lr=1e-3, seed=5, device=CPU, bf16=False, command="a test", **options)
    return torch.load(out / "state.pt", weights_only=True)


def test_a_resumed_unet_equals_an_uninterrupted_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)
    whole = train_tiny_unet(world, tmp_path / "a", 6)
    train_tiny_unet(world, tmp_path / "b", 3)
    assert equal_states(whole, train_tiny_unet(world, tmp_path / "b", 6, resume=True))
    assert not equal_states(whole, train_tiny_unet(world, tmp_path / "c", 5))


def test_a_run_stopped_by_the_clock_goes_on_as_if_it_had_not_been(world, tmp_path, monkeypatch):
    """--minutes: the same --steps, the learning rate's own course, dropout and all."""
    config = replace(UNET_CONFIG, dropout=0.3)
    whole = train_tiny_unet(world, tmp_path / "a", 6, config)
    calls = []
    monkeypatch.setattr(train.Progress, "out_of_time", lambda self: calls.append(1) or len(
        calls) == 3)
    assert train_tiny_unet(world, tmp_path / "b", 6, config)["step"] == 3
    assert equal_states(whole, train_tiny_unet(world, tmp_path / "b", 6, config, resume=True))
    other = train_tiny_unet(world, tmp_path / "c", 6, replace(config, dropout=0.0))
    assert not equal_states(whole, other)


def test_weights_are_the_average_and_samples_are_drawn(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAMPLES_EVERY", 2)
    state = train_tiny_unet(world, tmp_path / "a", 5)
    model, _ = knn_diffusion.load(tmp_path / "a" / "continuous.safetensors")
    assert all(torch.equal(tensor, state["ema"][name].half().float())
               for name, tensor in model.state_dict().items())
    assert any((tensor != state["model"][name]).any() for name, tensor in state["ema"].items())
    names = sorted(path.name for path in (tmp_path / "a" / "samples").iterdir())
    assert names == ["0000002.png", "0000004.png", "0000005.png"]        # the last is the end
    grid = Image.open(tmp_path / "a" / "samples" / names[0])
    assert grid.size == (12 * 18 + 2, 2 * 18 + 2)                        # pictures above samples


def test_resuming_does_not_change_the_experiment(world, tmp_path):
    train_tiny_unet(world, tmp_path / "a", 2)
    with pytest.raises(ValueError, match="condition was both, is query"):
        train_tiny_unet(world, tmp_path / "a", 4, resume=True, condition="query")
    with pytest.raises(ValueError, match="has 3 neighbours, --k is 2"):
        train_tiny_unet(world, tmp_path / "a", 4, resume=True, k=2)
    with pytest.raises(ValueError, match="target was v, is eps"):
        train_tiny_unet(world, tmp_path / "a", 4, resume=True, target="eps")
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)
    state["settings"]["index"] = "another"
    torch.save(state, tmp_path / "a" / "state.pt")
    with pytest.raises(ValueError, match="index was another"):
        train_tiny_unet(world, tmp_path / "a", 4, resume=True)
    train_tiny_unet(world, tmp_path / "a", 2)
    with pytest.raises(ValueError, match="has 2 steps, --steps is 2"):
        train_tiny_unet(world, tmp_path / "a", 2, resume=True)
    train_tiny_unet(world, tmp_path / "a", 3, resume=True)
    commands = clip_model.read_weights(tmp_path / "a" / "continuous.safetensors")[1]["command"]
    assert commands == "a test\na test"


TINY_TRANSFORMER = knn_diffusion.TransformerConfig(
    image_size=16, n_codes=16, tokens_a_side=8, embed_dim=16, n_neighbors=3, width=16, layers=1,
    heads=2, condition_width=12, T=6, query_map=2, query_hidden=8)


def train_tiny_transformer(world, out, steps, codec, resume=False, **options):
    train.train_diffusion(
        "discrete", world / "images", out, open_index(world / "index"), TINY_TRANSFORMER,
        **{**dict(condition="both", steps=steps, batch_size=8, lr=1e-3, seed=5, resume=resume,
                  init=None, minutes=None, device=CPU, bf16=False, command="a test", codec=codec),
           **options})
    return torch.load(out / "state.pt", weights_only=True)


def test_a_resumed_transformer_equals_an_uninterrupted_one(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)
    torch.manual_seed(0)
    codec = vqvae.VQVAE(TINY_VQVAE).eval().requires_grad_(False)
    whole = train_tiny_transformer(world, tmp_path / "a", 24, codec)       # T·11 draws and more
    train_tiny_transformer(world, tmp_path / "b", 13, codec)
    resumed = train_tiny_transformer(world, tmp_path / "b", 24, codec, resume=True)
    assert equal_states(whole, resumed)
    for one, two in zip(whole["others"][-1].values(), resumed["others"][-1].values()):
        assert torch.equal(one, two) and one.abs().sum() > 0               # the time sampler too
    model, metadata = knn_diffusion.load(tmp_path / "a" / "discrete.safetensors")
    assert isinstance(model, knn_diffusion.TokenTransformer)
    assert metadata["vqvae"] == vqvae.fingerprint(codec)
    # tokens are computed once and kept beside the embeddings
    [table] = open_index(world / "index").folder.glob("tokens-*.npy")
    assert np.load(table).shape == (len(open_index(world / "index")), 64)
    # and anew for other pictures under the same names
    index, tables = open_index(world / "index"), set()
    for shade in (0, 255):
        pictures = np.full((len(index), 16, 16, 3), shade, np.uint8)
        tokens = train.token_table(pictures, codec, index, CPU)
        assert torch.equal(tokens[0], codec.encode(train.to_x(pictures[:1]))[0].int())
        tables.add(frozenset(index.folder.glob("tokens-*.npy")))
    assert len(tables) == 2
    other = vqvae.VQVAE(TINY_VQVAE).eval()
    with pytest.raises(ValueError, match="vqvae was"):
        train_tiny_transformer(world, tmp_path / "b", 30, other, resume=True)
    with pytest.raises(ValueError, match="holds a TokenTransformer"):
        train_tiny_unet(world, tmp_path / "c", 1, init=tmp_path / "a" / "discrete.safetensors")
    wide = vqvae.VQVAE(replace(TINY_VQVAE, n_codes=20)).eval()
    with pytest.raises(ValueError, match="8x8 of 20"):
        train_tiny_transformer(world, tmp_path / "d", 1, wide)


def test_the_tokens_are_the_vqvaes_and_a_preset_says_which_it_wants(world, tmp_path, capsys,
                                                                    monkeypatch):
    """Not silently the stickers' VQ-VAE, 64x64 tokens of 512 at the gpu preset's 256 px."""
    arguments = ["discrete", "--preset", "gpu", "--data", str(world / "images"), "--index",
                 str(world / "index"), "--out", str(tmp_path / "out")]
    assert train.main(arguments) == 2
    assert "wants --vqvae, of 16x16 tokens of 1024 from 256 px" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    asked = []
    monkeypatch.setattr(train, "train_diffusion", lambda *given, **_: asked.append(given[4]))
    vqvae.save(tmp_path / "vqvae.safetensors", vqvae.VQVAE(TINY_VQVAE), {})     # factor 2, V = 16
    assert train.main([*arguments, "--vqvae", str(tmp_path / "vqvae.safetensors")]) == 0
    assert (asked[0].tokens_a_side, asked[0].n_codes) == (128, 16)
    assert "128x128 tokens of 16, as" in capsys.readouterr().out


def test_importance_weights_leave_the_mean_over_the_steps_as_it_is(world):
    """However t is drawn, the loss estimates the same mean over t, and the sampler is told the
    loss before its weight."""
    torch.manual_seed(0)
    codec = vqvae.VQVAE(TINY_VQVAE).eval().requires_grad_(False)
    index, model = open_index(world / "index"), knn_diffusion.TokenTransformer(TINY_TRANSFORMER)
    stages = train.Discrete(train.CachedPictures(world / "images", index, 16, 3), TINY_TRANSFORMER,
                            "both", CPU, codec, index)
    rows, generator = torch.arange(4000) % len(index), torch.Generator().manual_seed(1)
    with torch.no_grad():
        plain = stages.loss(model, rows, generator).item()
        told = []
        stages.times.update = lambda t, terms: told.append((t, terms))
        stages.times.seen[:] = 20
        for skewed in ([9.0, 9, 1, 1, 1, 1], [1.0, 1, 1, 1, 1, 9]):
            stages.times.mean_square[1:] = torch.tensor(skewed).double() ** 2
            found = stages.loss(model, rows, generator).item()
            assert found == pytest.approx(plain, rel=0.08)
            t, terms = told[-1]
            by_step = torch.stack([terms[t == step].mean() for step in range(1, 7)])
            assert by_step.mean().item() == pytest.approx(plain, rel=0.08)


# ---------------------------------------------------------------- the VQ-VAE

TINY_VQVAE = vqvae.VQVAEConfig(
    image_size=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(), latent_channels=8,
    embed_dim=4, n_codes=16, norm_groups=4)


def train_tiny_vqvae(data, out, steps, resume=False, keep_out=3, **changes):
    train.train_vqvae(data, out, TINY_VQVAE, keep_out, **{
        **dict(steps=steps, batch_size=4, lr=1e-3, seed=0, resume=resume, init=None, minutes=None,
               device=CPU, bf16=False, command="a test"), **changes})
    return torch.load(out / "state.pt", weights_only=True)


def test_a_run_of_whole_checkpoints_measures_its_end_once(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    (tmp_path / "out").mkdir()
    train_tiny_vqvae(world / "images", tmp_path / "out", 4)
    said = capsys.readouterr().out
    assert said.count("step 2: PSNR") == said.count("step 4: PSNR") == 1


def test_weights_of_others_tell_no_commands(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "theirs.ckpt")
    assert train.all_commands(tmp_path / "theirs.ckpt", "now") == "now"


def test_a_gumbel_file_is_no_start_for_training(world, tmp_path, capsys):
    """Whatever the preset says: the file decides."""
    config = replace(TINY_VQVAE, gumbel=True)
    vqvae.save(tmp_path / "gumbel.safetensors", vqvae.VQVAE(config), {})
    assert train.main(["vqvae", "--data", str(world / "images"), "--out", str(tmp_path / "out"),
                       "--init", str(tmp_path / "gumbel.safetensors")]) == 2
    assert "Gumbel codebook" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_kept_out_drawings_leave_with_all_their_renderings():
    names = [f"flat/{name}-{i}.png" for name in "abcdef" for i in range(3)] + ["plain.png"]
    kept, out = train.split_by_drawing(names, 3)
    assert out == [f"flat/{name}-{i}.png" for name in "cf" for i in range(3)]
    assert sorted(kept + out) == sorted(names)
    assert train.split_by_drawing(names, 0) == (names, [])


def test_what_is_measured_comes_from_all_folders():
    names = [f"flat/{i}" for i in range(1300)] + [f"outlined/{i}" for i in range(1100)]
    chosen = train.some(names, 1000)
    assert 700 < len(chosen) <= 1000 and len(set(chosen)) == len(chosen)
    assert abs(sum("flat" in name for name in chosen) / len(chosen) - 13 / 24) < 0.01
    assert train.some(names[:7], 1000) == names[:7] and train.some([], 5) == []


def test_vqvae_resumes_as_if_never_stopped_and_learns(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-2)
    data = tmp_path / "pictures"
    write_pictures(data, 8)
    (data / "broken.png").write_bytes(b"")
    monkeypatch.setattr(train, "REVIVE_EVERY", 10)
    revived, restart = [], vqvae.restart_dead_codes

    def one_is_dead(codebook, counts, z, generator):
        revived.append(restart(codebook, counts.index_fill(0, torch.tensor([3]), 0), z, generator))

    monkeypatch.setattr(vqvae, "restart_dead_codes", one_is_dead)
    whole = train_tiny_vqvae(data, tmp_path / "a", 60)
    assert len(revived) == 5 and min(revived) > 0         # from 0 to 40: not in the last fifth
    train_tiny_vqvae(data, tmp_path / "b", 26)
    assert equal_states(whole, train_tiny_vqvae(data, tmp_path / "b", 60, resume=True))
    assert len(revived) == 5 + 3 + 2
    model, metadata = vqvae.load(tmp_path / "a" / "vqvae.safetensors")
    assert "PSNR" in metadata["measured"] and "broken.png" in capsys.readouterr().err
    log = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert float(log[-1].split(",")[1]) < 0.8
    assert (tmp_path / "a" / "samples" / "0000060.png").is_file()
    with pytest.raises(ValueError, match="keep_out was 3, is 2"):
        train_tiny_vqvae(data, tmp_path / "b", 70, resume=True, keep_out=2)


# ---------------------------------------------------------------- editing


def edit_start(world, tmp_path, backbone):
    """Weights to start from, and the flags that go with them."""
    if backbone == "continuous":
        return ["--init", str(world / "continuous.safetensors")]
    torch.manual_seed(0)
    codec = vqvae.VQVAE(TINY_VQVAE).eval().requires_grad_(False)
    vqvae.save(tmp_path / "vqvae.safetensors", codec, {})
    codec = vqvae.load(tmp_path / "vqvae.safetensors")[0]
    train_tiny_transformer(world, tmp_path / "generator", 2, codec)
    return ["--init", str(tmp_path / "generator" / "discrete.safetensors"),
            "--vqvae", str(tmp_path / "vqvae.safetensors")]


def edit_command(world, out, start, steps, *more):
    return train.main([
        "edit", "--data", str(world / "images"), "--swap-index", str(world / "index"), "--index",
        str(world / "index"), "--clip", str(world / "clip.safetensors"), *start, "--out", str(out),
        "--steps", str(steps), "--batch-size", "4", "--swaps", "3", "--no-bf16", *more])


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_editing_trains_from_a_generator_and_sees_no_text(world, tmp_path, monkeypatch, backbone):
    def refuse(*_: object) -> None:
        raise AssertionError("a text was read")

    monkeypatch.setattr(clip_model.CLIP, "embed_texts", refuse)
    monkeypatch.setattr(clip_model.Tokenizer, "encode", refuse)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)
    start = edit_start(world, tmp_path, backbone)
    assert edit_command(world, tmp_path / "a", start, 6) == 0
    model, metadata = knn_diffusion.load(tmp_path / "a" / "edit.safetensors")
    assert model.config.edit and metadata["clip"] and ("vqvae" in metadata) == (
        backbone == "discrete")
    before = knn_diffusion.widened(knn_diffusion.load(start[1])[0]).state_dict()
    assert any((tensor != before[name]).any() for name, tensor in model.state_dict().items())
    # a run that was stopped and resumed is the same; its swaps are read, not made again
    assert edit_command(world, tmp_path / "b", start, 3) == 0
    monkeypatch.setattr(train.SwappedPictures, "make", refuse)
    assert edit_command(world, tmp_path / "b", start[2:], 6, "--resume") == 0
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in "ab"]
    assert equal_states(*states)
    monkeypatch.undo()
    assert edit_command(world, tmp_path / "b", start[2:], 7, "--resume", "--swaps", "2") == 2


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_the_editing_model_is_shown_the_swap_and_asked_for_the_original(
        world, tmp_path, monkeypatch, backbone):
    """Two swaps of picture 3: both to become it, each from its own; a dropped one is null."""
    index, clip = open_index(world / "index"), clip_model.load(world / "clip.safetensors")
    pictures = train.SwappedPictures(world / "images", index, index, clip, 16, 3, 2, 7, tmp_path)
    pictures.manipulated[23] = 255 - pictures.manipulated[3]
    rows = torch.tensor([3, 23, 3, 23])
    dropped = torch.tensor([False, False, True, True])
    no = torch.zeros(4, dtype=torch.bool)
    monkeypatch.setattr(knn_diffusion, "draw_edit_drops", lambda *_: (no, ~no, dropped))
    seen = []
    if backbone == "continuous":
        monkeypatch.setattr(knn_diffusion, "diffusion_loss", lambda *given: seen.append(given))
        config = knn_diffusion.load(world / "continuous.safetensors")[0].config
        stages = train.Continuous(pictures, replace(config, edit=True), "both", CPU)
        stages.loss(None, rows, torch.Generator().manual_seed(0))
        x0, given, null = seen[0][2], seen[0][-1], 0
        original = train.to_x(pictures.pictures[[3]])[0]
        swapped = train.to_x(pictures.manipulated[[3, 23]])
    else:
        torch.manual_seed(0)
        codec = vqvae.VQVAE(TINY_VQVAE).eval().requires_grad_(False)
        monkeypatch.setattr(knn_diffusion, "discrete_loss", lambda *given: (
            seen.append(given), (torch.ones(4), torch.ones(4)))[1])
        config = replace(TINY_TRANSFORMER, edit=True)
        stages = train.Discrete(pictures, config, "both", CPU, codec, index)
        stages.loss(None, rows, torch.Generator().manual_seed(0))
        x0, given, null = seen[0][2], seen[0][-1], TINY_TRANSFORMER.n_codes
        original = codec.encode(train.to_x(pictures.pictures[[3]]))[0]
        swapped = codec.encode(train.to_x(pictures.manipulated[[3, 23]]))
    assert all(torch.equal(each, original) for each in x0)
    assert torch.equal(given[:2], swapped) and not torch.equal(swapped[0], swapped[1])
    assert (given[2:] == null).all()
    assert torch.equal(seen[0][-3], no) and torch.equal(seen[0][-2], ~no)


def test_other_swaps_have_a_cache_of_their_own(world, tmp_path):
    index, clip = open_index(world / "index"), clip_model.load(world / "clip.safetensors")
    for i, (k, per_picture, seed) in enumerate([(3, 1, 7), (3, 1, 8), (2, 1, 7), (3, 2, 7)]):
        train.SwappedPictures(world / "images", index, index, clip, 16, k, per_picture, seed,
                              tmp_path)
        assert len(list(tmp_path.glob("swaps-*.npz"))) == i + 1


def test_a_single_picture_has_nothing_to_swap_with(world, tmp_path, capsys):
    write_pictures(tmp_path / "one", 1)
    clip = clip_model.load(world / "clip.safetensors")
    embeddings, names, _ = index_module.embed_folder(clip, tmp_path / "one")
    index_module.write_index(tmp_path / "index", embeddings, names, "some clip", clip.fingerprint(),
                             tmp_path / "one")
    assert train.main(["edit", "--data", str(tmp_path / "one"), "--swap-index",
                       str(tmp_path / "index"), "--index", str(world / "index"), "--clip",
                       str(world / "clip.safetensors"), "--init",
                       str(world / "continuous.safetensors"), "--out", str(tmp_path / "o")]) == 2
    assert "holds one picture" in capsys.readouterr().err


def test_swaps_change_a_region_only_and_speak_of_what_was_there(world, tmp_path):
    index, clip = open_index(world / "index"), clip_model.load(world / "clip.safetensors")
    made = train.SwappedPictures(world / "images", index, index, clip, 16, 3, 2, 7, tmp_path)
    assert len(made) == 40 and made.manipulated.shape == (40, 16, 16, 3)
    partner = neighbor_table(index, 1)[:, 0]
    assert (partner != np.arange(20)).all()
    _, boxes, _ = train.edit.region_swap(
        train.to_x(made.pictures), train.to_x(made.pictures[partner]),
        torch.Generator().manual_seed(7))
    for i, box in enumerate(boxes.tolist()):
        left, top, right, bottom = box
        original, changed = made.pictures[i], made.manipulated[i]
        differs = (original != changed).any(-1)
        assert differs[top:bottom, left:right].any()
        differs[top:bottom, left:right] = False
        assert not differs.any()
        crop = Image.fromarray(original).crop(train.edit.region_crop(tuple(box), 16, 16))
        wanted = clip.embed_pictures([crop])[0]
        assert torch.allclose(torch.from_numpy(made.queries[i]).float(), wanted, atol=2e-3)
    x0, query, neighbors = made.batch(torch.tensor([3, 23]))       # two swaps of picture 3
    assert torch.equal(x0[0], x0[1])
    assert (made.queries[:20] != made.queries[20:]).any()
    ids = index.search(torch.from_numpy(made.queries[3:4]).float(), 3)[1][0]
    assert torch.equal(neighbors[0], torch.from_numpy(index.embeddings[ids.numpy()]).float())
    assert len(list(tmp_path.glob("swaps-*.npz"))) == 1


def test_editing_wants_its_swap_index(world, tmp_path, capsys):
    argv = ["edit", "--data", str(world / "images"), "--out", str(tmp_path / "out"), "--init",
            str(world / "continuous.safetensors")]
    assert train.main(argv) == 2 and "--swap-index" in capsys.readouterr().err
    assert train.main([*argv, "--swap-index", str(tmp_path / "none")]) == 2
    assert train.main([*argv, "--swap-index", str(world / "index")]) == 2  # another CLIP's
    assert not (tmp_path / "out").exists()
    start = ["--init", str(world / "continuous.safetensors")]
    assert edit_command(world, tmp_path / "a", start, 1) == 0
    with pytest.raises(ValueError, match="that edits, continuous wants"):
        train_tiny_unet(world, tmp_path / "c", 1, init=tmp_path / "a" / "edit.safetensors")


def test_weights_of_another_clip_are_no_start(world, tmp_path):
    for name, model, clip in (("a", tiny_unet(), "abc"), ("b", tiny_unet(embed_dim=8), "")):
        knn_diffusion.save(tmp_path / name, model, {"clip": clip})
        with pytest.raises(ValueError, match="was trained with the CLIP"):
            train_tiny_unet(world, tmp_path / "out", 1, init=tmp_path / name)


@pytest.mark.parametrize(
    "line", ["", "{bad", "[]", '{"path": "x.png"}', '{"path": "x.png", "captions": []}']
)
def test_rows_that_can_not_be_used_are_named(tmp_path, line):
    (tmp_path / "captions.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(ValueError, match="captions.jsonl"):
        train.read_captions(tmp_path / "captions.jsonl")


def test_training_draws_every_time_and_the_last_one_too(world, tmp_path, monkeypatch):
    seen, loss = [], knn_diffusion.diffusion_loss

    def watch(model, schedule, x0, query, neighbors, t, *rest):
        seen.extend(t.tolist())
        return loss(model, schedule, x0, query, neighbors, t, *rest)

    monkeypatch.setattr(knn_diffusion, "diffusion_loss", watch)
    train_tiny_unet(world, tmp_path / "a", 150)
    assert min(seen) >= 1 and max(seen) == UNET_CONFIG.T and set(range(1, 8)) & set(seen)


@pytest.mark.parametrize("condition", ["both", "query", "neighbors"])
def test_condition_blinds_what_it_does_not_name(world, tmp_path, monkeypatch, condition):
    drops, loss = [], knn_diffusion.diffusion_loss

    def watch(*args):
        drops.append(args[-2:])
        return loss(*args)

    monkeypatch.setattr(knn_diffusion, "diffusion_loss", watch)
    train_tiny_unet(world, tmp_path / condition, 20, condition=condition)
    query, neighbors = (torch.cat(parts).float().mean().item() for parts in zip(*drops))
    assert (query == 1) == (condition == "neighbors") and (neighbors == 1) == (condition == "query")
    assert (
        clip_model.read_weights(tmp_path / condition / "continuous.safetensors")[1]["condition"]
        == condition
    )


def test_diffusion_training_sees_no_text_and_runs_no_clip(world, tmp_path, monkeypatch):
    """Not one text is opened, be it in the same folder; no CLIP is built, no tokenizer made."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copytree(world / "index", tmp_path / "index")
    for place in (tmp_path, tmp_path / "images"):
        (place / "captions.jsonl").write_text('{"captions": ["a fox"]}')

    def forbidden(*_, **__):
        raise AssertionError("the diffusion training touched CLIP or a caption")

    def watched(opened):
        def wrapper(path, *args, **options):
            if "captions" in str(path):
                forbidden()
            return opened(path, *args, **options)
        return wrapper

    monkeypatch.setattr("builtins.open", watched(open))
    for name in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    with pytest.raises(AssertionError, match="a caption"):
        (tmp_path / "captions.jsonl").read_text()
    for name in ("load", "CLIP", "Tokenizer"):
        monkeypatch.setattr(clip_model, name, forbidden)
    monkeypatch.setattr(train, "CaptionedPictures", forbidden)
    train_tiny_unet(tmp_path, tmp_path / "a", 2)


def test_training_rows_are_a_picture_its_embedding_and_its_neighbours(world):
    index = open_index(world / "index")
    data = train.CachedPictures(world / "images", index, 16, 3)
    x0, query, neighbors = data.batch(torch.tensor([4, 9]))
    picture = np.asarray(clip_model.read_image(world / "images" / index.paths[9]))
    assert np.allclose((x0[1].permute(1, 2, 0).numpy() + 1) * 127.5, picture, atol=1e-3)
    assert torch.equal(query[1], torch.from_numpy(index.embeddings[9].astype(np.float32)))
    ids = index.search(query, 3, exclude=torch.tensor([4, 9]))[1]
    assert torch.equal(neighbors[0], torch.from_numpy(index.embeddings[ids[0].numpy()]).float())
    assert 4 not in ids[0] and 9 not in ids[1]


def test_a_folder_and_an_index_of_other_files_are_refused(world, tmp_path):
    index = open_index(world / "index")
    write_pictures(tmp_path / "more", 21)
    with pytest.raises(ValueError, match="0 of the index's are missing, 1 of the folder's"):
        train.check_same_files(tmp_path / "more", index)
    write_pictures(tmp_path / "fewer", 19)
    with pytest.raises(ValueError, match="1 of the index's are missing, 0"):
        train.check_same_files(tmp_path / "fewer", index)
    write_pictures(tmp_path / "same", 20)
    (tmp_path / "same" / "broken.png").write_bytes(b"")  # skipped by both
    train.check_same_files(tmp_path / "same", index)


# ---------------------------------------------------------------- the command


def test_command_trains_resumes_and_starts_from_weights(world, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [
        "continuous",
        "--data",
        str(world / "images"),
        "--index",
        str(world / "index"),
        "--out",
        str(out),
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--k",
        "3",
        "--no-bf16",
        "--init",
        str(world / "continuous.safetensors"),
    ]
    assert train.main(argv) == 0
    assert "steps 0 to 2" in capsys.readouterr().out
    metadata = clip_model.read_weights(out / "continuous.safetensors")[1]
    assert metadata["command"].startswith("python train.py continuous") and metadata["step"] == "2"
    began = knn_diffusion.load(world / "continuous.safetensors")[0].config
    assert knn_diffusion.load(out / "continuous.safetensors")[0].config == began
    assert train.main([*argv, "--target", "eps", "--out", str(tmp_path / "eps")]) == 0
    found = knn_diffusion.load(tmp_path / "eps" / "continuous.safetensors")[0].config
    assert found == replace(began, target="eps") != began
    capsys.readouterr()
    assert metadata["clip"] == open_index(world / "index").manifest["encoder_hash"]
    with open(out / "log.csv", "a") as file:
        file.write("50,0.1,1e-3,9.0\n")  # from a crash, beyond the state
    assert train.main([*argv[:8], "3", *argv[9:], "--resume"]) == 0
    assert "steps 2 to 3" in capsys.readouterr().out
    lines = (out / "log.csv").read_text().split()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "3"]


def test_user_mistakes_give_status_2_and_write_nothing(world, tmp_path, capsys):
    base = [
        "continuous",
        "--data",
        str(world / "images"),
        "--index",
        str(world / "index"),
        "--out",
        str(tmp_path / "out"),
    ]
    write_pictures(tmp_path / "other", 3)
    for extra in (
        ["--resume"],
        ["--preset", "grand"],
        ["--steps", "0"],
        ["--lr", "nan"],
        ["--k", "0"],
        ["--minutes", "nan"],
        ["--data", str(tmp_path / "nowhere")],
        ["--device", "abacus"],
        ["--data", str(tmp_path / "other")],
        ["--index", str(tmp_path)],
        ["--init", str(tmp_path / "missing")],
    ):
        assert train.main([*base, *extra]) == 2, extra
        error = capsys.readouterr().err.strip()
        assert error and "Traceback" not in error and len(error.splitlines()) == 1
    assert (
        train.main(["clip", "--data", str(world / "images"), "--out", str(tmp_path / "out")]) == 2
    )
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_refused(world, tmp_path):
    train_tiny_unet(world, tmp_path / "a", 1)
    (tmp_path / "a" / "state.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="can't resume"):
        train_tiny_unet(world, tmp_path / "a", 2, resume=True)
