"""clip_model.py: other people's checkpoints, against their own code where it is installed.

The oracles come with `pip install --no-deps -r requirements-oracles.txt`; their weights here are
random: nothing is downloaded.
"""

import gzip
import importlib.util
import json
import random
import sys
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clip_model
from clip_model import read_weights, write_weights

TOLERANCE = 1e-5


def oracle(name: str) -> ModuleType:
    """A module of openai/CLIP's code, loaded by path: importing its package wants torchvision."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        pytest.skip("clip-anytorch is not installed (requirements-oracles.txt)")
    path = Path(spec.submodule_search_locations[0]) / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"openai_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {"embed_dim": 24, "context_length": 16, "vocab_size": 200, "transformer_width": 64,
         "transformer_heads": 1, "transformer_layers": 2}
TOWERS = {
    "vit": {"image_resolution": 32, "vision_layers": 2, "vision_width": 128,
            "vision_patch_size": 8},
    "resnet": {"image_resolution": 64, "vision_layers": (2, 1, 2, 1), "vision_width": 8,
               "vision_patch_size": None},
}


def openai_model(tower: str, activation: str = "quick_gelu", **changes) -> nn.Module:
    """Their model with random weights everywhere; GELU, which it lacks, is put in by hand."""
    torch.manual_seed(0)
    model = oracle("model").CLIP(**{**SMALL, **TOWERS[tower], **changes}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bn3.weight" in name:                 # zero at their start: the block would be blind
                parameter.fill_(1.0)
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if tower == "resnet":                        # running statistics that fit the weights
            model.train()
            for _ in range(20):
                side = model.visual.input_resolution
                model.encode_image(torch.randn(4, 3, side, side))
            model.eval()
    if activation == "gelu":
        for module in model.modules():
            if hasattr(module, "gelu"):
                module.gelu = nn.GELU()
    return model


def example(model: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and tokens, each text with one end token (the largest id) at another place."""
    torch.manual_seed(1)
    tokens = torch.randint(1, model.vocab_size - 2, (3, model.context_length))
    for row, end in zip(tokens, (4, model.context_length - 1, 1)):
        row[0], row[end], row[end + 1:] = model.vocab_size - 2, model.vocab_size - 1, 0
    return torch.randn(3, 3, size, size), tokens


@torch.no_grad()
def assert_same_embeddings(ours: clip_model.CLIP, theirs: nn.Module, size: int) -> None:
    pixels, tokens = example(theirs, size)
    for got, features in ((ours.embed_images(pixels), theirs.encode_image(pixels)),
                          (ours.embed_tokens(tokens), theirs.encode_text(tokens))):
        wanted = nn.functional.normalize(features, dim=-1)
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= TOLERANCE
        assert got.std(0).mean() > 10 * TOLERANCE              # different inputs, different answers


# ---------------------------------------------------------------- towers and layouts

@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_towers_equal_openais_own_code(tower, activation, tmp_path):
    theirs = openai_model(tower, activation)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    ours = clip_model.load(tmp_path / "w.pt", activation=activation)
    assert_same_embeddings(ours, theirs, TOWERS[tower]["image_resolution"])
    other = "gelu" if activation == "quick_gelu" else "quick_gelu"
    wrong = clip_model.load(tmp_path / "w.pt", activation=other)
    tokens = example(theirs, TOWERS[tower]["image_resolution"])[1]
    with torch.no_grad():
        assert (wrong.embed_tokens(tokens) - ours.embed_tokens(tokens)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tower, sizes", [
    ("vit", {"embed_dim": 512, "vision_layers": 12, "vision_width": 768, "vision_patch_size": 32}),
    ("resnet", {"embed_dim": 1024, "vision_layers": (3, 4, 6, 3), "vision_width": 64})])
def test_full_size_towers_equal_openais_own_code(tower, sizes, tmp_path):
    text = {"context_length": 77, "vocab_size": 49408, "transformer_width": 512,
            "transformer_heads": 8, "transformer_layers": 12}
    theirs = openai_model(tower, image_resolution=224, **sizes, **text)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    assert_same_embeddings(clip_model.load(tmp_path / "w.pt", activation="quick_gelu"), theirs, 224)


