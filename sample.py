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
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import clip_model
import index as retrieval
import knn_diffusion
import vqvae

SHIPPED = Path(__file__).parent / "weights" / "stickers"
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


def open_codec(path: Path, model: knn_diffusion.TokenTransformer, metadata: dict[str, str]
               ) -> vqvae.VQVAE:
    """The VQ-VAE that a transformer's tokens belong to. Raises ValueError for another one."""
    codec = vqvae.load(path)[0]
    wanted, found = metadata.get("vqvae", ""), vqvae.fingerprint(codec)
    if wanted not in ("", found) or model.config.n_codes != codec.config.n_codes:
        raise ValueError(f"the weights draw tokens of the VQ-VAE {wanted} ({model.config.n_codes} "
                         f"codes), {path} is {found} ({codec.config.n_codes} codes)")
    return codec


def generate(model: knn_diffusion.UNet | knn_diffusion.TokenTransformer, query: Tensor | None,
             neighbors: Tensor | None, seeds: list[int], batch_size: int = 16,
             codec: vqvae.VQVAE | None = None, **options) -> list[Image.Image]:
    """One picture a seed, in batches. query (B, E), neighbors (B, K, E), B seeds.

    `options` go to `knn_diffusion.sample`: steps, guidance, sampler, dynamic_threshold; or with a
    `codec`, for a transformer, to `sample_tokens`: steps, guidance, truncation, order.
    """
    draw = knn_diffusion.sample_tokens if codec else knn_diffusion.sample
    pictures = []
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        for x in draw(model, None if query is None else query[part],
                      None if neighbors is None else neighbors[part], seeds[part], **options):
            x0 = x                                            # the last x_t is the picture
        if codec:
            with torch.no_grad():
                x0 = codec.decode(x0)
        pictures += clip_model.to_pictures(x0)
    return pictures


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


