"""train.py: shared stages, caches, resume, what a training may see."""

import argparse
import math
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TRANSFORMER_CONFIG, UNET_CONFIG, tiny_unet, tiny_vqvae, write_pictures
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import clip_model
import index as retrieval
import knn_diffusion
import train
import vqvae

TINY_TRANSFORMER = replace(TRANSFORMER_CONFIG, n_codes=16, tokens_a_side=8, layers=1, T=6)
BACKBONES = pytest.mark.parametrize("what", ["continuous", "discrete"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "SWAPS", 3)
    for what, config in (("vqvae", tiny_vqvae().config), ("continuous", UNET_CONFIG),
                         ("discrete", TINY_TRANSFORMER)):
        monkeypatch.setitem(train.PRESETS[what], "tiny", config)


def command(world, what, out, steps, *more):
    """The arguments of a tiny training; later ones count."""
    own = ["--swap-index", world / "index"] if what == "edit" else ["--preset", "tiny"]
    return [str(part) for part in (
        what, "--data", world / "images", "--out", out, "--steps", steps, "--batch-size", 4,
        "--lr", 1e-3, "--seed", 5, "--no-bf16", "--index", world / "index", "--k", 3, "--vqvae",
        world / "vqvae.safetensors", "--clip", world / "clip.safetensors", *own, *more)]


def trained(world, what, out, steps, *more):
    """The state after a tiny training."""
    assert train.main(command(world, what, out, steps, *more)) == 0
    return torch.load(out / "state.pt", weights_only=True)


@pytest.fixture
def refused(world, capsys):
    """Tells that such a training ends with status 2 and one sentence, which has some words."""
    def refuse(words, what, out, *more):
        assert train.main(command(world, what, out, 4, *more)) == 2
        error = capsys.readouterr().err.strip()
        assert error and words in error and len(error.splitlines()) == 1
    return refuse


def equal_states(one, two):
    return one["step"] == two["step"] and all(
        torch.equal(one[part][name], two[part][name])
        for part in ("model", "ema") for name in one[part])


def log_of(out):
    """Rows of log.csv, without its head."""
    head, *rows = [row.split(",") for row in (out / "log.csv").read_text().splitlines()]
    assert head == ["step", "loss", "lr", "images_per_second", "gradient_norm", "skipped",
                    "held_out_loss"]
    return rows


# ---------------------------------------------------------------- shared stages

def test_learning_rate_warms_up_and_decays():
    rate = [train.learning_rate(step, 1.0, 10, 110) for step in range(111)]
    assert rate[0] == 0.1 and rate[9] == 1.0 and rate[110] == pytest.approx(0.02)
    assert rate[60] == pytest.approx(0.51) and all(a >= b for a, b in zip(rate[9:], rate[10:]))


@pytest.mark.parametrize("step, d", [(0, 0.1), (10**6, 0.99)])
def test_average_forgets_early_weights_fast(step, d):
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    wanted = d * ema.weight.item() + (1 - d) * model.weight.item()
    train.average(ema, model, step, 0.99)
    assert ema.weight.item() == pytest.approx(wanted, abs=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_and_twenty_end_the_run(world, tmp_path,
                                                                         monkeypatch, capsys):
    model = torch.nn.Linear(2, 1)
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=1.0), model.weight.clone()
    for factor, is_equal in ((math.nan, True), (1.0, False)):
        loss = model(torch.ones(1, 2)).sum() * factor
        loss.backward()
        train.take_step(model, [optimizer], loss, 0.1)
        assert torch.equal(model.weight, before) == is_equal and model.weight.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.1
    monkeypatch.setattr(train, "take_step", lambda *_: (math.nan, 1.0))
    assert train.main(command(world, "continuous", tmp_path / "a", 19)) == 0
    assert log_of(tmp_path / "a")[0][5] == "19"
    assert train.main(command(world, "continuous", tmp_path / "b", 99)) == 1
    assert "20 steps were not finite" in capsys.readouterr().err


def test_muon_moves_every_singular_direction_of_matrices_and_convolutions_alike():
    torch.manual_seed(0)
    shapes = (6, 40), (40, 6), (4, 2, 3, 3), (8, 3, 1, 1)
    model = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)
    model.to(memory_format=torch.channels_last)
    before = [weight.detach().clone() for weight in model]
    for weight in model:
        weight.grad = torch.randn_like(weight)
    train.Muon(list(model), lr=0.1, weight_decay=0.5).step()
    for weight, was in zip(model, before):
        gradient = weight.grad.permute(0, 2, 3, 1).flatten(1) if was.ndim == 4 else weight.grad
        change = (0.95 * was - weight.detach()).reshape(was.shape)         # lr · decay = 0.05
        change = change.permute(0, 2, 3, 1).flatten(1) if was.ndim == 4 else change
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        turned = u.T @ change @ vt.T / (0.1 * 0.2 * math.sqrt(max(change.shape)))
        assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.3)).all()
        assert (turned - turned.diagonal().diag()).abs().max() < 0.1