def in_custom_text_layout(state: dict) -> dict:
    """OpenCLIP's CustomTextCLIP: the text tower's names under "text."."""
    return {name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": t
            for name, t in state.items()}


def in_hugging_faces_layout(state: dict) -> dict:
    """Written from transformers' modeling_clip.py, in the other direction than the reader."""
    found = {"logit_scale": state["logit_scale"],
             "visual_projection.weight": state["visual.proj"].T.contiguous(),
             "text_projection.weight": state["text_projection"].T.contiguous(),
             "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
             "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
             "vision_model.embeddings.position_embedding.weight":
                 state["visual.positional_embedding"],
             "vision_model.embeddings.position_ids": torch.arange(17)[None],
             "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
             "text_model.embeddings.position_embedding.weight": state["positional_embedding"]}
    for kind in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        found[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
        found[f"text_model.final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
            for i in range(2):
                block, layer = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                thirds = state[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for part, third in zip("qkv", thirds):
                    found[f"{layer}.self_attn.{part}_proj.{kind}"] = third.clone()
                for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"),
                             ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                             ("mlp.c_proj", "mlp.fc2")):
                    found[f"{layer}.{b}.{kind}"] = state[f"{block}.{a}.{kind}"]
    return found


def test_every_layout_and_wrapper_gives_the_same_model(tmp_path):
    theirs = openai_model("vit")
    state = theirs.state_dict()
    torch.save({"epoch": 3, "name": "run", "optimizer": {"state": {}, "param_groups": []},
                "state_dict": {f"module.{k}": v for k, v in in_custom_text_layout(state).items()}},
               tmp_path / "openclip.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 1},
               tmp_path / "lightning.ckpt")
    write_weights(tmp_path / "hf.safetensors", in_hugging_faces_layout(state), {"format": "pt"})
    write_weights(tmp_path / "openclip.safetensors", state, {})
    for path in list(tmp_path.iterdir()):
        assert_same_embeddings(clip_model.load(path, activation="quick_gelu"), theirs, 32)
    resnet = openai_model("resnet")
    state = in_custom_text_layout(resnet.state_dict())
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "rn")
    ours = clip_model.load(tmp_path / "rn", activation="quick_gelu")
    assert_same_embeddings(ours, resnet, 64)
    assert not ours.visual.bn1.training and "ResNet" in ours.describe()


@pytest.mark.parametrize("kind", ["openclip", "hugging face"])
@pytest.mark.parametrize("own_pixels", [True, False])
def test_settings_beside_the_weights_are_heeded_in_both_forms(kind, own_pixels, tmp_path):
    write_weights(tmp_path / "open_clip_model.safetensors",
                  openai_model("vit", vocab_size=514).state_dict(), {})
    mean, std = clip_model.PIXEL_MEAN, clip_model.PIXEL_STD
    if own_pixels:
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)
    pixels = {"mean": mean, "std": std} if own_pixels else {}
    if kind == "openclip":
        files = {"open_clip_config": {"preprocess_cfg": pixels, "model_cfg": {
            "text_cfg": {"heads": 2}, "vision_cfg": {"width": 128, "head_width": 32}}}}
    else:
        files = {"config": {"vision_config": {"num_attention_heads": 4},
                            "text_config": {"num_attention_heads": 2, "hidden_act": "gelu"}},
                 "preprocessor_config": {f"image_{key}": value for key, value in pixels.items()}}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    ours = clip_model.load(tmp_path)
    config = ours.config
    assert (config.activation, config.vision_heads, config.text_heads) == ("gelu", 4, 2)
    assert (config.pixel_mean, config.pixel_std) == (mean, std)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    normalised = torch.from_numpy((picture / 255 - mean) / std).float().permute(2, 0, 1)
    assert torch.allclose(ours.embed_pictures([Image.fromarray(picture)]),
                          ours.embed_images(normalised[None]), atol=1e-6)
    ours.tokenizer = clip_model.Tokenizer([], 16)
    clip_model.save(tmp_path / "ours", ours, {})                        # our own files keep them
    assert clip_model.load(tmp_path / "ours").config == config


