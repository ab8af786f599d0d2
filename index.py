"""The retrieval database of kNN-Diffusion Sec. 3.1: an index of picture embeddings, and its rows
nearest to a query.

    H = { f_img(i) : i in I },      kNN(q) = the k rows r of H with the largest score q·r

Rows and queries have unit norm: the inner product is the cosine. It is taken in float64 from the
stored float16 row, and rounded to a multiple of 2⁻³⁰. Of equal scores the lower id is first.
That is `exact_search`. `scan` finds the same rows faster. `probe`, in inverted lists, misses some.

An index is a folder of plain files that numpy opens:

    embeddings.npy    float16 (N, E), unit-norm rows; or several files, named in the manifest
    paths.txt         line i names the picture of row i, in the picture folder; optional
    manifest.json     N, E, dtype, encoder and its fingerprint, the picture folder
    centroids.npy     float32 (C, E), with inverted lists only, as the next two
    lists.npy         int64 (N,), row ids list by list
    offsets.npy       int64 (C+1,), where each list begins
    neighbors-K.npy   int32 (N, min(K, N−1)), the table for training; optional

Shapes: N rows, E CLIP dimension, Q queries, K neighbours (k in calls), P rows, C lists."""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap, write_array_header_1_0
from PIL import Image
from torch import Tensor

import clip_model
from clip_model import IMAGE_SUFFIXES, SHIPPED, reason, replacing, require

LISTS = "centroids", "lists", "offsets"
BLOCK = 8192       # rows that are read and multiplied at once
GROUP = 16         # rows of which the scan keeps the best score
LISTED = 6         # groups per neighbour that are scored again
CACHED = 128       # blocks of an index that stay in memory: a million rows


# ---------------- kNN(·), the definition

def unit(vectors: Tensor, what: str) -> Tensor:
    """Vectors (n, E) of any float dtype and norm → float64 of unit norm. Raises ValueError, naming
    `what` they are, where one is zero or not finite."""
    norms = vectors.double().norm(dim=1, keepdim=True)
    require((norms.isfinite() & (norms > 0)).all(), f"{what} is zero or not finite")
    return vectors / norms


