"""clip_model.py: files, tokenizer, pictures, towers."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_clip
from PIL import Image

import clip_model
from clip_model import read_weights, write_weights

# ---------------------------------------------------------------- weights on disk


def test_weights_come_back_equal(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).half(),
        "b": torch.randn(7),
        "s": torch.tensor(2.5),
        "n": torch.arange(4),
        "empty": torch.zeros(0, 3),
        "bf": torch.randn(3).bfloat16(),
        "u": torch.tensor([1, 255], dtype=torch.uint8),
        "strided": torch.randn(4, 6).T,
    }
    write_weights(tmp_path / "w.safetensors", tensors, {"key": "välue"})
    found, metadata = read_weights(tmp_path / "w.safetensors")
    assert metadata == {"key": "välue"} and set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert not list(tmp_path.glob("*.part"))


def test_file_layout_is_the_published_one(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"x": torch.tensor([1.0, -2.0])}, {})
    raw = (tmp_path / "w.safetensors").read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    assert n % 8 == 0 and header["x"] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert np.frombuffer(raw[8 + n :], "<f4").tolist() == [1.0, -2.0]


@pytest.mark.parametrize("first", [b"\x80\x02", b"PK"])
def test_a_header_as_long_as_a_pickles_or_an_archives_first_bytes_is_no_such_file(tmp_path, first):
    """A file begins with its header's length, which can read like another format's name."""
    path, clip = tmp_path / "clip.safetensors", tiny_clip()
    clip_model.save(path, clip, {"command": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    wanted = int.from_bytes(first, "little")
    more = (wanted - length) % 65536
    clip_model.save(path, clip, {"command": "x" * more})
    assert path.read_bytes()[:2] == first
    again = clip_model.load(path)
    assert again.fingerprint() == clip.fingerprint() and again.tokenizer is not None


def test_a_foreign_digest_is_no_digest_of_ours(tmp_path):
    path = tmp_path / "w.safetensors"
    clip_model.write_weights(path, {"a": torch.ones(2)}, {})
    raw = path.read_bytes()
    header = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    header["__metadata__"] = {"digest": "sha256:00"}
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[-8:])
    assert clip_model.read_weights(path)[1] == {"digest": "sha256:00"}


def test_every_truncation_is_refused_with_one_sentence(tmp_path):
    write_weights(tmp_path / "w.safetensors", {"x": torch.randn(9), "y": torch.randn(2, 2)}, {})
    raw = (tmp_path / "w.safetensors").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(ValueError, match="not a whole .safetensors file"):
            read_weights(tmp_path / "cut")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"x": 3}',
        b'{"x": {"dtype": "F99", "shape": [], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"a": 1}}',
        b"[" * 5000,
        b"\xff\xfe",
    ],
)
def test_damaged_headers_are_refused(tmp_path, header):
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="not a whole .safetensors file"):
        read_weights(tmp_path / "w")


@pytest.mark.parametrize("header, sentence", [
    (b"[]", "its header is no table"), (b'{"a": {"shape": [1]}}', "'a' lacks a field"),
    (b'{"a": 3}', "'a' lacks a field"), (b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": '
                                         b'[0, 4]}}', "unknown dtype 'F7'")])
def test_a_damaged_header_is_told_in_words(tmp_path, header, sentence):
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=sentence):
        read_weights(tmp_path / "w")


def test_nothing_overrides_what_our_own_files_say(tmp_path):
    clip_model.save(tmp_path / "c", tiny_clip(), {})
    for option in ({"activation": "gelu"}, {"tokenizer": tmp_path}):
        with pytest.raises(ValueError, match="carries its own"):
            clip_model.load(tmp_path / "c", **option)


def test_a_changed_digit_in_the_header_is_seen(tmp_path):
    clip_model.save(tmp_path / "c", tiny_clip(), {})
    raw = (tmp_path / "c").read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for place in range(8, end, 7):
        for bit in (1, 2):
            damaged = bytearray(raw)
            damaged[place] ^= bit
            if not raw[place: end].strip():  # the padding: other blanks change nothing
                continue
            (tmp_path / "d").write_bytes(damaged)
            if b"digest" not in damaged[8:end]:  # the damage hit that word: all the rest is whole
                continue
            with pytest.raises(ValueError) as error:
                clip_model.load(tmp_path / "d")
            assert "\n" not in str(error.value)


def test_a_model_loads_from_its_path_alone(tmp_path):
    model = tiny_clip()
    clip_model.save(tmp_path / "c.safetensors", model, {"command": "made by hand"})
    again = clip_model.load(tmp_path / "c.safetensors")
    assert again.config == model.config and again.tokenizer.merges == model.tokenizer.merges
    assert again.fingerprint() == model.fingerprint() != tiny_clip(seed=1).fingerprint()
    texts = ["a red fox", "blue"]
    assert torch.allclose(again.embed_texts(texts), model.embed_texts(texts), atol=2e-3)
    # the same weights with another activation or other merges embed otherwise
    again.config = replace(again.config, activation="gelu")
    assert again.fingerprint() != model.fingerprint()
    again.config, merges = model.config, model.tokenizer.merges
    again.tokenizer = clip_model.Tokenizer([*merges[1:], merges[0]])
    assert again.fingerprint() != model.fingerprint()


def test_foreign_and_misfitting_files_are_refused(tmp_path):
    write_weights(tmp_path / "foreign", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="no token_embedding"):
        clip_model.load(tmp_path / "foreign")
    model = tiny_clip()
    clip_model.save_model(tmp_path / "c", model, {})  # no merges
    with pytest.raises(ValueError, match="merges"):
        clip_model.load(tmp_path / "c")
    with pytest.raises(ValueError, match="not finite"):
        write_weights(tmp_path / "x", {"x": torch.tensor(torch.inf)}, {})
    assert not (tmp_path / "x").exists()
    tensors, metadata = read_weights(tmp_path / "c")
    tensors.pop("ln_final.bias")
    write_weights(tmp_path / "d", tensors, metadata)
    with pytest.raises(ValueError, match="does not fit"):
        clip_model.load(tmp_path / "d")
    with pytest.raises(FileNotFoundError):
        clip_model.load(tmp_path / "nothing")


# ---------------------------------------------------------------- tokenizer


def test_byte_symbols_are_256_different_printable_ones():
    symbols = clip_model.byte_symbols()
    assert sorted(symbols) == list(range(256)) and len(set(symbols.values())) == 256
    assert all(s.isprintable() and not s.isspace() for s in symbols.values())
    assert symbols[ord("a")] == "a" and symbols[ord(" ")] == "Ġ"  # as GPT-2 writes it


def test_cleaning_follows_clips_rules():
    assert clip_model.clean("  A &amp;amp; B\n\tC ") == "a & b c"
    assert clip_model.clean("cafÃ©") == "café"  # mojibake
    assert clip_model.split_words("it's 42!?") == ["it", "'s", "4", "2", "!?"]


def test_merges_apply_in_learned_order():
    tokenizer = clip_model.Tokenizer([("b", "c</w>"), ("a", "b"), ("a", "bc</w>")])
    words = [tokenizer.words[i] for i in tokenizer.encode("abc ab")]
    assert words == ["abc</w>", "a", "b</w>"]  # (b, c) was learned before (a, b)


def test_encoding_and_decoding_give_the_cleaned_text_back():
    tokenizer = tiny_clip().tokenizer
    for text in ("a red fox", "naïve café", "日本 🦊", "x"):  # one space between words and signs
        ids = [tokenizer.start, *tokenizer.encode(text), tokenizer.end, 0, 0]
        assert tokenizer.decode(ids) == clip_model.clean(text)
    assert tokenizer.encode("   ") == []


def test_a_cut_text_keeps_its_end_token_and_warns():
    tokenizer = tiny_clip().tokenizer
    with pytest.warns(UserWarning, match="cut to 12"):
        tokens = tokenizer(["red " * 3000, "red"])
    assert tokens.shape == (2, 12)
    assert tokens[0, -1] == tokenizer.end == tokens.max() == len(tokenizer.words) - 1
    assert (
        tokens[1].tolist() == [tokenizer.start, tokenizer.ids["red</w>"], tokenizer.end] + [0] * 9
    )


# ---------------------------------------------------------------- pictures


def test_fit_square_is_pillows_antialiased_bicubic_and_a_centre_crop():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 3), np.uint8))
    wanted = picture.resize((32, 47), Image.Resampling.BICUBIC).crop((0, 8, 32, 40))
    assert clip_model.fit_square(picture, 32).tobytes() == wanted.tobytes()
    assert clip_model.fit_square(Image.new("RGB", (1, 500)), 16).size == (16, 16)


def test_thin_pictures_are_not_blown_up(monkeypatch):
    """1 x 60000 would become 64 x 3,840,000; what is kept equals the crop of that."""
    assert clip_model.fit_square(Image.new("RGB", (1, 60_000)), 64).size == (64, 64)
    rng = np.random.default_rng(0)
    thin = Image.fromarray(rng.integers(0, 256, (3, 100, 3), np.uint8))
    whole = thin.resize((int(16 * 100 / 3), 16), Image.Resampling.BICUBIC)
    left = round((whole.width - 16) / 2)
    wanted = np.asarray(whole.crop((left, 0, left + 16, 16))).astype(int)
    assert np.abs(np.asarray(clip_model.fit_square(thin, 16)) - wanted).max() <= 1
    monkeypatch.setattr(clip_model, "MAX_PIXELS", 0)
    assert np.abs(np.asarray(clip_model.fit_square(thin, 16)).astype(int) - wanted).max() <= 1


def test_pixels_are_normalised_with_clips_statistics():
    pixels = clip_model.to_pixels(np.full((1, 2, 2, 3), 255, np.uint8))
    wanted = (1 - np.array(clip_model.PIXEL_MEAN)) / np.array(clip_model.PIXEL_STD)
    assert np.allclose(pixels[0, :, 0, 0], wanted, atol=1e-6)


def test_transparency_goes_on_white_and_exif_turns(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert clip_model.read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert clip_model.read_image(tmp_path / "turned.jpg").size == (4, 8)
    deep = Image.fromarray(np.full((3, 3), 65535, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert clip_model.read_image(tmp_path / "deep.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_pictures_give_one_sentence(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="no readable picture"):
        clip_model.read_image(tmp_path / "x.png")


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
        h = (
            h * torch.sigmoid(1.702 * h)
            if activation == "quick_gelu"
            else (h * 0.5 * (1 + torch.erf(h / 2**0.5)))
        )
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
    assert not torch.allclose(
        model.embed_tokens(tokens)[0], model.embed_tokens(changed)[0], atol=1e-4
    )


def test_embeddings_have_unit_norm_and_logits_are_scaled_cosines():
    model = tiny_clip()
    pixels, tokens = torch.randn(3, 3, 16, 16), model.tokenizer(["a", "b", "c"])
    images, texts = model.embed_images(pixels), model.embed_tokens(tokens)
    assert torch.allclose(images.norm(dim=1), torch.ones(3))
    assert torch.allclose(model(pixels, tokens), images @ texts.T / 0.07, atol=1e-4)
    model.logit_scale.data.fill_(100.0)
    assert torch.allclose(model(pixels, tokens), images @ texts.T * 100, atol=1e-3)  # clamped


def test_layer_norm_is_computed_in_float32():
    layer, x = clip_model.LayerNorm(8), 1000 + torch.randn(4, 8)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())


def test_devices_that_are_not_there_are_refused():
    assert clip_model.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="no device"):
        clip_model.pick_device("abacus")