@pytest.mark.parametrize("part, name, value", [
    ("vision_cfg", "norm_kwargs", {"eps": 1e-6}), ("vision_cfg", "layer_norm_eps", 1e-6),
    ("text_cfg", "no_causal_mask", True), ("text_cfg", "pool_type", "last"),
    ("text_cfg", "hidden_act", "relu"), ("preprocess_cfg", "resize_mode", "squash")])
def test_settings_that_are_not_built_here_are_refused(part, name, value, tmp_path):
    write_weights(tmp_path / "open_clip_model.safetensors", openai_model("vit").state_dict(), {})
    parts = {"vision_cfg": {"width": 128}, "text_cfg": {"heads": 2}, "preprocess_cfg": {}}
    parts[part][name] = value
    file = tmp_path / ("config.json" if name == "hidden_act" else "open_clip_config.json")
    pixels = parts.pop("preprocess_cfg")
    file.write_text(json.dumps(parts | {"model_cfg": parts, "preprocess_cfg": pixels}))
    with pytest.raises(ValueError, match="does not fit a CLIP"):
        clip_model.load(tmp_path)


def test_shards_and_a_config_of_something_else(tmp_path):
    theirs = openai_model("vit")
    state = in_hugging_faces_layout(theirs.state_dict())
    for i in range(2):
        write_weights(tmp_path / f"model-{i}.safetensors",
                      {name: state[name] for name in list(state)[i::2]}, {})
    assert_same_embeddings(clip_model.load(tmp_path, activation="quick_gelu"), theirs, 32)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match="does not fit"):
        clip_model.load(tmp_path)
    write_weights(tmp_path / "w.safetensors", state, {})
    (tmp_path / "config.json").write_text('{"learning_rate": 1}')           # another model's
    assert clip_model.load(tmp_path / "w.safetensors", activation="gelu").config.text_heads == 1


PUBLISHED = {  # the published widths, and millions of parameters as OpenCLIP's model table counts
    "ViT-B/32": (dict(), 151.28),
    "RN50x4": (dict(embed_dim=640, image_size=288, vision_width=80, vision_layers=(4, 6, 10, 6),
                    vision_heads=40, text_width=640, text_heads=10), 178.30),
    "H/14": (dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32,
                  vision_heads=16, text_width=1024, text_layers=24, text_heads=16,
                  activation="gelu"), 986.11),
    "bigG/14": (dict(embed_dim=1280, patch_size=14, vision_width=1664, vision_layers=48,
                     vision_heads=16, vision_hidden=8192, text_width=1280, text_layers=32,
                     text_heads=20, activation="gelu"), 2539.57)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_published_models_are_read_off_their_shapes(name):
    changes, millions = PUBLISHED[name]
    config = clip_model.ClipConfig(**changes)
    with torch.device("meta"):
        model = clip_model.CLIP(config)
    found = clip_model.sizes_from_shapes(model.state_dict())
    for field, value in found.items():
        if not field.endswith("hidden"):
            assert getattr(config, field) == value, field
    assert len(found) >= 11
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_a_guessed_activation_warns_and_a_told_one_does_not(tmp_path):
    state = openai_model("vit").state_dict()
    torch.save(state, tmp_path / "full.pt")
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "half.pt")
    with pytest.warns(UserWarning, match=": gelu is guessed"):
        assert clip_model.load(tmp_path / "full.pt").config.activation == "gelu"
    with pytest.warns(UserWarning, match="quick_gelu is guessed"):
        half = clip_model.load(tmp_path / "half.pt")
    assert half.config.activation == "quick_gelu" and half.ln_final.weight.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clip_model.load(tmp_path / "half.pt", activation="gelu").config.activation == "gelu"


def test_what_is_no_clip_is_refused_with_one_sentence(tmp_path):
    state = openai_model("vit").state_dict()
    extra = {**state, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(128)}
    odd = {**state, "ln_final.bias": torch.zeros(3)}
    for wrong, word in ((extra, "ls_1"), (odd, "ln_final.bias"),
                        ({"a": 1}, "token_embedding"), ([1, 2], "no whole archive")):
        torch.save(wrong, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=word) as error:
            clip_model.load(tmp_path / "w.pt", activation="gelu")
        assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        clip_model.load(tmp_path / "empty")


# ---------------------------------------------------------------- archives