def test_muon_gets_matrices_inside_and_adam_the_rest():
    model = tiny_unet().to(memory_format=torch.channels_last)
    muon, adam = train.muon_and_adam(model, 0.1)
    inside, others = set(muon.weights), set(adam.param_groups[0]["params"])
    assert inside.isdisjoint(others) and inside | others == set(model.parameters())
    assert all(p.ndim >= 2 for p in inside) and len(inside) > 20
    assert {*model.conv_in.parameters(), *model.conv_out.parameters(),
            model.condition.type_embedding, model.position_map} <= others


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("what", ["continuous", "discrete", "vqvae", "edit"])
def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path, monkeypatch, what):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)
    start = ["--init", world / "continuous.safetensors"] if what == "edit" else []
    whole = trained(world, what, tmp_path / "a", 6, *start)
    trained(world, what, tmp_path / "b", 3, *start)
    monkeypatch.setattr(train.edit, "region_swap", None)                   # swaps are made once
    assert equal_states(whole, trained(world, what, tmp_path / "b", 6, *start, "--resume"))


@BACKBONES
def test_accumulated_batches_are_one_large_batch_and_seeds_differ(world, tmp_path, what):
    large = trained(world, what, tmp_path / "a", 3, "--batch-size", 8)
    parts = trained(world, what, tmp_path / "b", 3, "--accumulate", 2)
    for name, tensor in large["model"].items():
        assert torch.allclose(tensor, parts["model"][name], atol=2e-3), name
    losses_and_norms = [[float(log_of(tmp_path / out)[0][i]) for i in (1, 4)] for out in "ab"]
    assert losses_and_norms[0] == pytest.approx(losses_and_norms[1], rel=0.02)
    assert not equal_states(parts, trained(world, what, tmp_path / "c", 3, "--accumulate", 2,
                                           "--seed", 6))