def check_numbers(args: argparse.Namespace, T: int) -> None:
    """Raise ValueError with one sentence for a number out of range."""
    for name, value, least in (("--k", args.k, 0), ("--n", args.n, 1), ("--seed", args.seed, 0),
                               ("--batch-size", args.batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, wanted {least} or more")
    if not 1 <= args.steps <= T:
        raise ValueError(f"--steps is {args.steps}, wanted 1 to {T}")
    if args.seed + args.n > 2**63:
        raise ValueError(f"--seed is {args.seed}, wanted less than 2^63")
    for name, value in (("--dynamic-threshold", args.dynamic_threshold),
                        ("--truncation", args.truncation)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{name} is {value}, wanted 0 to 1")
    if not 0 <= args.eta <= 1:
        raise ValueError(f"--eta is {args.eta}, wanted 0 to 1")
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance is {args.guidance}, wanted a finite number")
    for path in (args.out, args.singles):
        if path and not os.path.isdir(path.parent):
            raise ValueError(f"no folder {path.parent} to write {path.name} into")
    if args.out.suffix.lower() != ".png" or args.out.is_dir():
        raise ValueError(f"--out is {args.out}, wanted a file name that ends with .png")
    if args.singles and args.singles.exists() and not args.singles.is_dir():
        raise ValueError(f"--singles is {args.singles}, a file; wanted a folder")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Draw pictures of a text with kNN-Diffusion.",
        epilog="guidance: out = uncond + G·(cond − uncond) at every step; G = 1 is off.")
    parser.add_argument("prompt", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    parser.add_argument("--image", type=Path, metavar="FILE",
                        help="a picture as the query instead of a text: shows the modality gap")
    parser.add_argument("--backbone", choices=["continuous", "discrete"],
                        help="must fit the weights (default: what they are; continuous)")
    parser.add_argument("--weights", type=Path,
                        help="default: the shipped sticker weights of the backbone")
    parser.add_argument("--vqvae", type=Path, default=SHIPPED / "vqvae.safetensors",
                        help="discrete: what makes pictures of tokens")
    parser.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    parser.add_argument("--index", type=Path, default=SHIPPED / "index",
                        help="another index gives another domain, with the same weights")
    parser.add_argument("--k", type=int, default=10, help="neighbours (default 10); 0: none")
    parser.add_argument("--condition", choices=["both", "query", "neighbors"],
                        help="what the model is shown (default: what it was trained with)")
    parser.add_argument("--query", choices=["nearest", "text"], default="nearest",
                        help="beside its neighbours: the best of them in the text's place "
                             "(default), or the text's own embedding, as in the paper")
    parser.add_argument("--n", type=int, default=4, help="samples a prompt (default 4)")
    parser.add_argument("--steps", type=int,
                        help="sampling steps (default: continuous 20, discrete 25)")
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
    parser.add_argument("--seed", type=int, default=0, help="sample j of a prompt uses seed + j")
    parser.add_argument("--batch-size", type=int, default=16, help="samples at once (default 16)")
    parser.add_argument("--out", type=Path, default=Path("picture.png"), help="the grid to write")
    parser.add_argument("--singles", type=Path, metavar="DIR", help="also every sample alone")
    parser.add_argument("--save-neighbors", action="store_true",
                        help="also OUT.neighbors.jsonl: prompt, rank, row, score, path")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Load, search, sample, write. Raises ValueError or FileNotFoundError before writing."""
    start = time.time()
    prompts = read_prompts(args)
    device = clip_model.pick_device(args.device)
    args.weights = args.weights or SHIPPED / f"{args.backbone or 'continuous'}.safetensors"
    model, metadata, clip, index = open_all(args.weights, args.clip, args.index)
    if model.config.edit:
        raise ValueError(f"{args.weights} edits pictures: use edit.py")
    backbone = settle_backbone(args, model)
    codec = open_codec(args.vqvae, model, metadata) if backbone == "discrete" else None
    check_numbers(args, model.config.T)
    args.condition = args.condition or metadata.get("condition", "both")
    if args.condition == "neighbors" and args.k == 0:
        raise ValueError("--condition neighbors wants --k of 1 or more")
    model, clip = model.to(device), clip.to(device)
    codec = codec.to(device) if codec else None
    k = min(args.k, len(index))
    if args.k > len(index):
        print(f"k is {args.k}, the index has {len(index)} rows: using {k}", file=sys.stderr)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{backbone} {args.weights} ({parameters:,} parameters), {args.clip} "
          f"({clip.describe()}), {args.index} (N = {len(index)}), k = {k}, "
          f"condition {args.condition}, query {args.query}, {args.steps} {args.sampler} steps, "
          f"guidance {args.guidance:g}, seed {args.seed}, {device}")

    if args.image:
        labels, args.query = [args.image.name], "text"         # a picture's embedding is one
        queries = clip.embed_pictures([clip_model.read_image(args.image)])
    else:
        labels, queries = prompts, clip.embed_texts(prompts)                   # (prompts, E)
    query, neighbors, scores, ids = condition_on(queries, index, k, args.condition,
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
    print(f"wrote {args.out}, {time.time() - start:.1f} s")


def settle_backbone(args: argparse.Namespace, model: torch.nn.Module) -> str:
    """The backbone that the weights are, and the defaults that hang on it. Raises ValueError where
    an argument contradicts it."""
    is_discrete = isinstance(model, knn_diffusion.TokenTransformer)
    backbone = "discrete" if is_discrete else "continuous"
    if args.backbone not in (None, backbone):
        raise ValueError(f"{args.weights} is {backbone}, --backbone says {args.backbone}")
    samplers = list(knn_diffusion.ORDERS if is_discrete else knn_diffusion.SAMPLERS)
    args.sampler = args.sampler or ("ancestral" if is_discrete else "dpm")
    if args.sampler not in samplers:
        raise ValueError(f"--sampler {args.sampler} does not go with {backbone} weights; there is "
                         f"{', '.join(samplers)}")
    if args.steps is None:
        args.steps = 25 if is_discrete else 20
    return backbone


def write(args: argparse.Namespace, labels: list[str], samples: list[list[Image.Image]],
          scores: Tensor, ids: Tensor, index: retrieval.Index) -> None:
    """The grid, the single pictures and the list of neighbours, as asked for.

    The settings stand in every PNG's text chunk "parameters", as JSON.
    """
    settings = {name: getattr(args, name) for name in (
        "n", "k", "condition", "query", "steps", "sampler", "eta", "guidance", "dynamic_threshold",
        "truncation")}
    settings |= {name: str(getattr(args, name)) for name in ("weights", "vqvae", "clip", "index")}

    def chunk(**own: object) -> PngInfo:
        info = PngInfo()
        info.add_itxt("parameters", json.dumps({**own, **settings}, ensure_ascii=False))
        return info

    shown = [[] if args.condition == "query" else
             retrieval.neighbor_pictures(index, row[:SHOWN_NEIGHBORS]) for row in ids.tolist()]
    if all(picture is None for row in shown for picture in row):
        shown = [[] for _ in shown]                          # the index's pictures are not at hand
    labelled_grid(labels, shown, samples).save(
        args.out, pnginfo=chunk(prompts=labels, seed=args.seed))
    if args.singles:
        args.singles.mkdir(exist_ok=True)
        for i, row in enumerate(samples):
            for j, picture in enumerate(row):
                picture.save(args.singles / f"{i:03d}-{j:02d}.png",
                             pnginfo=chunk(prompt=labels[i], seed=args.seed + j))
    if args.save_neighbors:
        with open(args.out.with_suffix(".neighbors.jsonl"), "w", encoding="utf-8") as file:
            for label, row_scores, row in zip(labels, scores.tolist(), ids.tolist()):
                for rank, (score, i) in enumerate(zip(row_scores, row), start=1):
                    file.write(json.dumps({"prompt": label, "rank": rank, "row": i,
                                           "score": round(score, 5), "path": index.paths[i]},
                                          ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
