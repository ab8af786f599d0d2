"""A tiny world for the tests: random models, a folder of pictures, an index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip_model
import index as retrieval
import knn_diffusion
import vqvae

CLIP_CONFIG = clip_model.ClipConfig(
    embed_dim=16, image_size=16, patch_size=8, vision_width=32, vision_layers=2, vision_heads=2,
    context_length=12, vocab_size=517, text_width=32, text_layers=2, text_heads=2)
UNET_CONFIG = knn_diffusion.UNetConfig(
    image_size=16, embed_dim=16, n_neighbors=3, widths=(16, 32), blocks=1, norm_groups=4,
    head_channels=8, condition_width=24, time_width=24, attention=(8, 4), self_attention=(4,),
    dropout=0.0, T=100, target="v", unshuffle=2, position_map=True, query_map=4, query_hidden=24)
TRANSFORMER_CONFIG = knn_diffusion.TransformerConfig(
    image_size=16, n_codes=7, tokens_a_side=3, embed_dim=16, n_neighbors=3, width=16, layers=2,
    heads=2, condition_width=12, T=10, query_map=2, query_hidden=8)
VQVAE_CONFIG = vqvae.VQVAEConfig(
    image_size=16, channels=8, multipliers=(1, 2), res_blocks=1, attention=(), latent_channels=8,
    embed_dim=4, n_codes=16, norm_groups=4)
BACKBONES = ["continuous", "discrete"]


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random vectors of length 1."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere: a zero-initialised branch would hide a missing path."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_clip(seed: int = 0, **changes) -> clip_model.CLIP:
    torch.manual_seed(seed)
    model = clip_model.CLIP(replace(CLIP_CONFIG, **changes)).eval()
    merges = [("r", "e"), ("re", "d</w>"), ("f", "o")]
    model.tokenizer = clip_model.Tokenizer(merges, model.config.context_length)
    return model


def tiny_unet(seed: int = 0, **changes) -> knn_diffusion.UNet:
    return randomised(knn_diffusion.UNet(replace(UNET_CONFIG, **changes)), seed)


def tiny_transformer(seed: int = 0, **changes) -> knn_diffusion.TokenTransformer:
    config = replace(TRANSFORMER_CONFIG, **changes)
    return randomised(knn_diffusion.TokenTransformer(config), seed)


def tiny_vqvae(seed: int = 0, **changes) -> vqvae.VQVAE:
    return randomised(vqvae.VQVAE(replace(VQVAE_CONFIG, **changes)), seed)


def two_samples(backbone: str) -> tuple:
    """A random network; x_t, t, queries and neighbours of two samples; pictures to edit."""
    torch.manual_seed(0)
    if backbone == "continuous":
        model, x = tiny_unet(), torch.randn(2, 2, 3, 16, 16)
    else:
        model, x = tiny_transformer(), torch.randint(7, (2, 2, 9))
    return model, x[0], torch.tensor([3, 9]), unit(2, 16), unit(2, 3, 16, seed=1), x[1]


def write_pictures(folder: Path, n: int, size: int = 16, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        blocks.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with images/ (20 pictures), index/ and, each a .safetensors, clip, vqvae,
    continuous, discrete, edit and edit-discrete, all random."""
    folder = tmp_path_factory.mktemp("world")
    write_pictures(folder / "images", 20)
    clip_model.save(folder / "clip.safetensors", tiny_clip(), {})
    clip = clip_model.load(folder / "clip.safetensors")
    embeddings, names, _ = retrieval.embed_folder(clip, folder / "images")
    retrieval.write_index(folder / "index", embeddings, names, "some clip", clip.fingerprint(),
                          folder / "images")
    codec = tiny_vqvae()
    torch.nn.init.normal_(codec.quantize.embedding.weight, std=5)    # codes that look different
    clip_model.save_model(folder / "vqvae.safetensors", codec, {})
    metadata = {"clip": clip.fingerprint(), "vqvae": vqvae.fingerprint(codec), "condition": "both"}
    unet, transformer = tiny_unet(), tiny_transformer(n_codes=16, tokens_a_side=8)
    for name, model in (("continuous", unet), ("discrete", transformer),
                        ("edit", randomised(knn_diffusion.widened(unet), 1)),
                        ("edit-discrete", randomised(knn_diffusion.widened(transformer), 1))):
        clip_model.save_model(folder / f"{name}.safetensors", model, metadata)
    return folder
