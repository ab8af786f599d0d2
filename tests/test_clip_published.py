"""clip_model.py: other people's checkpoints, against their own code where it is installed.

The oracles come with `pip install --no-deps -r requirements-oracles.txt`; their weights here are
random: nothing is downloaded.
"""

import gzip
import importlib.util
import io
import json
import pickle
import random
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clip_model
from clip_model import read_tensors, write_weights

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
    """Their model with random weights everywhere; their code has QuickGELU only, so GELU is put in
    its place by hand."""
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


def example(model: nn.Module, size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and tokens, each text with one end token (the largest id) at another place."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, model.vocab_size - 2, (3, model.context_length), generator=generator)
    for row, end in zip(tokens, (4, model.context_length - 1, 1)):
        row[0], row[end], row[end + 1:] = model.vocab_size - 2, model.vocab_size - 1, 0
    return torch.randn(3, 3, size, size, generator=generator), tokens


def embeddings(model: nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [nn.functional.normalize(model.encode_image(pixels), dim=-1),
                nn.functional.normalize(model.encode_text(tokens), dim=-1)]


def assert_same_embeddings(ours: clip_model.CLIP, theirs: nn.Module, size: int) -> None:
    pixels, tokens = example(theirs, size)
    with torch.no_grad():
        found = [ours.embed_images(pixels), ours.embed_tokens(tokens)]
    for got, wanted in zip(found, embeddings(theirs, pixels, tokens)):
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
    pixels, tokens = example(theirs, TOWERS[tower]["image_resolution"])
    with torch.no_grad():
        assert (wrong.embed_tokens(tokens) - ours.embed_tokens(tokens)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["ViT-B/32", "RN50"])
def test_full_size_towers_equal_openais_own_code(tower, tmp_path):
    sizes = {"embed_dim": 512 if tower == "ViT-B/32" else 1024, "context_length": 77,
             "vocab_size": 49408, "transformer_width": 512, "transformer_heads": 8,
             "transformer_layers": 12, "image_resolution": 224}
    sizes |= ({"vision_layers": 12, "vision_width": 768, "vision_patch_size": 32}
              if tower == "ViT-B/32" else
              {"vision_layers": (3, 4, 6, 3), "vision_width": 64, "vision_patch_size": None})
    theirs = openai_model("vit" if tower == "ViT-B/32" else "resnet", **sizes)
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
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    write_weights(tmp_path / "hf.safetensors", in_hugging_faces_layout(state), {"format": "pt"})
    write_weights(tmp_path / "openclip.safetensors", state, {})
    for name in ("openclip.pt", "lightning.ckpt", "old.bin", "hf.safetensors",
                 "openclip.safetensors"):
        ours = clip_model.load(tmp_path / name, activation="quick_gelu")
        assert_same_embeddings(ours, theirs, 32)


def test_resnet_in_openclips_wrapper(tmp_path):
    theirs = openai_model("resnet")
    torch.save({"state_dict": {f"module.{k}": v
                               for k, v in in_custom_text_layout(theirs.state_dict()).items()}},
               tmp_path / "w.pt")
    ours = clip_model.load(tmp_path / "w.pt", activation="quick_gelu")
    assert_same_embeddings(ours, theirs, 64)
    assert not ours.visual.bn1.training and "ResNet" in ours.describe()


def test_hugging_faces_own_model_and_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    for activation in ("quick_gelu", "gelu"):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config=dict(vocab_size=200, hidden_size=64, intermediate_size=96,
                             num_hidden_layers=2, num_attention_heads=4, eos_token_id=199,
                             max_position_embeddings=16, hidden_act=activation),
            vision_config=dict(hidden_size=96, intermediate_size=160, num_hidden_layers=2,
                               num_attention_heads=3, image_size=32, patch_size=8,
                               hidden_act=activation),
            projection_dim=24)
        theirs = transformers.CLIPModel(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        theirs.vocab_size, theirs.context_length = 200, 16
        pixels, tokens = example(theirs, 32)
        with torch.no_grad():
            output = theirs(input_ids=tokens, pixel_values=pixels)
        for shards in ("1GB", "100KB"):
            folder = tmp_path / f"{activation}-{shards}"
            theirs.save_pretrained(folder, max_shard_size=shards)
            assert (folder / "model.safetensors.index.json").exists() == (shards == "100KB")
            with warnings.catch_warnings():
                warnings.simplefilter("error")           # the config tells: nothing is guessed
                ours = clip_model.load(folder)
            assert ours.config.activation == activation and ours.config.vision_heads == 3
            with torch.no_grad():
                found = ours.embed_images(pixels), ours.embed_tokens(tokens)
            assert (found[0] - output.image_embeds).abs().max() <= TOLERANCE
            assert (found[1] - output.text_embeds).abs().max() <= TOLERANCE


def test_openclips_config_beside_the_weights_is_heeded(tmp_path):
    state = openai_model("vit").state_dict()
    write_weights(tmp_path / "open_clip_model.safetensors", state, {})
    config = {"model_cfg": {"embed_dim": 24, "quick_gelu": False,
                            "vision_cfg": {"layers": 2, "width": 128, "head_width": 32},
                            "text_cfg": {"heads": 2}},
              "preprocess_cfg": {"mean": clip_model.PIXEL_MEAN, "std": clip_model.PIXEL_STD}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours = clip_model.load(tmp_path)
    assert (ours.config.activation, ours.config.vision_heads, ours.config.text_heads) == (
        "gelu", 4, 2)
    for part, name, value in (("preprocess_cfg", "mean", [0.5, 0.5, 0.5]),
                              ("preprocess_cfg", "resize_mode", "squash"),
                              ("preprocess_cfg", "interpolation", "bilinear")):
        odd = {**config, part: {**config[part], name: value}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(odd))
        with pytest.raises(ValueError, match=name):
            clip_model.load(tmp_path)
    for name, value in (("no_causal_mask", True), ("pool_type", "last")):
        config["model_cfg"]["text_cfg"] = {"heads": 2, name: value}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="looks ahead or is pooled"):
            clip_model.load(tmp_path)


def test_towers_of_another_make_are_refused_by_name(tmp_path):
    write_weights(tmp_path / "open_clip_model.safetensors", openai_model("vit").state_dict(), {})
    for name, value in (("pool_type", "avg"), ("norm_kwargs", {"eps": 1e-6}), ("act_kwargs", {})):
        config = {"embed_dim": 24, "vision_cfg": {"layers": 2, "width": 128, name: value},
                  "text_cfg": {"heads": 2}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        with pytest.raises(ValueError, match="pooling" if name == "pool_type" else name):
            clip_model.load(tmp_path)


def test_a_config_of_something_else_does_not_matter_to_a_single_file(tmp_path):
    write_weights(tmp_path / "w.safetensors", openai_model("vit").state_dict(), {})
    (tmp_path / "config.json").write_text('{"learning_rate": 1}')
    assert clip_model.load(tmp_path / "w.safetensors", activation="gelu").config.activation == (
        "gelu")
    norms = {"vision_config": {"layer_norm_eps": 1e-6}, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(norms))
    with pytest.raises(ValueError, match="layer_norm_eps"):
        clip_model.load(tmp_path / "w.safetensors")


PUBLISHED = {  # the published widths, and millions of parameters as OpenCLIP's model table counts
    "ViT-B/32": (dict(), 151.28),
    "ViT-L/14": (dict(embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24,
                      vision_heads=16, text_width=768, text_heads=12), 427.62),
    "RN50": (dict(embed_dim=1024, vision_width=64, vision_layers=(3, 4, 6, 3), vision_heads=32),
             102.01),
    "RN50x4": (dict(embed_dim=640, image_size=288, vision_width=80, vision_layers=(4, 6, 10, 6),
                    vision_heads=40, text_width=640, text_heads=10), 178.30),
    "H/14": (dict(embed_dim=1024, patch_size=14, vision_width=1280, vision_layers=32,
                  vision_heads=16, text_width=1024, text_layers=24, text_heads=16,
                  activation="gelu"), 986.11),
    "g/14": (dict(embed_dim=1024, patch_size=14, vision_width=1408, vision_layers=40,
                  vision_heads=16, vision_hidden=6144, text_width=1024, text_layers=24,
                  text_heads=16, activation="gelu"), 1366.68),
    "bigG/14": (dict(embed_dim=1280, patch_size=14, vision_width=1664, vision_layers=48,
                     vision_heads=16, vision_hidden=8192, text_width=1280, text_layers=32,
                     text_heads=20, activation="gelu"), 2539.57),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_the_published_models_are_read_off_their_shapes(name):
    changes, millions = PUBLISHED[name]
    config = clip_model.ClipConfig(**changes)
    with torch.device("meta"):
        model = clip_model.CLIP(config)
    found = clip_model.sizes_from_shapes(model.state_dict(), config.activation, {})
    ours = clip_model.CLIP.describe(model)
    for field in ("embed_dim", "image_size", "vision_width", "vision_layers", "vision_heads",
                  "text_width", "text_layers", "text_heads", "vocab_size", "context_length"):
        assert getattr(found, field) == getattr(config, field), (field, ours)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_a_guessed_activation_warns_and_a_told_one_does_not(tmp_path):
    state = openai_model("vit").state_dict()
    torch.save(state, tmp_path / "full.pt")
    torch.save({name: t.half() for name, t in state.items()}, tmp_path / "half.pt")
    with pytest.warns(UserWarning, match="guessed gelu"):
        assert clip_model.load(tmp_path / "full.pt").config.activation == "gelu"
    with pytest.warns(UserWarning, match="guessed quick_gelu"):
        half = clip_model.load(tmp_path / "half.pt")
    assert half.config.activation == "quick_gelu" and half.ln_final.weight.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = clip_model.load(tmp_path / "half.pt", activation="gelu", dtype=torch.bfloat16)
    assert asked.config.activation == "gelu" and asked.text_projection.dtype == torch.bfloat16
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        close = (asked.embed_images(pixels) * clip_model.load(
            tmp_path / "half.pt", activation="gelu").embed_images(pixels)).sum(1)
    assert (close > 0.99).all()


def test_what_is_no_clip_is_refused_with_one_sentence(tmp_path):
    state = openai_model("vit").state_dict()
    extra = {**state, "visual.transformer.resblocks.0.ls_1.gamma": torch.zeros(128)}
    lacking = {name: t for name, t in state.items() if name != "visual.ln_pre.bias"}
    odd = {**state, "ln_final.bias": torch.zeros(3)}
    for wrong, word in ((extra, "ls_1"), (lacking, "ln_pre"), (odd, "ln_final.bias"),
                        ({"a": torch.zeros(2), "b": torch.zeros(1)}, "token_embedding"),
                        ({"a": 1}, "no table"), ([1, 2], "no table")):
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
    found, is_torchscript = read_tensors(tmp_path / "w.pt")
    assert is_torchscript
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


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("kind", ["zip", "legacy", "torchscript"])
def test_a_pickle_that_would_run_a_command_is_refused(kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "w.pt"
    if kind == "legacy":
        torch.save({"a": Bomb(marker)}, path, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        torch.save({"a": Bomb(marker)}, path)
    else:                                    # a TorchScript class whose state calls something
        command = f"touch {marker}".encode()
        program = (b"\x80\x02c__torch__\nModule\n)\x81}X\x01\x00\x00\x00acposix\nsystem\nX"
                   + len(command).to_bytes(4, "little") + command + b"\x85Rsb.")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("top/data.pkl", program)
    with pytest.raises(ValueError, match="call|Path|Unsupported") as error:
        clip_model.load(path)
    assert not marker.exists() and "\n" not in str(error.value)
    if kind == "torchscript":
        assert "posix system" in str(error.value)


def test_the_small_machine_agrees_with_pickle_itself():
    value = {"a": [1, 2.5, None, True, False, "é", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()],
             "big": 2**40, "neg": -7, "shared": None, "more": list(range(2000)), 5: {}}
    value["shared"] = value["a"]
    for protocol in (2, 4):
        found = clip_model.run_pickle(pickle.dumps(value, protocol), None)
        assert found == value and found["shared"] is found["a"]


def test_tensors_can_not_reach_beyond_their_storage(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    program = parts[name]
    assert program.count(b"K\x06\x85") == 1                     # the size, (6,)
    assert program.count(b"K\x01\x85") == 1                     # the stride, (1,)
    longer = program.replace(b"K\x06\x85", b"K\x07\x85")
    # a stride of 0 shows one number again and again: small in the file, huge once it is copied
    endless = program.replace(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85").replace(
        b"K\x01\x85", b"K\x00\x85")
    for changed in (longer, endless):
        parts[name] = changed
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            for entry, content in parts.items():
                archive.writestr(entry, content)
        with pytest.raises(ValueError, match="storage"):
            read_tensors(tmp_path / "w.pt")


def write_archive(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED,
                  **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo("top/data.pkl"), program)
        for name, content in entries.items():
            archive.writestr(f"top/{name}", content)


def test_crafted_archives_are_refused_in_time(tmp_path):
    """What would recurse in C, double at every level, or unpack to far more than the file."""
    path = tmp_path / "w.pt"
    node = b"c__torch__\nM\n)\x81"                             # a module without attributes
    doubling = node
    for i in range(40):                                        # each holds the one before twice
        doubling = (node + b"}(X\x01\x00\x00\x00a" + doubling + b"q" + bytes([i])
                    + b"X\x01\x00\x00\x00bh" + bytes([i]) + b"ub")
    for name, program, entries in (
            ("names", b"\x80\x02}N" + b"\x85" * 400_000 + b"Ns.", {}),
            ("names", b"\x80\x02}N\x85Ns.", {}),
            ("deeply", b"\x80\x02" + doubling + b".", {}),
            ("tuple", b"\x80\x02N" + b"\x85q\x00h\x00\x86" * 30 + b")R.", {}),
            ("argument", b"\x80\x02ccollections\nOrderedDict\n]N" + b"\x85" * 400_000
             + b"N\x86a\x85R.", {}),                           # a key whose hash recurses in C
            ("compressed", b"\x80\x02}.", {"byteorder": b"little" + b" " * 2**20})):
        write_archive(path, program, zipfile.ZIP_DEFLATED, **entries)
        start = time.monotonic()
        with pytest.raises(ValueError, match=name) as error:
            read_tensors(path)
        assert time.monotonic() - start < 5 and len(str(error.value)) < 500
    storage = (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
               b"X\x03\x00\x00\x00cpuK\x01tQ")
    axes = b"(" + b"K\x01" * 100_000 + b"t"                     # each tensor would keep its own
    write_archive(path, b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
                  + storage + b"K\x00" + 2 * axes + b"\x89}tRs.", **{"data/0": bytes(4)})
    with pytest.raises(ValueError, match="odd size"):
        read_tensors(path)
    write_archive(path, b"\x80\x02}.", a=bytes(1000), b=bytes(1000))
    raw = path.read_bytes()
    size = (1000).to_bytes(4, "little")                        # both are to be nearly all of it
    path.write_bytes(raw.replace(size, (len(raw) - 100).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="overlap"):
        read_tensors(path)


def test_a_shape_beyond_all_numbers_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**47, 2**47, 0],
                               "data_offsets": [0, 0]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="odd shape"):
        clip_model.read_weights(tmp_path / "w.safetensors")


def corrupted(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A truncation, a burst of random bytes, or a few flipped ones."""
    kind = rng.choice(["cut", "burst", "flip"])
    if kind == "cut":
        return raw[: rng.randrange(len(raw))], kind
    damaged = bytearray(raw)
    # Half of the damage goes where the structure is: the first and the last kilobyte.
    def place() -> int:
        return rng.choice([rng.randrange(len(raw)), rng.randrange(min(1000, len(raw))),
                           len(raw) - 1 - rng.randrange(min(1000, len(raw)))])
    if kind == "burst":
        at = place()
        damaged[at: at + 8] = rng.randbytes(8)
    else:
        for _ in range(3):
            damaged[place()] ^= 1 << rng.randrange(8)
    return bytes(damaged[: len(raw)]), kind


@pytest.mark.parametrize("kind", ["safetensors", "zip", "torchscript", "legacy"])
def test_five_hundred_corruptions_give_one_sentence_or_the_tensors(kind, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    state, path = model.state_dict(), tmp_path / "w"
    if kind == "safetensors":
        write_weights(path, state, {"a": "b"})
    elif kind == "torchscript":
        torch.jit.save(torch.jit.script(model), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    raw, rng, refused = path.read_bytes(), random.Random(0), 0
    assert read_tensors(path)[0].keys() >= state.keys()
    for _ in range(500):
        damaged, how = corrupted(raw, rng)
        path.write_bytes(damaged)
        try:
            found = read_tensors(path)[0]
            # Damage in the tensors' own bytes can't be seen where the format has no checksum, and
            # damage in code, padding or names of entries that are not read does no harm.
            assert how != "cut"
            if kind != "legacy":
                assert found.keys() == state.keys()
            if kind in ("zip", "torchscript"):
                assert all(torch.equal(found[name], state[name]) for name in state)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 150


@pytest.mark.parametrize("kind", ["zip", "torchscript"])
def test_a_damaged_pickle_or_tensor_is_always_seen_in_archives(kind, tmp_path):
    """A zip has a checksum for each entry: whatever is read is either whole or refused."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    path = tmp_path / "w.pt"
    torch.save(model.state_dict(), path) if kind == "zip" else torch.jit.save(
        torch.jit.script(model), path)
    raw, rng = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        entries = [info for info in archive.infolist()
                   if info.filename.endswith("data.pkl") or "/data/" in info.filename]
    for _ in range(100):
        info = rng.choice(entries)
        name_and_extra = raw[info.header_offset + 26: info.header_offset + 30]
        start = info.header_offset + 30 + int.from_bytes(name_and_extra[:2], "little") + \
            int.from_bytes(name_and_extra[2:], "little")
        damaged = bytearray(raw)
        damaged[start + rng.randrange(info.file_size)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole archive"):
            read_tensors(path)


# ---------------------------------------------------------------- the published vocabulary


def public_tokenizer():
    return oracle("simple_tokenizer").SimpleTokenizer()


def strings(n: int) -> list[str]:
    """Texts of every awkward kind, n in all."""
    rng = random.Random(0)
    words = ("a photo of the Cat's dog don't they'll we've I'm it'd running STICKER naïve café "
             "Ελλάδα привет 東京タワー 안녕하세요 مرحبا हिन्दी 😀 👩‍👩‍👧 🏳️‍🌈 ❤️ "
             "&amp; &lt;b&gt; &amp;amp; &#233; Ã© â€™ schÃ¶n 1234 3.14 50% $9.99 ?!... -- "
             "__init__ #tag @me http://x.y/z \t \n <|endoftext|> <|startoftext|> "
             "½ ² Ⅳ ﬁ ｆｕｌｌ ́e İ ß zzzzqqq x").split(" ")
    found = ["", " ", " \t\n ", "a" * 10_000, "word " * 2000, "😀" * 50, "\x00\x07", "’“”"]
    while len(found) < n:
        if rng.random() < 0.1:
            found.append("".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x24F),
                                                 rng.randrange(0x370, 0x530),
                                                 rng.randrange(0x3040, 0x30FF)]))
                                 for _ in range(rng.randrange(1, 20))))
        else:
            found.append(" ".join(rng.choice(words) for _ in range(rng.randrange(1, 9))))
    return found


def test_tokens_equal_the_public_tokenizers_on_20_000_strings():
    theirs = public_tokenizer()
    where = clip_model.find_vocabulary(Path("/nowhere"))
    ours = clip_model.read_vocabulary(where)
    assert len(ours.words) == clip_model.PUBLISHED_SIZE and ours.ids == theirs.encoder
    assert (ours.start, ours.end) == (49406, 49407)
    for text in strings(20_000):
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_vocabulary_files_of_every_kind_give_one_tokenizer(tmp_path):
    found = clip_model.find_vocabulary(Path("/nowhere"))
    if found is None:
        pytest.skip("no CLIP package is installed")
    whole = clip_model.read_vocabulary(found)
    lines = gzip.open(found / clip_model.VOCABULARY, "rt", encoding="utf-8").read().split("\n")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines[1:48895]) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(whole.ids))
    ours = clip_model.read_vocabulary(tmp_path)
    assert ours.ids == whole.ids and ours.merges == whole.merges
    # each pads as its source does; the embedding is blind to it
    assert whole(["a cat"])[0, 4:].unique().tolist() == [0]
    assert ours(["a cat"])[0, 4:].unique().tolist() == [49407]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert clip_model.read_vocabulary(tmp_path)(["a cat"])[0, 4:].unique().tolist() == [0]
    (tmp_path / "vocab.json").write_text(json.dumps({**whole.ids, "!": 5}))
    with pytest.raises(ValueError, match="disagree"):
        clip_model.read_vocabulary(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="2 different merges"):
        clip_model.read_vocabulary(tmp_path)
    bomb = tmp_path / clip_model.VOCABULARY
    bomb.write_bytes(gzip.compress(b"a b\n" * 20_000_000)[:-9])
    with pytest.raises(ValueError, match="list of merges"):
        clip_model.read_vocabulary(bomb)


def test_a_vocabulary_is_found_beside_the_weights_or_its_lack_is_said(tmp_path, monkeypatch):
    theirs = openai_model("vit", vocab_size=49408)
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    blind = clip_model.load(tmp_path / "w.pt", activation="gelu")
    assert blind.embed_pictures([Image.new("RGB", (40, 30))]).shape == (1, 24)
    with pytest.raises(FileNotFoundError, match=clip_model.VOCABULARY):
        blind.embed_texts(["a cat"])
    monkeypatch.undo()
    before, modules = set(sys.modules), blind.fingerprint()
    reading = clip_model.load(tmp_path / "w.pt", activation="gelu")
    assert not {"clip", "open_clip"} & (set(sys.modules) - before)         # found, not imported
    assert reading.embed_texts(["a cat", "a much longer text of cats"]).shape == (2, 24)
    assert reading.fingerprint() == modules
    with pytest.warns(UserWarning, match="cut"):
        reading.embed_texts(["cat " * 100])


# ---------------------------------------------------------------- pixels


def public_transform(picture: Image.Image, size: int) -> np.ndarray:
    """Resize, CenterCrop, convert("RGB") as torchvision's on Pillow pictures, written anew."""
    w, h = picture.size
    new = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    if (w <= h and w != size) or (h <= w and h != size):
        picture = picture.resize(new, Image.BICUBIC)
    left, top = int(round((picture.width - size) / 2.0)), int(round((picture.height - size) / 2.0))
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


@pytest.mark.parametrize("shape", [(500, 1), (1, 500), (224, 224), (225, 224), (223, 331),
                                   (64, 1001), (1, 1), (3, 2), (448, 449)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_equal_the_public_transforms(shape, mode, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (*shape, 3) if mode == "RGB" else shape, np.uint8)
    Image.fromarray(array).save(tmp_path / "p.png")
    found = np.asarray(clip_model.fit_square(clip_model.read_image(tmp_path / "p.png"), 224))
    assert np.array_equal(found, public_transform(Image.fromarray(array), 224))


def test_odd_modes_equal_the_stated_order_by_hand(tmp_path):
    """EXIF → alpha on white → RGB, against numpy, for each kind of file."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (20, 30, 3), np.uint8)
    alpha = rng.integers(0, 256, (20, 30), np.uint8)

    def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        a = alpha[..., None].astype(float) / 255
        return rgb * a + 255 * (1 - a)

    picture = Image.fromarray(np.dstack([rgb, alpha]))
    cases = {"alpha.png": (picture, {}, on_white(rgb, alpha))}
    grey = rgb[..., 0]
    cases["grey-alpha.png"] = (Image.fromarray(np.dstack([grey, alpha]), "LA"), {},
                               on_white(np.dstack([grey] * 3), alpha))
    palette = Image.fromarray(grey // 64).convert("L")
    palette = Image.fromarray(np.asarray(palette))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])
    cases["palette.png"] = (palette, {}, table[grey // 64])
    clear = np.where((grey // 64 == 2)[..., None], 255, table[grey // 64])
    cases["clear-palette.png"] = (palette, {"transparency": 2}, clear)
    deep = rng.integers(0, 65536, (20, 30)).astype(np.uint16)
    cases["deep.png"] = (Image.fromarray(deep), {}, np.dstack([deep / 257] * 3))
    cmyk = rng.integers(0, 256, (20, 30, 4), np.uint8)
    k = 255 - cmyk[..., 3:].astype(float)
    cases["cmyk.tif"] = (Image.fromarray(cmyk, "CMYK"), {}, (255 - cmyk[..., :3]) * k / 255)
    exif = Image.Exif()
    exif[0x0112] = 6                                            # shown turned by 90 degrees
    cases["turned.png"] = (Image.fromarray(rgb), {"exif": exif}, rgb.transpose(1, 0, 2)[:, ::-1])
    for name, (picture, options, wanted) in cases.items():
        picture.save(tmp_path / name, **options)
        found = np.asarray(clip_model.read_image(tmp_path / name)).astype(float)
        assert found.shape == wanted.shape and np.abs(found - wanted).max() <= 1, name
