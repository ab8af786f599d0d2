"""The retrieval database of kNN-Diffusion Sec. 3.1: an index of image embeddings, searched for the
nearest ones.

    H = { f_img(i) : i in I },      kNN(q) = the k rows of H with the largest cosine to q

Rows and queries have unit norm, so the cosine is an inner product. An index is a folder of plain
files that numpy opens:

    embeddings.npy    float16 (N, E), unit-norm rows
    paths.txt         line i names the picture of row i, relative to the picture folder
    manifest.json     N, E, dtype, encoder and its fingerprint; written last: no manifest, no index
    neighbors-K.npy   int32 (N, min(K, N−1)), the table for training; optional

Shapes: N rows, E CLIP dimension, Q queries, K neighbours.

    python index.py build data/stickers/images --clip weights/stickers/clip.safetensors --out DIR
    python index.py search weights/stickers/index "a red heart" --out neighbours.png
    python index.py info weights/stickers/index
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clip_model

FORMAT = 1
BLOCK_BYTES = 256 * 2**20        # memory for one block of scores and its rows, about


# ---------------------------------------------------------------- the index on disk

@dataclass
class Index:
    """An open index. `embeddings` is memory-mapped; pictures may be missing."""
    folder: Path
    embeddings: np.ndarray       # float16 (N, E), unit-norm rows
    paths: list[str]             # N names, relative to `root`
    manifest: dict

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def root(self) -> Path:
        """The folder that the paths are relative to; it need not exist."""
        return self.folder / self.manifest.get("root", ".")

    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None
               ) -> tuple[Tensor, Tensor]:
        """The min(k, N) nearest rows of each query: scores float32 and ids int64 (Q, k).

        queries: float32 (Q, E), normalised here; exclude: int64 (Q,), a row id per query that must
        not come back, wherever it ranks (one fewer result then, if N allows no more). Best first;
        of equal scores among the results the lower id first. Raises ValueError for a wrong
        dimension, a negative k, or queries or rows that are not finite.
        """
        N, E = self.embeddings.shape
        if queries.ndim != 2 or queries.shape[1] != E:
            raise ValueError(f"queries have shape {tuple(queries.shape)}, the index wants (Q, {E})")
        if k < 0:
            raise ValueError(f"k is {k}, wanted 0 or more")
        if not torch.isfinite(queries).all():
            raise ValueError("a query embedding is not finite")
        queries = torch.nn.functional.normalize(queries.float(), dim=-1)
        if exclude is None or len(queries) == 0:
            return nearest(queries, self.embeddings, min(k, N))
        # The own row is dropped by its id, never by its rank: a duplicate may rank before it.
        scores, ids = nearest(queries, self.embeddings, min(k + 1, N))
        is_own = ids == exclude.to(ids.device)[:, None]                           # (Q, k+1)
        is_own[~is_own.any(1), -1] = True                # own row not found: drop the last one
        keep = (len(ids), ids.shape[1] - 1)
        return scores[~is_own].view(keep), ids[~is_own].view(keep)


def nearest(queries: Tensor, rows: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Exact search in blocks: scores float32 and ids int64 (Q, k), best first, ties by id.

    Costs Q·N·E multiplications; a block of rows is chosen so that its scores and its float32 copy
    fit into BLOCK_BYTES.
    """
    Q, E = queries.shape
    best = torch.full((Q, 0), -torch.inf, device=queries.device)
    best_ids = torch.zeros((Q, 0), dtype=torch.int64, device=queries.device)
    if Q == 0 or k == 0:
        return best, best_ids
    block = max(1, BLOCK_BYTES // (4 * (Q + E)))
    for start in range(0, len(rows), block):
        part = torch.from_numpy(np.array(rows[start:start + block])).to(queries.device).float()
        scores, ids = (queries @ part.T).topk(min(k, len(part)), dim=1)           # (Q, <=k)
        best = torch.cat([best, scores], dim=1)
        best_ids = torch.cat([best_ids, ids + start], dim=1)
        best_ids, order = best_ids.sort(dim=1)                    # by id, then stably by score
        best, rank = best.gather(1, order).sort(dim=1, descending=True, stable=True)
        best, best_ids = best[:, :k], best_ids.gather(1, rank)[:, :k]
    if not torch.isfinite(best).all():
        raise ValueError("the index has rows that are not finite")
    return best, best_ids


def open_index(folder: str | os.PathLike) -> Index:
    """Open an index folder. Raises FileNotFoundError or ValueError with one sentence where it is
    missing, unfinished, or its files disagree."""
    folder = Path(folder)
    manifest_path = folder / "manifest.json"
    if not os.path.isfile(manifest_path):
        raise FileNotFoundError(f"no index at {folder} (no manifest.json); `python index.py build` "
                                "makes one")
    try:
        manifest = json.loads(manifest_path.read_text("utf-8"))
        N, E, root = manifest["rows"], manifest["dim"], manifest.get("root", ".")
        if not (type(N) is int and type(E) is int and isinstance(root, str)):
            raise ValueError("an odd manifest")
        embeddings = np.load(folder / "embeddings.npy", mmap_mode="r", allow_pickle=False)
        paths = (folder / "paths.txt").read_bytes().decode("utf-8").split("\n")[:-1]
        shape, dtype = embeddings.shape, embeddings.dtype
    except Exception as error:               # numpy's reader raises many kinds on a damaged file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"the index at {folder} is damaged ({reason[:160]})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the index at {folder} has format {manifest.get('format')}, "
                         f"this version reads {FORMAT}")
    if shape != (N, E) or dtype != np.float16 or len(paths) != N or N == 0:
        raise ValueError(f"the index at {folder} is damaged: its manifest says {N} x {E} float16, "
                         f"the files have {shape} {dtype} and {len(paths)} paths")
    return Index(folder, embeddings, paths, manifest)


