"""vqvae.py: the codebook, the network against torch's own calls, taming's files."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised

import vqvae
from clip_model import write_weights
from vqvae import VQVAEConfig

TINY = VQVAEConfig(channels=8, multipliers=(1, 2), res_blocks=1, attention=(), latent_channels=6,
                   embed_dim=4, n_codes=12, norm_groups=4)


def tiny(**changes) -> vqvae.VQVAE:
    from dataclasses import replace
    torch.manual_seed(0)
    model = randomised(vqvae.VQVAE(replace(TINY, **changes)))
    return model


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
    codebook, z = vqvae.Codebook(7, 3), torch.randn(2, 3, 2, 2, requires_grad=True)
    e = codebook.vectors(codebook.nearest(z)).transpose(1, 2).view(z.shape)
    codebook_term, commitment = codebook.losses(z, e)
    assert codebook_term.item() == pytest.approx(commitment.item())
    assert codebook_term.item() == pytest.approx(((z - e) ** 2).mean().item())
    weight = codebook.embedding.weight
    assert torch.autograd.grad(codebook_term, z, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(codebook_term, weight, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(commitment, weight, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(commitment, z)[0].abs().sum() > 0


def test_beta_weighs_the_commitment_term_alone():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    losses = {beta: tiny(commitment=beta)(x)[1].item() for beta in (0.0, 0.25, 1.0)}
    assert losses[0.25] == pytest.approx(1.25 * losses[0.0], rel=1e-4)
    grads = {}
    for beta in (0.25, 1.0):
        model = tiny(commitment=beta)
        model.requires_grad_(True)(x)[1].backward()
        grads[beta] = (model.quantize.embedding.weight.grad, model.quant_conv.weight.grad)
    assert torch.allclose(grads[0.25][0], grads[1.0][0])                 # the codes: no β
    assert torch.allclose(4 * grads[0.25][1], grads[1.0][1], rtol=1e-3, atol=1e-7)


def test_gradient_goes_straight_through():
    """The decoder sees e; the encoder receives the gradient with respect to e."""
    model, x = tiny().requires_grad_(True), torch.rand(1, 3, 8, 8) * 2 - 1
    found, _, tokens = model(x)
    e = model.quantize.vectors(tokens).transpose(1, 2).unflatten(2, (4, 4))
    e = e.detach().requires_grad_(True)
    assert torch.allclose(found, model.from_vectors(e), atol=1e-5)
    at_e = torch.autograd.grad(model.from_vectors(e).square().sum(), e)[0]
    z = model.latents(x).detach().requires_grad_(True)
    model.latents = lambda _: z
    assert torch.allclose(torch.autograd.grad(model(x)[0].square().sum(), z)[0], at_e, atol=1e-4)


def test_restart_revives_a_code_that_nothing_uses():
    codebook, z = vqvae.Codebook(4, 2), torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[0.0, 0], [1, 1], [90, 90], [80, -80]]))
    counts = torch.tensor([3, 2, 0, 0])
    before = codebook.embedding.weight[:2].clone()
    assert set(codebook.nearest(z).unique().tolist()) <= {0, 1}
    n = vqvae.restart_dead_codes(codebook, counts, z, torch.Generator().manual_seed(0))
    assert n == 2 and torch.equal(codebook.embedding.weight[:2], before)
    assert {2, 3} <= set(codebook.nearest(z).unique().tolist())


def test_perplexity_and_psnr_in_closed_form():
    assert vqvae.perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert vqvae.perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    assert vqvae.perplexity(torch.tensor([1, 3])) == pytest.approx(
        math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))
    x = torch.zeros(2, 3, 4, 4)
    assert vqvae.psnr(x + 0.2, x).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert vqvae.reconstruction_loss(x + 0.5, x).item() == pytest.approx(0.5 + 0.25)


# ---------------------------------------------------------------- taming's files


def taming_state(c: VQVAEConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of taming-transformers, written out from its code's
    description, not from our modules."""
    state: dict[str, torch.Tensor] = {}

    def conv(name: str, c_in: int, c_out: int, k: int) -> None:
        state[f"{name}.weight"] = torch.randn(c_out, c_in, k, k, generator=generator) * (
            c_in * k * k) ** -0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(c_out, generator=generator)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def block(name: str, c_in: int, c_out: int) -> None:
        norm(f"{name}.norm1", c_in)
        conv(f"{name}.conv1", c_in, c_out, 3)
        norm(f"{name}.norm2", c_out)
        conv(f"{name}.conv2", c_out, c_out, 3)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def attn(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def mid(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        attn(f"{name}.attn_1", width)
        block(f"{name}.block_2", width, width)

    widths, n = [c.channels * m for m in c.multipliers], len(c.multipliers)
    conv("encoder.conv_in", 3, c.channels, 3)
    now = c.channels
    for i, width in enumerate(widths):
        for j in range(c.res_blocks):
            block(f"encoder.down.{i}.block.{j}", now, width)
            now = width
            if i in c.attention:
                attn(f"encoder.down.{i}.attn.{j}", now)
        if i + 1 < n:
            conv(f"encoder.down.{i}.downsample.conv", now, now, 3)
    mid("encoder.mid", now)
    norm("encoder.norm_out", now)
    conv("encoder.conv_out", now, c.latent_channels, 3)
    conv("decoder.conv_in", c.latent_channels, now, 3)
    mid("decoder.mid", now)
    for i in reversed(range(n)):
        for j in range(c.res_blocks + 1):
            block(f"decoder.up.{i}.block.{j}", now, widths[i])
            now = widths[i]
            if i in c.attention:
                attn(f"decoder.up.{i}.attn.{j}", now)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", now, now, 3)
    norm("decoder.norm_out", now)
    conv("decoder.conv_out", now, 3, 3)
    if c.gumbel:
        state["quantize.embed.weight"] = torch.randn(c.n_codes, c.embed_dim, generator=generator)
        conv("quantize.proj", c.latent_channels, c.n_codes, 1)
    else:
        state["quantize.embedding.weight"] = torch.randn(c.n_codes, c.embed_dim,
                                                         generator=generator)
    conv("quant_conv", c.latent_channels, c.latent_channels if c.gumbel else c.embed_dim, 1)
    conv("post_quant_conv", c.embed_dim, c.latent_channels, 1)
    return state


class Functional:
    """taming's forward pass composed of torch's functional calls over a state dict."""

    def __init__(self, state: dict[str, torch.Tensor], c: VQVAEConfig) -> None:
        self.s, self.c = state, c

    def conv(self, name, x, **options):
        return F.conv2d(x, self.s[f"{name}.weight"], self.s[f"{name}.bias"], **options)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.norm(f"{name}.norm1", x)
        h = self.conv(f"{name}.conv1", h * h.sigmoid(), padding=1)
        h = self.norm(f"{name}.norm2", h)
        h = self.conv(f"{name}.conv2", h * h.sigmoid(), padding=1)
        if f"{name}.nin_shortcut.weight" in self.s:
            x = self.conv(f"{name}.nin_shortcut", x)
        return x + h

    def attn(self, name, x):
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")   # (B, C, L)
        weights = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(2)
        return x + self.conv(f"{name}.proj_out",
                             torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def mid(self, name, x):
        return self.block(f"{name}.block_2",
                          self.attn(f"{name}.attn_1", self.block(f"{name}.block_1", x)))

    def encode(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        n = len(self.c.multipliers)
        for i in range(n):
            for j in range(self.c.res_blocks):
                x = self.block(f"encoder.down.{i}.block.{j}", x)
                if i in self.c.attention:
                    x = self.attn(f"encoder.down.{i}.attn.{j}", x)
            if i + 1 < n:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.norm("encoder.norm_out", self.mid("encoder.mid", x))
        z = self.conv("quant_conv", self.conv("encoder.conv_out", x * x.sigmoid(), padding=1))
        if self.c.gumbel:
            return self.conv("quantize.proj", z).flatten(2).argmax(1)
        codes = self.s["quantize.embedding.weight"]
        return torch.cdist(z.flatten(2).transpose(1, 2), codes).argmin(-1)

    def decode(self, tokens, height):
        key = "quantize.embed.weight" if self.c.gumbel else "quantize.embedding.weight"
        x = self.s[key][tokens].transpose(1, 2).unflatten(2, (height, -1))
        x = self.mid("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", x),
                                              padding=1))
        for i in reversed(range(len(self.c.multipliers))):
            for j in range(self.c.res_blocks + 1):
                x = self.block(f"decoder.up.{i}.block.{j}", x)
                if i in self.c.attention:
                    x = self.attn(f"decoder.up.{i}.attn.{j}", x)
            if i > 0:
                x = self.conv(f"decoder.up.{i}.upsample.conv",
                              x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        x = self.norm("decoder.norm_out", x)
        return self.conv("decoder.conv_out", x * x.sigmoid(), padding=1)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_tamings_checkpoints_load_and_give_its_numbers(gumbel, nested, tmp_path):
    config = VQVAEConfig(channels=32, multipliers=(1, 2, 2), res_blocks=2, attention=(1, 2),
                         latent_channels=24, embed_dim=16, n_codes=50, gumbel=gumbel)
    state = taming_state(config, torch.Generator().manual_seed(0))
    extra = {"loss.discriminator.main.0.weight": torch.zeros(3, 3),
             "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}
    if nested:                                         # FFHQ's: inside a transformer's checkpoint
        inside = {f"first_stage_model.{name}": t for name, t in {**state, **extra}.items()}
        extra = {"transformer.tok_emb.weight": torch.zeros(2, 2),
                 "cond_stage_model.encoder.conv_in.weight": torch.zeros(1)}
        whole = {**inside, **extra}
    else:
        whole = {**state, **extra}
    torch.save({"epoch": 1, "global_step": 7, "state_dict": whole}, tmp_path / "last.ckpt")
    model, metadata = vqvae.load(tmp_path / "last.ckpt")
    assert model.config == config and metadata == {} and not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    wanted, x = Functional(state, config), torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        tokens = model.encode(x)
        assert tokens.shape == (2, 24) and len(tokens.unique()) > 5
        assert torch.equal(tokens, wanted.encode(x))
        assert torch.allclose(model.decode(tokens, 4), wanted.decode(tokens, 4), atol=1e-4)


def test_published_sizes():
    """Factor and codes; the sizes are read back off the tensors' shapes."""
    for name, factor, n_codes in (("f16-1024", 16, 1024), ("f16-16384", 16, 16384),
                                  ("f8-8192", 8, 8192)):
        config = vqvae.PRESETS[name]
        with torch.device("meta"):
            model = vqvae.VQVAE(config)
        assert (config.factor, config.n_codes) == (factor, n_codes)
        assert vqvae.sizes_from_shapes(model.state_dict()) == config
    with torch.device("meta"):
        stickers = vqvae.VQVAE(vqvae.PRESETS["stickers"])
    assert 2 * sum(p.numel() for p in stickers.parameters()) < 4_000_000     # bytes when shipped


def test_a_model_comes_back_from_its_file(tmp_path):
    model, x = tiny(), torch.rand(1, 3, 8, 8) * 2 - 1
    vqvae.save(tmp_path / "v.safetensors", model, {"command": "x", "step": "1"})
    found, metadata = vqvae.load(tmp_path / "v.safetensors")
    assert found.config == model.config and metadata["step"] == "1"
    assert torch.allclose(found.decode(found.encode(x)), model.half().float().decode(
        found.encode(x)), atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="do not fill"):
        model.decode(torch.zeros(1, 7, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=f"token {model.config.n_codes}, but"):
        model.decode(torch.full((1, 4), model.config.n_codes))               # MASK
    with pytest.raises(FileNotFoundError):
        vqvae.load(tmp_path / "nothing.ckpt")
    state = taming_state(VQVAEConfig(channels=32, multipliers=(1,), attention=()),
                         torch.Generator())
    for name in ("encoder.conv_in.weight", "quantize.embedding.weight", "decoder.mid.block_1.norm1."
                 "weight"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "w.ckpt")
        with pytest.raises(ValueError, match="taming") as error:
            vqvae.load(tmp_path / "w.ckpt")
        assert "\n" not in str(error.value)
    write_weights(tmp_path / "w.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="lacks"):
        vqvae.load(tmp_path / "w.safetensors")