def stored(rows: Rows, key: slice | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Some rows, float32 (n, E). Raises ValueError for one without unit norm: a single flipped bit
    can make a row the nearest one to every query."""
    found = torch.from_numpy(rows[key]).to(device).float()
    is_unit = (found.norm(dim=1) - 1).abs() < 2**-9
    require(is_unit.all(), f"a row in {rows.files[0].parent} has not norm 1: damaged")
    return found


def best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of rows `ids`, int64 (Q, n), by scores, float64 (Q, n): (Q, min(k, n)) of each.
    Of equal scores the lower id is first. Ours: a score and its id make one integer,
    score·2³⁰·2³² − id: topk settles ties, too."""
    keys = (scores * 2**30).round().long() * 2**32 - ids
    keys = keys.topk(min(k, keys.shape[1])).values
    ids = -keys % 2**32
    return (keys + ids).double() / 2**62, ids


def exact_search(rows: Rows, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """kNN(·) of unit-norm float64 queries (Q, E): float64 scores, int64 ids, (Q, min(k, N))."""
    scores, ids = queries[:, :0], queries[:, :0].long()
    for start in range(0, rows.shape[0], BLOCK):
        block = stored(rows, slice(start, start + BLOCK), queries.device)  # (P, E)
        its_scores = queries @ block.double().T                            # (Q, P)
        its_ids = (start + torch.arange(len(block)).to(ids)).expand_as(its_scores)
        scores, ids = best(torch.cat([scores, its_scores], 1), torch.cat([ids, its_ids], 1), k)
    return scores, ids


# ---------------- the same rows, faster
#
# Low precision multiplies two to five times as fast. Its scores err in the third digit, but the
# error is bounded, so they tell which rows are *not* the best. Keep the best low score of each
# group of 16 rows, list the best groups, score their rows again as defined. No row of another
# group is above its low score + the bound. Where this is below the k-th score found, all are found.

def scan_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU that multiplies it natively, else float32."""
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


@functools.lru_cache(CACHED)
def low_block(rows: Rows, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows from `start` on in low precision, (P, E), and the most that one of them lost by it."""
    block = stored(rows, slice(start, start + BLOCK), device)
    low = block.to(scan_dtype(device))
    return low, (block - low).norm(dim=1).max()


def score_again(rows: Rows, queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query's rows `ids`, int64 (Q, n), scored as defined. `ids` is used up:
    results that are made between blocks of rows would leave holes in memory."""
    scores = queries.new_empty(len(ids), k)
    for some in torch.arange(len(ids)).split(max(1, 1024 // ids.shape[1])):
        its = torch.from_numpy(rows[ids[some].cpu()]).to(ids.device).double()  # (q, n, E)
        scores[some], ids[some, :k] = best((its @ queries[some, :, None])[..., 0], ids[some], k)
    return scores, ids[:, :k]


def scan(rows: Rows, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`exact_search` in the best groups alone, and which answers are proved equal, bool (Q,).

    The bound: with q̂ and r̂ the rounded vectors, Cauchy and Schwarz give
        |q·r − q̂·r̂| ≤ ‖q − q̂‖ ‖r‖ + ‖q̂‖ ‖r − r̂‖,   all norms below 1.01.
    The differences are measured. Between −1 and 1 bfloat16 rounds a score by at most 2⁻⁹, and
    |q·r| is below 1 + 2⁻⁹ (`stored`). A GPU's float32 may be TF32: 2⁻¹⁰ each for row and query.
    Sums of E products err by less than E·2⁻²²."""
    (N, E), Q, device, loss = rows.shape, len(queries), queries.device, 0
    columns = queries.to(scan_dtype(device)).T.contiguous()             # (E, Q)
    read = low_block if N <= CACHED * BLOCK else low_block.__wrapped__
    maxima = columns.new_empty(N // GROUP, Q)                           # of each group
    for start in range(0, N, BLOCK):
        low, its_loss = read(rows, start, device)                       # (P, E)
        scores = low[: len(low) // GROUP * GROUP] @ columns             # (P, Q)
        maxima[start // GROUP:(start + BLOCK) // GROUP] = scores.view(-1, GROUP, Q).amax(1)
        loss = max(loss, its_loss)
    top, groups = maxima.T.topk(LISTED * k + 1)                         # (Q, LISTED·k + 1)
    members = groups[:, :-1, None] * GROUP + torch.arange(GROUP, device=device)
    tail = torch.arange(N - N % GROUP, N, device=device).expand(Q, -1)  # rows of no group
    scores, ids = score_again(rows, queries, torch.cat([members.flatten(1), tail], dim=1), k)
    lost = (queries - columns.T).norm(dim=1) + loss + 2**-9 + E * 2**-22
    return scores, ids, top[:, -1].clamp(min=-1) + 1.01 * lost < scores[:, -1]


# ---------------- inverted lists (IVF)
#
# k-means parts the rows into C lists, each with a centroid. A query looks only into the lists of
# its nprobe nearest centroids. A neighbour in another is missed; `recall` says how often.

def make_lists(rows: Rows, n_lists: int, iterations: int = 10) -> list[Tensor]:
    """The tensors of centroids.npy, lists.npy and offsets.npy.

    Spherical k-means on 64·C random rows, the first C as centroids: assign each to the centroid of
    the largest inner product, average, normalise. An empty list's centroid becomes zero. Then all
    rows are assigned."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    chosen = stored(rows, order[: 64 * n_lists])  # (n, E)
    centroids = chosen[:n_lists]                  # (C, E)
    for _ in range(iterations):
        lists = [(part @ centroids.T).argmax(1) for part in chosen.split(1024)]
        sums = torch.zeros_like(centroids).index_add_(0, torch.cat(lists), chosen)
        centroids = F.normalize(sums, dim=1)
    blocks = (stored(rows, slice(i, i + 1024)) for i in range(0, len(rows), 1024))
    lists = torch.cat([(block @ centroids.T).argmax(1) for block in blocks])  # (N,)
    ends = lists.bincount(minlength=len(centroids)).cumsum(0)
    return [centroids, lists.argsort(stable=True), F.pad(ends, (1, 0))]


@functools.lru_cache(4096)
def low_list(index: Index, c: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ids (P,) and the rows, float16 (P, E), of list c."""
    _, order, offsets = index.lists
    ids = order[offsets[c]:offsets[c + 1]]
    return ids.to(device), stored(index.rows, ids, device).half()


def probe(index: Index, queries: Tensor, k: int, nprobe: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of each query's nprobe lists, and which queries got k rows, bool (Q,).

    A list is read once, for all queries that look into it. Its k best rows for each are found in
    float32, of equal ones any, and the k best of all lists scored again."""
    read = low_list if len(index) <= CACHED * BLOCK else low_list.__wrapped__
    low, Q, centroids = queries.float(), len(queries), index.lists[0].to(queries.device)
    near = (low @ centroids.T).topk(nprobe).indices.flatten()     # (Q·nprobe,), query by query
    scores = low.new_full((len(near), k), -2)                     # below any cosine
    ids = torch.zeros_like(scores, dtype=torch.int64)
    wanted, sizes = (part.tolist() for part in near.unique(return_counts=True))
    for c, some in zip(wanted, near.argsort().split(sizes)):      # some: (q,) of Q·nprobe
        its_ids, rows = read(index, c, queries.device)            # (P,), (P, E)
        n = min(k, len(rows))
        scores[some, :n], which = (rows.float() @ low[some // nprobe].T).T.topk(n)
        ids[some, :n] = its_ids[which]                            # (q, n)
    top, which = scores.view(Q, -1).topk(k)                       # (Q, k)
    ids = ids.view(Q, -1).gather(1, which)
    return *score_again(index.rows, queries, ids, k), top[:, -1] > -2


# ---------------- the index

@dataclass(repr=False, eq=False)
class Index:
    """An open index. Its pictures may be missing; its rows are read when wanted."""
    folder: Path
    rows: Rows                         # float16 (N, E), unit norm
    paths: Sequence                    # N names of files in `root`, or row numbers
    root: Path                         # need not exist
    manifest: dict
    lists: list[Tensor] | None = None  # of `make_lists`

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, nprobe: int | None = None,
               exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The min(k, N) nearest rows of each query: scores float32 and ids int64 (Q, k), best
        first, of equal scores the lower id.

        queries: (Q, E), any float dtype and norm. nprobe: look into so many inverted lists; None:
        exact. exclude: int64 (Q,), a row id per query that must not come back; K is min(k, N − 1)
        then. Raises ValueError for another shape, k or nprobe too small, a query that is zero or
        not finite, or damaged rows."""
        N, E = self.rows.shape
        require(queries.shape[1:] == (E,), f"queries: {tuple(queries.shape)}, not (Q, {E})")
        require(k >= 0 and (nprobe is None or nprobe >= 1), f"k is {k}, nprobe {nprobe}: too small")
        queries, wide = unit(queries, "a query embedding"), min(k + (exclude is not None), N)
        at_once = min(1024, 1 + 2**34 // N)  # `scan` holds Q·N / GROUP scores
        found, use_lists = [], wide and nprobe and self.lists and nprobe < len(self.lists[0])
        for some in queries.split(at_once):
            if use_lists:
                scores, ids, is_sure = probe(self, some, wide, nprobe)
            elif 0 < 64 * GROUP * LISTED * wide < N:  # else it is no faster
                scores, ids, is_sure = scan(self.rows, some, wide)
            else:
                scores, ids, is_sure = *exact_search(self.rows, some, wide), torch.tensor(True)
            if not is_sure.all():
                scores[~is_sure], ids[~is_sure] = exact_search(self.rows, some[~is_sure], wide)
            found.append((scores, ids))
        scores, ids = (torch.cat(part) for part in zip(*found))
        if exclude is not None:
            # By its id, never by its rank: a duplicate may rank before it.
            is_own = ids == exclude.to(ids.device)[:, None]  # (Q, k + 1)
            is_own[~is_own.any(1), -1] = True                # not found: drop the last
            scores, ids = (part[~is_own].view(len(ids), wide - 1) for part in (scores, ids))
        return scores.float(), ids


def check_encoder(index: Index, name: str, fingerprint: str, dim: int) -> None:
    """Raise ValueError, naming both, where another encoder made the index. An unknown one passes
    with a warning if E fits."""
    E, its_hash = index.rows.shape[1], index.manifest.get("encoder_hash")
    made_by = f"{index.manifest.get('encoder')} ({its_hash or 'no fingerprint'}, {E} dimensions)"
    require(E == dim and its_hash in (fingerprint, None, ""),
            f"{index.folder} was made by encoder {made_by}, not {name} ({fingerprint}, {dim})")
    if not its_hash:
        warnings.warn(f"{index.folder} does not say which encoder made it", stacklevel=2)


def neighbor_table(index: Index, k: int, device: torch.device | str = "cpu") -> np.ndarray:
    """int32 (N, min(k, N−1)): the nearest rows of every row, itself excluded by its id.
    Read from neighbors-<k>.npy, or computed on `device` and kept there: N²·E multiplications, or,
    with inverted lists, a search of 64 lists per row."""
    blocks = (index.search(torch.from_numpy(index.rows[own]).to(device), k, 64, own)[1]
              .int().cpu().numpy()
              for own in torch.arange(len(index)).split(1024))
    return np.array(cached(index.folder / f"neighbors-{k}.npy", rows_digest(index.rows), blocks))


# ---------------- files and pictures

class Rows:
    """A matrix (N, E) of floats in one .npy file or several. Each read maps its file anew, so that
    it leaves memory again. Raises ValueError for anything else."""
    def __init__(self, files: Sequence[Path]) -> None:
        arrays = [open_memmap(path, mode="r") for path in files]
        self.files, self.starts = files, np.cumsum([0] + [len(array) for array in arrays])
        self.shape, self.dtype = (int(self.starts[-1]), *arrays[0].shape[1:]), arrays[0].dtype
        require(len(self.shape) == 2 and self.dtype.kind == "f", f"{files[0]}: no floats (N, E)")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray | Tensor | int) -> np.ndarray:
        """A slice, or row ids 0 … N−1 of any shape → (…, E)."""
        ids = np.arange(*key.indices(self.shape[0])) if isinstance(key, slice) else np.asarray(key)
        if len(self.files) == 1:
            return open_memmap(self.files[0], mode="r")[ids]
        out = np.empty((*ids.shape, self.shape[1]), self.dtype)
        file = np.searchsorted(self.starts, ids, side="right") - 1  # of each row
        for i in np.unique(file):
            array = open_memmap(self.files[i], mode="r")
            out[file == i] = array[ids[file == i] - self.starts[i]]
        return out


def rows_digest(rows: Rows) -> str:
    """64 hex digits of all rows, read block by block."""
    digest = hashlib.sha256()
    for i in range(0, len(rows), BLOCK):
        digest.update(rows[i:i + BLOCK])
    return digest.hexdigest()


def read_names(folder: Path) -> list[str]:
    """The lines of paths.txt, none where it is missing. A byte-order mark does no harm."""
    path = folder / "paths.txt"
    return path.read_text("utf-8-sig").splitlines() if path.is_file() else []


def open_index(folder: str | Path) -> Index:
    """Open an index folder. Raises FileNotFoundError, or ValueError where its files disagree."""
    folder, lists = Path(folder), None
    if not os.path.isfile(folder / "manifest.json"):
        raise FileNotFoundError(f"no index at {folder}: see python index.py build")
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8-sig"))
        N, E, root = manifest["rows"], manifest["dim"], folder / manifest.get("root", ".")
        files = manifest.get("files", [{"file": "embeddings.npy"}])
        rows = Rows([folder / entry["file"] for entry in files])
        paths = read_names(folder) or range(N)
        require(rows.shape == (N, E) and rows.dtype == np.float16 and len(paths) == N,
                f"{N} x {E} in its manifest, {rows.shape} in its files, {len(paths)} paths")
        if manifest.get("lists"):
            lists = [torch.from_numpy(np.load(folder / f"{name}.npy")) for name in LISTS]
            require(torch.equal(lists[1].sort().values, torch.arange(N)), "a list lacks rows")
    except Exception as error:  # a damaged file raises any kind
        raise ValueError(f"the index at {folder} is damaged ({reason(error)})") from None
    return Index(folder, rows, paths, root, manifest, lists)


def write_index(out: str | Path, rows: Tensor | Rows, paths: Sequence, encoder: str,
                encoder_hash: str, root: str | Path, n_lists: int | None = 0) -> Index:
    """Write an index of embeddings (N, E), one name per row, and open it. Once whole, it replaces
    an older index at `out`.

    Float16 files stay where they are, named in the manifest; other rows are copied, normalised.
    n_lists: so many inverted lists; None: 4·√N, or none below 50,000 rows. Raises ValueError for
    rows that are zero or not finite, or an `out` that holds anything else."""
    (N, E), out = rows.shape, refuse_foreign(out)
    require(N == len(paths) > 0, f"{len(paths)} names for {N} rows")
    if n_lists is None:  # 4·√N: faiss's rule; few rows need none
        n_lists = round(4 * N**0.5) if N >= 50_000 else 0
    manifest = {"format": 1, "rows": N, "dim": E, "dtype": "float16", "normalised": True,
                "encoder": encoder, "encoder_hash": encoder_hash, "lists": n_lists,
                "root": os.path.relpath(Path(root).resolve(), out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        (folder := Path(aside, "index")).mkdir()
        if rows.dtype == np.float16:
            for i in range(0, N, BLOCK):
                stored(rows, slice(i, i + BLOCK))  # raises for a norm other than 1
            manifest["files"] = [{"file": os.path.relpath(path.resolve(), out), "rows": int(n)}
                                 for path, n in zip(rows.files, np.diff(rows.starts))]
        else:
            blocks = (unit(torch.as_tensor(rows[i:i + BLOCK]), "an embedding").half().numpy()
                      for i in range(0, N, BLOCK))
            write_array(folder / "embeddings.npy", blocks)
            rows = Rows([folder / "embeddings.npy"])
        if not isinstance(paths, range):
            (folder / "paths.txt").write_text("".join(f"{path}\n" for path in paths), "utf-8")
        if n_lists:
            for name, part in zip(LISTS, make_lists(rows, n_lists)):
                np.save(folder / f"{name}.npy", part.numpy())
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return open_index(out)


def index_files(out: str | Path, source: str | Path, encoder: str = "unknown",
                encoder_hash: str = "", n_lists: int | None = None) -> Index:
    """`write_index` for embeddings that are there already: one .npy file, or a folder of them in
    the order of their numbers, as clip-retrieval writes them (img_emb_0.npy, …). A paths.txt in the
    folder, or beside it, names the rows."""
    source = Path(source)
    files = [source] if source.is_file() else sorted(source.glob("*.npy"), key=lambda path: [
        int(number) for number in re.findall(r"\d+", path.stem)])
    require(files, f"no .npy file of embeddings at {source}")
    require(Path(out).resolve() not in {path.resolve().parent for path in files},
            f"{source} would make way for its index: another --out")
    rows = Rows(files)
    paths = read_names(source) or read_names(source.parent) or range(len(rows))
    return write_index(out, rows, paths, encoder, encoder_hash, out, n_lists)


def refuse_foreign(out: str | Path) -> Path:
    """`out`, links resolved. Raises ValueError where it holds anything but an index."""
    out = Path(out).resolve()
    names = [path.name for path in out.glob("*")]
    ours = r"(manifest|paths|embeddings|centroids|lists|offsets|neighbors|tokens|swaps|pictures)\b"
    is_index = "manifest.json" in names and all(re.match(ours, name) for name in names)
    require((is_index or not names) and not out.is_file(), f"{out} is neither new nor an index")
    return out


def write_array(path: Path, blocks: Iterable[np.ndarray]) -> None:
    """A .npy file of blocks, one after the other. Raises ValueError for none."""
    with replacing(path) as file:
        n = file.write(bytes(128)) - 128  # room for the header
        for block in blocks:
            file.write(np.ascontiguousarray(block))
            n += len(block)
            if sys.stderr.isatty():
                print(f"\r{path.name}: {n:,} rows ", end="", file=sys.stderr)
        require(n > 0, f"no picture can be read for {path}")
        file.seek(0)
        write_array_header_1_0(file, {"descr": block.dtype.str, "fortran_order": False,
                                      "shape": (n, *block.shape[1:])})


def cached(path: Path, key: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """An array in a .npy file, memory-mapped. Where it is missing or damaged, or its .key tells of
    another key or shape, `blocks` makes its rows."""
    key_path = path.with_suffix(".key")
    with suppress(Exception):  # a damaged file raises many kinds
        array = open_memmap(path, mode="c")
        if key_path.read_text("utf-8") == f"{key} {array.shape} {array.dtype}\n":
            return array
    write_array(path, blocks)
    array = open_memmap(path, mode="c")
    key_path.write_text(f"{key} {array.shape} {array.dtype}\n", "utf-8")
    return array


def list_images(folder: str | Path, others: bool = False) -> list[str]:
    """All picture files below a folder, or all others: relative names, sorted. Links are followed;
    no folder is read twice, so a circle ends."""
    names, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        if os.path.realpath(here) in seen:
            folders.clear()  # os.walk goes no deeper
            continue
        seen.add(os.path.realpath(here))
        names += [Path(here, name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in names
                  if (Path(name).suffix.lower() in IMAGE_SUFFIXES) != others)


def embed_folder(clip: clip_model.CLIP, folder: str | Path, batch_size: int = 256
                 ) -> tuple[Tensor, list[str], list[str]]:
    """All pictures below a folder: embeddings, unit-norm float32 (N, E), their names, and one
    sentence per unreadable picture. Raises ValueError where all are."""
    def read(name: str) -> Image.Image | str:
        try:
            picture = clip_model.read_image(Path(folder) / name)
            return clip_model.fit_square(picture, clip.config.image_size)
        except ValueError as error:
            return str(error)

    files, names, bad, found = list_images(folder), [], [], []
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(files), batch_size):
            batch = files[i:i + batch_size]
            pictures = dict(zip(batch, pool.map(read, batch)))
            bad += [pictures.pop(name) for name in batch if isinstance(pictures[name], str)]
            names += pictures
            if pictures:
                found.append(clip.embed_pictures(list(pictures.values())).cpu())
    require(names, f"no readable picture below {folder} {bad[:1]}")
    return torch.cat(found), names, bad


def neighbor_pictures(index: Index, ids: list[int]) -> list[Image.Image | None]:
    """The pictures of rows; None where a file is not at hand."""
    pictures = []
    for i in ids:
        try:
            pictures.append(clip_model.read_image(index.root / str(index.paths[i])))
        except (FileNotFoundError, ValueError):
            pictures.append(None)
    return pictures


# ---------------- the command

def build(args: argparse.Namespace) -> None:
    """Embed a folder of pictures, or take embeddings, and write an index."""
    start, encoder, bad, others = time.time(), (), [], []
    require(bool(args.images) != bool(args.embeddings), "wanted pictures or --embeddings")
    n_lists = None if args.ivf == "auto" else int(args.ivf.replace("none", "0"))
    refuse_foreign(args.out)
    path = args.clip or (SHIPPED / "clip.safetensors" if args.images else None)
    if path:
        clip = clip_model.load(path).to(clip_model.pick_device(args.device))
        encoder = clip.describe(), clip.fingerprint()
        print(f"CLIP {path}: {encoder[0]}, {encoder[1]}")
    if args.images:
        embeddings, names, bad = embed_folder(clip, args.images)
        others = list_images(args.images, others=True)
        index = write_index(args.out, embeddings, names, *encoder, args.images, n_lists)
    else:
        index = index_files(args.out, args.embeddings, *encoder, n_lists=n_lists)
    for sentence in bad:
        print(f"skipped: {sentence}", file=sys.stderr)
    print(f"{len(index):,} rows of {index.rows.shape[1]} dimensions in {args.out}, "
          f"{index.manifest['lists'] or 'no'} inverted lists, {len(bad)} files not readable, "
          f"{len(others)} of other kinds, {time.time() - start:.0f} s")


def search(args: argparse.Namespace) -> None:
    """Print the nearest rows of a text or a picture, one per line; draw them on request."""
    is_picture = os.path.isfile(args.query)
    is_name = Path(args.query).suffix.lower() in IMAGE_SUFFIXES
    require(is_picture or args.query.strip() and not is_name,
            f"{args.query!r} is neither a text nor a picture here")
    index, clip = open_index(args.index), clip_model.load(args.clip)
    check_encoder(index, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    query = (clip.embed_pictures([clip_model.read_image(args.query)]) if is_picture
             else clip.embed_texts([args.query]))
    scores, ids = (found[0].tolist() for found in index.search(query, args.k, args.nprobe))
    for rank, i in enumerate(ids):
        print(f"{rank + 1}\t{scores[rank]:.4f}\t{i}\t{index.paths[i]}")
    print(f"{len(ids)} of the {len(index):,} rows in {args.index}", file=sys.stderr)
    if args.out:
        clip_model.grid([neighbor_pictures(index, ids[:100])], 96).save(args.out)
        print(f"wrote {args.out}", file=sys.stderr)


def recall(args: argparse.Namespace) -> None:
    """Print what inverted lists lose: recall@k against exact search."""
    index = open_index(args.index)
    require(index.lists, f"{args.index} has no inverted lists: see build --ivf")
    # Some of its own rows are the queries, each excluded from its neighbours.
    own = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:1000]
    rows = torch.from_numpy(index.rows[own])
    exact = index.search(rows, args.k, exclude=own)[1]               # (Q, K)
    for nprobe in args.nprobe:
        ids = index.search(rows, args.k, nprobe, exclude=own)[1]
        is_hit = (ids[:, :, None] == exact[:, None]).any(1).float()  # (Q, K)
        print(f"nprobe {nprobe}\trecall@{args.k} {is_hit.mean():.4f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and search an index of image embeddings.")
    commands, subs = parser.add_subparsers(required=True), {}
    for run in (build, search, recall):
        subs[run] = commands.add_parser(run.__name__, help=run.__doc__)
        subs[run].set_defaults(run=run)
        if run is not build:
            subs[run].add_argument("index", type=Path)
            subs[run].add_argument("--k", type=int, default=10, help="neighbours (default 10)")
    info = commands.add_parser("info", help="Print the manifest.")
    info.add_argument("index", type=Path)
    info.set_defaults(run=lambda args: print(json.dumps(open_index(args.index).manifest, indent=1)))
    option = subs[build].add_argument
    option("images", type=Path, nargs="?", help="folder of pictures, read recursively")
    option("--embeddings", type=Path, help="instead: .npy file or a folder of them")
    option("--clip", type=Path, help="default: the stickers'; with --embeddings: unknown")
    option("--out", type=Path, required=True, help="folder to write")
    option("--ivf", default="auto", help="inverted lists: auto, none, or their number")
    option("--device", default="auto", help="of CLIP: auto, cpu, cuda, cuda:1, ...")
    option = subs[search].add_argument
    option("query", metavar="TEXT_OR_IMAGE", help="an existing file is a picture")
    option("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    option("--nprobe", type=int, help="inverted lists to look into (default: exact)")
    option("--out", type=Path, help="also draw the first 100 neighbours")
    subs[recall].add_argument("--nprobe", type=int, nargs="+", default=[1, 4, 16, 64])
    return clip_model.run_command(parser, lambda args: args.run(args), argv)


if __name__ == "__main__":
    sys.exit(main())