def write_index(out: str | os.PathLike, embeddings: Tensor, paths: list[str], encoder: str,
                encoder_hash: str, root: str | os.PathLike) -> Index:
    """Write rows (N, E), normalised here, as a new index in the folder `out`, and open it.

    An older manifest there goes first and the new one comes last: a build that is killed leaves no
    index that opens. Raises ValueError for no rows, rows that are not finite, or all-zero rows.
    """
    rows = torch.as_tensor(embeddings).float()
    if rows.ndim != 2 or len(rows) == 0 or len(rows) != len(paths):
        raise ValueError(f"an index wants one row a picture and at least one; got "
                         f"{tuple(rows.shape)} for {len(paths)} pictures")
    if not torch.isfinite(rows).all() or (rows.norm(dim=1) == 0).any():
        raise ValueError("an embedding is zero or not finite")
    names = "".join(path + "\n" for path in paths).encode()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "manifest.json", *out.glob("neighbors-*")):
        old.unlink(missing_ok=True)
    rows = torch.nn.functional.normalize(rows, dim=1).half()
    save_array(out / "embeddings.npy", rows.numpy())
    (out / "paths.txt").write_bytes(names)
    manifest = {"format": FORMAT, "rows": len(rows), "dim": rows.shape[1], "dtype": "float16",
                "normalised": True, "encoder": encoder, "encoder_hash": encoder_hash,
                "root": Path(os.path.relpath(root, out)).as_posix()}
    part = out / "manifest.json.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(part, out / "manifest.json")
    return open_index(out)


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save, atomically: an open memory map of an older file keeps its rows."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        np.save(file, array)
    os.replace(part, path)