def test_a_signal_or_the_clock_saves_and_the_run_goes_on(world, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third step; dropout and all as in an uninterrupted run."""
    monkeypatch.setitem(train.PRESETS["continuous"], "tiny", replace(UNET_CONFIG, dropout=0.3))
    whole = trained(world, "continuous", tmp_path / "a", 6)
    seen, loss = [], knn_diffusion.diffusion_loss

    def interrupted(*given):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*given)

    monkeypatch.setattr(knn_diffusion, "diffusion_loss", interrupted)
    assert trained(world, "continuous", tmp_path / "b", 6)["step"] == 3
    assert "stopped at step 3, saved; --resume goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = trained(world, "continuous", tmp_path / "b", 6, "--resume")
    assert equal_states(whole, resumed)
    assert trained(world, "continuous", tmp_path / "c", 6, "--minutes", 1e-9)["step"] == 1


def test_resuming_takes_another_rate_but_no_other_experiment(world, tmp_path, refused):
    out = tmp_path / "a"
    trained(world, "continuous", out, 2)
    (out / "log.csv").write_text("\nwhat?\n")                              # no matter
    trained(world, "continuous", out, 3, "--resume", "--lr", 1e-4, "--batch-size", 2)
    for words, more in (("condition was both, is query", ["--condition", "query"]),
                        ("preset was tiny, is stickers", ["--preset", "stickers"]),
                        ("has 3 steps, --steps is 3", ["--steps", 3])):
        refused(words, "continuous", out, "--resume", *more)
    refused("holds a run: --resume goes on", "continuous", out)
    sound = (out / "state.pt").read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    for content in (b"not a state", bytes(flipped)):
        (out / "state.pt").write_bytes(content)
        refused("can't resume", "continuous", out, "--resume")
    clip_model.save_model(tmp_path / "other", tiny_vqvae(1), {})
    trained(world, "discrete", tmp_path / "d", 1)
    refused("vqvae was", "discrete", tmp_path / "d", "--resume", "--vqvae", tmp_path / "other")


def test_weights_are_the_average_numbered_and_samples_are_drawn(world, tmp_path):
    state = trained(world, "continuous", tmp_path / "a", 5, "--save-every", 2, "--keep", "--k", 99)
    model, metadata = knn_diffusion.load(tmp_path / "a" / "continuous.safetensors")
    assert model.config.n_neighbors == 19                                  # all others
    assert all(torch.equal(tensor, state["ema"][name].half().float())
               for name, tensor in model.state_dict().items())
    assert any((tensor != state["model"][name]).any() for name, tensor in state["ema"].items())
    assert metadata["step"] == "5" and metadata["condition"] == "both"
    assert metadata["command"].startswith("python train.py continuous --data")
    names = sorted(path.name for path in (tmp_path / "a").rglob("*0*.*"))
    assert names == [f"{stem}000000{i}.{end}" for stem, end in (("", "png"), ("continuous-",
                     "safetensors")) for i in (2, 4, 5)]
    grid = Image.open(tmp_path / "a" / "samples" / "0000002.png")
    assert grid.size == (12 * 18 + 2, 2 * 18 + 2)                          # pictures above samples


class ReadBacks(TorchDispatchMode):
    """Counts the numbers that are read out of tensors; a GPU would be waited for."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("edits", [False, True])
@BACKBONES
def test_a_step_copies_no_float_picture_mixes_no_devices_and_reads_back_once(
        what, edits, tmp_path, monkeypatch):
    """On the meta device numbers can't be read, nor other devices' tensors be used."""
    copied, losses, on_device = [], [], train.on_device
    monkeypatch.setattr(train, "on_device", lambda inputs, device: (
        copied.append([each.dtype for each in inputs if each.ndim == 4]),
        on_device(inputs, device))[1])
    monkeypatch.setattr(train, "take_step", lambda *given: losses.append(given[2]) or (1.0, 1.0))
    monkeypatch.setattr(train, "muon_and_adam", lambda *_: [])
    monkeypatch.setattr(train, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(train.Run, "save", lambda *_: None)
    monkeypatch.setattr(train, "samples", lambda *_: [])
    monkeypatch.setattr(train.Run, "save_grid", lambda *_: None)
    args = argparse.Namespace(
        what=what, data="", out=tmp_path, device=torch.device("meta"), bf16=False, steps=2, lr=1e-3,
        batch_size=3, accumulate=2, seed=0, preset="tiny", resume=False, weights=None, command="",
        minutes=1, save_every=9, keep=False, condition="both", flip=True, query_noise=1.0)
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 16, (20, 16, 16, 3) if what == "continuous" else (20, 64))
    x0 = x0.astype(np.uint8 if what == "continuous" else np.int32)
    data = train.Data(x0, rng.normal(size=(20, 16)), np.zeros((20, 3), int),
                      rng.normal(size=(20, 16)), [x0] * edits)
    if what == "continuous":
        train.train_continuous(args, tiny_unet(edit=edits), data, {})
        assert copied == [[torch.uint8, torch.float32, *[torch.uint8] * edits]] * 4      # x_0, ε
    else:
        config = replace(TINY_TRANSFORMER, edit=edits)
        train.train_discrete(args, knn_diffusion.TokenTransformer(config), data, None, {})
    assert len(losses) == 2 and all(loss.is_meta for loss in losses)
    monkeypatch.undo()
    model = tiny_unet().requires_grad_(True).to(memory_format=torch.channels_last)
    loss = sum(p.square().sum() for p in model.parameters())
    loss.backward()
    with ReadBacks() as count:
        train.take_step(model, train.muon_and_adam(model, 1e-3)[:1], loss, 1e-3)
    assert count.n <= 2                                  # one list of two numbers


# ---------------------------------------------------------------- what a training may see

def losses_seen(monkeypatch, what="continuous"):
    """What the loss is given in each step."""
    name = "diffusion_loss" if what == "continuous" else "discrete_loss"
    seen, loss = [], getattr(knn_diffusion, name)
    monkeypatch.setattr(knn_diffusion, name, lambda *given: (seen.append(given), loss(*given))[1])
    return seen


@pytest.mark.parametrize("of", ["its own index", "another", "a larger one"])
def test_a_row_is_a_picture_its_embedding_and_its_neighbours(world, tmp_path, monkeypatch, of):
    """The picture itself is not among them."""
    index = database = retrieval.open_index(world / "index")
    if of != "its own index":
        rows, names = torch.nn.functional.normalize(torch.randn(30, 16), dim=1), list(range(30))
        if of == "a larger one":
            rows = torch.cat([rows, torch.from_numpy(index.rows[:])])
            names += index.paths
        database = retrieval.write_index(tmp_path / "index", rows, [str(i) for i in names], "clip",
                                         index.manifest["encoder_hash"], index.root)
    more = [] if database is index else ["--neighbors-from", tmp_path / "index"]
    seen = losses_seen(monkeypatch)
    trained(world, "continuous", tmp_path / "a", 1, *more)
    _, _, x0, query, neighbors, t, eps, *_ = seen[0]
    rows = torch.from_numpy(index.rows[:]).float()
    for i in range(len(x0)):
        [row] = (rows == query[i]).all(1).nonzero()[:, 0].tolist()
        picture = np.asarray(clip_model.read_image(world / "images" / index.paths[row]))
        assert np.allclose((x0[i].permute(1, 2, 0).numpy() + 1) * 127.5, picture, atol=1e-3)
        row += 30 * (of == "a larger one")
        itself = None if of == "another" else torch.tensor([row])
        ids = database.search(query[i:i + 1], 3, exclude=itself)[1]
        assert np.array_equal(neighbors[i], database.rows[ids[0]])
    assert eps.std().item() == pytest.approx(1, abs=0.1) and t.min() >= 1


@BACKBONES
def test_every_step_of_the_diffusion_is_trained_the_last_too(world, tmp_path, monkeypatch, what):
    T, i, steps = (100, 5, 40) if what == "continuous" else (6, 4, 10)     # i: the place of t
    seen = losses_seen(monkeypatch, what)
    trained(world, what, tmp_path / "a", steps, "--batch-size", 20)
    t = torch.cat([given[i] for given in seen])
    assert t.min() == 1 and t.max() == T and len(t.unique()) > 0.9 * T


@pytest.mark.parametrize("condition", ["both", "query", "neighbors"])
def test_condition_blinds_what_it_does_not_name(world, tmp_path, monkeypatch, condition):
    seen = losses_seen(monkeypatch)
    trained(world, "continuous", tmp_path / "a", 20, "--condition", condition)
    query, neighbors = (torch.cat([given[i] for given in seen]).float().mean() for i in (7, 8))
    assert (query == 1) == (condition == "neighbors") and (neighbors == 1) == (condition == "query")


def test_flips_and_noise_change_the_picture_and_the_query_alone(world, tmp_path, monkeypatch):
    seen = losses_seen(monkeypatch)
    for i, more in enumerate(([], ["--flip"], ["--query-noise", 1.0])):
        trained(world, "continuous", tmp_path / str(i), 1, "--batch-size", 16, *more)
    plain, flipped, noisy = seen
    is_flipped = (plain[2] != flipped[2]).flatten(1).any(1)
    assert 2 < is_flipped.sum() < 14
    assert torch.equal(plain[2][is_flipped].flip(-1), flipped[2][is_flipped])
    assert torch.equal(plain[3], flipped[3]) and torch.equal(plain[2], noisy[2])
    changed = (plain[3] - noisy[3]).abs().amax(1) > 1e-2
    assert 2 < changed.sum() < 14 and torch.equal(plain[4], noisy[4])


def test_every_fiftieth_picture_is_kept_out_with_all_its_rows():
    for N, R, wanted in ((100, 100, [49, 99]), (99, 99, []), (120, 240, [49, 99, 169, 219])):
        data = train.Data(np.zeros(N), *[np.zeros(R)] * 3, [])
        assert data.held_out.tolist() == wanted
        assert data.rows.tolist() == sorted({*range(R)} - {*wanted})
    data = train.Data(*[np.zeros(50000)] * 4, [])
    assert 200 < len(data.held_out) <= 256 and data.held_out[-1] > 49000


@BACKBONES
def test_the_loss_of_rows_kept_out_is_logged_and_they_are_not_trained_on(world, tmp_path,
                                                                        monkeypatch, what):
    images, names = tmp_path / "images", [f"{i:03d}.png" for i in range(120)]
    write_pictures(images, 120)
    rows = torch.nn.functional.normalize(torch.randn(120, 16), dim=1)
    index = retrieval.write_index(tmp_path / "index", rows, names, "clip", "abc", images)
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    seen, i = losses_seen(monkeypatch, what), 3 if what == "continuous" else 5
    state = trained(tmp_path, what, tmp_path / "a", 5, "--batch-size", 64, "--save-every", 4,
                    "--condition", "neighbors", "--vqvae", world / "vqvae.safetensors")
    log = log_of(tmp_path / "a")
    assert [(row[0], bool(row[-1])) for row in log] == [("2", False), ("4", True), ("5", True)]
    kept = torch.from_numpy(index.rows[[49, 99]]).float()
    is_kept = [(given[i][:, None] == kept).all(-1).any(1).tolist() for given in seen]
    assert not any(map(any, is_kept[:4] + is_kept[5:6])) and is_kept[4::2] == [[True, True]] * 2

    assert seen[-1][7].all() and not seen[-1][8].any()                     # the query is blinded
    model, seeded = seen[-1][0], torch.Generator().manual_seed(5)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in state["ema"].items())
    x0 = train.to_x(train.read_pictures(images, ["049.png", "099.png"], 16))
    near = torch.from_numpy(index.rows[retrieval.neighbor_table(index, 3)[[49, 99]]]).float()
    t = torch.randint(1, 1 + model.config.T, (2,), generator=seeded)
    drops = torch.tensor([True, True]), torch.tensor([False, False])
    if what == "continuous":
        eps = torch.randn(2, 3, 16, 16, generator=seeded)
        wanted = knn_diffusion.diffusion_loss(model, knn_diffusion.Schedule(100), x0, kept, near, t,
                                              eps, *drops)
    else:
        x0 = vqvae.load(world / "vqvae.safetensors")[0].encode(x0)
        masks = knn_diffusion.MaskSchedule(6, 16)
        u = torch.rand(2, 64, generator=seeded)
        codes = torch.randint(16, (2, 64), generator=seeded)
        xt = knn_diffusion.mask_and_replace(x0, t, masks, u, codes)
        wanted = knn_diffusion.discrete_loss(model, masks, x0, xt, t, kept, near, *drops)
    assert float(log[-1][-1]) == pytest.approx(wanted.item(), abs=2e-5)


