"""clip_model.py: files, tokenizer, pictures, towers, what the scripts share."""

import argparse
import json
import struct
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

import clip_model
from clip_model import read_image, read_weights, write_weights

# ---------------------------------------------------------------- weights on disk

def test_weights_come_back_equal(tmp_path):
    tensors = {"a": torch.randn(3, 5).half(), "b": torch.randn(7), "s": torch.tensor(2.5),
               "n": torch.arange(4), "empty": torch.zeros(0, 3), "bf": torch.randn(3).bfloat16(),
               "u": torch.tensor([1, 255], dtype=torch.uint8), "strided": torch.randn(4, 6).T}
    write_weights(tmp_path / "w.safetensors", tensors, {"key": "välue"})
    found, metadata = read_weights(tmp_path / "w.safetensors")
    assert metadata == {"key": "välue"} and set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_file_layout_is_the_published_one(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"x": torch.tensor([1.0, -2.0])}, {})
    raw = (tmp_path / "w.safetensors").read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0 and header["x"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert np.frombuffer(raw[8 + n :], "<f4").tolist() == [1.0, -2.0]


def test_every_truncation_is_refused_with_one_sentence(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"x": torch.randn(9), "y": torch.randn(2, 2)}, {})
    raw = (tmp_path / "w.safetensors").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="not a whole .safetensors file"):
            read_weights(tmp_path / "cut")


@pytest.mark.parametrize("header", [
    b"[]", b"{", b'{"x": 3}', b"[" * 5000, b"\xff\xfe", b'{"x": {"shape": [1]}}',
    *(b'{"x": {"dtype": %s, "shape": %s, "data_offsets": %s}}' % entry for entry in (
        (b'"F99"', b"[1]", b"[0, 4]"), (b'"F32"', b"[2]", b"[0, 4]"), (b"[]", b"[1]", b"[0, 4]"),
        (b'"F32"', b"[1]", b"[4, 8]"), (b'"F32"', b"[0]", b"[0, 0]")))])
def test_damaged_headers_are_refused_with_one_sentence(tmp_path, header):
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="not a whole .safetensors file") as error:
        read_weights(tmp_path / "w")
    assert "\n" not in str(error.value)


