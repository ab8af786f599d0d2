"""Text to picture with kNN-Diffusion:  python sample.py "a red heart"

The text's CLIP embedding and the embeddings of its k nearest *pictures* take the place that a
picture's own embedding and its neighbours had in training (kNN-Diffusion Sec. 3). Departs: by
default the best neighbour stands for the text's embedding, see `condition_on`. No weight changes
when another index is named: then the pictures come from another domain.

Shapes: B samples, E CLIP dimension, K neighbours, N index rows.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import clip_model
import index as retrieval
import knn_diffusion
import vqvae
from clip_model import require

SHIPPED = Path(__file__).parent / "weights" / "stickers"
SETTINGS = ("n k condition query steps sampler eta guidance dynamic_threshold truncation weights "
            "vqvae clip index")      # what a PNG's text chunk holds
SHOWN_NEIGHBORS = 5              # pictures of neighbours drawn in the grid, at most


def open_all(weights: Path, clip_path: Path, index_path: Path
             ) -> tuple[knn_diffusion.UNet | knn_diffusion.TokenTransformer, dict[str, str],
                        clip_model.CLIP, retrieval.Index]:
    """Load a generator, its file's metadata, a CLIP and an index that belong together.

    Raises FileNotFoundError, or ValueError with one sentence where one is damaged or where the
    generator or the index was made with another CLIP.
    """
    model, metadata = knn_diffusion.load(weights)
    clip, index = clip_model.load(clip_path), retrieval.open_index(index_path)
    wanted, found = metadata.get("clip", ""), clip.fingerprint()
    if wanted not in ("", found) or model.config.embed_dim != clip.config.embed_dim:
        raise ValueError(f"{weights} was trained with the CLIP {wanted} "
                         f"({model.config.embed_dim} dimensions), {clip_path} is {found} "
                         f"({clip.config.embed_dim} dimensions)")
    retrieval.check_encoder(index, clip.describe(), found, clip.config.embed_dim)
    return model, metadata, clip, index


def condition_on(queries: Tensor, index: retrieval.Index, k: int, condition: str,
                 query: str = "nearest") -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Search, then keep what `condition` names: query (B, E) and neighbours (B, K, E) or None, and
    what was found: scores and row ids (B, K). queries: unit-norm (B, E).

    query: "text" hands the queries on as they are, as the paper does. Departs: "nearest" puts the
    best neighbour in a query's place, where neighbours are shown at all, and leaves it among the
    neighbours, which are still the text's (in training a query is never its own neighbour). A
    text's embedding lies apart from all pictures' (the sticker CLIP's: cosine 0.67 to its own
    picture, 0.99 between that and the neighbour), where a small network that has seen pictures only
    knows no shapes.
    """
    scores, ids = index.search(queries.cpu(), k)
    rows = torch.from_numpy(index.embeddings[ids.numpy()]).float().to(queries.device)    # (B, K, E)
    if query == "nearest" and condition == "both" and rows.shape[1]:
        queries = rows[:, 0]                                                             # (B, E)
    return (None if condition == "neighbors" else queries,
            None if condition == "query" or k == 0 else rows, scores, ids)


def open_codec(path: Path, model: knn_diffusion.UNet | knn_diffusion.TokenTransformer,
               metadata: dict[str, str]) -> vqvae.VQVAE | None:
    """The VQ-VAE that a transformer's tokens belong to, None for a U-Net. Raises ValueError for
    another one."""
    if isinstance(model, knn_diffusion.UNet):
        return None
    codec = vqvae.load(path)[0]
    wanted, found = metadata.get("vqvae", ""), vqvae.fingerprint(codec)
    if wanted not in ("", found) or model.config.n_codes != codec.config.n_codes:
        raise ValueError(f"the weights draw tokens of the VQ-VAE {wanted} ({model.config.n_codes} "
                         f"codes), {path} is {found} ({codec.config.n_codes} codes)")
    return codec