def test_diffusion_training_sees_no_text_and_runs_no_clip(world, tmp_path, monkeypatch):
    """Not one text is opened, be it in the same folder; no CLIP is built, no tokenizer made."""
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copytree(world / "index", tmp_path / "index")
    for place in (tmp_path, tmp_path / "images"):
        (place / "captions.jsonl").write_text('{"captions": ["a fox"]}')

    def watched(path, *args, opened=open, **options):
        assert "captions" not in str(path)
        return opened(path, *args, **options)

    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr("io.open", watched)               # pathlib's
    with pytest.raises(AssertionError):
        (tmp_path / "captions.jsonl").read_text()
    for name in ("load", "CLIP", "Tokenizer"):
        monkeypatch.setattr(clip_model, name, None)
    trained(tmp_path, "continuous", tmp_path / "a", 2)


def test_tokens_are_made_once_and_anew_where_damaged(world, tmp_path, monkeypatch):
    shutil.copytree(world / "index", tmp_path / "index", ignore=shutil.ignore_patterns("tokens-*"))
    shutil.copytree(world / "images", tmp_path / "images")
    own = ["--vqvae", world / "vqvae.safetensors"]
    first = trained(tmp_path, "discrete", tmp_path / "a", 2, *own)
    [tokens] = (tmp_path / "index").glob("tokens-*.npy")
    wanted = np.load(tokens)
    assert wanted.shape == (20, 64)
    (tmp_path / "index" / "pictures-16.npy").unlink()
    with monkeypatch.context() as patch:                  # with tokens no picture is opened
        patch.setattr(train, "read_pictures", None)
        assert equal_states(first, trained(tmp_path, "discrete", tmp_path / "b", 2, *own))
    for harm in (b"", tokens.read_bytes()[:200]):
        tokens.write_bytes(harm)
        trained(tmp_path, "discrete", tmp_path / f"c{len(harm)}", 1, *own)
        assert (np.load(tokens) == wanted).all()
    write_pictures(tmp_path / "images", 21)               # one more than the index knows: fine
    trained(tmp_path, "discrete", tmp_path / "d", 1, *own)


