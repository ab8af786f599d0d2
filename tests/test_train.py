"""train.py: shared stages, caches, resume, what a training may see."""

import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import UNET_CONFIG, tiny_unet, write_pictures
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import clip_model
import index as retrieval
import knn_diffusion
import train
import vqvae
from index import open_index

CPU = torch.device("cpu")
TINY_VQVAE = vqvae.VQVAEConfig(
    image_size=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(), latent_channels=8,
    embed_dim=4, n_codes=16, norm_groups=4)
TINY_TRANSFORMER = knn_diffusion.TransformerConfig(
    image_size=16, n_codes=16, tokens_a_side=8, embed_dim=16, n_neighbors=3, width=16, layers=1,
    heads=2, condition_width=12, T=6, query_map=2, query_hidden=8)


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    for what, config in (("vqvae", TINY_VQVAE), ("continuous", UNET_CONFIG),
                         ("discrete", TINY_TRANSFORMER)):
        monkeypatch.setitem(train.PRESETS[what], "tiny", config)


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("codec") / "vqvae.safetensors"
    vqvae.save(path, vqvae.VQVAE(TINY_VQVAE), {})
    return path


def command(world, what, out, steps, *more, codec=None):
    """The arguments of a tiny training; later ones count."""
    own = {"continuous": ["--preset", "tiny", "--index", world / "index", "--k", 3],
           "discrete": ["--preset", "tiny", "--index", world / "index", "--k", 3, "--vqvae", codec],
           "vqvae": ["--preset", "tiny"],
           "edit": ["--swap-index", world / "index", "--index", world / "index", "--clip",
                    world / "clip.safetensors", *([] if "SWAPS" in vars(train) else ["--swaps", 3])]}[what]
    return [str(part) for part in (
        what, "--data", world / "images", "--out", out, "--steps", steps, "--batch-size", 4,
        "--lr", 1e-3, "--seed", 5, "--no-bf16", *own, *more)]


def trained(world, what, out, steps, *more, codec=None):
    """The state after a tiny training."""
    assert train.main(command(world, what, out, steps, *more, codec=codec)) == 0
    return torch.load(out / "state.pt", weights_only=True)


def equal_states(one, two):
    return one["step"] == two["step"] and all(
        torch.equal(one[part][name], two[part][name])
        for part in ("model", "ema") for name in one[part])


@pytest.fixture
def flat_rate(monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: 1e-3)


# ---------------------------------------------------------------- shared stages

def test_learning_rate_warms_up_and_decays():
    rate = [train.learning_rate(step, 1.0, 10, 110) for step in range(111)]
    assert rate[0] == 0.1 and rate[9] == 1.0 and rate[110] == pytest.approx(0.02)
    assert rate[60] == pytest.approx(0.51) and all(a >= b for a, b in zip(rate[9:], rate[10:]))


def test_average_forgets_early_weights_fast():
    model, ema = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, d in ((0, 0.1), (10**6, 0.99)):
        start = ema.weight.item()
        train.average(ema, model, step, 0.99)
        wanted = d * start + (1 - d) * model.weight.item()
        assert ema.weight.item() == pytest.approx(wanted, abs=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(2, 1)
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=1.0), model.weight.clone()
    nan = model(torch.ones(1, 2)).sum() * torch.nan
    assert not train.descend(model, [optimizer], nan, 0.1, 1.0)
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert train.descend(model, [optimizer], model(torch.ones(1, 2)).sum(), 0.1, 1.0)
    assert not torch.equal(model.weight, before) and optimizer.param_groups[0]["lr"] == 0.1


def test_twenty_such_steps_in_a_row_stop_the_run(tmp_path):
    progress = train.Progress(tmp_path, 0, 100, None)
    for step in range(19):
        progress.update(step, math.nan, 0.1, 4, finite=False)
    progress.update(19, 1.0, 0.1, 4, finite=True)                          # one good step resets
    for step in range(20, 39):
        progress.update(step, math.nan, 0.1, 4, finite=False)
    with pytest.raises(FloatingPointError, match="20 times"):
        progress.update(39, math.nan, 0.1, 4, finite=False)
    progress.finish(39, tmp_path)