def check_encoder(index: Index, name: str, fingerprint: str, dim: int) -> None:
    """Raise ValueError, naming both, where the index was made by another encoder than this one.
    An unknown encoder of the right dimension passes with a warning."""
    made_by, E = index.manifest.get("encoder", "unknown"), index.embeddings.shape[1]
    if E != dim or index.manifest.get("encoder_hash") not in (fingerprint, None, ""):
        raise ValueError(
            f"the index at {index.folder} was made by encoder {made_by} "
            f"({index.manifest.get('encoder_hash') or 'no fingerprint'}, {E} dimensions), not by "
            f"{name} ({fingerprint}, {dim} dimensions)")
    if not index.manifest.get("encoder_hash"):
        warnings.warn(f"the index at {index.folder} does not say which encoder made it",
                      stacklevel=2)


# ---------------------------------------------------------------- the neighbour table for training

def neighbor_table(index: Index, k: int) -> np.ndarray:
    """int32 (N, min(k, N-1)): the nearest rows of every row, itself excluded by id.

    Read from neighbors-<k>.npy, or computed (N²·E multiplications) and written there. Beside it
    neighbors-<k>.key holds the digests of the embeddings and of the table: a damaged table, or one
    of other embeddings, is computed anew. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, wanted 1 or more")
    N, path = len(index), index.folder / f"neighbors-{k}.npy"
    key_path = index.folder / f"neighbors-{k}.key"
    rows = hashlib.sha256(np.ascontiguousarray(index.embeddings).tobytes()).hexdigest()
    if path.is_file() and key_path.is_file():
        table_digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if key_path.read_text("utf-8") == f"{rows} {table_digest}\n":
            return np.load(path, allow_pickle=False)
    table = np.empty((N, min(k, N - 1)), np.int32)
    for start in range(0, N, 1024):
        own = torch.arange(start, min(start + 1024, N))
        queries = torch.from_numpy(np.array(index.embeddings[start:start + 1024])).float()
        table[start:start + 1024] = index.search(queries, k, exclude=own)[1].numpy()
    save_array(path, table)
    table_digest = hashlib.sha256(path.read_bytes()).hexdigest()
    key_path.write_text(f"{rows} {table_digest}\n", encoding="utf-8")
    return table


# ---------------------------------------------------------------- pictures of a folder

def list_images(folder: str | os.PathLike) -> list[str]:
    """All picture files below a folder, relative names, sorted. Raises FileNotFoundError."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.suffix.lower() in clip_model.IMAGE_SUFFIXES and path.is_file())


