"""Train the small sticker CLIP from captions.jsonl:  python examples/train_clip.py --data --out

The only training here that ever reads a word. Two ways:

    both towers    contrastively, from nothing or from --init (CLIP, 2103.00020 Sec. 2.3)
    --text-only    the picture tower of --init stays as it is, the vocabulary grows, and the text
                   tower learns to speak to it (locked-image tuning, LiT, 2111.07991). So an index
                   and a generator, which know f_img alone, stay valid.

Shapes: B batch, H W picture, E CLIP dimension, D width of the text tower.
"""
from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import clip_model  # noqa: E402
import train  # noqa: E402
from clip_model import ClipConfig, require  # noqa: E402

# Its vocabulary is learned, so the training replaces vocab_size.
STICKERS = ClipConfig(embed_dim=256, image_size=64, patch_size=16, vision_width=256,
                      vision_layers=5, vision_heads=4, context_length=24, vocab_size=1514,
                      text_width=192, text_layers=3, text_heads=3, activation="gelu")
VOCABULARY = 1900                # tokens; with them clip.safetensors stays below 12 MB
SCENES = 8000                    # with --text-only: this many crops of scenes are embedded, once


# ---------------------------------------------------------------- the vocabulary

def learn_merges(captions: list[str], n_merges: int, known: clip_model.Tokenizer | None = None
                 ) -> list[tuple[str, str]]:
    """Learn byte-pair merges: again and again, join the most frequent pair of neighbours.

    known: its merges come first. Source: Sennrich et al. (1508.07909) Alg. 1; ties go to the
    alphabetically first pair.
    """
    known = known or clip_model.Tokenizer([])
    counts: Counter[str] = Counter()
    for caption, n in Counter(captions).items():
        for word in clip_model.split_words(caption):
            counts[word] += n
    words = {word: tuple(known.words[i] for i in known.encode_word(word)) for word in counts}
    merges = list(known.merges)
    while len(merges) < n_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: clip_model.merge_pair(parts, best) if best[0] in parts else parts
                 for word, parts in words.items()}
    return merges


def grow_vocabulary(model: clip_model.CLIP, captions: list[str], size: int) -> clip_model.CLIP:
    """The same model with more merges behind its own, `size` tokens at most. A new token's vector
    is the mean of its two parts'."""
    old, config = model.tokenizer, model.config
    merges = learn_merges(captions, size - 514, old)
    grown = clip_model.CLIP(replace(config, vocab_size=514 + len(merges)))
    grown.tokenizer = clip_model.Tokenizer(merges, config.context_length)
    weights = model.state_dict()
    rows = weights.pop("token_embedding.weight")                                  # (V, D)
    rows, ends = list(rows[:-2]), list(rows[-2:])
    for left, right in merges[len(old.merges):]:
        ids = grown.tokenizer.ids
        rows.append((rows[ids[left]] + rows[ids[right]]) / 2)
    grown.load_state_dict({**weights, "token_embedding.weight": torch.stack(rows + ends)})
    return grown


# ---------------------------------------------------------------- captioned pictures