def test_muon_moves_every_singular_direction_alike():
    """Five Newton-Schulz steps against the singular value decomposition, and one step by hand."""
    torch.manual_seed(0)
    for shape in ((6, 40), (40, 6), (16, 32)):
        gradient = torch.randn(shape)
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        turned = u.T @ train.orthogonal(gradient) @ vt.T
        assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.3)).all()
        assert (turned - turned.diagonal().diag()).abs().max() < 0.05
    weights = [torch.nn.Parameter(torch.randn(4, 2, 3, 3)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = torch.randn(4, 2, 3, 3)
    train.Muon(weights, lr=0.1, weight_decay=0.5).step()                   # as one stack
    for weight, was in zip(weights, before):
        update = train.orthogonal(weight.grad.flatten(1)).view(4, 2, 3, 3)
        wanted = was * 0.95 - 0.1 * 0.2 * math.sqrt(18) * update           # 18 columns
        assert torch.allclose(weight, wanted, atol=5e-3)                   # bfloat16 inside


def test_muon_gets_matrices_inside_and_adam_the_rest():
    model = tiny_unet()
    muon, adam = train.muon_and_adam(model, 0.1, at_the_ends=("conv_in.", "conv_out."))
    sizes = [sum(p.numel() for g in o.param_groups for p in g["params"]) for o in (muon, adam)]
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) and sizes[0] > sizes[1]
    by_adam = {id(p) for g in adam.param_groups for p in g["params"]}
    for ends in (model.conv_in, model.conv_out):
        assert all(id(p) in by_adam for p in ends.parameters())
    assert id(model.condition.type_embedding) in by_adam and id(model.position_map) in by_adam


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize("what", ["continuous", "discrete", "vqvae"])
def test_a_resumed_run_equals_an_uninterrupted_one(world, codec, tmp_path, flat_rate, what):
    whole = trained(world, what, tmp_path / "a", 6, codec=codec)
    trained(world, what, tmp_path / "b", 3, codec=codec)
    resumed = trained(world, what, tmp_path / "b", 6, "--resume", codec=codec)
    assert equal_states(whole, resumed)
    assert not equal_states(whole, trained(world, what, tmp_path / "c", 6, "--seed", 6,
                                           codec=codec))


@pytest.mark.parametrize("what", ["continuous", "discrete"])
def test_accumulated_batches_are_one_large_batch(world, codec, tmp_path, what):
    large = trained(world, what, tmp_path / "a", 3, "--batch-size", 8, codec=codec)
    parts = trained(world, what, tmp_path / "b", 3, "--batch-size", 4, "--accumulate", 2,
                    codec=codec)
    for name, tensor in large["model"].items():
        assert torch.allclose(tensor, parts["model"][name], atol=2e-3), name


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


def test_resuming_takes_another_rate_but_no_other_experiment(world, codec, tmp_path, capsys):
    trained(world, "continuous", tmp_path / "a", 2)
    trained(world, "continuous", tmp_path / "a", 3, "--resume", "--lr", 1e-4, "--batch-size", 2)
    for more, sentence in ((["--condition", "query"], "condition was both, is query"),
                           (["--target", "eps"], "target was v, is eps"),
                           (["--preset", "stickers"], "preset was tiny, is stickers"),
                           (["--k", 2], "has 3 neighbours, --k is 2"),
                           (["--steps", 3], "has 3 steps, --steps is 3")):
        assert train.main(command(world, "continuous", tmp_path / "a", 4, "--resume", *more)) == 2
        assert sentence in capsys.readouterr().err
    assert train.main(command(world, "continuous", tmp_path / "a", 9)) == 2
    assert "holds a run: --resume goes on" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    vqvae.save(other, vqvae.VQVAE(TINY_VQVAE), {})
    trained(world, "discrete", tmp_path / "d", 1, codec=codec)
    assert train.main(command(world, "discrete", tmp_path / "d", 2, "--resume", codec=other)) == 2
    assert "vqvae was" in capsys.readouterr().err


def test_a_damaged_state_is_refused_and_a_damaged_log_is_not(world, tmp_path, capsys):
    trained(world, "continuous", tmp_path / "a", 2)
    (tmp_path / "a" / "log.csv").write_text("\nwhat?\n")
    trained(world, "continuous", tmp_path / "a", 3, "--resume")
    path = tmp_path / "a" / "state.pt"
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    for content in (b"not a state", sound[:-100], bytes(flipped)):
        path.write_bytes(content)
        assert train.main(command(world, "continuous", tmp_path / "a", 9, "--resume")) == 2
        assert "can't resume" in capsys.readouterr().err


def test_weights_are_the_average_numbered_and_samples_are_drawn(world, tmp_path):
    state = trained(world, "continuous", tmp_path / "a", 5, "--save-every", 2, "--keep")
    model, metadata = knn_diffusion.load(tmp_path / "a" / "continuous.safetensors")
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


# ---------------------------------------------------------------- what a training may see

def losses_seen(monkeypatch, name="diffusion_loss"):
    """What the loss is given in each step."""
    seen, loss = [], getattr(knn_diffusion, name)
    monkeypatch.setattr(knn_diffusion, name, lambda *given: (seen.append(given), loss(*given))[1])
    return seen


def test_a_row_is_a_picture_its_embedding_and_its_neighbours(world, tmp_path, monkeypatch):
    seen, index = losses_seen(monkeypatch), open_index(world / "index")
    trained(world, "continuous", tmp_path / "a", 1, "--query-noise", 0)
    _, _, x0, query, neighbors, t, eps, *_ = seen[0]
    rows = torch.from_numpy(index.rows[:]).float()
    for i in range(len(x0)):
        [row] = (rows == query[i]).all(1).nonzero()[:, 0].tolist()
        picture = np.asarray(clip_model.read_image(world / "images" / index.paths[row]))
        assert np.allclose((x0[i].permute(1, 2, 0).numpy() + 1) * 127.5, picture, atol=1e-3)
        ids = index.search(query[i:i + 1], 3, exclude=torch.tensor([row]))[1]
        assert row not in ids and torch.equal(neighbors[i], rows[ids[0]])
    assert eps.std().item() == pytest.approx(1, abs=0.1) and t.min() >= 1


def test_every_step_of_the_diffusion_is_trained_the_last_one_too(world, codec, tmp_path,
                                                                 monkeypatch):
    seen = losses_seen(monkeypatch), losses_seen(monkeypatch, "discrete_loss")
    trained(world, "continuous", tmp_path / "a", 40, "--batch-size", 20)
    trained(world, "discrete", tmp_path / "b", 10, "--batch-size", 20, codec=codec)
    t = torch.cat([given[5] for given in seen[0]])
    assert t.min() == 1 and t.max() == UNET_CONFIG.T
    t = torch.cat([given[4] for given in seen[1]])
    assert set(t.tolist()) == set(range(1, TINY_TRANSFORMER.T + 1))


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


def test_neighbours_may_come_from_another_index(world, tmp_path, monkeypatch):
    rows = torch.nn.functional.normalize(torch.randn(30, 16), dim=1)
    other = retrieval.write_index(tmp_path / "other", rows, [f"{i}.png" for i in range(30)],
                                  "some clip", open_index(world / "index").manifest["encoder_hash"],
                                  tmp_path)
    seen = losses_seen(monkeypatch)
    trained(world, "continuous", tmp_path / "a", 1, "--neighbors-from", tmp_path / "other")
    _, _, _, query, neighbors, *_ = seen[0]
    ids = other.search(query, 3)[1]
    assert torch.equal(neighbors, torch.from_numpy(other.rows[ids.numpy()]).float())


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
    trained(tmp_path, "continuous", tmp_path / "a", 2)


class ReadBacks(TorchDispatchMode):
    """Counts the tensors whose numbers are read, each of which a GPU would wait for."""
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


def test_a_step_reads_back_once(world):
    """Loss and gradient norm together, in `take_step`; the losses read nothing."""
    model, schedule = tiny_unet().train(), knn_diffusion.Schedule(100)
    x, q, n = torch.randn(2, 3, 16, 16), torch.randn(2, 16), torch.randn(2, 3, 16)
    t, no = torch.tensor([3, 70]), torch.zeros(2, dtype=torch.bool)
    tokens = knn_diffusion.TokenTransformer(TINY_TRANSFORMER)
    masks = knn_diffusion.MaskSchedule(6, 16)
    x0, t2 = torch.randint(16, (2, 64)), torch.tensor([1, 6])
    optimizers = train.muon_and_adam(model.requires_grad_(True), 1e-3, ("conv_in.",))
    with ReadBacks() as count:
        loss = knn_diffusion.diffusion_loss(model, schedule, x, q, n, t, x, no, no)
        xt = knn_diffusion.mask_and_replace(x0, t2, masks, torch.rand(2, 64), x0)
        knn_diffusion.discrete_loss(tokens, masks, x0, xt, t2, q, n, no, no)
        assert count.n == 0
        loss.backward()
        train.take_step(model, optimizers[:1], loss, 1e-3, 1.0)
    assert count.n <= 2                                  # one list of two numbers


# ---------------------------------------------------------------- what is made once

def test_pictures_and_tokens_are_made_once_and_anew_where_damaged(world, codec, tmp_path,
                                                                  monkeypatch):
    shutil.copytree(world / "index", tmp_path / "index", ignore=shutil.ignore_patterns("tokens-*"))
    shutil.copytree(world / "images", tmp_path / "images")
    first = trained(tmp_path, "discrete", tmp_path / "a", 2, codec=codec)
    [tokens] = (tmp_path / "index").glob("tokens-*.npy")
    wanted = np.load(tokens)
    assert wanted.shape == (20, 64)
    read = []
    monkeypatch.setattr(train, "read_square", lambda path, size: read.append(path))
    assert equal_states(first, trained(tmp_path, "discrete", tmp_path / "b", 2, codec=codec))
    assert not read                                       # with tokens no picture is opened
    monkeypatch.undo()
    monkeypatch.setitem(train.PRESETS["discrete"], "tiny", TINY_TRANSFORMER)
    for harm in (b"", tokens.read_bytes()[:200]):
        tokens.write_bytes(harm)
        trained(tmp_path, "discrete", tmp_path / f"c{len(harm)}", 1, codec=codec)
        assert (np.load(tokens) == wanted).all()
    write_pictures(tmp_path / "images", 21)               # one more than the index knows: fine
    trained(tmp_path, "discrete", tmp_path / "d", 1, codec=codec)


def test_a_jpeg_is_read_small_turned_and_the_same_as_slowly(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    picture = picture.resize((800, 600), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x112] = 6                                                        # a quarter turn
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    slow = clip_model.fit_square(clip_model.read_image(tmp_path / "a.jpg"), 64)
    quick = train.read_square(tmp_path / "a.jpg", 64)
    assert quick.shape == (64, 64, 3)
    assert np.abs(quick.astype(int) - np.asarray(slow)).mean() < 3
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="a.jpg"):
        train.read_square(tmp_path / "a.jpg", 64)


def test_a_folder_that_lacks_the_indexs_files_is_refused(world, tmp_path, capsys):
    write_pictures(tmp_path / "images", 3)
    argv = command(world, "continuous", tmp_path / "a", 1, "--data", tmp_path / "images")
    assert train.main(argv) == 2
    assert "003.png" in capsys.readouterr().err and not (tmp_path / "a").exists()


# ---------------------------------------------------------------- the VQ-VAE

def test_kept_out_drawings_leave_with_all_their_renderings():
    names = [f"flat/{name}-{i}.png" for name in "abcdef" for i in range(3)] + ["plain.png"]
    kept, out = train.split_by_drawing(names, 3)
    assert out == [f"flat/{name}-{i}.png" for name in "cf" for i in range(3)]
    assert sorted(kept + out) == sorted(names)
    assert train.split_by_drawing(names, 0) == (names, [])
    photographs = [f"img-{i:04d}.jpg" for i in range(1000)]
    assert len(train.split_by_drawing(photographs, 10, are_stickers=False)[1]) == 100


def test_what_is_measured_comes_from_all_folders():
    names = [f"flat/{i}" for i in range(1300)] + [f"outlined/{i}" for i in range(1100)]
    chosen = train.some(names, 1000)
    assert 700 < len(chosen) <= 1000 and len(set(chosen)) == len(chosen)
    assert abs(sum("flat" in name for name in chosen) / len(chosen) - 13 / 24) < 0.01
    assert train.some(names[:7], 1000) == names[:7] and train.some([], 5) == []


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
    assert said.count("step 30: PSNR") == said.count("step 60: PSNR") == 1
    assert "3 kept out" in said and "broken.png" in errors
    log = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert log[0].startswith("step,loss,lr,images_per_second")
    assert float(log[-1].split(",")[1]) < 0.8
    assert (tmp_path / "a" / "samples" / "0000060.png").is_file()


def test_a_gumbel_file_is_no_start_for_training(world, tmp_path, capsys):
    path = tmp_path / "gumbel.safetensors"
    vqvae.save(path, vqvae.VQVAE(replace(TINY_VQVAE, gumbel=True)), {})
    assert train.main(command(world, "vqvae", tmp_path / "out", 1, "--init", path)) == 2
    assert "Gumbel codebook" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- editing (Sec. 3.3)

def start_of(world, tmp_path, backbone, codec):
    """Weights to start from, and the flags that go with them."""
    if backbone == "continuous":
        return ["--init", world / "continuous.safetensors"]
    trained(world, "discrete", tmp_path / "generator", 2, codec=codec)
    return ["--init", tmp_path / "generator" / "discrete.safetensors", "--vqvae", codec]


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_editing_trains_from_a_generator_and_sees_no_text(world, codec, tmp_path, monkeypatch,
                                                          flat_rate, backbone):
    def refuse(*_: object) -> None:
        raise AssertionError("a text was read, or swaps made twice")

    start = start_of(world, tmp_path, backbone, codec)
    monkeypatch.setattr(clip_model.CLIP, "embed_texts", refuse)
    whole = trained(world, "edit", tmp_path / "a", 6, *start)
    model, metadata = knn_diffusion.load(tmp_path / "a" / "edit.safetensors")
    assert model.config.edit and metadata["clip"]
    assert ("vqvae" in metadata) == (backbone == "discrete")
    before = knn_diffusion.widened(knn_diffusion.load(start[1])[0]).state_dict()
    assert any((tensor != before[name]).any() for name, tensor in model.state_dict().items())
    trained(world, "edit", tmp_path / "b", 3, *start)
    monkeypatch.setattr(train.edit, "region_swap", refuse)
    resumed = trained(world, "edit", tmp_path / "b", 6, *start[2:], "--resume")
    assert equal_states(whole, resumed)


@pytest.mark.parametrize("backbone", ["continuous", "discrete"])
def test_the_model_is_shown_the_swap_and_asked_for_the_original(world, codec, tmp_path, monkeypatch,
                                                                backbone):
    """Outside the region both agree; the query is the original region's; a dropped one is null."""
    name = "diffusion_loss" if backbone == "continuous" else "discrete_loss"
    start = start_of(world, tmp_path, backbone, codec)
    seen = losses_seen(monkeypatch, name)
    dropped = torch.tensor([False, False, True, True])
    monkeypatch.setattr(knn_diffusion, "draw_edit_drops",
                        lambda *_: (~dropped & dropped, dropped, dropped))
    trained(world, "edit", tmp_path / "a", 1, *start)
    x0, shown = seen[0][2], seen[0][-1]
    pictures = np.load(world / "index" / "pictures-16.npy")
    [swaps] = (tmp_path / "a").glob("swaps-*.npz")
    with np.load(swaps) as made:
        manipulated, queries = train.to_x(made["manipulated"]), made["queries"]
    assert len(manipulated) == 3 * len(pictures)
    originals = train.to_x(pictures)
    if backbone == "discrete":
        model = vqvae.load(codec)[0]
        originals, manipulated = model.encode(originals), model.encode(manipulated)
    for i in range(4):
        rows = [row for row in range(len(queries))
                if torch.equal(seen[0][-5 if backbone == "discrete" else 3][i],
                               torch.from_numpy(queries[row]).float())]
        assert any(torch.equal(originals[row % 20], x0[i]) for row in rows)
        null = TINY_TRANSFORMER.n_codes if backbone == "discrete" else 0
        assert (shown[i] == null).all() if dropped[i] else any(
            torch.equal(manipulated[row], shown[i]) for row in rows)


def test_swaps_change_a_region_only_and_speak_of_what_was_there(world, tmp_path):
    trained(world, "edit", tmp_path / "a", 1, "--init", world / "continuous.safetensors",
            "--swaps", 2, "--seed", 7)
    index, clip = open_index(world / "index"), clip_model.load(world / "clip.safetensors")
    pictures = np.load(world / "index" / "pictures-16.npy")
    partner = retrieval.neighbor_table(index, 1)[:, 0]
    assert (partner != np.arange(20)).all()
    _, boxes, _ = train.edit.region_swap(train.to_x(pictures), train.to_x(pictures[partner]),
                                         torch.Generator().manual_seed(7))
    with np.load(next((tmp_path / "a").glob("swaps-*.npz"))) as made:
        manipulated, queries, neighbors = (made[name] for name in ("manipulated", "queries",
                                                                   "neighbors"))
    for i, box in enumerate(boxes.tolist()):
        left, top, right, bottom = box
        differs = (pictures[i] != manipulated[i]).any(-1)
        assert differs[top:bottom, left:right].any()
        differs[top:bottom, left:right] = False
        assert not differs.any()
        crop = Image.fromarray(pictures[i]).crop(train.edit.region_crop(tuple(box), 16, 16))
        wanted = clip.embed_pictures([crop])[0]
        assert torch.allclose(torch.from_numpy(queries[i]).float(), wanted, atol=2e-3)
    found = index.search(torch.from_numpy(queries).float(), 3)[1]
    assert (found.numpy() == neighbors).mean() > 0.95     # float16 queries, near ties


# ---------------------------------------------------------------- the command

def test_what_does_not_belong_together_is_refused(world, codec, tmp_path, capsys):
    for name, model, clip in (("a", tiny_unet(), "abc"), ("b", tiny_unet(embed_dim=8), "")):
        knn_diffusion.save(tmp_path / name, model, {"clip": clip})
        argv = command(world, "continuous", tmp_path / "out", 1, "--init", tmp_path / name)
        assert train.main(argv) == 2 and "was trained with the CLIP" in capsys.readouterr().err
    trained(world, "edit", tmp_path / "e", 1, "--init", world / "continuous.safetensors")
    argv = command(world, "continuous", tmp_path / "out", 1, "--init",
                   tmp_path / "e" / "edit.safetensors")
    assert train.main(argv) == 2 and "that edits" in capsys.readouterr().err
    argv = command(world, "discrete", tmp_path / "out", 1, "--init",
                   world / "continuous.safetensors", codec=codec)
    assert train.main(argv) == 2 and "holds a UNet" in capsys.readouterr().err
    argv = command(world, "discrete", tmp_path / "out", 1, "--preset", "gpu", codec=codec)
    argv = [part for part in argv if part not in ("--vqvae", str(codec))]
    assert train.main(argv) == 2
    assert "needs --vqvae, best of 16x16 tokens of 1024" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra", [
    ["--resume"], ["--preset", "grand"], ["--steps", "0"], ["--lr", "nan"], ["--k", "0"],
    ["--minutes", "nan"], ["--data", "nowhere"], ["--device", "abacus"], ["--index", "nowhere"],
    ["--init", "missing"], ["--swap-index", "x"], ["--batch-size", "1000000000000"]])
def test_user_mistakes_give_status_2_and_write_nothing(world, tmp_path, capsys, extra):
    assert train.main(command(world, "continuous", tmp_path / "out", 1, *extra)) == 2
    error = capsys.readouterr().err.strip()
    assert error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_changed_target_and_a_large_k_are_taken(world, tmp_path):
    trained(world, "continuous", tmp_path / "a", 1, "--target", "eps", "--k", 1000)
    config = knn_diffusion.load(tmp_path / "a" / "continuous.safetensors")[0].config
    assert config.target == "eps" and config.n_neighbors == 19