# ---------------------------------------------------------------- the VQ-VAE

def test_kept_out_drawings_leave_with_all_their_renderings():
    names = [f"flat/{name}-{i}.png" for name in "abcdef" for i in range(3)] + ["plain.png"]
    kept, out = train.split_by_drawing(names, 3)
    assert out == names[6:9] + names[15:18] and sorted(kept + out) == sorted(names)
    assert train.split_by_drawing(names, 0) == (names, [])
    photographs = [f"img-{i:04d}.jpg" for i in range(1000)]
    assert len(train.split_by_drawing(photographs, 10, are_stickers=False)[1]) == 100


def test_vqvae_learns_restarts_codes_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-2)
    monkeypatch.setattr(train, "REVIVE_EVERY", 10)
    write_pictures(tmp_path / "images", 8)
    (tmp_path / "images" / "broken.png").write_bytes(b"")
    calls, restart = [], vqvae.restart_dead_codes
    monkeypatch.setattr(vqvae, "restart_dead_codes",
                        lambda *given: (calls.append(given[1].sum()), restart(*given)))
    trained(tmp_path, "vqvae", tmp_path / "a", 60, "--keep-out", 3, "--save-every", 30)
    assert len(calls) == 5 and min(calls) == 8 * 4 * 64   # from 0 to 40: not in the last fifth
    said, errors = capsys.readouterr()
    assert "3 kept out" in said and "broken.png" in errors
    log = log_of(tmp_path / "a")
    assert [row[0] for row in log] == ["30", "50", "60"] and float(log[-1][1]) < 0.8
    assert float(log[-1][-1]) < float(log[0][-1]) < 1.5 and log[1][-1] == ""     # held out
    assert (tmp_path / "a" / "samples" / "0000060.png").is_file()