def read_captions(path: Path) -> list[dict]:
    """Rows of captions.jsonl. Raises ValueError, naming the line, for a row that can't be used."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                usable = isinstance(row["path"], str) and says_what_it_shows(row)
                for part in row.get("parts", []):
                    left, top, right, bottom = map(float, part["box"])
                    usable &= left < right and top < bottom and says_what_it_shows(part)
            except (ValueError, KeyError, TypeError, RecursionError):
                usable = False
            require(usable, f"{path} line {number} is no row with a path, a concept and captions")
            rows.append(row)
    require(any("parts" not in row for row in rows), f"{path} has no picture of one thing")
    return rows


def says_what_it_shows(row: dict) -> bool:
    captions = row["captions"]
    return isinstance(captions, list) and len(captions) > 0 and all(
        isinstance(text, str) for text in [row["concept"], *captions])


class CaptionedPictures:
    """Pictures with captions (captions.jsonl), drawn in batches that a contrastive loss can use."""

    def __init__(self, folder: Path, size: int) -> None:
        self.rows = read_captions(folder / "captions.jsonl")
        self.shown = train.read_pictures(folder, [row["path"] for row in self.rows], size)
        self.scenes = [i for i, row in enumerate(self.rows) if "parts" in row]
        self.members: dict[str, list[int]] = {}          # concept -> rows with one thing in them
        for i, row in enumerate(self.rows):
            if "parts" not in row:
                self.members.setdefault(row["concept"], []).append(i)
        self.twins = [concept for concept, rows in self.members.items()
                      if len(rows) > 1 and all(map(self.exact_captions, rows))]
        self.crops: list[tuple[dict, Tensor]] = []       # scenes and parts, once `embed` was called

    def exact_captions(self, i: int) -> list[str]:
        """The captions that name style and background: they tell twins apart."""
        style, colour = (self.rows[i].get(key, "\0") for key in ("style", "background"))
        return [caption for caption in self.rows[i]["captions"]
                if caption.startswith(f"{style} ") and caption.endswith(f" {colour} background")]

    def crop_of(self, i: int, part: dict, rng: np.random.Generator) -> np.ndarray:
        """A window around a scene's part, up to half wider than it, scaled up to a whole picture.

        A square, but cut at the picture's border. The boxes are in pixels of the model's size.
        """
        left, top, right, bottom = part["box"]
        half = max(right - left, bottom - top) * rng.uniform(1.0, 1.5) / 2
        x, y = (left + right) / 2, (top + bottom) / 2
        size = self.shown.shape[1]
        box = np.clip([x - half, y - half, x + half, y + half], 0, size).round().astype(int)
        crop = Image.fromarray(self.shown[i]).crop(tuple(box))
        return np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC))

    def scene(self, rng: np.random.Generator) -> tuple[dict, np.ndarray]:
        """A random scene (3 in 10), or a crop around one of its parts: its row and its picture."""
        i = self.scenes[rng.integers(len(self.scenes))]
        parts = self.rows[i]["parts"]
        if not parts or rng.random() < 0.3:
            return self.rows[i], self.shown[i]
        part = parts[rng.integers(len(parts))]
        return part, self.crop_of(i, part, rng)

    @torch.no_grad()
    def embed(self, model: clip_model.CLIP, rng: np.random.Generator) -> None:
        """Put a frozen tower's embeddings in the pictures' place, and draw SCENES scenes."""
        def embed(pictures: Sequence[np.ndarray]) -> Tensor:
            parts = (clip_model.to_pixels(pictures[i:i + 256]).to(model.logit_scale.device)
                     for i in range(0, len(pictures), 256))
            return torch.cat([model.embed_images(part) for part in parts])

        if self.scenes:
            rows, pictures = zip(*(self.scene(rng) for _ in range(SCENES)))
            self.crops = list(zip(rows, embed(pictures)))
        self.shown = embed(self.shown)                                             # (N, E)

    def batch(self, n: int, rng: np.random.Generator
              ) -> tuple[list, list[str], list[str], np.ndarray]:
        """n pictures (or embeddings), a caption each, their concepts, and which captions are exact.

        Half of them are pairs of twins: one concept, but another style or another background, with
        exact captions. Only a quarter if the pictures are embedded: their tower tells twins apart
        already, and words are what is to be learned. An eighth are scenes and crops of them.
        """
        is_embedded = isinstance(self.shown, Tensor)
        n_pairs = n // (8 if is_embedded else 4) if self.twins else 0          # two pictures each
        n_scenes = n // 8 if self.scenes else 0
        drawn = []                                       # (picture, options, concept, is exact)
        for concept in deal(self.twins, n_pairs, rng):
            for i in rng.permutation(self.members[concept])[:2]:
                drawn.append((self.shown[i], self.exact_captions(i), concept, True))
        for concept in deal(list(self.members), n - 2 * n_pairs - n_scenes, rng):
            i = rng.choice(self.members[concept])
            drawn.append((self.shown[i], self.rows[i]["captions"], concept, False))
        for _ in range(n_scenes):
            row, picture = (self.crops[rng.integers(SCENES)] if is_embedded else self.scene(rng))
            drawn.append((picture, row["captions"], row["concept"], False))
        pictures, options, concepts, is_exact = zip(*drawn)
        captions = [each[rng.integers(len(each))] for each in options]
        return list(pictures), captions, list(concepts), np.array(is_exact)


def deal(cards: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """n cards from a shuffled deck: none comes again before all have come."""
    order = rng.permutation(max(n, len(cards)))[:n]
    return [cards[i % len(cards)] for i in order]


# ---------------------------------------------------------------- the loss

def contrastive_loss(logits: Tensor, concepts: list[str], is_exact: np.ndarray) -> Tensor:
    """CLIP's symmetric cross-entropy over logits (B, B), the pairs on the diagonal.

    Ours: a pair of the same concept that is no pair of exact captions is no negative: left out.
    """
    codes = torch.tensor(np.unique(concepts, return_inverse=True)[1], device=logits.device)
    exact = torch.from_numpy(is_exact).to(logits.device)
    same = codes[:, None] == codes[None]                                          # (B, B)
    false_negative = same & ~(exact[:, None] & exact[None])
    false_negative.fill_diagonal_(False)
    logits = logits.float().masked_fill(false_negative, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def embed_by_length(model: clip_model.CLIP, tokens: Tensor) -> Tensor:
    """`embed_tokens` in parts of like length: a part is as slow as its longest text is long."""
    order = tokens.argmax(-1).argsort()
    found = torch.cat([model.embed_tokens(part) for part in tokens[order].split(128)])
    return found[order.argsort()]                                                 # (B, E)


# ---------------------------------------------------------------- the loop

def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and convolutions only: not norms, biases, single vectors."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def run(args: argparse.Namespace) -> None:
    """Train; write out/clip.safetensors (the EMA) and out/state.pt. Raises ValueError or
    FileNotFoundError before the first step."""
    for name in ("steps", "batch_size", "save_every", "lr", "minutes"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be more than 0")
    require(args.resume or args.init or not args.text_only, "--text-only needs --init, a picture "
            "tower to keep")
    args.device = clip_model.pick_device(args.device)
    args.bf16 = not args.no_bf16
    args.weights = args.out / "clip.safetensors" if args.resume else args.init
    model = clip_model.load(args.weights) if args.weights else None
    require(model is None or model.tokenizer, f"no vocabulary was found for {args.weights}")
    config = model.config if model else STICKERS
    pictures = CaptionedPictures(args.data, config.image_size)
    captions = [caption for row in pictures.rows for caption in row["captions"]]
    torch.manual_seed(args.seed)
    if model is None:
        merges = learn_merges(captions, config.vocab_size - 514)
        model = clip_model.CLIP(replace(config, vocab_size=514 + len(merges)))
        model.tokenizer = clip_model.Tokenizer(merges, config.context_length)
    elif args.text_only and not args.resume:
        model = grow_vocabulary(model, captions, VOCABULARY)
    model, tokenizer = model.to(args.device), model.tokenizer
    if args.text_only:
        pictures.embed(model, np.random.default_rng(args.seed))
    print(f"{len(pictures.rows)} pictures, {len(captions)} captions, {len(tokenizer.words)} tokens")
    optimizers = [torch.optim.AdamW(weight_groups(model, 0.1), lr=args.lr, betas=(0.9, 0.98),
                                    eps=1e-6, fused=True)]
    settings = {"batch_size": args.batch_size, "lr": args.lr, "text_only": args.text_only,
                "merges": "\n".join(" ".join(pair) for pair in tokenizer.merges)}
    training = train.Run(args, model, settings, optimizers)
    model.visual.requires_grad_(not args.text_only)
    for step, _ in training.steps(look=lambda step: None):
        rng = np.random.default_rng((args.seed, step))
        shown, texts, concepts, is_exact = pictures.batch(args.batch_size, rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # a few captions are cut: no news here
            tokens = tokenizer(texts).to(args.device)
        with train.autocast(args.device, args.bf16):
            images = (torch.stack(shown) if args.text_only else
                      model.embed_images(clip_model.to_pixels(shown).to(args.device)))  # (B, E)
            found = embed_by_length(model, tokens)                                     # (B, E)
        loss = contrastive_loss(model.logits(images, found), concepts, is_exact)
        loss.backward()
        training.advance(step, loss, decay=0.998, warmup=200)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with captions.jsonl")
    parser.add_argument("--out", type=Path, required=True,
                        help="folder to write: clip.safetensors, state.pt, log.csv")
    parser.add_argument("--text-only", action="store_true",
                        help="keep the picture tower of --init, train the text tower alone")
    parser.add_argument("--init", type=Path, help="start from these weights, optimiser fresh")
    parser.add_argument("--steps", type=int, default=2600, help="in total, resumed ones included")
    parser.add_argument("--batch-size", type=int, default=512, help="pictures per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt, all other "
                        "arguments as they were; --steps may differ")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after this long, state written")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--no-bf16", action="store_true", help="train in float32")
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(what="clip", preset=None, accumulate=1, keep=False,
                        command="python examples/train_clip.py " + shlex.join(argv))
    return clip_model.run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
