"""The retrieval database of kNN-Diffusion Sec. 3.1: an index of image embeddings, searched for the
nearest ones, exactly or by inverted lists.

    H = { f_img(i) : i in I },      kNN(q) = the k rows of H with the largest cosine to q

Rows and queries have unit norm, so the cosine is an inner product. An index is a folder of plain
files that numpy opens:

    embeddings.npy    float16 (N, E), unit-norm rows; or several files, named in the manifest
    paths.txt         line i names the picture of row i, relative to the picture folder; optional
    manifest.json     N, E, dtype, encoder and its fingerprint; written last: no manifest, no index
    neighbors-K.npy   int32 (N, min(K, N−1)), the table for training; optional
    centroids.npy     float32 (C, E); lists.npy: int64 (N,), row ids list by list; offsets.npy:
                      int64 (C+1,), where each list begins; all three with inverted lists only

A score is the inner product of the stored float16 row and the float32 query, in float64; of equal
scores the lower id comes first. Exact search means just that, and costs a bfloat16 scan.

Shapes: N rows, E CLIP dimension, Q queries, K neighbours, G groups of GROUP rows, P places of a
block; C inverted lists, R of them looked into a query, W rows in the longest.

    python index.py build data/stickers/images --clip weights/stickers/clip.safetensors --out DIR
    python index.py build --embeddings FOLDER_OF_NPY --out DIR --ivf auto
    python index.py search weights/stickers/index "a red heart" --out neighbours.png
    python index.py recall DIR --nprobe 4 16 64
    python index.py neighbors DIR --k 10
    python index.py info weights/stickers/index
"""
from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import re
import sys
import time
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip_model

SHIPPED = Path(__file__).parent / "weights" / "stickers"
FORMAT = 1
RESIDENT_BYTES = 4 * 2**30       # an index whose low-precision rows need no more stays in memory
BLOCK_BYTES = 256 * 2**20        # else this many bytes of rows at a time; also the bound of tables
PIECE_BYTES = 16 * 2**20         # of rows that are looked at again; small tables are reused faster
SCAN_BYTES = 4 * 2**20           # of scores at a time: they must fit the processor's cache
GROUP = 8                        # rows whose best score stands for all of them
TABLE_NPROBE = 64                # inverted lists looked into for the neighbour table
LISTED = 128                     # groups that are looked into at first


# ---------------------------------------------------------------- rows on disk

class Rows:
    """float16 (N, E) in one .npy file or several, read by seeking: nothing stays in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises ValueError where a file is no C-ordered float16 matrix of the others' width, or
        cut off."""
        self.files, self.offsets, counts = list(files), [], []
        for path in files:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim != 2 or array.dtype != np.float16 or not array.flags.c_contiguous:
                raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, wanted float16 "
                                 "(N, E), row after row")
            self.offsets.append(array.offset)
            counts.append(array.shape)
        if len({width for _, width in counts}) != 1:
            raise ValueError(f"{len(counts)} files of rows have widths "
                             f"{sorted({width for _, width in counts})}, wanted one")
        self.starts = np.cumsum([0] + [n for n, _ in counts])              # first row of each, N
        self.shape = (int(self.starts[-1]), counts[0][1])

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start … stop−1, float16 (n, E)."""
        out = np.empty((min(stop, len(self)) - start, self.shape[1]), np.float16)
        for i, (first, last) in enumerate(zip(self.starts, self.starts[1:])):
            low, high = max(first, start), min(last, start + len(out))
            if low < high:
                with open(self.files[i], "rb") as file:
                    file.seek(self.offsets[i] + int(low - first) * 2 * self.shape[1])
                    fill(out[low - start:high - start], file)
        return out

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Any rows (n,), in that order: float16 (n, E)."""
        if len(ids) and (np.diff(ids) == 1).all():
            return self.read(int(ids[0]), int(ids[-1]) + 1)
        out = np.empty((len(ids), self.shape[1]), np.float16)
        which = np.searchsorted(self.starts, ids, side="right") - 1        # the file of each
        for i in np.unique(which):
            mine = np.flatnonzero(which == i)
            places = self.offsets[i] + (ids[mine] - self.starts[i]) * 2 * self.shape[1]
            with open(self.files[i], "rb", buffering=0) as file:
                for j, place in zip(mine.tolist(), places.tolist()):
                    file.seek(place)
                    fill(out[j], file)
        return out

    def __getitem__(self, key: np.ndarray | int | slice) -> np.ndarray:
        """Row ids of any shape, 0 … N−1, or a slice without a step → float16 (…, E)."""
        if isinstance(key, slice) and key.step in (None, 1):
            start, stop, _ = key.indices(len(self))
            return self.read(start, max(start, stop))
        ids = np.asarray(key)
        if ids.dtype.kind not in "iu" or ((ids < 0) | (ids >= len(self))).any():
            raise IndexError("wanted row ids 0 … N−1, or a slice without a step")
        return self.take(ids.reshape(-1)).reshape(*ids.shape, self.shape[1])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read(0, len(self)).astype(dtype or np.float16, copy=False)


def fill(rows: np.ndarray, file: BinaryIO) -> None:
    if file.readinto(rows) != rows.nbytes:
        raise ValueError(f"{file.name} was cut off while it was read")


# ---------------------------------------------------------------- exact search by a cheap scan
#
# The product of all rows with all queries is nearly all of the work, and in bfloat16 it is two to
# three times as fast as in float32. Its scores are wrong in the third digit, but the error is
# bounded: so they can't tell the best row, but which rows *can* be among the best. Three steps:
#
#     scan      low-precision scores of every row; of each group of 8 rows keep the best, and list
#               the 128 best groups (twice k, if that is more)
#     re-rank   the k best groups hold k rows at least that reach what the k-th of them must: that
#               is a floor. Score the rows of all listed groups that can reach it, the best exactly:
#               float16 rows, in float64
#     certify   a group that is not listed holds no score above its best + the bound; where that is
#               below the k-th exact score, the answer is exact
#
# Where the certificate fails (more rows too alike for bfloat16), all groups that can still hold one
# of the k best are re-ranked, however many. So the answer is exact, and only the time varies.

@functools.cache
def scan_dtype(device: torch.device) -> torch.dtype:
    """float16 on a GPU; on a CPU the faster one of bfloat16 and float32 here, tried for some
    milliseconds. Exact results do not depend on it, only their speed; which inverted lists are made
    and looked into can."""
    if device.type == "cuda":
        return torch.float16

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(2048, 512, dtype=dtype), torch.ones(512, 256, dtype=dtype)
        return min(timeit.repeat(lambda: torch.mm(a, b), number=1, repeat=4))

    return min((torch.bfloat16, torch.float32), key=seconds)