def test_a_weight_that_is_not_finite_is_neither_written_nor_loaded(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        write_weights(tmp_path / "x", {"x": torch.tensor(torch.inf)}, {})
    assert not list(tmp_path.iterdir())
    clip_model.save(tmp_path / "c", tiny_clip(), {})
    raw = bytearray((tmp_path / "c").read_bytes())
    raw[-2:] = np.float16(np.nan).tobytes()
    (tmp_path / "c").write_bytes(raw)
    with pytest.raises(ValueError, match="not finite"):
        clip_model.load(tmp_path / "c")


def test_a_model_loads_from_its_path_alone(tmp_path):
    model = tiny_clip()
    clip_model.save(tmp_path / "c.safetensors", model, {"command": "made by hand"})
    again = clip_model.load(tmp_path / "c.safetensors")
    assert again.config == model.config and again.tokenizer.merges == model.tokenizer.merges
    assert again.fingerprint() == model.fingerprint() != tiny_clip(seed=1).fingerprint()
    texts = ["a red fox", "blue"]
    assert torch.allclose(again.embed_texts(texts), model.embed_texts(texts), atol=2e-3)
    # It is f_img's: another activation changes it, another text tower does not.
    again.text_projection.add_(1)
    assert again.fingerprint() == model.fingerprint()
    again.config = replace(again.config, activation="gelu")
    assert again.fingerprint() != model.fingerprint()


def test_foreign_and_misfitting_files_are_refused(tmp_path):
    write_weights(tmp_path / "foreign", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="no token_embedding"):
        clip_model.load(tmp_path / "foreign")
    clip_model.save(tmp_path / "c", tiny_clip(), {})
    tensors, metadata = read_weights(tmp_path / "c")
    tensors.pop("ln_final.bias")
    write_weights(tmp_path / "d", tensors, metadata)
    with pytest.raises(ValueError, match="does not fit"):
        clip_model.load(tmp_path / "d")
    with pytest.raises(ValueError, match="holds a CLIP, wanted Judge"):
        clip_model.load_model(tmp_path / "c", {"Judge": ()})
    with pytest.raises(FileNotFoundError, match="no weights file"):
        clip_model.load(tmp_path / "nothing")


# ---------------------------------------------------------------- tokenizer

def test_byte_symbols_are_256_different_printable_ones():
    symbols = clip_model.BYTE_SYMBOLS
    assert sorted(symbols) == list(range(256)) and len(set(symbols.values())) == 256
    assert all(s.isprintable() and not s.isspace() for s in symbols.values())
    assert symbols[ord("a")] == "a" and symbols[ord(" ")] == "Ġ"  # as GPT-2 writes it


def test_cleaning_and_splitting_follow_clips_rules():
    assert clip_model.split_words("  A &amp;amp; B\n\tC ") == ["a", "&", "b", "c"]
    assert clip_model.split_words("cafÃ©") == clip_model.split_words("CAFÉ") != ["cafe"]  # mojibake
    assert clip_model.split_words("it's 42!?") == ["it", "'s", "4", "2", "!?"]


def test_merges_apply_in_learned_order():
    tokenizer = clip_model.Tokenizer([("b", "c</w>"), ("a", "b"), ("a", "bc</w>")])
    words = [tokenizer.words[i] for i in tokenizer.encode("abc ab")]
    assert words == ["abc</w>", "a", "b</w>"]  # (b, c) was learned before (a, b)


def test_tokens_joined_give_the_cleaned_text_back():
    tokenizer = tiny_clip().tokenizer
    byte_of = {symbol: byte for byte, symbol in clip_model.BYTE_SYMBOLS.items()}
    for text in ("a red fox", "naïve café", "日本 🦊", "x"):
        words = "".join(tokenizer.words[i] for i in tokenizer.encode(text))
        found = b" ".join(bytes(map(byte_of.get, word)) for word in words.split("</w>")[:-1])
        assert found.decode() == text
    assert tokenizer.encode("   ") == []


def test_a_pair_is_merged_from_left_to_right():
    assert clip_model.merge_pair(tuple("aaab"), ("a", "a")) == ("aa", "a", "b")
    assert clip_model.merge_pair(("a", "b", "ab", "a"), ("a", "b")) == ("ab", "ab", "a")


def test_a_cut_text_keeps_its_end_token_and_warns():
    tokenizer = tiny_clip().tokenizer
    with pytest.warns(UserWarning, match="cut to 12"):
        tokens = tokenizer(["red " * 3000, "red"])
    assert tokens.shape == (2, 12)
    assert tokens[0, -1] == tokenizer.end == tokens.max() == len(tokenizer.words) - 1
    red = [tokenizer.start, tokenizer.ids["red</w>"], tokenizer.end]
    assert tokens[1].tolist() == red + [0] * 9
    with pytest.raises(ValueError, match="list of texts"):
        tokenizer("a red heart")


# ---------------------------------------------------------------- pictures

def test_transparency_goes_on_white_deep_grey_is_scaled_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 1000, 40000, 65535]], np.uint16))
    deep.save(tmp_path / "deep.png", transparency=1000)
    found = np.asarray(read_image(tmp_path / "deep.png"))[0]
    assert found.tolist() == [[grey] * 3 for grey in (0, 255, 156, 255)]
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack(                # a FLOAT as width
        "<HHIfHHII4x", 0x100, 11, 1, 8.0, 0x112, 3, 1, 6)                     # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_a_jpeg_that_is_read_smaller_is_turned_and_shows_the_same(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6                                                        # a quarter turn
    picture.resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", exif=exif)
    slow, quick = (read_image(tmp_path / "a.jpg", least) for least in (0, 128))
    assert slow.size == (600, 800) and quick.size == (150, 200)
    slow, quick = (np.asarray(clip_model.fit_square(each, 64), int) for each in (slow, quick))
    assert np.abs(slow - quick).mean() < 3


def test_what_a_file_says_of_its_mode_ends_with_it_and_the_callers_picture_stays(tmp_path):
    Image.new("CMYK", (8, 4)).save(tmp_path / "p.jpg", icc_profile=bytes(128))
    with Image.open(tmp_path / "p.jpg") as picture:
        assert clip_model.to_rgb(picture).info == {} and picture.mode == "CMYK"


def test_kinds_of_files_are_named_so_that_no_data_runs_as_a_program(tmp_path):
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", b"no picture",
                    b"\x89PNG\r\n\x1a\n broken", b"P6 1 1 255\n\0\0\0"):     # Pillow reads the last
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(ValueError, match="no readable picture"):
            read_image(tmp_path / "x.png")
    picture = Image.new("RGB", (9, 5), "red")
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[picture])
    for suffix in (".avif", ".jfif", ".webp", ".bmp", ".gif", ".tif"):
        picture.save(tmp_path / f"p{suffix}")
    for path in tmp_path.glob("p*"):
        assert read_image(path).size == (9, 5) and path.suffix in clip_model.IMAGE_SUFFIXES


