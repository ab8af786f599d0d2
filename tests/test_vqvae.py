"""vqvae.py: the codebook, the network against torch's own calls, taming's files."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_vqvae

import vqvae
from clip_model import write_weights
from vqvae import VQVAEConfig

# ---------------------------------------------------------------- the codebook

def test_nearest_code_equals_brute_force():
    torch.manual_seed(0)
    codebook, z = vqvae.Codebook(30, 5).requires_grad_(False), torch.randn(2, 5, 3, 4)
    torch.nn.init.normal_(codebook.embedding.weight)
    wanted = [[min(range(30), key=lambda v: float(
        ((z[b, :, i // 4, i % 4] - codebook.embedding.weight[v]) ** 2).sum()))
        for i in range(12)] for b in range(2)]
    assert codebook.nearest(z).tolist() == wanted
    with torch.autocast("cpu", torch.bfloat16):            # near codes are told apart all the same
        assert codebook.nearest(z).tolist() == wanted


def test_each_term_teaches_its_own_side():
    """d‖e − z‖²/dz = 2 (z − e) over the number of entries, β of it here; what e gets is −1/β it."""
    model, x = tiny_vqvae(), torch.rand(2, 3, 8, 8) * 2 - 1
    z = model.latents(x).detach().requires_grad_(True)
    model.latents = lambda _: z
    _, loss = model(x)
    tokens = model.encode(x)
    e = model.quantize.vectors(tokens).transpose(1, 2).view(z.shape)
    assert loss.item() == pytest.approx(1.25 * (z - e).square().mean().item())
    by_z, by_codes = torch.autograd.grad(loss, [z, model.quantize.embedding.weight])
    assert torch.allclose(by_z, 0.25 * 2 * (z - e) / z.numel(), atol=1e-7)
    to_codes = -4 * by_z.flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(by_codes, torch.zeros_like(by_codes).index_add_(
        0, tokens.flatten(), to_codes), atol=1e-7)


def test_gradient_goes_straight_through():
    """The decoder sees e; the encoder receives the gradient with respect to e."""
    model, x = tiny_vqvae(), torch.rand(1, 3, 8, 8) * 2 - 1
    found, _ = model(x)
    e = model.quantize.vectors(model.encode(x)).transpose(1, 2).unflatten(2, (4, 4))
    e = e.detach().requires_grad_(True)
    assert torch.allclose(found, model.from_vectors(e), atol=1e-5)
    at_e = torch.autograd.grad(model.from_vectors(e).square().sum(), e)[0]
    z = model.latents(x).detach().requires_grad_(True)
    model.latents = lambda _: z
    assert torch.allclose(torch.autograd.grad(model(x)[0].square().sum(), z)[0], at_e, atol=1e-4)


def test_restart_revives_a_code_that_nothing_uses():
    codebook, z = vqvae.Codebook(4, 2).requires_grad_(False), torch.randn(1, 2, 5, 5)
    codebook.embedding.weight.copy_(torch.tensor([[0.0, 0], [1, 1], [90, 90], [80, -80]]))
    assert set(codebook.nearest(z).unique().tolist()) <= {0, 1}
    counts, before = torch.tensor([3, 2, 0, 0]), codebook.embedding.weight[:2].clone()
    vqvae.restart_dead_codes(codebook, counts, z, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.embedding.weight[:2], before)
    assert {2, 3} <= set(codebook.nearest(z).unique().tolist())


def test_the_loss_of_pixels_in_closed_form():
    x = torch.zeros(2, 3, 4, 4)
    assert vqvae.reconstruction_loss(x + 0.5, x).item() == pytest.approx(0.5 + 0.25)


# ---------------------------------------------------------------- taming's files

class Taming:
    """taming-transformers' forward pass, from its code's description, in torch's functional calls.
    A weight is drawn when its name is first asked for: so `state` becomes a checkpoint."""

    def __init__(self, config: VQVAEConfig) -> None:
        self.c, self.state = config, {}
        self.generator = torch.Generator().manual_seed(0)

    def drawn(self, name, *shape, scale=0.1, mean=0.0):
        if name not in self.state:
            self.state[name] = mean + scale * torch.randn(shape, generator=self.generator)
        assert self.state[name].shape == shape, name
        return self.state[name]

    def conv(self, name, x, width, size=3, **options):
        fan_in = x.shape[1] * size * size
        weight = self.drawn(f"{name}.weight", width, x.shape[1], size, size, scale=fan_in ** -0.5)
        return F.conv2d(x, weight, self.drawn(f"{name}.bias", width), **options)

    def norm(self, name, x):
        weight = self.drawn(f"{name}.weight", x.shape[1], mean=1.0)
        return F.group_norm(x, 32, weight, self.drawn(f"{name}.bias", x.shape[1]), 1e-6)

    def swish(self, name, x):
        x = self.norm(name, x)
        return x * x.sigmoid()

    def block(self, name, x, width):
        h = self.conv(f"{name}.conv1", self.swish(f"{name}.norm1", x), width, padding=1)
        h = self.conv(f"{name}.conv2", self.swish(f"{name}.norm2", h), width, padding=1)
        return h + (x if x.shape[1] == width else self.conv(f"{name}.nin_shortcut", x, width, 1))

    def attn(self, name, x):
        h, c = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", h, c, 1).flatten(2) for part in "qkv")   # (B, C, L)
        weights = (torch.einsum("bci,bcj->bij", q, k) * c ** -0.5).softmax(2)
        mixed = torch.einsum("bij,bcj->bci", weights, v).view(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed, c, 1)

    def mid(self, name, x):
        x = self.attn(f"{name}.attn_1", self.block(f"{name}.block_1", x, x.shape[1]))
        return self.block(f"{name}.block_2", x, x.shape[1])

    def level(self, name, x, i, n):
        for j in range(n):
            x = self.block(f"{name}.{i}.block.{j}", x, self.c.channels * self.c.multipliers[i])
            if i in self.c.attention:
                x = self.attn(f"{name}.{i}.attn.{j}", x)
        return x

    def codes(self):
        name = "quantize.embed.weight" if self.c.gumbel else "quantize.embedding.weight"
        return self.drawn(name, self.c.n_codes, self.c.embed_dim, scale=1.0)

    def encode(self, x):
        c = self.c
        x = self.conv("encoder.conv_in", x, c.channels, padding=1)
        for i in range(len(c.multipliers)):
            x = self.level("encoder.down", x, i, c.res_blocks)
            if i + 1 < len(c.multipliers):
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)),
                              x.shape[1], stride=2)
        x = self.swish("encoder.norm_out", self.mid("encoder.mid", x))
        x = self.conv("encoder.conv_out", x, c.latent_channels, padding=1)
        z = self.conv("quant_conv", x, c.latent_channels if c.gumbel else c.embed_dim, 1)
        if c.gumbel:
            return self.conv("quantize.proj", z, c.n_codes, 1).flatten(2).argmax(1)
        return torch.cdist(z.flatten(2).transpose(1, 2), self.codes()).argmin(-1)

    def decode(self, tokens, height):
        c = self.c
        e = self.codes()[tokens].transpose(1, 2).unflatten(2, (height, -1))
        x = self.conv("post_quant_conv", e, c.latent_channels, 1)
        x = self.conv("decoder.conv_in", x, c.channels * c.multipliers[-1], padding=1)
        x = self.mid("decoder.mid", x)
        for i in reversed(range(len(c.multipliers))):
            x = self.level("decoder.up", x, i, c.res_blocks + 1)
            if i > 0:
                x = self.conv(f"decoder.up.{i}.upsample.conv",
                              x.repeat_interleave(2, 2).repeat_interleave(2, 3), x.shape[1],
                              padding=1)
        return self.conv("decoder.conv_out", self.swish("decoder.norm_out", x), 3, padding=1)


TAMING = VQVAEConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, attention=(1, 2),
                     latent_channels=24, embed_dim=16, n_codes=50)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_tamings_checkpoints_load_and_give_its_numbers(gumbel, nested, tmp_path):
    theirs, x = Taming(replace(TAMING, gumbel=gumbel)), torch.rand(2, 3, 16, 24) * 2 - 1
    tokens = theirs.encode(x)
    picture = theirs.decode(tokens, 4)
    file = {**theirs.state, "loss.discriminator.main.0.weight": torch.zeros(3, 3)}
    if nested:                                         # FFHQ's: inside a transformer's checkpoint
        file = {f"first_stage_model.{name}": t for name, t in file.items()}
        file |= {"transformer.tok_emb.weight": torch.zeros(2, 2),
                 "cond_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    torch.save({"epoch": 1, "global_step": 7, "state_dict": file}, tmp_path / "last.ckpt")
    model, metadata = vqvae.load(tmp_path / "last.ckpt")
    assert model.config == theirs.c and metadata == {} and not model.training
    assert model.state_dict().keys() == theirs.state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.state[name]), name
    with torch.no_grad():
        assert tokens.shape == (2, 24) and len(tokens.unique()) > 5
        assert torch.equal(model.encode(x), tokens)
        assert torch.allclose(model.decode(tokens, 4), picture, atol=1e-4)


def test_published_sizes():
    """Factor and codes; the sizes are read back off the tensors' shapes."""
    openimages = vqvae.VQVAEConfig(multipliers=(1, 1, 2, 4), attention=(3,), n_codes=8192,
                                   gumbel=True)
    for config, factor, n_codes in ((vqvae.PRESETS["f16-1024"], 16, 1024),
                                    (vqvae.PRESETS["f16-16384"], 16, 16384), (openimages, 8, 8192)):
        with torch.device("meta"):
            model = vqvae.VQVAE(config)
        assert (config.factor, config.n_codes) == (factor, n_codes)
        assert vqvae.sizes_from_shapes(model.state_dict()) == config


def test_what_does_not_fit_is_refused(tmp_path):
    model, file = tiny_vqvae(), tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="codes, 0 to 15; MASK is none"):
        model.decode(torch.full((1, 4), model.config.n_codes))
    theirs = Taming(TAMING)
    theirs.decode(theirs.encode(torch.zeros(1, 3, 8, 8)), 2)
    for name in ("encoder.conv_in.bias", "quantize.embedding.weight", "decoder.conv_in.weight"):
        write_weights(file, {k: v for k, v in theirs.state.items() if k != name}, {})
        with pytest.raises(ValueError, match=f"holds no VQ-VAE.*{name}"):
            vqvae.load(file)
