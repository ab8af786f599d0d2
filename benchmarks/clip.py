"""Our CLIP beside the public ones:  python benchmarks/clip.py [--model ViT-B/32] [--device cpu]

The same random weights, inputs and threads, alternated in one run; pictures and texts a second,
medians of --repeats, and ratios. Peers: openai/CLIP's own model code (clip-anytorch), Hugging
Face's CLIPModel with its default attention. The first comes with requirements-oracles.txt, the
second counts where transformers is installed.
Also: captions tokenised a second, from cold and with the words cached.
"""
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# In place of this folder, where this very file would pass for openai's package `clip`.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import clip_model  # noqa: E402

MODELS = {
    "ViT-B/32": {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12,
                 "vision_width": 768, "vision_patch_size": 32},
    "RN50": {"embed_dim": 1024, "image_resolution": 224, "vision_layers": (3, 4, 6, 3),
             "vision_width": 64, "vision_patch_size": None},
}
TEXT = {"context_length": 77, "vocab_size": 49408, "transformer_width": 512,
        "transformer_heads": 8, "transformer_layers": 12}


def public_model(name: str) -> nn.Module:
    """openai/CLIP's model by path: importing its package wants torchvision."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        raise ValueError("clip-anytorch is not installed: "
                         "pip install --no-deps -r requirements-oracles.txt")
    path = Path(spec.submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location("openai_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    return module.CLIP(**MODELS[name], **TEXT).eval().requires_grad_(False)


def hugging_face_model() -> nn.Module | None:
    try:
        import transformers
    except ImportError:
        return None
    text = {"eos_token_id": 49407}
    return transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, projection_dim=512)).eval().requires_grad_(False)


def alternated(runs: dict[str, Callable[[], Tensor]], repeats: int, device: torch.device
               ) -> dict[str, float]:
    """Median seconds of each run; one warm-up, then every run in turn, again and again."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="ViT-B/32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device = clip_model.pick_device(args.device)
    try:
        theirs = public_model(args.model)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "w.pt")
        ours = clip_model.load(Path(folder) / "w.pt", activation="quick_gelu").to(device)
    theirs = theirs.to(device)
    other = hugging_face_model() if args.model == "ViT-B/32" else None
    other = other.to(device) if other is not None else None

    generator = torch.Generator().manual_seed(0)
    size, B = MODELS[args.model]["image_resolution"], args.batch_size
    pixels = torch.randn(B, 3, size, size, generator=generator).to(device)
    tokens = torch.zeros(B, 77, dtype=torch.int64)
    for row in tokens:                           # captions of 6 to 20 tokens, as people write them
        n = int(torch.randint(6, 21, (1,), generator=generator))
        row[:n] = torch.randint(1, 49000, (n,), generator=generator)
        row[0], row[n - 1] = 49406, 49407
    tokens = tokens.to(device)
    normalise = nn.functional.normalize

    def in_bf16(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def wrapped() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return run()
        return wrapped

    with torch.inference_mode():
        runs = {"pictures": {"openai": lambda: normalise(theirs.encode_image(pixels), dim=-1),
                             "ours": lambda: ours.embed_images(pixels)},
                "texts": {"openai": lambda: normalise(theirs.encode_text(tokens), dim=-1),
                          "ours": lambda: ours.embed_tokens(tokens)}}
        if other is not None:
            vision, text = other.vision_model, other.text_model
            runs["pictures"]["hugging face"] = lambda: normalise(
                other.visual_projection(vision(pixels).pooler_output), dim=-1)
            runs["texts"]["hugging face"] = lambda: normalise(
                other.text_projection(text(tokens).pooler_output), dim=-1)
        print(f"{args.model}, batch {B}, {device}, {torch.get_num_threads()} threads, medians of "
              f"{args.repeats} alternated runs")
        print("| a second | openai float32 | hugging face float32 | ours float32 | ratio | "
              "ours bf16 | ratio |\n|---|---|---|---|---|---|---|")
        for what, own in runs.items():
            difference = (own["openai"]() - own["ours"]()).abs().max().item()
            own["ours bf16"] = in_bf16(own["ours"])
            t = alternated(own, args.repeats, device)
            speed = {name: f"{B / seconds:.1f}" for name, seconds in t.items()}
            print(f"| {what} | {speed['openai']} | {speed.get('hugging face', '-')} | "
                  f"{speed['ours']} | {t['openai'] / t['ours']:.2f} | {speed['ours bf16']} | "
                  f"{t['openai'] / t['ours bf16']:.2f} |   largest difference {difference:.1e}")
    tokenizer = clip_model.published_tokenizer(Path("."))
    if tokenizer is not None:
        captions = [f"a photo of a {a} {b} number {i % 100} on the table" for i, (a, b) in
                    enumerate([("red", "heart"), ("small", "fox"), ("teddy", "bear"),
                               ("blue", "car"), ("happy", "dog")] * 2000)]
        for what in ("from cold", "words cached"):
            start = time.perf_counter()
            tokenizer(captions)
            print(f"10,000 captions tokenised {what}: {time.perf_counter() - start:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
