"""The retrieval database of kNN-Diffusion Sec. 3.1: an index of picture embeddings, and the rows of
it that lie nearest to a query.

    H = { f_img(i) : i in I },      kNN(q) = the k rows r of H with the largest score q·r

Rows and queries have unit norm, so the inner product is the cosine. It is taken in float64 between
the stored float16 row and the query, and rounded to a multiple of 2⁻³⁰. Rows of equal scores come
in the order of their ids. `exact_search` is this definition. `scan` finds the same rows faster.
`probe` looks into inverted lists: faster still, and approximate.

An index is a folder of plain files that numpy opens:

    embeddings.npy    float16 (N, E), unit-norm rows; or several files, named in the manifest
    paths.txt         line i names the picture of row i, relative to the picture folder; optional
    manifest.json     N, E, dtype, encoder and its fingerprint, the picture folder
    centroids.npy     float32 (C, E); lists.npy: int64 (N,), row ids list by list; offsets.npy:
                      int64 (C+1,), where each list begins; all three with inverted lists only
    neighbors-K.npy   int32 (N, min(K, N−1)), the table for training, its .key beside it; optional

Shapes: N rows, E CLIP dimension, Q queries, K neighbours (k in calls), P rows of a block, C lists.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip_model
from clip_model import SHIPPED, reason, replacing, require

FORMAT = 1
BLOCK = 16384                    # rows that are read and multiplied at once
GROUP = 16                       # rows of which the scan keeps the best score
RESIDENT_BYTES = 4 * 2**30       # rows stay in memory, for the scan, up to this size
TABLE_NPROBE = 64                # inverted lists per row, for the neighbour table


# ---------------------------------------------------------------- kNN(·), the definition

def unit(vectors: Tensor, what: str) -> Tensor:
    """Vectors (n, E) of any float dtype and norm → float64 of unit norm. Raises ValueError, which
    says `what` they are, for one that is zero or not finite."""
    vectors = vectors.double()
    largest = vectors.abs().amax(1, keepdim=True)          # divided out first: no square overflows
    require((largest.isfinite() & (largest > 0)).all(), f"{what} is zero or not finite")
    return F.normalize(vectors / largest, dim=1)


def is_unit(rows: Tensor) -> Tensor:
    """Which rows (n, E) have unit norm, to float16's precision: bool (n,)."""
    return (rows.float().norm(dim=1) - 1).abs() < 2e-3


def stored(rows: Rows, key: slice | Tensor, device: torch.device) -> Tensor:
    """Some rows as they are stored, float16 (n, E). Raises ValueError for one without unit norm:
    a single flipped bit can make a row the nearest one to every query."""
    found = torch.from_numpy(rows[key]).to(device)
    require(is_unit(found).all(), f"a row in {rows.files[0].parent} is damaged: its norm is not 1")
    return found