@torch.no_grad()
def draw(model: knn_diffusion.UNet | knn_diffusion.TokenTransformer, query: Tensor | None,
         neighbors: Tensor | None, seeds: list[int], codec: vqvae.VQVAE | None = None, **options
         ) -> Tensor:
    """One picture a seed, float32 (B, 3, H, W), about in [-1, 1]; query (B, E), neighbors
    (B, K, E). `options` go to `knn_diffusion.sample`; with a `codec`, for a transformer, to
    `sample_tokens`."""
    sampler = knn_diffusion.sample_tokens if codec else knn_diffusion.sample
    x0 = deque(sampler(model, query, neighbors, seeds, **options), maxlen=1).pop()   # the last x_t
    return codec.decode(x0) if codec else x0


def generate(model: knn_diffusion.UNet | knn_diffusion.TokenTransformer, query: Tensor | None,
             neighbors: Tensor | None, seeds: list[int], batch_size: int = 16,
             codec: vqvae.VQVAE | None = None, **options) -> list[Image.Image]:
    """The same in batches, as pictures."""
    parts = [slice(start, start + batch_size) for start in range(0, len(seeds), batch_size)]
    return [picture for part in parts for picture in clip_model.to_pictures(draw(
        model, *(each if each is None else each[part] for each in (query, neighbors)), seeds[part],
        codec, **options))]