# ---------------------------------------------------------------- editing (Sec. 3.3)

@BACKBONES
def test_the_model_is_shown_the_swap_and_asked_for_the_original(world, tmp_path, monkeypatch, what):
    """Outside the region both agree; the query is the original region's; a dropped one is null."""
    seen = losses_seen(monkeypatch, what)
    dropped = torch.tensor([False, False, True, True])
    monkeypatch.setattr(knn_diffusion, "draw_edit_drops",
                        lambda *_: (~dropped & dropped, dropped, dropped))
    monkeypatch.setattr(clip_model.CLIP, "embed_texts", None)              # no text is read
    trained(world, "edit", tmp_path / "a", 1, "--init", world / f"{what}.safetensors")
    model, metadata = knn_diffusion.load(tmp_path / "a" / "edit.safetensors")
    assert model.config.edit and metadata["clip"] and ("vqvae" in metadata) == (what == "discrete")
    x0, shown, asked = seen[0][2], seen[0][-1], seen[0][3 if what == "continuous" else -5]
    originals = train.to_x(np.load(world / "index" / "pictures-16.npy"))
    with np.load(tmp_path / "a" / "swaps.npz") as made:
        manipulated, queries = train.to_x(made["manipulated"]), torch.from_numpy(made["queries"])
    assert len(manipulated) == len(queries) == 3 * len(originals)
    if what == "discrete":
        codec = vqvae.load(world / "vqvae.safetensors")[0]
        originals, manipulated = codec.encode(originals), codec.encode(manipulated)
    for i in range(4):
        rows = (queries.float() == asked[i]).all(1).nonzero()[:, 0].tolist()
        assert any(torch.equal(originals[row % 20], x0[i]) for row in rows)
        null = TINY_TRANSFORMER.n_codes if what == "discrete" else 0
        assert (shown[i] == null).all() if dropped[i] else any(
            torch.equal(manipulated[row], shown[i]) for row in rows)