def is_listable(name: str) -> bool:
    """Whether paths.txt can hold a file name: UTF-8, on one line."""
    return "\n" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def embed_folder(clip: clip_model.CLIP, folder: str | os.PathLike, batch_size: int = 256,
                 bf16: bool = False) -> tuple[Tensor, list[str], list[str]]:
    """Embed all pictures below a folder: unit-norm float32 (N, E), their relative names, and one
    sentence for each file that could not be read.

    Threads decode and resize the next batch while CLIP sees this one (Pillow lets other threads run
    meanwhile). bf16: matrix products in bfloat16, faster, the cosine to float32's above 0.999.
    """
    files, start = list_images(folder), time.time()
    device = clip.logit_scale.device

    def read(name: str) -> Image.Image | str:
        try:
            if not is_listable(name):
                raise ValueError(f"{name!r} is no file name for a list of lines in UTF-8")
            picture = clip_model.read_image(Path(folder) / name)
            return clip_model.fit_square(picture, clip.config.image_size)
        except ValueError as error:
            return str(error)

    names, bad, embeddings = [], [], [torch.zeros(0, clip.config.embed_dim)]
    batches = [files[i:i + batch_size] for i in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
        coming = workers.map(read, batches[0] if batches else [])
        for i, batch in enumerate(batches):
            found = dict(zip(batch, coming))
            coming = workers.map(read, batches[i + 1] if i + 1 < len(batches) else [])
            bad += [sentence for sentence in found.values() if isinstance(sentence, str)]
            pictures = {name: p for name, p in found.items() if not isinstance(p, str)}
            names += pictures
            if pictures:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    embeddings.append(clip.embed_pictures(list(pictures.values())).cpu())
            if sys.stderr.isatty():
                done = min(len(files), (i + 1) * batch_size)
                left = (time.time() - start) / done * (len(files) - done)
                print(f"\r{done}/{len(files)} pictures embedded, {left:.0f} s left ",
                      end="\n" if done == len(files) else "", file=sys.stderr)
    return torch.cat(embeddings), names, bad


def neighbor_pictures(index: Index, ids: list[int]) -> list[Image.Image | None]:
    """The pictures of rows; None where a file is not at hand."""
    pictures = []
    for i in ids:
        try:
            pictures.append(clip_model.read_image(index.root / index.paths[i]))
        except (FileNotFoundError, ValueError):
            pictures.append(None)
    return pictures


# ---------------------------------------------------------------- the command

def build(args: argparse.Namespace) -> None:
    """Embed a folder of pictures and write the index."""
    start = time.time()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file, wanted a folder to write")
    clip = clip_model.load(args.clip).to(clip_model.pick_device(args.device))
    print(f"{args.images} through {args.clip} ({clip.describe()}, {clip.fingerprint()}, "
          f"{clip.config.embed_dim} dimensions)")
    embeddings, names, bad = embed_folder(clip, args.images, bf16=args.bf16)
    for sentence in bad:
        print(f"skipped: {sentence}", file=sys.stderr)
    if not names:
        raise ValueError(f"no readable picture below {args.images}")
    index = write_index(args.out, embeddings, names, clip.describe(), clip.fingerprint(),
                        args.images)
    print(f"{len(index)} rows of {index.embeddings.shape[1]} dimensions in {args.out}, "
          f"{len(bad)} files skipped, {time.time() - start:.0f} s")


def search(args: argparse.Namespace) -> None:
    """Print the nearest rows of a text or a picture, one a line, and draw them on request."""
    index, clip = open_index(args.index), clip_model.load(args.clip)
    check_encoder(index, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    if args.k < 0:
        raise ValueError(f"k is {args.k}, wanted 0 or more")
    if args.out and not os.path.isdir(args.out.parent):
        raise ValueError(f"no folder {args.out.parent} to write {args.out.name} into")
    if not args.query.strip():
        raise ValueError("the text to search for is empty")
    if os.path.isfile(args.query):
        query = clip.embed_pictures([clip_model.read_image(args.query)])
    else:
        query = clip.embed_texts([args.query])
    if args.k > len(index):
        print(f"k is {args.k}, the index has {len(index)} rows: showing all", file=sys.stderr)
    scores, ids = (result[0].tolist() for result in index.search(query, args.k))
    for rank, (score, i) in enumerate(zip(scores, ids), start=1):
        print(f"{rank}\t{score:.4f}\t{i}\t{index.paths[i]}")
    if args.out:
        clip_model.grid([neighbor_pictures(index, ids)], 96).save(args.out)
        print(f"wrote {args.out}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    shipped = Path(__file__).parent / "weights" / "stickers"
    parser = argparse.ArgumentParser(description="Build and search an index of image embeddings.")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("build", help="embed a folder of pictures, read recursively")
    sub.add_argument("images", type=Path, help="folder of pictures")
    sub.add_argument("--clip", type=Path, default=shipped / "clip.safetensors")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--bf16", action="store_true", help="embed in bfloat16: about twice as fast")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    sub.set_defaults(run=build)

    sub = commands.add_parser("search", help="show the nearest neighbours of a text or a picture")
    sub.add_argument("index", type=Path)
    sub.add_argument("query", metavar="TEXT_OR_IMAGE", help="an existing file is a picture")
    sub.add_argument("--clip", type=Path, default=shipped / "clip.safetensors")
    sub.add_argument("--k", type=int, default=10, help="number of neighbours (default 10)")
    sub.add_argument("--out", type=Path, help="also draw the neighbours into this PNG")
    sub.set_defaults(run=search)

    sub = commands.add_parser("info", help="print the manifest")
    sub.add_argument("index", type=Path)
    sub.set_defaults(run=lambda args: print(json.dumps(open_index(args.index).manifest, indent=1)))

    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