@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_torchscript_archives_load_without_torch_jit(tower, tmp_path, monkeypatch):
    theirs = openai_model(tower)
    oracle("model").convert_weights(theirs)                     # fp16, as OpenAI's releases
    state = {name: t.clone() for name, t in theirs.state_dict().items()}
    size = TOWERS[tower]["image_resolution"]
    pixels, tokens = example(theirs, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(theirs.float(), (pixels, tokens)).half(),
                       tmp_path / "w.pt")
    monkeypatch.setattr(torch.jit, "load", None)
    monkeypatch.setattr(torch, "load", None)
    found, metadata = read_weights(tmp_path / "w.pt")
    assert metadata == {"format": "TorchScript"}
    for name, tensor in state.items():
        if "num_batches" not in name:
            assert torch.equal(found[name].float(), tensor.half().float()), name
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)             # an archive is OpenAI's: no guess
        ours = clip_model.load(tmp_path / "w.pt")
    assert ours.config.activation == "quick_gelu"
    for buffer in [*theirs.parameters(), *theirs.buffers()]:
        buffer.data = buffer.data.half().float() if buffer.is_floating_point() else buffer.data
    assert_same_embeddings(ours, theirs.float(), size)


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    touch = f"touch {marker}".encode()
    command = b"X" + len(touch).to_bytes(4, "little") + touch
    system, module, name = b"cposix\nsystem\n", b"X\x05\0\0\0posix", b"X\x06\0\0\0system"
    node = b"c__torch__\nM\n)\x81"                             # a module without attributes
    programs = [                                               # one per way to call what is named
        system + command + b"\x85R.", system + command + b"\x85\x81.",
        b"\x80\x04" + system + command + b"\x85}\x92.",
        b"(" + command + b"iposix\nsystem\n.", b"(" + system + command + b"o.",
        b"\x80\x04" + module + name + b"\x93" + command + b"\x85R.",
        node + b"}X\x01\0\0\0a" + system + command + b"\x85Rsb.",
        node + b"}X\x0c\0\0\0__setstate__" + system + b"sb" + command + b"b.",
        node + b"}X\x06\0\0\0extend" + system + b"sb(" + command + b"e."]
    for program in programs:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("top/data.pkl", b"\x80\x02" + program)
        with suppress(ValueError):                             # refused, or a placeholder
            read_weights(path)
        assert not marker.exists()


class Callback:
    """Stands for a class of some training library."""


def test_what_is_neither_tensor_nor_container_becomes_a_placeholder(tmp_path):
    """As a checkpoint of Lightning 1.0, whose callbacks are keyed by their classes."""
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "p": nn.Parameter(torch.ones(2)),
               "h": torch.ones(3).half(), "n": torch.arange(3), "e": torch.empty(0)}
    odd = {"callbacks": {Callback: {}, Callback(): dict}, "path": Path("x"), "kinds": {1, 2},
           "random": np.float64(3), "function": Callback.__init__}
    torch.save({"state_dict": tensors} | odd, tmp_path / "w.pt")
    found = read_weights(tmp_path / "w.pt")[0]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------- the published vocabulary

def strings(n: int) -> list[str]:
    """Texts of every awkward kind, n in all."""
    rng = random.Random(0)
    words = ("a photo of the Cat's dog don't they'll we've I'm it'd running STICKER naïve café "
             "Ελλάδα привет 東京タワー 안녕하세요 مرحبا हिन्दी 😀 👩‍👩‍👧 🏳️‍🌈 ❤️ "
             "&amp; &lt;b&gt; &amp;amp; &#233; Ã© â€™ schÃ¶n 1234 3.14 50% $9.99 ?!... -- "
             "__init__ #tag @me http://x.y/z \t \n <|endoftext|> <|startoftext|> "
             "½ ² Ⅳ ﬁ ｆｕｌｌ ́e İ ß zzzzqqq x").split(" ")
    found = ["", " ", " \t\n ", "a" * 10_000, "word " * 2000, "😀" * 50, "\x00\x07", "’“”"]
    ranges = (range(32, 127), range(160, 0x24F), range(0x370, 0x530), range(0x3040, 0x30FF))
    while len(found) < n:
        letters = [chr(rng.choice(rng.choice(ranges))) for _ in range(9)]
        found += ["".join(letters), *(" ".join(rng.sample(words, 8)) for _ in range(9))]
    return found