def test_pictures_of_any_mode_are_embedded_alike():
    model, red = tiny_clip(), Image.new("RGB", (20, 20), "red")
    found = model.embed_pictures([red, red.convert("RGBA"), red.convert("P")])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_grid_places_pictures_row_by_row():
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    sheet = clip_model.grid([[red, blue], [None, red]], 4)
    assert sheet.size == (14, 14)
    assert sheet.getpixel((3, 3)) == (255, 0, 0) and sheet.getpixel((9, 3)) == (0, 0, 255)
    assert sheet.getpixel((3, 9)) == (235, 235, 235) and sheet.getpixel((9, 9)) == (255, 0, 0)


# ---------------------------------------------------------------- towers

@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_equals_torchs_with_and_without_gradient(is_causal):
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert torch.allclose(clip_model.attention(q, k, v, is_causal), wanted, atol=1e-6)
    q.requires_grad_()
    assert torch.allclose(clip_model.attention(q, k, v, is_causal), wanted, atol=1e-6)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_tower_equals_a_composition_of_torchs_own_layers(activation):
    model = tiny_clip(activation=activation)
    tower, pixels = model.visual, torch.randn(2, 3, 16, 16)
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, 2, 2, 8, 8)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(2, 4, -1)
    x = patches @ tower.conv1.weight.reshape(32, -1).T
    x = torch.cat([tower.class_embedding.expand(2, 1, -1), x], 1) + tower.positional_embedding
    x = torch.layer_norm(x, (32,), tower.ln_pre.weight, tower.ln_pre.bias)
    for block in tower.transformer.resblocks:
        attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())  # the same names
        h = torch.layer_norm(x, (32,), block.ln_1.weight, block.ln_1.bias)
        x = x + attention(h, h, h)[0]
        h = torch.layer_norm(x, (32,), block.ln_2.weight, block.ln_2.bias) @ block.mlp.c_fc.weight.T
        h = h + block.mlp.c_fc.bias
        share = (torch.sigmoid(1.702 * h) if activation == "quick_gelu"
                 else 0.5 * (1 + torch.erf(h / 2**0.5)))
        h = h * share
        x = x + block.mlp.c_proj(h)
    x = torch.layer_norm(x[:, 0], (32,), tower.ln_post.weight, tower.ln_post.bias) @ tower.proj
    wanted = x / x.norm(dim=1, keepdim=True)
    assert torch.allclose(model.embed_images(pixels), wanted, atol=1e-5)


def test_text_is_pooled_at_the_end_token_and_blind_to_what_follows():
    model = tiny_clip()
    tokens = model.tokenizer(["a red fox", "red"])
    noisy = tokens.clone()
    noisy[1, 5:] = 7  # behind the end token
    assert torch.allclose(model.embed_tokens(tokens), model.embed_tokens(noisy), atol=1e-6)
    assert torch.allclose(model.embed_tokens(tokens)[1:], model.embed_tokens(tokens[1:]), atol=1e-6)
    changed = tokens.clone()
    changed[0, 1] += 1
    difference = model.embed_tokens(tokens)[0] - model.embed_tokens(changed)[0]
    assert difference.abs().max() > 1e-4


def test_embeddings_have_unit_norm_and_logits_are_scaled_cosines():
    model = tiny_clip()
    pixels, tokens = torch.randn(3, 3, 16, 16), model.tokenizer(["a", "b", "c"])
    images, texts = model.embed_images(pixels), model.embed_tokens(tokens)
    assert torch.allclose(images.norm(dim=1), torch.ones(3))
    assert torch.allclose(model.logits(images, texts), images @ texts.T / 0.07, atol=1e-4)
    model.logit_scale.data.fill_(100.0)
    assert torch.allclose(model.logits(images, texts), images @ texts.T * 100, atol=1e-3)  # clamped


# ---------------------------------------------------------------- what the scripts share

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "f"
    with clip_model.replacing(path) as file:
        file.write(b"old")
    with pytest.raises(KeyError), clip_model.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error, status, said", [
    (ValueError("k is\n-1"), 2, "k is -1"), (FileNotFoundError("no x"), 2, "no x"),
    (OverflowError("too large"), 2, "too large"), (OSError("disk full"), 1, "disk full"),
    (FloatingPointError("loss is nan"), 1, "loss is nan"), (OSError(), 1, "OSError"),
    (MemoryError(), 1, "--batch-size"), (torch.OutOfMemoryError("CUDA out of memory."), 1, "--n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
    (None, 0, "")])
def test_a_command_ends_with_one_sentence_and_a_status(error, status, said, capsys):
    def run(args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    assert clip_model.run_command(argparse.ArgumentParser(), run, []) == status
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == (status > 0)
    error = RuntimeError("shapes do not match")                 # ours to mend: its traceback stays
    with pytest.raises(RuntimeError, match="shapes"):
        clip_model.run_command(argparse.ArgumentParser(), run, [])
    assert warnings.formatwarning("cut", UserWarning, "a.py", 3) == "cut\n"    # no source line