def best(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rows `ids`, int64 (Q, n), and their scores, float64 (Q, n): the k best, best first, of
    equal scores the lower id. Both (Q, min(k, n)).

    Ours: a score and its id make one integer, score·2³⁰·2³² − id, so that topk settles ties, too.
    """
    keys = (scores * 2**30).round().long() * 2**32 - ids
    keys = keys.topk(min(k, keys.shape[1])).values
    ids = -keys % 2**32
    return (keys + ids).double() / 2**62, ids


def exact_search(rows: Rows, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """kNN(·) as defined: scores float64 and row ids int64, (Q, min(k, N)).

    queries: unit-norm float64 (Q, E). Block by block, the best rows so far are kept. They are
    sorted out once they are twice as many as wanted, so that a large k costs no more than N.
    """
    scores, ids = queries[:, :0], queries[:, :0].long()
    for start in range(0, len(rows), BLOCK):
        block = stored(rows, slice(start, start + BLOCK), queries.device).double()
        its_ids = torch.arange(start, start + len(block), device=queries.device)
        scores = torch.cat([scores, queries @ block.T], dim=1)
        ids = torch.cat([ids, its_ids.expand(len(queries), -1)], dim=1)
        if ids.shape[1] > 2 * k or start + BLOCK >= len(rows):
            scores, ids = best(scores, ids, k)
    return scores, ids


# ---------------------------------------------------------------- the same rows, faster
#
# Low precision makes the product of all rows with all queries two to five times as fast. Its scores
# are wrong in the third digit, but by a bounded error, so they tell which rows are *not* the best:
# keep the best score of each group of 16 rows, list the best groups, and score their rows again as
# the definition does. No other group holds a row above its best score + the bound. Where that is
# less than the k-th score found, the answer is the definition's. Else more groups are listed.

def scan_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU; bfloat16 on a CPU that multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.float16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def scan(index: Index, queries: Tensor, k: int, n_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of the n_groups best groups, as `exact_search` gives them, and for which
    queries no row elsewhere can be better, bool (Q,).

    The bound: with q̂ and r̂ the rounded vectors, Cauchy and Schwarz give
        |q·r − q̂·r̂| ≤ ‖q − q̂‖ ‖r‖ + ‖q̂‖ ‖r − r̂‖,   and ‖r‖ ≤ 1.002 (see `stored`);
    float32 sums of E products err by less than E·2⁻²², and the score's rounding is half its eps.
    """
    (Q, E), device = queries.shape, queries.device
    columns = queries.to(scan_dtype(device)).T.contiguous()                # (E, Q)
    # A GPU may add in float16 where the result is float16, and no bound holds for that.
    product = partial(torch.mm, out_dtype=torch.float32) if device.type == "cuda" else torch.mm
    end, lost = len(index) - len(index) % GROUP, 0.0
    top = groups = torch.zeros(Q, 0, dtype=torch.int64, device=device)
    for start in range(0, end, BLOCK):
        low, rounding = index.low(slice(start, min(start + BLOCK, end)), device)
        scores = product(low, columns)                                     # (P, Q)
        # The bits of positive numbers, read as integers, are ordered as the numbers are, and those
        # of negative ones lie below. Integers are compared many times faster than bfloat16.
        bits = scores.view(torch.int16 if scores.itemsize == 2 else torch.int32)
        maxima = bits.view(-1, GROUP, Q).amax(1).T                         # (Q, P / GROUP)
        maxima, here = maxima.topk(min(n_groups + 1, maxima.shape[1]))
        top, lost = torch.cat([top.to(bits.dtype), maxima], dim=1), max(lost, rounding)
        top, kept = top.topk(min(n_groups + 1, top.shape[1]))              # (Q, n_groups + 1)
        groups = torch.cat([groups, start // GROUP + here], dim=1).gather(1, kept)
    members = groups[:, :n_groups, None] * GROUP + torch.arange(GROUP, device=device)
    tail = torch.arange(end, len(index), device=device).expand(Q, -1)      # rows of no whole group
    found, ids = rescore(index, queries, torch.cat([members.flatten(1), tail], dim=1), k)
    q_hat = columns.T.double()
    bound = 1.002 * (queries - q_hat).norm(dim=1) + 1e-7
    bound += 1.01 * q_hat.norm(dim=1) * (lost + E * 2.0**-22)
    others = top[:, -1].clamp(min=0).view(scores.dtype).double()           # 0 for all negative ones
    others = others * (1 + torch.finfo(scores.dtype).eps / 2) + bound
    return found, ids, others < found[:, -1]


def rescore(index: Index, queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the rows ids (Q, n), scored as `exact_search` does."""
    found, at_once = [], max(1, 2**22 // (ids.shape[1] * queries.shape[1]))
    for some, its_ids in zip(queries.split(at_once), ids.split(at_once)):
        rows = torch.from_numpy(index.rows[its_ids]).to(ids.device).double()          # (q, n, E)
        found.append(best(torch.bmm(rows, some[:, :, None])[..., 0], its_ids, k))
    scores, ids = (torch.cat(part) for part in zip(*found))
    return scores, ids


# ---------------------------------------------------------------- inverted lists (IVF)
#
# k-means parts the rows into C lists, each with a centroid. A query looks into the nprobe lists of
# the nearest centroids only. A neighbour beyond the border of a list is missed; the command
# `recall` says how often that happens.

@dataclass
class Lists:
    """Row ids list by list: list c is order[offsets[c] : offsets[c+1]]."""
    centroids: Tensor            # float32 (C, E), unit norm
    order: Tensor                # int64 (N,)
    offsets: Tensor              # int64 (C+1,)


def nearest_centroid(rows: Tensor, centroids: Tensor) -> Tensor:
    """int64 (n,): the list of each row (n, E)."""
    return torch.cat([(part.float() @ centroids.T).argmax(1) for part in rows.split(1024)])


def spherical_kmeans(rows: Tensor, n_lists: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Unit-norm centroids float32 (C, E) of rows (n, E): assign each row to the centroid of the
    largest inner product, average, normalise. An empty list starts again at a random row."""
    generator = torch.Generator().manual_seed(seed)
    centroids = rows[torch.randperm(len(rows), generator=generator)[:n_lists]].float()
    for _ in range(iterations):
        lists = nearest_centroid(rows, centroids)
        sums = torch.zeros_like(centroids)
        for part, its_lists in zip(rows.split(BLOCK), lists.split(BLOCK)):
            sums.index_add_(0, its_lists, part.float())
        is_empty = lists.bincount(minlength=n_lists) == 0
        fresh = rows[torch.randint(len(rows), (n_lists,), generator=generator)].float()
        centroids = F.normalize(torch.where(is_empty[:, None], fresh, sums), dim=1)
    return centroids


def make_lists(rows: Rows, n_lists: int, sample: int = 64) -> Lists:
    """k-means on `sample` rows per list, then one pass over all rows, block by block."""
    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(rows), generator=generator)[: sample * n_lists].sort().values
    centroids = spherical_kmeans(stored(rows, chosen, cpu), n_lists)
    blocks = (stored(rows, slice(i, i + BLOCK), cpu) for i in range(0, len(rows), BLOCK))
    lists = torch.cat([nearest_centroid(block, centroids) for block in blocks])
    ends = lists.bincount(minlength=n_lists).cumsum(0)
    return Lists(centroids, lists.argsort(stable=True), F.pad(ends, (1, 0)))


def probe(index: Index, queries: Tensor, k: int, nprobe: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of each query's nprobe lists, and for which queries these hold enough rows,
    bool (Q,). A list is read once, for all queries that look into it. Its rows are compared in low
    precision, and the best 2k are scored again as the definition does."""
    lists, device, low_queries = index.lists, queries.device, queries.float()
    near = (low_queries @ lists.centroids.to(device).T).topk(nprobe).indices.flatten()
    by_list = near.argsort(stable=True)                                    # (Q · nprobe,)
    wanted = by_list.split(near.bincount(minlength=len(lists.centroids)).tolist())
    scores = torch.full((len(queries), 2 * k), -2.0, device=device)        # below any cosine
    ids = torch.zeros_like(scores, dtype=torch.int64)
    for places, members in zip(wanted, lists.order.split(lists.offsets.diff().tolist())):
        some = places // nprobe                                            # the queries, (q,)
        for its_ids in members.to(device).split(BLOCK) if len(some) and len(members) else ():
            rows = index.low(its_ids, device)[0].float()                   # (P, E)
            found = torch.cat([scores[some], low_queries[some] @ rows.T], dim=1)
            scores[some], kept = found.topk(2 * k)
            found = torch.cat([ids[some], its_ids.expand(len(some), -1)], dim=1)
            ids[some] = found.gather(1, kept)
    return *rescore(index, queries, ids, k), scores[:, -1] > -2


# ---------------------------------------------------------------- the index

@dataclass(repr=False)
class Index:
    """An open index. Its pictures may be missing; its rows are read when they are wanted."""
    folder: Path
    rows: Rows                   # float16 (N, E), unit norm
    paths: Sequence              # N names, relative to `root`; row numbers where there are none
    manifest: dict
    lists: Lists | None = None
    resident: dict[torch.device, tuple[Tensor, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, {len(self):,} rows of {self.rows.shape[1]})"

    @property
    def root(self) -> Path:
        """The folder that the paths are relative to; it need not exist."""
        return self.folder / self.manifest.get("root", ".")

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, nprobe: int | None = None,
               exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The min(k, N) nearest rows of each query: scores float32 and ids int64 (Q, k), best
        first, of equal scores the lower id.

        queries: (Q, E) of any float dtype and any norm.
        nprobe: look into so many inverted lists, where the index has them; None: exact.
        exclude: int64 (Q,), a row id per query that must not come back, wherever it ranks. There
            is one result fewer if N allows no more.
        Raises ValueError for another shape, a query that is zero or not finite, a negative k,
        nprobe < 1, or damaged rows.
        """
        N, E = self.rows.shape
        require(queries.ndim == 2 and queries.shape[1] == E,
                f"queries have shape {tuple(queries.shape)}, the index wants (Q, {E})")
        require(isinstance(k, int) and k >= 0, f"k is {k}, wanted a whole number, 0 or more")
        require(nprobe is None or nprobe >= 1, f"nprobe is {nprobe}, wanted 1 or more")
        queries, wide = unit(queries, "a query embedding"), min(k + (exclude is not None), N)
        at_once = max(1, 2**24 // max(BLOCK, wide))
        with torch.autocast(queries.device.type, enabled=False):
            found = [self.nearest(some, wide, nprobe or 0) for some in queries.split(at_once)]
        scores, ids = (torch.cat(part) for part in zip(*found))
        if exclude is not None:
            # The own row is dropped by its id, never by its rank: a duplicate may rank before it.
            is_own = ids == exclude.to(ids.device)[:, None]                # (Q, k + 1)
            is_own[~is_own.any(1), -1:] = True       # own row not found: the last one is too many
            kept = (len(ids), max(0, wide - 1))
            scores, ids = scores[~is_own].view(kept), ids[~is_own].view(kept)
        return scores.float(), ids

    def nearest(self, queries: Tensor, k: int, nprobe: int) -> tuple[Tensor, Tensor]:
        """`search` for unit-norm float64 queries and k ≤ N, nprobe 0 for exact: the quickest way
        first, the next one for the queries that it leaves open. Both (Q, k), float64 and int64."""
        N, n_lists = len(self), len(self.lists.centroids) if self.lists else 0
        # Where the listed groups are more than an eighth of all rows, exact search is as quick.
        ways = [partial(scan, n_groups=n) for n in (8 * k, 32 * k) if 8 * GROUP * n <= N]
        if nprobe < n_lists and 2 * k * n_lists <= nprobe * N:
            ways.insert(0, partial(probe, nprobe=nprobe))
        scores = queries.new_zeros(len(queries), k)
        ids, left = scores.long(), torch.arange(len(queries) if k else 0, device=queries.device)
        for way in ways:
            if len(left):
                scores[left], ids[left], is_done = way(self, queries[left], k)
                left = left[~is_done]
        if len(left):
            scores[left], ids[left] = exact_search(self.rows, queries[left], k)
        return scores, ids

    def low(self, key: slice | Tensor, device: torch.device) -> tuple[Tensor, float]:
        """Some rows in low precision (n, E), and the largest ‖r − r̂‖ among them or among all. All
        rows stay in memory where they need no more than RESIDENT_BYTES."""
        (N, E), dtype = self.rows.shape, scan_dtype(device)

        def rounded(key: slice | Tensor) -> tuple[Tensor, float]:
            rows = stored(self.rows, key, device)
            return rows.to(dtype), (rows.float() - rows.to(dtype).float()).norm(dim=1).max().item()

        if N * E * dtype.itemsize > RESIDENT_BYTES:
            return rounded(key)
        if device not in self.resident:
            everything, lost = torch.empty(N, E, dtype=dtype, device=device), [0.0]
            for i in range(0, N, BLOCK):
                everything[i:i + BLOCK], loss = rounded(slice(i, i + BLOCK))
                lost.append(loss)
            self.resident[device] = everything, max(lost)
        everything, lost = self.resident[device]
        # index_select copies whole rows, several times as fast as everything[key].
        return everything[key] if isinstance(key, slice) else everything.index_select(0, key), lost


def check_encoder(index: Index, name: str, fingerprint: str, dim: int) -> None:
    """Raise ValueError, naming both, where the index was made by another encoder than this one.
    An unknown encoder of the right dimension passes with a warning."""
    E, its_hash = index.rows.shape[1], index.manifest.get("encoder_hash")
    require(E == dim and its_hash in (fingerprint, None, ""), f"the index at {index.folder} was "
            f"made by encoder {index.manifest.get('encoder')} ({its_hash or 'no fingerprint'}, {E} "
            f"dimensions), not by {name} ({fingerprint}, {dim} dimensions)")
    if not its_hash:
        warnings.warn(f"{index.folder} does not say which encoder made it", stacklevel=2)


def neighbor_table(index: Index, k: int, device: torch.device | str = "cpu") -> np.ndarray:
    """int32 (N, min(k, N−1)): the nearest rows of every row, itself excluded by its id.

    Kept in neighbors-<k>.npy. Where that is missing, or of other rows, it is computed on `device`:
    N²·E multiplications, or, with inverted lists, a search of TABLE_NPROBE lists per row.
    """
    require(k >= 1, f"k is {k}, wanted 1 or more")
    key = rows_digest(index.rows) + (f" nprobe {TABLE_NPROBE}" if index.lists else "")
    blocks = (index.search(torch.from_numpy(index.rows[own]).to(device), k, TABLE_NPROBE, own)[1]
              .int().cpu().numpy() for own in torch.arange(len(index)).split(1024))
    return np.array(cached(index.folder / f"neighbors-{k}.npy", key, blocks))


# ---------------------------------------------------------------- files

class Rows:
    """A matrix (N, E) of floats in one .npy file or several. Each read maps its file anew, so that
    what was read leaves memory again. Raises ValueError for files that are damaged or differ."""

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            arrays = [np.load(path, mmap_mode="r") for path in files]
            (self.dtype, width), = {(array.dtype, *array.shape[1:]) for array in arrays}
        except Exception as error:           # numpy's reader raises many kinds on a damaged file
            raise ValueError(f"{files[0]} ({len(files)} files) is no matrix, or they have several "
                             f"widths or types: {reason(error)}") from None
        self.files, self.starts = list(files), np.cumsum([0] + [len(array) for array in arrays])
        self.shape = (int(self.starts[-1]), width)
        require(all(self.shape) and self.dtype.kind == "f", f"{files[0]} holds {self.shape} "
                f"{self.dtype}, wanted floats, and at least one row")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray | Tensor | int) -> np.ndarray:
        """A slice, or row ids 0 … N−1 of any shape → (…, E)."""
        if isinstance(key, slice):
            key = np.arange(*key.indices(len(self)))
        ids = key.numpy(force=True) if isinstance(key, Tensor) else np.asarray(key)
        if ids.dtype.kind not in "iu" or ((ids < 0) | (ids >= len(self))).any():
            raise IndexError("wanted a slice, or row ids from 0 to N−1")
        out = np.empty((*ids.shape, self.shape[1]), self.dtype)
        file = np.searchsorted(self.starts, ids, side="right") - 1         # of each row
        for i in np.unique(file):
            out[file == i] = np.load(self.files[i], mmap_mode="r")[ids[file == i] - self.starts[i]]
        return out


def rows_digest(rows: Rows) -> str:
    """64 hex digits of all rows, read block by block."""
    digest = hashlib.sha256()
    for i in range(0, len(rows), BLOCK):
        digest.update(rows[i:i + BLOCK])
    return digest.hexdigest()


def read_names(folder: Path) -> list[str]:
    """The lines of paths.txt; a byte-order mark and Windows' line ends do no harm."""
    return (folder / "paths.txt").read_text("utf-8-sig").removesuffix("\n").split("\n")


def open_index(folder: str | os.PathLike) -> Index:
    """Open an index folder. Raises FileNotFoundError or ValueError with one sentence where it is
    missing, or its files disagree."""
    folder, lists = Path(folder), None
    if not os.path.isfile(folder / "manifest.json"):
        raise FileNotFoundError(f"no index at {folder}; `python index.py build` makes one")
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8-sig"))
        require(manifest["format"] == FORMAT, f"format {manifest['format']} is not {FORMAT}")
        N, E, _ = manifest["rows"], manifest["dim"], Path(manifest.get("root", "."))
        files = manifest.get("files", [{"file": "embeddings.npy", "rows": N}])
        rows = Rows([folder / entry["file"] for entry in files])
        paths = read_names(folder) if manifest.get("paths", True) else range(N)
        require(rows.shape == (N, E) and rows.dtype == np.float16 and len(paths) == N
                and np.diff(rows.starts).tolist() == [entry["rows"] for entry in files],
                f"{N} x {E} in its manifest, {rows.shape} in its files, {len(paths)} paths")
        if manifest.get("lists"):
            lists = Lists(*(torch.from_numpy(np.load(folder / f"{name}.npy"))
                            for name in ("centroids", "lists", "offsets")))
            ends, shape = lists.offsets.tolist(), tuple(lists.centroids.shape)
            require(ends == [0, *sorted(ends)[1:-1], N] and shape == (len(ends) - 1, E)
                    and lists.centroids.isfinite().all() and lists.offsets.dtype == torch.int64
                    and torch.equal(lists.order.sort().values, torch.arange(N)), "inverted lists")
    except Exception as error:               # a damaged file makes its reader raise any kind
        raise ValueError(f"the index at {folder} is damaged ({reason(error)})") from None
    return Index(folder, rows, paths, manifest, lists)


def write_index(out: str | os.PathLike, rows: Tensor | Rows, paths: Sequence, encoder: str,
                encoder_hash: str, root: str | os.PathLike, n_lists: int | None = 0) -> Index:
    """Write an index of embeddings (N, E), one name per row, and open it. It takes the place of an
    older index at `out` when it is whole.

    Float16 rows of unit norm in files stay where they are, and the manifest names them; all others
    are copied, normalised. n_lists: so many inverted lists; None: 4·√N, or none below 50,000 rows.
    Raises ValueError for no rows, rows that are zero or not finite, more lists than rows, or an
    `out` that holds anything but an index.
    """
    N, E = rows.shape
    require(N == len(paths) > 0, f"{len(paths)} names for {N} rows, wanted one each, and one row")
    if n_lists is None:     # 4·√N, faiss's rule of thumb; of few rows exact search is as quick
        n_lists = round(4 * math.sqrt(N)) if N >= 50_000 else 0
    require(n_lists <= N, f"{n_lists} lists for {N} rows: wanted one per row at most")
    manifest = {"format": FORMAT, "rows": N, "dim": E, "dtype": "float16", "normalised": True,
                "encoder": encoder, "encoder_hash": encoder_hash, "root": relative(root, out)}
    blocks = [slice(i, i + BLOCK) for i in range(0, N, BLOCK)]
    with new_folder(out) as folder:
        if isinstance(rows, Rows) and rows.dtype == np.float16 and all(
                is_unit(torch.from_numpy(rows[block])).all() for block in blocks):
            manifest["files"] = [{"file": relative(path, out), "rows": int(n)}
                                 for path, n in zip(rows.files, np.diff(rows.starts))]
        else:
            arrays = (unit(torch.as_tensor(rows[block]), "an embedding") for block in blocks)
            write_array(folder / "embeddings.npy", (N, E), np.float16,
                        (array.half().numpy() for array in arrays))
            rows = Rows([folder / "embeddings.npy"])
        if isinstance(paths, range):
            manifest["paths"] = False
        else:
            (folder / "paths.txt").write_bytes("".join(path + "\n" for path in paths).encode())
        if n_lists:
            manifest["lists"], lists = n_lists, make_lists(rows, n_lists)
            for name, part in zip(("centroids", "lists", "offsets"), astuple(lists)):
                np.save(folder / f"{name}.npy", part.numpy())
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return open_index(out)


def index_files(out: str | os.PathLike, source: str | os.PathLike, encoder: str = "unknown",
                encoder_hash: str = "", n_lists: int | None = None) -> Index:
    """`write_index` for embeddings that are there already: one .npy file, or a folder of them in
    the order of the numbers in their names, as clip-retrieval writes them (img_emb_0.npy, …). A
    paths.txt in the folder, or beside it, names the rows. A source that is an index passes its
    encoder, names and picture folder on."""
    source, root, paths = Path(source), Path(out), None
    if (source / "manifest.json").is_file():
        made = open_index(source)
        rows, paths, root = made.rows, made.paths, made.root
        encoder, encoder_hash = made.manifest["encoder"], made.manifest["encoder_hash"]
    else:
        files = [source] if source.is_file() else sorted(source.glob("*.npy"), key=lambda path: [
            int(number) for number in re.findall(r"\d+", path.stem)])
        require(files, f"no .npy file of embeddings at {source}")
        rows = Rows(files)
        for folder in (source.parent, source):
            paths = read_names(folder) if (folder / "paths.txt").is_file() else paths
    require(Path(out).resolve() not in {path.resolve().parent for path in rows.files},
            f"the rows in {source} would make way for their index: another --out, please")
    return write_index(out, rows, paths or range(len(rows)), encoder, encoder_hash, root, n_lists)


def cached(path: Path, key: str, blocks: Iterable[np.ndarray]) -> np.ndarray:
    """An array in a .npy file, memory-mapped. Where the file is missing or damaged, or the .key
    beside it tells of another key or shape, `blocks` makes its rows, and they are written."""
    key_path = path.with_suffix(".key")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if key_path.read_text("utf-8") == f"{key} {array.shape} {array.dtype}\n":
            return array
    except Exception:                         # numpy's reader raises many kinds on a damaged file
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        n = file.write(bytes(128)) - 128                  # room for the header
        for block in blocks:
            file.write(np.ascontiguousarray(block))
            n += len(block)
            if sys.stderr.isatty():
                print(f"\r{path.name}: {n:,} rows ", end="", file=sys.stderr)
        require(n > 0, f"nothing to put into {path}: no picture can be read")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {
            "descr": block.dtype.str, "fortran_order": False, "shape": (n, *block.shape[1:])})
        assert file.tell() == 128
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    key_path.write_text(f"{key} {array.shape} {array.dtype}\n", encoding="utf-8")
    return array


def write_array(path: Path, shape: tuple, dtype: type, blocks: Iterable[np.ndarray]) -> None:
    """A .npy file, written block by block. (A memory map on a full disk kills the process.)"""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with replacing(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A fresh folder beside `out`. It takes the place of `out` when all went well, and is gone when
    not."""
    out = refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=out.name, suffix=".part"))
    try:
        yield folder
        folder.chmod(0o755)
        if out.exists():
            out.rename(folder.with_suffix(".old"))
        folder.rename(out)
        shutil.rmtree(folder.with_suffix(".old"), ignore_errors=True)
    except OSError as error:
        raise OSError(f"{out} could not be written: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_foreign(out: str | os.PathLike) -> Path:
    """`out`, links resolved. Raises ValueError where it is neither absent, empty, nor an index."""
    out = Path(out).resolve()
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    ours = r"(manifest|paths|embeddings|centroids|lists|offsets|neighbors|tokens|swaps|pictures)\b"
    is_index = "manifest.json" in names and b'"encoder"' in (out / "manifest.json").read_bytes()
    is_ours = (is_index or not names) and all(re.match(ours, name) for name in names)
    require(is_ours and not out.is_file(), f"{out} is neither an empty folder nor an index alone")
    return out


def relative(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """A path as seen from a folder, links resolved; an absolute one from another Windows drive."""
    try:
        return Path(os.path.relpath(Path(path).resolve(), Path(folder).resolve())).as_posix()
    except ValueError:
        return Path(path).resolve().as_posix()


# ---------------------------------------------------------------- pictures of a folder

def list_files(folder: str | os.PathLike) -> list[str]:
    """All files below a folder, relative names, sorted. Folders behind links are read after all
    others, and none is read twice, so a circle of links ends. Raises FileNotFoundError."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    names, seen, tops = [], set(), [Path(folder)]
    for top in tops:                                       # it grows while it is gone through
        for here, folders, files in os.walk(top):
            if os.path.realpath(here) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(here))
            names += [Path(here, name).relative_to(folder).as_posix() for name in files]
            tops += [Path(here, name) for name in sorted(folders) if Path(here, name).is_symlink()]
    return sorted(names)


def is_image(name: str) -> bool:
    return Path(name).suffix.lower() in clip_model.IMAGE_SUFFIXES


def list_images(folder: str | os.PathLike) -> list[str]:
    """All picture files below a folder, by their names: relative, sorted."""
    return [name for name in list_files(folder) if is_image(name)]


def embed_folder(clip: clip_model.CLIP, folder: str | os.PathLike, batch_size: int = 256
                 ) -> tuple[Tensor, list[str], list[str]]:
    """Embed all pictures below a folder: unit-norm float32 (N, E), their relative names, and one
    sentence per picture that could not be read. Threads decode and resize."""
    def read(name: str) -> Image.Image | str:
        try:
            require(name.isprintable(), f"{name!r} is no file name for a list of lines in UTF-8")
            picture = clip_model.read_image(Path(folder) / name)
            return clip_model.fit_square(picture, clip.config.image_size)
        except (ValueError, FileNotFoundError) as error:
            return str(error)

    files, names, bad, found = list_images(folder), [], [], [torch.zeros(0, clip.config.embed_dim)]
    with ThreadPoolExecutor() as workers:
        for i in range(0, len(files), batch_size):
            batch = files[i:i + batch_size]
            pictures = dict(zip(batch, workers.map(read, batch)))
            bad += [pictures.pop(name) for name in batch if isinstance(pictures[name], str)]
            names += pictures
            if pictures:
                found.append(clip.embed_pictures(list(pictures.values())).cpu())
    return torch.cat(found), names, bad


def neighbor_pictures(index: Index, ids: list[int]) -> list[Image.Image | None]:
    """The pictures of rows; None where a file is not at hand."""
    def read(i: int) -> Image.Image | None:
        try:
            return clip_model.read_image(index.root / str(index.paths[i]))
        except (FileNotFoundError, ValueError):
            return None
    return [read(i) for i in ids]


# ---------------------------------------------------------------- the command

def build(args: argparse.Namespace) -> None:
    """Embed a folder of pictures, or take embeddings that are there, and write the index."""
    start, encoder, bad = time.time(), (), []
    require(bool(args.images) != bool(args.embeddings), "wanted either pictures or --embeddings")
    require(re.fullmatch("auto|none|[1-9][0-9]*", args.ivf), f"--ivf is {args.ivf!r}, see --help")
    n_lists = {"auto": None, "none": 0}[args.ivf] if args.ivf.isalpha() else int(args.ivf)
    refuse_foreign(args.out)
    path = args.clip or (SHIPPED / "clip.safetensors" if args.images else None)
    if path:
        clip = clip_model.load(path).to(clip_model.pick_device(args.device))
        encoder = clip.describe(), clip.fingerprint()
        print(f"CLIP {path} ({encoder[0]}, {encoder[1]}, {clip.config.embed_dim} dimensions)")
    if args.images:
        embeddings, names, bad = embed_folder(clip, args.images)
        others = Counter(Path(name).suffix.lower() for name in list_files(args.images)
                         if not is_image(name))
        bad += [f"{n} files of kind {kind!r}, never tried" for kind, n in others.items()]
        print(*(f"skipped: {sentence}\n" for sentence in bad), sep="", end="", file=sys.stderr)
        require(names, f"no readable picture below {args.images}")
        index = write_index(args.out, embeddings, names, *encoder, args.images, n_lists)
    else:
        index = index_files(args.out, args.embeddings, *encoder, n_lists=n_lists)
    print(f"{len(index):,} rows of {index.rows.shape[1]} dimensions in {args.out}, "
          f"{index.manifest.get('lists', 'no')} inverted lists, {len(bad)} files skipped, "
          f"{time.time() - start:.0f} s")


def search(args: argparse.Namespace) -> None:
    """Print the nearest rows of a text or a picture, one per line, and draw them on request."""
    is_picture, out = os.path.isfile(args.query), args.out
    require(args.query.strip(), "the text to search for is empty")
    require(is_picture or not is_image(args.query), f"no picture at {args.query}")
    require(not out or out.parent.is_dir() and is_image(out.name) and str(out) != args.query,
            f"{out} is no name for a new picture in a folder that is there")
    index, clip = open_index(args.index), clip_model.load(args.clip)
    check_encoder(index, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
    query = (clip.embed_pictures([clip_model.read_image(args.query)]) if is_picture
             else clip.embed_texts([args.query]))
    scores, ids = (found[0].tolist() for found in index.search(query, args.k, args.nprobe))
    for rank, (score, i) in enumerate(zip(scores, ids), start=1):
        print(f"{rank}\t{score:.4f}\t{i}\t{index.paths[i]}")
    print(f"{len(ids)} of {len(index)} rows, k is {args.k}; "
          f"{'inverted lists' if args.nprobe and index.lists else 'exact'}", file=sys.stderr)
    if out:
        sheet = clip_model.grid([neighbor_pictures(index, ids[:100])], 96)
        with replacing(out) as file:
            sheet.save(file, Image.registered_extensions()[out.suffix.lower()])
        print(f"wrote {out}", file=sys.stderr)


def recall(args: argparse.Namespace) -> None:
    """Print what inverted lists lose, for 1,000 of the index's own rows, themselves excluded:
    recall@k against exact search, the share of rows looked at, and the time."""
    index, k = open_index(args.index), args.k
    require(index.lists, f"the index at {args.index} has no inverted lists (build it with --ivf)")
    require(k >= 1 and min(args.nprobe) >= 1, "k and nprobe: wanted 1 or more")
    own = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:1000]
    rows, sizes = torch.from_numpy(index.rows[own]).float(), index.lists.offsets.diff()
    exact = index.search(rows, k, exclude=own)[1]
    print(f"nprobe\trecall@{k}\trows scanned\tms per query")
    for nprobe in args.nprobe:
        start = time.perf_counter()
        ids = index.search(rows, k, nprobe=nprobe, exclude=own)[1]
        seconds = (time.perf_counter() - start) / len(own)
        hits = (ids[:, :, None] == exact[:, None]).any(1).float().mean().item()
        near = (rows @ index.lists.centroids.T).topk(min(nprobe, len(sizes))).indices
        share = sizes[near].sum().item() / (len(own) * len(index))
        print(f"{nprobe}\t{hits:.4f}\t{share:.2%}\t{1e3 * seconds:.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and search an index of image embeddings.")
    commands = parser.add_subparsers(required=True)

    sub = commands.add_parser("build", help="embed a folder of pictures, read recursively")
    sub.add_argument("images", type=Path, nargs="?", help="folder of pictures")
    sub.add_argument("--embeddings", type=Path, help="instead: a .npy file or a folder of them")
    sub.add_argument("--clip", type=Path, help="default: the stickers'; with --embeddings: unknown")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--ivf", default="auto", metavar="auto|none|NLIST", help="inverted lists: "
                     "auto (the default) is 4 sqrt(N) of them from 50,000 rows on")
    sub.add_argument("--device", default="auto", help="of CLIP: auto, cpu, cuda, cuda:1, ...")
    sub.set_defaults(run=build)

    sub = commands.add_parser("search", help="show the nearest neighbours of a text or a picture")
    sub.add_argument("index", type=Path)
    sub.add_argument("query", metavar="TEXT_OR_IMAGE", help="an existing file is a picture")
    sub.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    sub.add_argument("--k", type=int, default=10, help="number of neighbours (default 10)")
    sub.add_argument("--nprobe", type=int, help="inverted lists to look into (default: exact)")
    sub.add_argument("--out", type=Path, help="also draw the first 100 neighbours into this file")
    sub.set_defaults(run=search)

    sub = commands.add_parser("recall", help="what inverted lists lose against exact search")
    sub.add_argument("index", type=Path)
    sub.add_argument("--k", type=int, default=10)
    sub.add_argument("--nprobe", type=int, nargs="+", default=[1, 4, 16, 64])
    sub.set_defaults(run=recall)

    sub = commands.add_parser("info", help="print the manifest")
    sub.add_argument("index", type=Path)
    sub.set_defaults(run=lambda args: print(json.dumps(open_index(args.index).manifest, indent=1)))
    return clip_model.run_command(parser, lambda args: args.run(args), argv)


if __name__ == "__main__":
    sys.exit(main())