class Block:
    """Rows ready for the scan: `low` (P, E) in low precision on a device, at P places, and which
    rows these are: `ids` (P,), −1 where a place is empty (its `low` is zero). The last place is
    always empty."""

    def __init__(self, rows: Rows, device: torch.device, dtype: torch.dtype, ids: Tensor) -> None:
        E, spare = rows.shape[1], GROUP - len(ids) % GROUP
        self.rows, self.ids = rows, F.pad(ids, (0, spare), value=-1).to(device)
        # float16 rows are the stored ones themselves; a float32 scan converts them on the way.
        self.exact = dtype != torch.bfloat16
        self.low = torch.zeros(len(self.ids), E, device=device,
                               dtype=torch.float16 if self.exact else dtype)
        self.lost = torch.zeros(len(self.ids), device=device)              # ‖r − low(r)‖ of each
        norms = torch.zeros_like(self.lost)                                # ‖r‖
        wanted, order = ids.cpu().sort()                                   # as the files have them
        wanted, order = wanted[wanted >= 0], order[wanted >= 0]
        step = max(1, BLOCK_BYTES // (32 * E))
        for part, places in zip(wanted.split(step), order.split(step)):
            found = torch.from_numpy(rows.take(part.numpy())).to(device).float()
            low = found.to(self.low.dtype)
            self.low[places.to(device)] = low
            norms[places.to(device)] = found.norm(dim=1)
            self.lost[places.to(device)] = (found - low.float()).norm(dim=1)
        self.norm, self.rounding = norms.max().item(), self.lost.max().item()   # the largest ones
        if not math.isfinite(self.norm):
            raise ValueError("the index has rows that are not finite")

    def stored(self, places: Tensor) -> Tensor:
        """The float16 rows at places (m,) that are not empty, as stored: (m, E)."""
        if self.exact:
            return self.low[places]
        return torch.from_numpy(self.rows.take(self.ids[places].cpu().numpy())).to(self.low.device)


def error_bound(queries: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """How far a low-precision score may lie from the true one, but for its output's own rounding:
    (Q,), float32.

    With q̂, r̂ the rounded vectors, q·r − q̂·r̂ = (q − q̂)·r + q̂·(r − r̂), so by Cauchy and Schwarz
        |q·r − q̂·r̂| ≤ ‖q − q̂‖ ‖r‖ + ‖q̂‖ ‖r − r̂‖
    with norms that are measured, not bounded. The products of two rounded entries are exact in
    float32, and E additions of them in any order err by at most about E·2⁻²⁴·‖q̂‖‖r̂‖; twice that
    here.
    """
    rounded = queries.to(dtype).float()
    added = queries.shape[1] * 2.0 ** -23
    if dtype == torch.float32:
        added *= 2                                          # there the products are rounded as well
    r_hat = block.norm + block.rounding
    q_hat = rounded.norm(dim=1)
    bound = (queries - rounded).norm(dim=1) * block.norm + q_hat * (block.rounding + added * r_hat)
    return bound * 1.001 + 1e-7                                        # this line's own rounding


def at_most(scores: Tensor, bound: Tensor) -> Tensor:
    """The true score of what scored `scores` (Q, c) ≥ 0 in low precision is at most this. The
    output was rounded as well, by half a unit in its last place: at most 2⁻⁸ of a bfloat16."""
    return scores.float() * (1 + torch.finfo(scores.dtype).eps / 2) + bound[:, None]


def at_least(scores: Tensor, bound: Tensor) -> Tensor:
    """And at least this (Q, c); where it scored 0, which may stand for less, −inf."""
    low = scores.float() * (1 - torch.finfo(scores.dtype).eps / 2) - bound[:, None]
    return torch.where(scores > 0, low, -torch.inf)


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """The integer of as many bits: it orders non-negative numbers as they order themselves."""
    return torch.int32 if dtype.itemsize == 4 else torch.int16


def group_maxima(queries: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The best low-precision score of each group of GROUP rows, at least 0: (Q, G) in `dtype`.

    Positive floating-point numbers stand in the order of their bits read as an integer, and below
    them, with the sign bit set, all negative ones: so the maximum is an integer's, which
    processors take many times faster than bfloat16's. Of negative numbers alone it is none, and is
    replaced by 0, which bounds them too. In cache-sized pieces it costs next to nothing.
    """
    Q, n = len(queries), len(block.low)
    as_integer = integer_of(dtype)
    piece = max(1, SCAN_BYTES // (dtype.itemsize * Q * GROUP)) * GROUP
    columns = queries.to(dtype).T.contiguous()                             # (E, Q)
    best = torch.empty(Q, n // GROUP, dtype=as_integer, device=queries.device)
    for start in range(0, n, piece):
        rows = block.low[start:start + piece].to(dtype)
        scores = (rows @ columns).view(as_integer).view(-1, GROUP, Q)      # (groups, GROUP, Q)
        best[:, start // GROUP:(start + len(rows)) // GROUP] = scores.amax(1).T
    return best.clamp_(min=0).view(dtype)


def search_block(queries: Tensor, block: Block, k: int, dtype: torch.dtype
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of a block for queries (Q, E): see `refine`."""
    in_group = torch.arange(GROUP, device=queries.device)
    return refine(queries, block, group_maxima(queries, block, dtype),
                  lambda _, groups: (groups[:, :, None] * GROUP + in_group).flatten(1), k)


def refine(queries: Tensor, block: Block, maxima: Tensor,
           locate: Callable[[Tensor, Tensor], Tensor], k: int, caution: float = 1.0
           ) -> tuple[Tensor, Tensor, Tensor]:
    """From the best low-precision scores of groups (Q, G) to the k best rows in them: exact scores
    float64, −inf where there are fewer than k, row ids int64 (Q, k), and for which queries the
    listed groups were certified (Q,).

    locate: the numbers of some queries (m,) and columns of their tables (m, c) → the places of all
    rows of these groups (m, c'). caution: what share of the error bounds is believed; exact with 1.
    """
    bound = caution * error_bound(queries, block, maxima.dtype)            # (Q,)
    G = maxima.shape[1]
    listed = min(max(LISTED, 2 * k), G)
    best, groups = maxima.view(integer_of(maxima.dtype)).topk(min(listed + 1, G), dim=1)
    highest = at_most(best.view(maxima.dtype), bound)                      # (Q, listed + 1)
    scores = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    ids = torch.empty_like(scores, dtype=torch.int64)
    floor = at_least(best.view(maxima.dtype)[:, k - 1:k], bound) if k <= G else -torch.inf
    count = (highest[:, :listed] >= floor).sum(1)                          # they come in order
    for some in count.argsort().split(64):                                 # little padding so
        places = locate(some, groups[some, :int(count[some].max())])       # (m, c)
        step = max(1, PIECE_BYTES // (4 * places.shape[1] * queries.shape[1]))
        for which, where in zip(some.split(step), places.split(step)):
            scores[which], ids[which] = rerank(queries[which], block, where, k, caution)
    worst = scores[:, -1]                                                  # the k-th exact score
    sure = highest[:, -1] < worst if G > listed else torch.ones_like(worst, dtype=torch.bool)
    for i in (~sure).nonzero():                                            # (1,): one query
        may_hold = (at_most(maxima[i], bound[i]) >= worst[i]).nonzero()[None, :, 1]
        parts = locate(i, may_hold).split(max(k, BLOCK_BYTES // (16 * queries.shape[1])), dim=1)
        found = zip(*[rerank(queries[i], block, part, k) for part in parts])
        scores[i], ids[i] = in_order(*(torch.cat(part, dim=1) for part in found), k)
    return scores, ids, sure


def score_again(queries: Tensor, block: Block, places: Tensor) -> tuple[Tensor, Tensor]:
    """Scores float32 (Q, c) of some places of a block, −inf where they are empty, and how far off
    they may be (Q, c): the low-precision rows once more, but the query as it is and the sums in
    float32, so that of all roundings the rows' own is left."""
    low = block.low[places].float()                                        # (Q, c, E)
    again = torch.bmm(low, queries[:, :, None])[..., 0]
    sums = queries.shape[1] * 2.0 ** -22 * (block.norm + block.rounding)
    loose = queries.norm(dim=1, keepdim=True) * (block.lost[places] + sums) + 1e-7
    return again.masked_fill(block.ids[places] < 0, -torch.inf), loose


def rerank(queries: Tensor, block: Block, places: Tensor, k: int, caution: float = 1.0
           ) -> tuple[Tensor, Tensor]:
    """The k best of some places (Q, c) of a block: exact scores float64, −inf where there are fewer
    than k, and row ids (Q, k). `score_again` tells which can be among them: those that may reach
    what k of them reach at least."""
    places = F.pad(places, (0, max(0, k - places.shape[1])), value=len(block.ids) - 1)
    again, loose = score_again(queries, block, places)
    floor = (again - caution * loose).topk(k, dim=1).values[:, -1:]        # (Q, 1)
    can = (again + caution * loose >= floor) & (block.ids[places] >= 0)
    query, column = can.nonzero().unbind(1)
    chosen = places[query, column]                                         # (m,)
    exact = (block.stored(chosen).double() * queries[query].double()).sum(-1)
    scores = torch.full(places.shape, -torch.inf, dtype=torch.float64, device=queries.device)
    scores[query, column] = exact
    ids = torch.where(block.ids[places] < 0, torch.iinfo(torch.int64).max, block.ids[places])
    return in_order(scores, ids, k)


def in_order(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best scores and their ids (Q, ≤k), best first, of equal scores the lower id."""
    ids, order = ids.sort(dim=1)                                           # by id, then stably
    scores, rank = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], ids.gather(1, rank)[:, :k]


@contextmanager
def as_promised(device: torch.device) -> Iterator[None]:
    """Products with float32 factors and sums wherever float32 is said, and float32 sums on a GPU's
    float16, whatever the caller allows elsewhere, autocast included: the bounds take them for
    granted."""
    gpu, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    wanted = [(gpu, "fp32_precision", "ieee"), (cpu, "fp32_precision", "ieee"),
              (gpu, "allow_fp16_reduced_precision_reduction", False),
              (gpu, "allow_fp16_accumulation", False)]
    before = [(where, name, getattr(where, name)) for where, name, _ in wanted]
    try:
        for where, name, value in wanted:
            setattr(where, name, value)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)


# ---------------------------------------------------------------- inverted lists (IVF)
#
# k-means parts the rows into C lists, each with a centroid; a query looks into the nprobe lists
# with the nearest centroids only. That is approximate: a neighbour beyond a border is missed, and
# `recall` says how often.

@dataclass
class Lists:
    """Row ids list by list: list c is order[offsets[c] : offsets[c+1]]."""
    centroids: Tensor            # float32 (C, E), unit norm
    order: Tensor                # int64 (N,)
    offsets: Tensor              # int64 (C+1,)


def default_lists(n: int) -> int:
    """4·√N lists of at least 39 rows each (faiss's rule of thumb); 0 below 50,000 rows, where
    looking at all of them is as quick."""
    return 0 if n < 50_000 else min(round(4 * math.sqrt(n)), n // 39)


def nearest_centroid(rows: Tensor, centroids: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 (n,): the list of each row (n, E), in low precision."""
    columns = centroids.to(dtype).T.contiguous()
    step = max(1, SCAN_BYTES // (dtype.itemsize * len(centroids)))
    return torch.cat([(part.to(dtype) @ columns).argmax(1) for part in rows.split(step)])


def spherical_kmeans(rows: Tensor, n_lists: int, iterations: int = 10, seed: int = 0) -> Tensor:
    """Unit-norm centroids float32 (C, E) of rows (n, E): assign each to the centroid of largest
    inner product, average, normalise. An empty list restarts at a random row."""
    generator = torch.Generator().manual_seed(seed)
    dtype = scan_dtype(rows.device)
    centroids = rows[torch.randperm(len(rows), generator=generator)[:n_lists]].float()
    for _ in range(iterations):
        lists = nearest_centroid(rows, centroids, dtype)
        sums = torch.zeros_like(centroids)
        for part, where in zip(rows.split(65536), lists.split(65536)):
            sums.index_add_(0, where, part.float())
        is_empty = (lists.bincount(minlength=n_lists) == 0).nonzero()[:, 0]
        fresh = torch.randint(len(rows), (len(is_empty),), generator=generator)
        sums[is_empty] = rows[fresh.to(rows.device)].float()
        centroids = F.normalize(sums, dim=1)
    return centroids


def make_lists(rows: Rows, n_lists: int, device: torch.device, sample: int = 64) -> Lists:
    """k-means on a sample of `sample` rows a list, then one pass over all rows, block by block."""
    n, generator = len(rows), torch.Generator().manual_seed(0)
    chosen = torch.randperm(n, generator=generator)[: sample * n_lists].sort().values
    centroids = spherical_kmeans(torch.from_numpy(rows.take(chosen.numpy())).to(device), n_lists)
    dtype, step = scan_dtype(device), max(1, BLOCK_BYTES // (4 * rows.shape[1]))
    parts = (torch.from_numpy(rows.read(i, i + step)).to(device) for i in range(0, n, step))
    lists = torch.cat([nearest_centroid(part, centroids, dtype).cpu() for part in parts])
    sizes, by_size = lists.bincount(minlength=n_lists).sort(stable=True)   # see `Layout`
    order = by_size.argsort()[lists].argsort(stable=True)
    return Lists(centroids.cpu()[by_size], order, F.pad(sizes.cumsum(0), (1, 0)))


@dataclass
class Layout:
    """Where lists lie in a block: in runs that are padded to one length, so that a run of rows is a
    batch of matrices. Little is padded, since lists are numbered by size."""
    ids: Tensor                  # int64 (P,), −1 for padding: what `Block` wants
    first: Tensor                # int64 (C,), where each list begins
    length: Tensor               # int64 (C,), rows of each, padded
    runs: list[tuple[int, int]]  # lists in a run, and rows in each


def lay_out(lists: Sequence[Tensor], run: int = 32) -> Layout:
    """Row ids list by list → the layout, `run` lists to a run."""
    runs, ids = [], []
    for members in (lists[i:i + run] for i in range(0, len(lists), run)):
        length = max(1, -(-max(map(len, members)) // 32) * 32)             # few different lengths
        runs.append((len(members), length))
        ids += [F.pad(part, (0, length - len(part)), value=-1) for part in members]
    length = torch.tensor([len(part) for part in ids])
    return Layout(torch.cat(ids), length.cumsum(0) - length, length, runs)


def list_scores(queries: Tensor, block: Block, layout: Layout, probes: Tensor, dtype: torch.dtype
                ) -> Tensor:
    """Low-precision scores, at least 0, of every row of each query's lists: (Q, R·W) in `dtype`, W
    the longest list's padded length. probes: (Q, R) lists.

    The pairs (query, list) are sorted by list, so that a list is multiplied once with all queries
    that look into it, and a run of lists is one batched product: of the run's lists that are
    wanted, where these are few, else of all, for their rows then need no copy.
    """
    (Q, R), W = probes.shape, int(layout.length.max())
    lists, by_list = probes.flatten().sort(stable=True)                    # (Q·R,)
    n_pairs = lists.bincount(minlength=len(layout.first))
    begins = n_pairs.cumsum(0) - n_pairs                                   # of each list's pairs
    slot = torch.arange(Q * R, device=lists.device) - begins[lists]        # of a pair in its list
    low = queries.to(dtype)
    table = torch.zeros(Q * R, W, dtype=integer_of(dtype), device=queries.device)
    done = member = place = 0
    for count, length in layout.runs:
        in_list = n_pairs[member:member + count]
        pairs = int(in_list.sum())
        if pairs:
            which = lists[done:done + pairs] - member                      # list in the run
            rows = block.low[place:place + count * length].view(count, length, -1)
            if pairs < count // 4:
                wanted, which = which.unique(return_inverse=True)
                rows = rows[wanted]
            seat = slot[done:done + pairs]
            seats = -(-int(in_list.max()) // 8) * 8                        # few different shapes
            seated = torch.zeros(len(rows), seats, low.shape[1], dtype=dtype, device=low.device)
            seated[which, seat] = low[by_list[done:done + pairs] // R]
            scores = torch.bmm(seated, rows.to(dtype).mT).view(integer_of(dtype))
            table[by_list[done:done + pairs], :length] = scores[which, seat].clamp_(min=0)
        done, member, place = done + pairs, member + count, place + count * length
    return table.view(dtype).view(Q, R * W)                                # as in `group_maxima`


def search_lists(queries: Tensor, block: Block, layout: Layout, probes: Tensor, k: int,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The k best rows of each query's lists, probes (Q, R): scores float64, −inf where its lists
    hold fewer, and row ids (Q, k).

    The choice of the lists is a guess, so the bounds on rounding need not be certain either: they
    add up E roundings as if all went the same way. Independent ones add up to about 1/√E of that;
    eight times as much is believed here.
    """
    W = int(layout.length.max())
    first, length = layout.first.to(queries.device), layout.length.to(queries.device)

    def locate(which: Tensor, columns: Tensor) -> Tensor:
        in_list, row = probes[which].gather(1, columns // W), columns % W
        return torch.where(row < length[in_list], first[in_list] + row, len(block.ids) - 1)

    scores = list_scores(queries, block, layout, probes, dtype)            # (Q, R·W)
    caution = min(1.0, 8 / math.sqrt(queries.shape[1]))
    return refine(queries, block, scores, locate, k, caution)[:2]


# ---------------------------------------------------------------- the index on disk

@dataclass
class Index:
    """An open index. Pictures may be missing; rows are read when they are wanted."""
    folder: Path
    rows: Rows                   # float16 (N, E), unit-norm
    paths: Sequence              # N names, relative to `root`; row numbers where there are none
    manifest: dict
    lists: Lists | None = None   # inverted lists, where they were built
    resident: dict[torch.device, Block] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def embeddings(self) -> np.ndarray | Rows:
        """The rows to look into, float16 (N, E): one file memory-mapped, several as `Rows`."""
        return self.rows if len(self.rows.files) > 1 else np.load(self.rows.files[0], mmap_mode="r")

    @functools.cached_property
    def layout(self) -> Layout | None:
        """Where the lists lie in the resident block."""
        return self.lists and lay_out(self.lists.order.split(self.lists.offsets.diff().tolist()))

    @property
    def root(self) -> Path:
        """The folder that the paths are relative to; it need not exist."""
        return self.folder / self.manifest.get("root", ".")

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, exclude: Tensor | None = None,
               nprobe: int | None = None) -> tuple[Tensor, Tensor]:
        """The min(k, N) nearest rows of each query: scores float32 and ids int64 (Q, k).

        queries: float32 (Q, E), normalised here; exclude: int64 (Q,), a row id per query that must
        not come back, wherever it ranks (one fewer result then, if N allows no more). Best first;
        of equal scores the lower id. nprobe: look into so many inverted lists only, where the index
        has them; else exact. Raises ValueError for a wrong dimension, a negative k, nprobe < 1, or
        queries or rows that are not finite.
        """
        N, E = self.rows.shape
        if queries.ndim != 2 or queries.shape[1] != E:
            raise ValueError(f"queries have shape {tuple(queries.shape)}, the index wants (Q, {E})")
        if k < 0:
            raise ValueError(f"k is {k}, wanted 0 or more")
        if nprobe is not None and nprobe < 1:
            raise ValueError(f"nprobe is {nprobe}, wanted 1 or more")
        queries = F.normalize(queries.float(), dim=-1)
        if not torch.isfinite(queries).all():
            raise ValueError("a query embedding is not finite")
        scores, ids, _ = self.nearest(queries, min(k + (exclude is not None), N), nprobe)
        if exclude is not None:
            # The own row is dropped by its id, never by its rank: a duplicate may rank before it.
            is_own = ids == exclude.to(ids.device)[:, None]                       # (Q, k+1)
            is_own[~is_own.any(1), -1:] = True           # own row not found: drop the last one
            keep = (len(ids), max(0, ids.shape[1] - 1))
            scores, ids = scores[~is_own].view(keep), ids[~is_own].view(keep)
        return scores.float(), ids

    def nearest(self, queries: Tensor, k: int, nprobe: int | None = None
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores float64 and ids int64 (Q, k) of unit-norm queries (Q, E), k ≤ N, and for which
        queries the scan was certified at once (Q,)."""
        device = queries.device
        scores = torch.empty(len(queries), 0, dtype=torch.float64, device=device)
        ids, sure = scores.long(), torch.ones(len(queries), dtype=torch.bool, device=device)
        if k == 0 or len(queries) == 0:
            return scores, ids, sure
        with as_promised(device):
            if nprobe is not None and self.lists is not None:
                return self.probe(queries, k, nprobe)
            dtype = scan_dtype(device)
            for block in self.blocks(device, dtype):
                step = max(1, min(1024, BLOCK_BYTES * GROUP // (4 * len(block.low))))
                found = [search_block(part, block, k, dtype) for part in queries.split(step)]
                more, more_ids, all_sure = (torch.cat(parts) for parts in zip(*found))
                scores, ids = in_order(torch.cat([scores, more], 1), torch.cat([ids, more_ids], 1),
                                       k)
                sure &= all_sure
        return scores, ids, sure

    def probe(self, queries: Tensor, k: int, nprobe: int) -> tuple[Tensor, Tensor, Tensor]:
        """`nearest` through the lists, none certified."""
        device, dtype, lists = queries.device, scan_dtype(queries.device), self.lists
        nprobe = min(nprobe, len(lists.centroids))
        centroids, sizes = lists.centroids.to(device, dtype), lists.offsets.diff()
        fits = self.fits()
        spans = [] if fits else lists.order.split(sizes.tolist())          # row ids of each list
        # So many queries at a time that their tables of scores, or their lists' rows, fit.
        at_once = 2 * (int(sizes.max()) + 32 if fits
                       else self.rows.shape[1] * (len(self) // len(sizes) + 32))
        # The worst case of one run in `list_scores`: all queries look into one of its lists.
        in_run = 64 * (int(sizes.max()) + 32 + self.rows.shape[1]) if fits else 0
        found = []
        for part in queries.split(max(1, BLOCK_BYTES // max(2 * nprobe * at_once, in_run))):
            probes = (part.to(dtype) @ centroids.T).topk(nprobe, dim=1).indices        # (q, R)
            if fits:
                block, layout = next(self.blocks(device, dtype)), self.layout
            else:
                wanted, probes = probes.unique(return_inverse=True)
                layout = lay_out([spans[i] for i in wanted.tolist()])
                block = Block(self.rows, device, dtype, layout.ids)
            found.append(search_lists(part, block, layout, probes, k, dtype))
        scores, ids = (torch.cat(parts) for parts in zip(*found))
        few = (scores[:, -1] == -torch.inf).nonzero()[:, 0]      # lists with fewer than k rows
        if len(few):
            scores[few], ids[few], _ = self.nearest(queries[few], k)
        return scores, ids, torch.zeros_like(ids[:, 0], dtype=torch.bool)

    def fits(self) -> bool:
        """Whether the low-precision rows stay in memory; lists are padded, by up to 31 rows each
        and to the longest of 32."""
        places = len(self.layout.ids) if self.lists else len(self)
        return places * self.rows.shape[1] * 2 <= RESIDENT_BYTES

    def blocks(self, device: torch.device, dtype: torch.dtype) -> Iterator[Block]:
        """The index as one resident block, laid out by lists where there are lists, or as many
        passing ones."""
        if self.fits():
            if device not in self.resident:
                ids = self.layout.ids if self.lists else torch.arange(len(self))
                self.resident[device] = Block(self.rows, device, dtype, ids)
            yield self.resident[device]
            return
        step = max(1, BLOCK_BYTES // (2 * self.rows.shape[1]))
        for start in range(0, len(self), step):
            ids = torch.arange(start, min(start + step, len(self)))
            yield Block(self.rows, device, dtype, ids)


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
        N, E, _ = manifest["rows"], manifest["dim"], Path(manifest.get("root", "."))
        files = manifest.get("files", [{"file": "embeddings.npy", "rows": N}])
        rows = Rows([folder / entry["file"] for entry in files])
        counts = [entry["rows"] for entry in files]
        paths = range(N)
        if manifest.get("paths", True):
            paths = (folder / "paths.txt").read_bytes().decode("utf-8").split("\n")[:-1]
        lists = read_lists(folder, N, E) if manifest.get("lists") else None
    except Exception as error:               # numpy's reader raises many kinds on a damaged file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"the index at {folder} is damaged ({reason[:160]})") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"the index at {folder} has format {manifest.get('format')}, "
                         f"this version reads {FORMAT}")
    if rows.shape != (N, E) or np.diff(rows.starts).tolist() != counts or len(paths) != N or N == 0:
        raise ValueError(f"the index at {folder} is damaged: its manifest says {N} x {E} in "
                         f"{len(counts)} files, they hold {rows.shape}, and {len(paths)} paths")
    return Index(folder, rows, paths, manifest, lists)


def read_lists(folder: Path, N: int, E: int) -> Lists:
    """The inverted lists' three files. Raises ValueError where they don't fit N rows."""
    centroids, order, offsets = (
        torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
        for name in ("centroids", "lists", "offsets"))
    if any(part.is_floating_point() for part in (order, offsets)) or not (
            torch.isfinite(centroids).all()):
        raise ValueError("its inverted lists hold odd numbers")
    if centroids.shape != (len(offsets) - 1, E) or offsets[0] != 0 or offsets[-1] != N or (
            (offsets.diff() < 0).any() or len(order) != N
            or not torch.equal(order.sort().values, torch.arange(N))):
        raise ValueError(f"lists of {len(order)} rows do not fit {N}")
    return Lists(centroids, order, offsets)


def write_index(out: str | os.PathLike, embeddings: Tensor, paths: list[str], encoder: str,
                encoder_hash: str, root: str | os.PathLike, n_lists: int | None = 0,
                device: torch.device | str = "cpu") -> Index:
    """Write rows (N, E), normalised here, as a new index in the folder `out`, and open it.

    An older manifest there goes first and the new one comes last: a build that is killed leaves no
    index that opens. n_lists: also build so many inverted lists, None for `default_lists`. Raises
    ValueError for no rows, rows that are zero or not finite, or more lists than rows.
    """
    rows = torch.as_tensor(embeddings).float()
    if rows.ndim != 2 or len(rows) == 0 or len(rows) != len(paths):
        raise ValueError(f"an index wants one row a picture and at least one; got "
                         f"{tuple(rows.shape)} for {len(paths)} pictures")
    check_rows(rows)
    n_lists = how_many_lists(n_lists, len(rows))
    out = start_afresh(out)
    save_array(out / "embeddings.npy", F.normalize(rows, dim=1).half().numpy())
    (out / "paths.txt").write_bytes("".join(path + "\n" for path in paths).encode())
    return finish(out, [out / "embeddings.npy"], True, encoder, encoder_hash, n_lists,
                  root=Path(os.path.relpath(root, out)).as_posix(), device=device)


def index_files(out: str | os.PathLike, source: str | os.PathLike, encoder: str = "unknown",
                encoder_hash: str = "", dim: int | None = None,
                n_lists: int | None = None, device: torch.device | str = "cpu") -> Index:
    """Make an index of embeddings that are there already: one .npy file, or a folder of them in the
    order of the numbers in their names, as clip-retrieval writes them (img_emb_0.npy, …).

    Unit-norm float16 files stay where they are, and the manifest names them; others are copied,
    normalised, one at a time. A paths.txt beside them, in UTF-8, names the rows, a line each;
    without one row numbers stand for names. A folder that is an index of these files already, and
    may be `out` itself, tells the encoder, where none is given, and where the pictures are.
    n_lists: None for `default_lists`. Raises FileNotFoundError, or ValueError for other shapes or
    numbers of names, for rows that are zero or not finite, where copies would stand beside the
    source, and where the source is an index of files elsewhere; an older index in `out` is still
    whole then.
    """
    out, source = Path(out), Path(source)
    sources = [source] if source.is_file() else sorted(
        source.glob("*.npy"), key=lambda p: ([*map(int, re.findall(r"\d+", p.stem))], p.name))
    own = {"neighbors", "tokens", "centroids", "lists", "offsets"}
    sources = [path for path in sources if path.stem.split("-")[0] not in own]
    made = index_of(source, sources)
    if made and encoder == "unknown":
        encoder, encoder_hash = (made.manifest.get(name, "") for name in ("encoder",
                                                                          "encoder_hash"))
    if not sources:
        raise FileNotFoundError(f"no .npy file of embeddings at {source}")
    arrays = [open_matrix(path) for path in sources]
    widths = {array.shape[1] for array in arrays}
    N, E = sum(len(array) for array in arrays), max(widths)
    if len(widths) > 1 or N == 0 or E == 0 or dim not in (None, E):
        raise ValueError(f"{source} holds {N} rows of {sorted(widths)} dimensions, wanted "
                         f"{'one width' if dim is None else dim} and at least one row")
    print(f"{source}: {len(sources)} files, {N:,} rows of {E}, {2 * N * E / 1e9:.2f} GB in "
          f"float16; a search holds {min(2 * N * E, RESIDENT_BYTES) / 1e9:.2f} GB of them at most")
    are_fine = [is_unit_float16(path, array) for path, array in zip(sources, arrays)]
    targets = [path if fine else out / f"embeddings-{i}.npy"
               for i, (path, fine) in enumerate(zip(sources, are_fine))]
    if not all(are_fine) and sources[0].parent.resolve() == out.resolve():
        raise ValueError(f"{source} is to be copied as float16 of unit norm: another --out, please")
    beside = [folder / "paths.txt" for folder in (sources[0].parent, source.parent)]
    names = next((path for path in beside if path.is_file()), None)
    try:
        paths = names.read_text("utf-8").removesuffix("\n").split("\n") if names else []
    except ValueError:
        raise ValueError(f"{names} is not in UTF-8") from None
    if names and len(paths) != N:
        raise ValueError(f"{names} has {len(paths)} lines for {N} rows")
    n_lists = how_many_lists(n_lists, N)
    root = Path(os.path.relpath(made.root, out)).as_posix() if made else "."
    in_place = made and out.resolve() == source.resolve()             # its rows stay
    out = out if in_place else start_afresh(out)
    for array, target, fine in zip(arrays, targets, are_fine):
        if not fine:
            copy_normalised(array, target)
    if paths:
        (out / "paths.txt").write_bytes("".join(path + "\n" for path in paths).encode())
    if in_place:                                         # whole, should the lists never be finished
        finish(out, targets, bool(paths), encoder, encoder_hash, 0, root)
    return finish(out, targets, bool(paths), encoder, encoder_hash, n_lists, root, device)


def index_of(source: Path, files: list[Path]) -> Index | None:
    """The index that a folder of embeddings is, where it opens and holds these files, no more.
    Raises ValueError where it holds others."""
    try:
        index = open_index(source)
    except (FileNotFoundError, ValueError):              # none, or one of what was there once
        return None
    its, these = ({path.resolve() for path in group} for group in (index.rows.files, files))
    if not its <= these:
        raise ValueError(f"{source} is an index of files elsewhere: wanted their folder")
    return index if its == these else None


def open_matrix(path: Path) -> np.ndarray:
    """A memory-mapped matrix of floats. Raises ValueError for anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim == 2 and array.dtype.kind == "f":
            return array
        reason = f"it holds {array.dtype} {array.shape}"
    except Exception as error:               # numpy's reader raises many kinds on a damaged file
        reason = " ".join(str(error).split())[:160]
    raise ValueError(f"{path} is no matrix of embeddings ({reason})")


def in_blocks(array: np.ndarray) -> Iterator[Tensor]:
    """A mapped matrix as float32 blocks; each is unmapped again, so that memory stays small."""
    step = max(1, BLOCK_BYTES // (8 * max(1, array.shape[1])))
    for start in range(0, len(array), step):
        part = np.array(np.load(array.filename, mmap_mode="r")[start:start + step], np.float32)
        yield torch.from_numpy(part)


def is_unit_float16(path: Path, array: np.ndarray) -> bool:
    """Whether a file can be searched as it is. Raises ValueError for rows without a direction."""
    fine = array.dtype == np.float16 and array.flags.c_contiguous
    for part in in_blocks(array):
        check_rows(part, f" in {path}")
        fine = fine and (part.norm(dim=1) - 1).abs().max().item() < 2e-3
    return bool(fine)


def check_rows(rows: Tensor, where: str = "") -> None:
    """Raise ValueError for rows (n, E) without a direction, or too long to tell it."""
    norms = rows.norm(dim=1)                             # not finite where a number in it is not
    if not (norms.isfinite() & (norms > 0)).all():
        raise ValueError(f"an embedding{where} is zero or not finite")


def copy_normalised(array: np.ndarray, target: Path) -> None:
    """Write a mapped matrix as unit-norm float16, block by block."""
    part_path = target.with_name(target.name + ".part")
    copy = np.lib.format.open_memmap(part_path, "w+", np.float16, array.shape)
    done = 0
    for part in in_blocks(array):
        copy[done:done + len(part)] = F.normalize(part, dim=1).half().numpy()
        done += len(part)
    copy.flush()
    os.replace(part_path, target)


def start_afresh(out: str | os.PathLike) -> Path:
    """The folder, made where it is missing, without an older index's manifest and tables."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lists = [out / f"{name}.npy" for name in ("centroids", "lists", "offsets")]
    for old in (out / "manifest.json", *out.glob("neighbors-*"), *lists):
        old.unlink(missing_ok=True)
    return out


def how_many_lists(n_lists: int | None, n: int) -> int:
    """`default_lists` for None. Raises ValueError for more inverted lists than rows."""
    if n_lists is not None and n_lists > n:
        raise ValueError(f"{n_lists} lists for {n} rows: wanted at most one a row")
    return default_lists(n) if n_lists is None else n_lists


def finish(out: Path, files: list[Path], has_paths: bool, encoder: str, encoder_hash: str,
           n_lists: int, root: str = ".", device: torch.device | str = "cpu") -> Index:
    """Build the lists, write the manifest, open the index."""
    rows = Rows(files)
    manifest = {"format": FORMAT, "rows": len(rows), "dim": rows.shape[1], "dtype": "float16",
                "normalised": True, "encoder": encoder, "encoder_hash": encoder_hash, "root": root}
    if files != [out / "embeddings.npy"]:
        manifest["files"] = [
            {"file": Path(os.path.relpath(path, out)).as_posix(), "rows": int(n)}
            for path, n in zip(files, np.diff(rows.starts))]
    if not has_paths:
        manifest["paths"] = False
    if n_lists:
        lists = make_lists(rows, n_lists, torch.device(device))
        save_array(out / "centroids.npy", lists.centroids.numpy())
        save_array(out / "lists.npy", lists.order.numpy())
        save_array(out / "offsets.npy", lists.offsets.numpy())
        manifest["lists"] = n_lists
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
    made_by, E = index.manifest.get("encoder", "unknown"), index.rows.shape[1]
    if E != dim or index.manifest.get("encoder_hash") not in (fingerprint, None, ""):
        raise ValueError(
            f"the index at {index.folder} was made by encoder {made_by} "
            f"({index.manifest.get('encoder_hash') or 'no fingerprint'}, {E} dimensions), not by "
            f"{name} ({fingerprint}, {dim} dimensions)")
    if not index.manifest.get("encoder_hash"):
        warnings.warn(f"the index at {index.folder} does not say which encoder made it",
                      stacklevel=2)


# ---------------------------------------------------------------- the neighbour table for training

def neighbor_table(index: Index, k: int, below: float | None = None,
                   device: torch.device | str = "cpu") -> np.ndarray:
    """int32 (N, min(k, N−1)): the nearest rows of every row, itself excluded by id.

    Read from neighbors-<k>.npy, or computed and written there: N²·E multiplications, or through
    the index's inverted lists, TABLE_NPROBE of them a row. Rows found go into a .part file at once,
    so that a run that was killed goes on where it was. Beside the table neighbors-<k>.key holds the
    digests of the embeddings and of the table: a damaged table, or one of other embeddings, is
    computed anew. below: near-duplicates, rows of a score of at least this, come after all others
    (in neighbors-<k>-below-<below>.npy). device: where the search runs. Raises ValueError for
    k < 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}, wanted 1 or more")
    N, width = len(index), min(k, len(index) - 1)
    name = f"neighbors-{k}" if below is None else f"neighbors-{k}-below-{below!r}"
    digest = rows_digest(index.rows) + (f" nprobe {TABLE_NPROBE}" if index.lists else "")
    path, key_path = index.folder / f"{name}.npy", index.folder / f"{name}.key"
    part = index.folder / f"{name}-{hashlib.sha256(digest.encode()).hexdigest()[:16]}.part"

    def key() -> str:
        return f"{digest} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"

    if path.is_file() and key_path.is_file() and key_path.read_text("utf-8") == key():
        return np.load(path, allow_pickle=False)
    part.touch()
    with open(part, "r+b") as file:        # every row at its place: two runs write the same
        first = done = min(N, os.path.getsize(part) // (4 * width)) if width else N
        file.seek(4 * width * done)
        start = time.time()
        while done < N:
            own = torch.arange(done, min(done + 1024, N))
            queries = torch.from_numpy(index.rows.read(done, done + 1024)).to(device).float()
            found = own_neighbors(index, queries, own, width, below)
            file.write(found.int().cpu().numpy())
            file.flush()
            done += len(own)
            if sys.stderr.isatty():
                left = (time.time() - start) / (done - first) * (N - done)
                print(f"\rneighbours of {done:,}/{N:,} rows, {left:.0f} s left ",
                      end="\n" if done == N else "", file=sys.stderr)
        file.seek(0)
        table = np.fromfile(file, np.int32, N * width).reshape(N, width)
    save_array(path, table)
    key_path.write_text(key(), encoding="utf-8")
    part.unlink(missing_ok=True)
    return table


def own_neighbors(index: Index, queries: Tensor, own: Tensor, k: int, below: float | None
                  ) -> Tensor:
    """int64 (Q, k): the neighbours of rows `own` (Q,) without themselves, near-duplicates last."""
    wide, most = k if below is None else 2 * k, len(index) - 1
    while True:
        wide = min(wide, most)
        scores, ids = index.search(queries, wide, exclude=own, nprobe=TABLE_NPROBE)
        if below is None:
            return ids
        too_near = scores >= below
        if wide == most or ((~too_near).sum(1) >= k).all():
            return ids.gather(1, too_near.to(torch.int8).argsort(dim=1, stable=True))[:, :k]
        wide *= 4


def rows_digest(rows: Rows) -> str:
    """64 hex digits of all rows, read block by block."""
    digest, step = hashlib.sha256(), max(1, BLOCK_BYTES // (2 * rows.shape[1]))
    for start in range(0, len(rows), step):
        digest.update(rows.read(start, start + step))
    return digest.hexdigest()


def recall(index: Index, k: int, nprobe: int, queries: int = 1000, seed: int = 0
           ) -> tuple[float, float, float, float]:
    """What inverted lists lose: recall@k against exact search, the share of rows scanned, and
    seconds a query, through the lists and exact, for `queries` of the index's own rows (themselves
    excluded). Raises ValueError where the index has no lists."""
    if index.lists is None:
        raise ValueError(f"the index at {index.folder} has no inverted lists (build it with --ivf)")
    own = torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:queries]
    rows = torch.from_numpy(index.rows.take(own.numpy())).float()
    index.search(rows[:1], k)                                              # the rows are read now
    start = time.perf_counter()
    wanted = index.search(rows, k, exclude=own)[1]
    exact_seconds = time.perf_counter() - start
    start = time.perf_counter()
    found = index.search(rows, k, exclude=own, nprobe=nprobe)[1]
    seconds = time.perf_counter() - start
    hits = (found[:, :, None] == wanted[:, None]).any(1).float().mean().item()
    probes = (F.normalize(rows, dim=1) @ index.lists.centroids.T).topk(
        min(nprobe, len(index.lists.centroids)), dim=1).indices
    scanned = index.lists.offsets.diff()[probes].sum().item() / (len(own) * len(index))
    return hits, scanned, seconds / len(own), exact_seconds / len(own)


# ---------------------------------------------------------------- pictures of a folder

def list_images(folder: str | os.PathLike) -> list[str]:
    """All picture files below a folder, relative names, sorted. Raises FileNotFoundError."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder of pictures at {folder}")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.suffix.lower() in clip_model.IMAGE_SUFFIXES and path.is_file())


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
            if "\n" in name or name.encode("utf-8", "replace").decode() != name:
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
            pictures.append(clip_model.read_image(index.root / str(index.paths[i])))
        except (FileNotFoundError, ValueError):
            pictures.append(None)
    return pictures


# ---------------------------------------------------------------- the command

def wanted_lists(text: str) -> int | None:
    """--ivf's value: how many, None for auto. Raises ValueError where it is none."""
    if text in ("auto", "none"):
        return None if text == "auto" else 0
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--ivf is {text!r}, wanted auto, none or a number of lists")
    return int(text)


def build(args: argparse.Namespace) -> None:
    """Embed a folder of pictures, or take embeddings that are there, and write the index."""
    start = time.time()
    if (args.images is None) == (args.embeddings is None):
        raise ValueError("wanted one of a folder of pictures and --embeddings")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"{args.out} is a file, wanted a folder to write")
    n_lists, device = wanted_lists(args.ivf), clip_model.pick_device(args.device)
    path = args.clip or (SHIPPED / "clip.safetensors" if args.images else None)
    clip, bad = clip_model.load(path).to(device) if path else None, []
    if clip:
        print(f"CLIP {path} ({clip.describe()}, {clip.fingerprint()}, {clip.config.embed_dim} "
              "dimensions)")
    if args.images:
        embeddings, names, bad = embed_folder(clip, args.images, bf16=args.bf16)
        for sentence in bad:
            print(f"skipped: {sentence}", file=sys.stderr)
        if not names:
            raise ValueError(f"no readable picture below {args.images}")
        index = write_index(args.out, embeddings, names, clip.describe(), clip.fingerprint(),
                            args.images, n_lists, device)
    else:
        encoder = (clip.describe(), clip.fingerprint(), clip.config.embed_dim) if clip else ()
        index = index_files(args.out, args.embeddings, *encoder, n_lists=n_lists, device=device)
    print(f"{len(index):,} rows of {index.rows.shape[1]} dimensions in {args.out}, "
          f"{index.manifest.get('lists', 'no')} inverted lists, {len(bad)} files skipped, "
          f"{time.time() - start:.0f} s")


def search(args: argparse.Namespace) -> None:
    """Print the nearest rows of a text or a picture, one a line, and draw them on request."""
    index, clip = open_index(args.index), clip_model.load(args.clip)
    check_encoder(index, clip.describe(), clip.fingerprint(), clip.config.embed_dim)
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
    if args.nprobe is not None and index.lists is None:
        print(f"the index at {args.index} has no inverted lists: searched exactly", file=sys.stderr)
    scores, ids = (result[0].tolist() for result in index.search(query, args.k,
                                                                 nprobe=args.nprobe))
    for rank, (score, i) in enumerate(zip(scores, ids), start=1):
        print(f"{rank}\t{score:.4f}\t{i}\t{index.paths[i]}")
    if args.out:
        clip_model.grid([neighbor_pictures(index, ids)], 96).save(args.out)
        print(f"wrote {args.out}", file=sys.stderr)


def make_table(args: argparse.Namespace) -> None:
    """Compute the neighbour table, or go on with it."""
    start = time.time()
    table = neighbor_table(open_index(args.index), args.k, args.below,
                           clip_model.pick_device(args.device))
    print(f"neighbours {table.shape} in {args.index}, {time.time() - start:.0f} s")


def show_recall(args: argparse.Namespace) -> None:
    """Print what inverted lists lose and gain, a line for each number of probes."""
    index = open_index(args.index)
    if args.k < 1 or min(args.nprobe) < 1:
        raise ValueError(f"k is {args.k}, nprobe {args.nprobe}: wanted 1 or more")
    for i, nprobe in enumerate(args.nprobe):
        hits, scanned, seconds, exact = recall(index, args.k, nprobe)
        if i == 0:
            print(f"nprobe\trecall@{args.k}\trows scanned\tms a query\tms exact")
        print(f"{nprobe}\t{hits:.4f}\t{scanned:.2%}\t{1e3 * seconds:.3f}\t{1e3 * exact:.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and search an index of image embeddings.")
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("build", help="embed a folder of pictures, read recursively")
    sub.add_argument("images", type=Path, nargs="?", help="folder of pictures")
    sub.add_argument("--embeddings", type=Path, help="instead: a .npy file of embeddings, or a "
                     "folder of them (clip-retrieval's img_emb_0.npy, ...), not copied if they are "
                     "float16 of unit norm; a paths.txt beside them, one "
                     "file name a row, names the rows")
    sub.add_argument("--clip", type=Path, help="default: the stickers'; with --embeddings the one "
                     "that made them, by default unknown")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")
    sub.add_argument("--ivf", default="auto", metavar="auto|none|NLIST", help="inverted lists: "
                     "auto (the default) is 4 sqrt(N) of them from 50,000 rows on")
    sub.add_argument("--bf16", action="store_true", help="embed in bfloat16: about twice as fast")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    sub.set_defaults(run=build)

    sub = commands.add_parser("search", help="show the nearest neighbours of a text or a picture")
    sub.add_argument("index", type=Path)
    sub.add_argument("query", metavar="TEXT_OR_IMAGE", help="an existing file is a picture")
    sub.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    sub.add_argument("--k", type=int, default=10, help="number of neighbours (default 10)")
    sub.add_argument("--nprobe", type=int, help="inverted lists to look into (default: exact)")
    sub.add_argument("--out", type=Path, help="also draw the neighbours into this PNG")
    sub.set_defaults(run=search)

    sub = commands.add_parser("recall", help="what inverted lists lose against exact search")
    sub.add_argument("index", type=Path)
    sub.add_argument("--k", type=int, default=10)
    sub.add_argument("--nprobe", type=int, nargs="+", default=[1, 4, 16, 64])
    sub.set_defaults(run=show_recall)

    sub = commands.add_parser("neighbors", help="make the neighbour table that training reads "
                                  "(without --below)")
    sub.add_argument("index", type=Path)
    sub.add_argument("--k", type=int, default=10)
    sub.add_argument("--below", type=float, help="scores from which rows count as near-duplicates "
                     "and come after all others")
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    sub.set_defaults(run=make_table)

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