def test_tokens_equal_the_public_tokenizers_on_20_000_strings():
    theirs = oracle("simple_tokenizer").SimpleTokenizer()
    ours = clip_model.published_tokenizer(Path("/nowhere"))
    assert len(ours.words) == clip_model.PUBLISHED_SIZE and ours.ids == theirs.encoder
    assert (ours.start, ours.end) == (49406, 49407)
    for text in strings(20_000):
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_vocabulary_files_of_both_kinds_give_one_tokenizer(tmp_path):
    packed = Path(oracle("simple_tokenizer").default_bpe())
    whole = clip_model.published_tokenizer(packed)
    lines = gzip.open(packed, "rt", encoding="utf-8").read().split("\n")
    merges = tmp_path / "merges.txt"
    merges.write_text("#version: 0.2\n" + "\n".join(lines[1:48895]) + "\n", "utf-8")
    assert clip_model.published_tokenizer(tmp_path).ids == whole.ids
    merges.write_bytes(b"#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="list of"):
        clip_model.published_tokenizer(merges)


def test_a_vocabulary_is_found_without_an_import_or_its_lack_is_said(tmp_path, monkeypatch):
    torch.save(openai_model("vit", vocab_size=49408).state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    blind = clip_model.load(tmp_path / "w.pt", activation="gelu")
    assert blind.embed_pictures([Image.new("RGB", (40, 30))]).shape == (1, 24)
    with pytest.raises(ValueError, match=clip_model.VOCABULARY):
        blind.embed_texts(["a cat"])
    monkeypatch.undo()
    before = set(sys.modules)
    reading = clip_model.load(tmp_path / "w.pt", activation="gelu")
    assert not {"clip", "open_clip"} & (set(sys.modules) - before)
    assert reading.embed_texts(["a cat", "a much longer text of cats"]).shape == (2, 24)


# ---------------------------------------------------------------- pixels

def public_transform(picture: Image.Image, size: int) -> np.ndarray:
    """Resize, CenterCrop, convert("RGB") as torchvision's on Pillow pictures, written anew."""
    w, h = picture.size
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    if (w <= h and w != size) or (h <= w and h != size):
        picture = picture.resize(new, Image.BICUBIC)
    left, top = int(round((picture.width - size) / 2.0)), int(round((picture.height - size) / 2.0))
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


@pytest.mark.parametrize("shape", [(500, 1), (1, 500), (224, 224), (225, 224), (1, 1), (448, 449)])
def test_pixels_equal_the_public_transforms(shape, tmp_path):
    for form in (shape, (*shape, 3)):
        array = np.random.default_rng(0).integers(0, 256, form, np.uint8)
        Image.fromarray(array).save(tmp_path / "p.png")
        found = np.asarray(clip_model.fit_square(clip_model.read_image(tmp_path / "p.png"), 224))
        assert np.array_equal(found, public_transform(Image.fromarray(array), 224))


def test_odd_modes_equal_the_stated_order_by_hand(tmp_path):
    """Alpha on white → RGB, against numpy, for each kind of file."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3), np.uint8)
    alpha, cmyk = (rng.integers(0, 256, (20, 30, n), np.uint8) for n in (1, 4))
    few = rgb[..., 1] // 64
    palette = Image.fromarray(few)
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])
    palette.putpalette(table.ravel().tolist())
    cases = {
        "alpha.png": (Image.fromarray(np.dstack([rgb, alpha])), {},
                      rgb * (alpha / 255) + 255 * (1 - alpha / 255)),
        "palette.png": (palette, {}, table[few]),
        "clear-palette.png": (palette, {"transparency": 2},
                              np.where((few == 2)[..., None], 255, table[few])),
        "cmyk.tif": (Image.fromarray(cmyk, "CMYK"), {},
                     (255. - cmyk[..., :3]) * (255. - cmyk[..., 3:]) / 255)}
    for name, (picture, options, wanted) in cases.items():
        picture.save(tmp_path / name, **options)
        found = np.asarray(clip_model.read_image(tmp_path / name)).astype(float)
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1, name