def labelled_grid(labels: list[str], neighbors: list[list[Image.Image | None]],
                  samples: list[list[Image.Image]], cell: int = 96) -> Image.Image:
    """One row a prompt: its text above, neighbours' pictures, a gap, the samples."""
    font, line, gap = ImageFont.load_default(14), 22, 14
    left = [clip_model.grid([row], cell * 2 // 3) if row else None for row in neighbors]
    right = [clip_model.grid([row], cell) for row in samples]
    inset = max((strip.width + gap for strip in left if strip), default=0)
    sheet = Image.new("RGB", (inset + right[0].width, len(labels) * (line + cell + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, label in enumerate(labels):
        top = i * (line + cell + 4)
        draw.text((4, top + 4), label[:200], fill=(60, 60, 60), font=font)
        if left[i]:
            sheet.paste(left[i], (0, top + line + (cell - cell * 2 // 3) // 2))
        sheet.paste(right[i], (inset, top + line))
    return sheet


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The positional prompts, then the file's lines. Raises ValueError for an empty prompt."""
    prompts = list(args.prompt)
    if args.prompts:
        try:
            lines = args.prompts.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"can't read prompts from {args.prompts} ({error})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError("a prompt is empty")
    if bool(prompts) == bool(args.image):
        raise ValueError("wanted one or more prompts, or --image" if not prompts
                         else "--image takes the place of the prompts: give one or the other")
    return prompts


def shared_flags(parser: argparse.ArgumentParser) -> None:
    """What sample.py and edit.py both take."""
    parser.add_argument("--backbone", choices=["continuous", "discrete"],
                        help="must fit the weights (default: what they are; continuous)")
    parser.add_argument("--weights", type=Path, help="default: the shipped ones of the backbone")
    parser.add_argument("--vqvae", type=Path, default=SHIPPED / "vqvae.safetensors",
                        help="discrete: what makes pictures of tokens")
    parser.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    parser.add_argument("--index", type=Path, default=SHIPPED / "index",
                        help="another index gives another domain, with the same weights")
    parser.add_argument("--k", type=int, default=10, help="neighbours (default 10); 0: none")
    parser.add_argument("--query", choices=["nearest", "text"], default="nearest",
                        help="beside its neighbours: the best of them in the text's place "
                             "(default), or the text's own embedding, as in the paper")
    parser.add_argument("--n", type=int, default=4, help="pictures a text (default 4)")
    parser.add_argument("--steps", type=int,
                        help="sampling steps (default: continuous 20, discrete 25)")
    parser.add_argument("--seed", type=int, default=0, help="picture j of a text uses seed + j")
    parser.add_argument("--singles", type=Path, metavar="DIR", help="also every picture alone, at "
                        "the model's own resolution")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def finish(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command: status 0, 2 for bad input, 1 for the rest, said in one sentence."""
    start = time.time()
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {args.out}, {time.time() - start:.1f} s")
    return 0


def prepare(args: argparse.Namespace, shipped: str, edits: bool = False
            ) -> tuple[torch.nn.Module, clip_model.CLIP, retrieval.Index, vqvae.VQVAE | None]:
    """Open what a command names, on its device, fill in what hangs on it, and say what came out.
    Raises FileNotFoundError, or ValueError where something is missing or does not fit."""
    device = clip_model.pick_device(args.device)
    args.weights = args.weights or SHIPPED / f"{shipped}.safetensors"
    model, metadata, clip, index = open_all(args.weights, args.clip, args.index)
    is_discrete = isinstance(model, knn_diffusion.TokenTransformer)
    backbone = "discrete" if is_discrete else "continuous"
    samplers = list(knn_diffusion.ORDERS if is_discrete else knn_diffusion.SAMPLERS)
    args.steps = args.steps if args.steps is not None else 25 if is_discrete else 20
    args.sampler = args.sampler or samplers[0]
    args.condition = args.condition or metadata.get("condition", "both")
    if model.config.edit != edits:
        raise ValueError(f"{args.weights} draws pictures; editing wants weights of `train.py edit`"
                         if edits else f"{args.weights} edits pictures: use edit.py")
    require(args.backbone in (None, backbone),
          f"{args.weights} is {backbone}, --backbone says {args.backbone}")
    require(args.sampler in samplers, f"--sampler {args.sampler} does not go with {backbone} "
                                    f"weights; there is {', '.join(samplers)}")
    codec = open_codec(args.vqvae, model, metadata)
    require(args.k >= 0, f"--k is {args.k}, wanted 0 or more")
    require(args.n >= 1, f"--n is {args.n}, wanted 1 or more")
    require(0 <= args.seed <= 2**63 - args.n, f"--seed is {args.seed}, wanted 0 to 2^63 less --n")
    require(1 <= args.steps <= model.config.T,
          f"--steps is {args.steps}, wanted 1 to {model.config.T}")
    for path in (args.out, args.singles):
        if path and not os.path.isdir(path.parent):
            raise ValueError(f"no folder {path.parent} to write {path.name} into")
    require(args.out.suffix.lower() == ".png" and not args.out.is_dir(),
          f"--out is {args.out}, wanted a file name that ends with .png")
    require(args.singles is None or not args.singles.is_file(),
          f"--singles is {args.singles}, a file; wanted a folder")
    if args.k > len(index):
        print(f"k is {args.k}, the index has {len(index)} rows: using all", file=sys.stderr)
    print(f"{backbone} {args.weights} ({sum(p.numel() for p in model.parameters()):,} parameters), "
          f"{args.clip} ({clip.describe()}), {args.index} (N = {len(index)}), "
          f"k = {min(args.k, len(index))}, condition {args.condition}, query {args.query}, "
          f"{args.steps} {args.sampler} steps, seed {args.seed}, {device}")
    return model.to(device), clip.to(device), index, codec.to(device) if codec else None


def text_chunk(args: argparse.Namespace, names: str, **own: object) -> PngInfo:
    """A PNG's text chunk "parameters", JSON: what is this picture's own, and the named settings."""
    settings = {name: getattr(args, name) for name in names.split()}
    info = PngInfo()
    info.add_itxt("parameters", json.dumps({**own, **settings}, ensure_ascii=False, default=str))
    return info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw pictures of a text with kNN-Diffusion.",
        epilog="guidance: out = uncond + G·(cond − uncond) at every step; G = 1 is off.")
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    parser.add_argument("--image", type=Path, metavar="FILE",
                        help="a picture as the query instead of a text: shows the modality gap")
    shared_flags(parser)
    parser.add_argument("--condition", choices=["both", "query", "neighbors"],
                        help="what the model is shown (default: what it was trained with)")
    parser.add_argument("--sampler", choices=[*knn_diffusion.SAMPLERS, *knn_diffusion.ORDERS],
                        help="continuous: dpm, DPM-Solver++(2M) (default); ddim; ddpm wants many "
                             "steps. Discrete: ancestral (default); purity, the surest first")
    parser.add_argument("--eta", type=float, default=0.0, metavar="ETA",
                        help="of ddim: 0 (default) adds no noise, 1 as much as ddpm")
    parser.add_argument("--guidance", type=float, default=2.0, metavar="G", help="default 2")
    parser.add_argument("--dynamic-threshold", type=float, metavar="P",
                        help="continuous: clip x_0 at its P quantile (0.995, say), not at 1")
    parser.add_argument("--truncation", type=float, metavar="R", default=0.6,
                        help="discrete: only the likeliest codes, R of mass (default 0.6; 1: all)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples at once (default 16)")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="the grid to write")
    parser.add_argument("--save-neighbors", action="store_true",
                        help="also OUT.neighbors.jsonl: prompt, rank, row, score, path")
    return finish(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load, search, sample, write. Raises ValueError or FileNotFoundError before writing."""
    prompts = read_prompts(args)
    require(args.batch_size >= 1, f"--batch-size is {args.batch_size}, wanted 1 or more")
    require(args.dynamic_threshold is None or 0 < args.dynamic_threshold <= 1,
          f"--dynamic-threshold is {args.dynamic_threshold}, wanted 0 to 1")
    require(0 < args.truncation <= 1, f"--truncation is {args.truncation}, wanted 0 to 1")
    require(0 <= args.eta <= 1, f"--eta is {args.eta}, wanted 0 to 1")
    require(math.isfinite(args.guidance), f"--guidance is {args.guidance}, wanted a finite number")
    model, clip, index, codec = prepare(args, args.backbone or "continuous")
    require(args.condition != "neighbors" or args.k > 0,
          "--condition neighbors wants --k of 1 or more")
    print(f"guidance {args.guidance:g}")
    if args.image:
        labels, args.query = [args.image.name], "text"         # a picture's embedding is one
        queries = clip.embed_pictures([clip_model.read_image(args.image)])
    else:
        labels, queries = prompts, clip.embed_texts(prompts)                   # (prompts, E)
    query, neighbors, scores, ids = condition_on(queries, index, args.k, args.condition,
                                                  args.query)
    repeat = [part if part is None else part.repeat_interleave(args.n, dim=0)
              for part in (query, neighbors)]                                  # (prompts·n, ...)
    seeds = [args.seed + j for _ in labels for j in range(args.n)]
    options = {"sampler": args.sampler, "dynamic_threshold": args.dynamic_threshold,
               "eta": args.eta}
    if codec:
        options = {"order": args.sampler, "truncation": args.truncation}
    pictures = generate(model, *repeat, seeds, args.batch_size, codec, steps=args.steps,
                        guidance=args.guidance, **options)
    samples = [pictures[i * args.n:(i + 1) * args.n] for i in range(len(labels))]
    write(args, labels, samples, scores, ids, index)


def write(args: argparse.Namespace, labels: list[str], samples: list[list[Image.Image]],
          scores: Tensor, ids: Tensor, index: retrieval.Index) -> None:
    """The grid, the single pictures and the list of neighbours, as asked for."""
    shown = [[] if args.condition == "query" else
             retrieval.neighbor_pictures(index, row[:SHOWN_NEIGHBORS]) for row in ids.tolist()]
    if all(picture is None for row in shown for picture in row):
        shown = [[] for _ in shown]                          # the index's pictures are not at hand
    labelled_grid(labels, shown, samples).save(
        args.out, pnginfo=text_chunk(args, SETTINGS, prompts=labels, seed=args.seed))
    if args.singles:
        args.singles.mkdir(exist_ok=True)
        for i, row in enumerate(samples):
            for j, picture in enumerate(row):
                info = text_chunk(args, SETTINGS, prompt=labels[i], seed=args.seed + j)
                picture.save(args.singles / f"{i:03d}-{j:02d}.png", pnginfo=info)
    if args.save_neighbors:
        with open(args.out.with_suffix(".neighbors.jsonl"), "w", encoding="utf-8") as file:
            for label, row_scores, row in zip(labels, scores.tolist(), ids.tolist()):
                for rank, (score, i) in enumerate(zip(row_scores, row), start=1):
                    file.write(json.dumps({"prompt": label, "rank": rank, "row": i,
                                           "score": round(score, 5), "path": index.paths[i]},
                                          ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