def test_swaps_change_a_region_only_and_speak_of_what_was_there(world, tmp_path):
    trained(world, "edit", tmp_path / "a", 1, "--init", world / "continuous.safetensors")
    index, clip = retrieval.open_index(world / "index"), clip_model.load(world / "clip.safetensors")
    pictures = np.load(world / "index" / "pictures-16.npy")
    partner = retrieval.neighbor_table(index, 1)[:, 0]
    _, boxes = train.edit.region_swap(train.to_x(pictures), train.to_x(pictures[partner]),
                                      torch.Generator().manual_seed(5))
    with np.load(tmp_path / "a" / "swaps.npz") as made:
        manipulated, queries = made["manipulated"], torch.from_numpy(made["queries"])
    for i, box in enumerate(boxes.tolist()):
        left, top, right, bottom = box
        differs = (pictures[i] != manipulated[i]).any(-1)
        assert differs.any() and differs.sum() == differs[top:bottom, left:right].sum()
        crop = Image.fromarray(pictures[i]).crop(train.edit.region_crop(tuple(box), 16, 16))
        assert torch.allclose(queries[i].float(), clip.embed_pictures([crop])[0], atol=2e-3)
    name = f"neighbors-3-from-{retrieval.rows_digest(index.rows)[:16]}.npy"
    itself = torch.arange(len(queries)) % len(index)
    assert np.array_equal(np.load(world / "index" / name),
                          index.search(queries, 3, exclude=itself)[1])


# ---------------------------------------------------------------- the command

def test_what_does_not_belong_together_is_refused(world, tmp_path, refused, capsys):
    out, generator = tmp_path / "out", world / "continuous.safetensors"
    for name, model, clip in (("a", tiny_unet(), "abc"), ("b", tiny_unet(embed_dim=8), "")):
        clip_model.save_model(tmp_path / name, model, {"clip": clip})
        refused("another CLIP", "continuous", out, "--init", tmp_path / name)
    clip_model.save_model(tmp_path / "edits", tiny_unet(edit=True), {})
    clip_model.save_model(tmp_path / "gumbel", tiny_vqvae(gumbel=True), {})
    write_pictures(tmp_path / "few", 3)
    refused("that edits", "continuous", out, "--init", tmp_path / "edits")
    refused("holds a UNet", "discrete", out, "--init", generator)
    refused("Gumbel codebook", "vqvae", out, "--init", tmp_path / "gumbel")
    refused("--flip is the U-Net's", "discrete", out, "--flip")
    refused("no 003.png: give the --index", "discrete", out, "--data", tmp_path / "few")
    argv = command(world, "discrete", out, 1, "--preset", "gpu")
    i = argv.index("--vqvae")
    assert train.main(argv[:i] + argv[i + 2:]) == 2                        # the stickers' VQ-VAE
    assert "wanted one that makes 16x16 of 1024" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("extra", [
    ["--resume"], ["--preset", "grand"], ["--steps", "0"], ["--lr", "nan"], ["--k", "0"],
    ["--minutes", "nan"], ["--data", "nowhere"], ["--device", "abacus"], ["--index", "nowhere"],
    ["--init", "missing"], ["--swap-index", "x"], ["--batch-size", "-1"]])
def test_user_mistakes_give_status_2_and_write_nothing(tmp_path, refused, extra):
    refused("", "continuous", tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()
