"""The index beside faiss-cpu and numpy:  python benchmarks/knn.py [exact ivf growth shards]

Same rows, same queries, same threads, one run, the contestants in turn; medians and ratios. Rows
are a Gaussian mixture, unit-norm float16: `--centres` centres (default N/250) drawn from N(0, I/E)
with seed 0, each row its centre + spread·N(0, I/E) with spread 0.5; queries are drawn likewise with
another seed. `exact` also reports how many queries the scan alone certifies, on the mixture and on
the sticker CLIP's embeddings of data/stickers/scenes (of the shipped index, where that is missing).
Files are made in --folder and deleted after; `shards` wants 2·E bytes of disk for each of its rows.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import clip_model  # noqa: E402
import index as retrieval  # noqa: E402


def mixture(n: int, dim: int, centres: int, seed: int) -> torch.Tensor:
    """Unit-norm float16 (n, dim); the centres are the same for all seeds."""
    means = torch.randn(centres, dim, generator=torch.Generator().manual_seed(0)) / dim ** 0.5
    generator = torch.Generator().manual_seed(seed)
    rows = torch.empty(n, dim, dtype=torch.float16)
    for start in range(0, n, 100_000):
        size = min(100_000, n - start)
        which = torch.randint(centres, (size,), generator=generator)
        part = torch.randn(size, dim, generator=generator) * (0.5 / dim ** 0.5) + means[which]
        rows[start:start + size] = torch.nn.functional.normalize(part, dim=1).half()
    return rows


def make_index(folder: Path, name: str, rows: torch.Tensor, lists: int = 0) -> retrieval.Index:
    np.save(folder / f"{name}.npy", rows.numpy())
    return retrieval.index_files(folder / name, folder / f"{name}.npy", n_lists=lists)


def in_turn(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one call that does not count; they take turns."""
    seconds = {name: [] for name in contestants}
    for i in range(repeats + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def exact(args: argparse.Namespace, folder: Path) -> None:
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = mixture(args.rows, args.dim, args.centres, seed=1)
    index = make_index(folder, "exact", rows)
    flat = faiss.IndexFlatIP(args.dim)
    flat.add(rows.float().numpy())
    queries = unit(mixture(1024, args.dim, args.centres, seed=2).float())
    full = rows.float().numpy()
    print(f"\nexact, {args.rows:,} x {args.dim}, k = {args.k}, {torch.get_num_threads()} threads, "
          f"scan in {retrieval.scan_dtype(args.device)}, medians of {args.repeats}")
    print("| queries | here, s | faiss IndexFlatIP, s | numpy, s | faiss / here | numpy / here |")
    print("|---|---|---|---|---|---|")
    for n in (1024, 1):
        q = queries[:n].to(args.device)
        seconds = in_turn({"here": lambda q=q: index.search(q, args.k),
                           "faiss": lambda n=n: flat.search(queries[:n].numpy(), args.k)},
                          args.repeats)
        by_numpy = in_turn({"numpy": lambda n=n: numpy_search(full, queries[:n].numpy(), args.k)},
                           1)["numpy"]
        print(f"| {n:,} | {seconds['here']:.3f} | {seconds['faiss']:.3f} | {by_numpy:.3f} | "
              f"{seconds['faiss'] / seconds['here']:.2f} | {by_numpy / seconds['here']:.2f} |",
              flush=True)
    ids = index.search(queries.to(args.device), args.k)[1].cpu().numpy()
    agree = np.mean([len(set(a) & set(b)) / args.k
                     for a, b in zip(ids, flat.search(queries.numpy(), args.k)[1])])
    print(f"the same ids as faiss: {agree:.4%}")
    print(f"certified at once: {certified(index, queries, args):.1%} of the mixture's queries")
    scenes = scene_embeddings()
    generator = torch.Generator().manual_seed(0)
    where = torch.randperm(len(scenes), generator=generator)[:1000]
    scene_index = make_index(folder, "scenes", scenes.half())
    print(f"and {certified(scene_index, scenes[where].float(), args):.1%} of 1,000 sticker "
          f"pictures' among {len(scenes):,} of {scenes.shape[1]} dimensions")
    memory = json.loads(child("memory", folder / "exact", args))
    print(f"memory while 1,024 queries are searched: {memory['beside'] / 1e6:.0f} MB "
          f"(faiss keeps {4 * args.rows * args.dim / 1e6:.0f} MB of rows)")


def certified(index: retrieval.Index, queries: torch.Tensor, args: argparse.Namespace) -> float:
    """The share of queries whose answer the scan proves."""
    queries = retrieval.unit(queries.to(args.device), "a query")
    return retrieval.scan(index.rows, queries, args.k)[2].float().mean().item()


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def numpy_search(rows: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """Product and partial sort in blocks."""
    best = []
    for start in range(0, len(rows), 65536):
        scores = queries @ rows[start:start + 65536].T
        at = np.argpartition(-scores, k, axis=1)[:, :k]
        best.append((np.take_along_axis(scores, at, 1), at + start))
    scores, ids = (np.concatenate(part, axis=1) for part in zip(*best))
    return np.take_along_axis(ids, np.argsort(-scores, axis=1)[:, :k], 1)


def scene_embeddings() -> torch.Tensor:
    shipped = ROOT / "weights" / "stickers"
    scenes = ROOT / "data" / "stickers" / "scenes"
    if scenes.is_dir():
        clip = clip_model.load(shipped / "clip.safetensors")
        return retrieval.embed_folder(clip, scenes)[0]
    return torch.from_numpy(retrieval.open_index(shipped / "index").rows[:]).float()


def ivf(args: argparse.Namespace, folder: Path) -> None:
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows = mixture(args.rows, args.dim, args.centres, seed=1)
    queries = unit(mixture(1024, args.dim, args.centres, seed=2).float())
    start = time.perf_counter()
    index = make_index(folder, "ivf", rows, args.lists)
    built = time.perf_counter() - start
    full = rows.float().numpy()
    start = time.perf_counter()
    peer = faiss.IndexIVFFlat(faiss.IndexFlatIP(args.dim), args.dim, args.lists,
                              faiss.METRIC_INNER_PRODUCT)
    peer.train(full)
    peer.add(full)
    peer_built = time.perf_counter() - start
    wanted = index.search(queries, args.k)[1].numpy()
    centroids, sizes = index.lists[0], index.lists[2].diff()
    print(f"\nIVF, {args.rows:,} x {args.dim}, {args.lists} lists (the largest of "
          f"{int(sizes.max())}), 1,024 queries, k = {args.k}; built in {built:.0f} s, faiss "
          f"in {peer_built:.0f} s")
    print("| probes | rows scanned | recall here | faiss | here, s | faiss, s | faiss / here |")
    print("|---|---|---|---|---|---|---|")
    for nprobe in (4, 16, 64):
        peer.nprobe = nprobe
        q = queries.to(args.device)
        seconds = in_turn({"here": lambda q=q, p=nprobe: index.search(q, args.k, nprobe=p),
                           "faiss": lambda: peer.search(queries.numpy(), args.k)}, args.repeats)
        found = index.search(q, args.k, nprobe=nprobe)[1].cpu().numpy()
        probes = (queries @ centroids.T).topk(nprobe, dim=1).indices
        scanned = sizes[probes].sum().item() / (len(queries) * args.rows)
        recalls = [np.mean([len(set(a) & set(b)) / args.k for a, b in zip(ids, wanted)])
                   for ids in (found, peer.search(queries.numpy(), args.k)[1])]
        print(f"| {nprobe} | {scanned:.2%} | {recalls[0]:.4f} | {recalls[1]:.4f} | "
              f"{seconds['here']:.3f} | {seconds['faiss']:.3f} | "
              f"{seconds['faiss'] / seconds['here']:.2f} |", flush=True)


def growth(args: argparse.Namespace, folder: Path) -> None:
    """Seconds by N, a line fitted through them, and what follows for the paper's indexes."""
    print(f"\ngrowth, {args.dim} dimensions, k = {args.k}")
    print("| rows | 1,024 queries, s | one query, ms |")
    print("|---|---|---|")
    sizes, many, one = [], [], []
    for n in (10_000, 100_000, 300_000, 1_000_000, 3_000_000):
        if n > args.rows * 3:
            break
        index = make_index(folder, f"grow-{n}", mixture(n, args.dim, max(1, n // 250), seed=1))
        q = unit(mixture(1024, args.dim, max(1, n // 250), seed=2).float()).to(args.device)
        seconds = in_turn({"many": lambda q=q, i=index: i.search(q, args.k),
                           "one": lambda q=q, i=index: i.search(q[:1], args.k)}, args.repeats)
        print(f"| {n:,} | {seconds['many']:.3f} | {1e3 * seconds['one']:.1f} |", flush=True)
        sizes.append(n)
        many.append(seconds["many"])
        one.append(seconds["one"])
        del index
        shutil.rmtree(folder / f"grow-{n}")
        (folder / f"grow-{n}.npy").unlink()
    per_row = [float(np.polyfit(sizes, times, 1)[0]) for times in (many, one)]
    print(f"a row costs {per_row[0] / 1024 * 1e12:.2f} ps a query where 1,024 share a scan, and "
          f"{per_row[1] * 1e9:.3f} ns for a single one (slopes)")
    print("\nComputed from that, exact, files in memory:\n| rows | bytes | one query | table |\n"
          "|---|---|---|---|")
    for n in (69_000_000, 400_000_000):
        print(f"| {n / 1e6:.0f}M | {2 * n * args.dim / 1e9:.0f} GB | {n * per_row[1]:.1f} s | "
              f"{n * n * per_row[0] / 1024 / 3600:,.0f} h |")


def shards(args: argparse.Namespace, folder: Path) -> None:
    """More rows than memory may hold: float16 files of a million rows each, and a process that
    reports its peak."""
    source = folder / "img_emb"
    source.mkdir()
    per_file = min(1_000_000, args.shard_rows)
    for i in range(args.shard_rows // per_file):
        np.save(source / f"img_emb_{i}.npy",
                mixture(per_file, args.dim, args.centres, seed=100 + i).numpy())
    made = json.loads(child("build", source, args))
    found = json.loads(child("search", folder / "large", args))
    print(f"\nlarger than memory, {args.shard_rows:,} x {args.dim} in files of {per_file:,}: built "
          f"in {made['seconds']:.0f} s (peak {made['peak'] / 1e9:.2f} GB), {found['queries']} "
          f"queries in {found['seconds']:.1f} s, peak resident memory {found['peak'] / 1e9:.2f} GB")
    index = retrieval.open_index(folder / "large")
    queries = unit(mixture(found["queries"], args.dim, args.centres, seed=2).float())[:4].double()
    best = [(torch.empty(4, 0, dtype=torch.float64), torch.empty(4, 0, dtype=torch.int64))]
    for start in range(0, len(index), 200_000):
        rows = torch.from_numpy(index.rows[start:start + 200_000]).double()
        scores, at = (queries @ rows.T).topk(args.k, dim=1)
        best.append((scores, at + start))
    scores, ids = (torch.cat(part, 1) for part in zip(*best))
    wanted = ids.gather(1, scores.argsort(1, descending=True)[:, :args.k])
    print(f"ids equal float64's on 4 queries: {wanted.tolist() == found['ids'][:4]}")


def child(what: str, folder: Path, args: argparse.Namespace) -> str:
    """Run one measurement in a process of its own, whose peak memory is its own too."""
    command = [sys.executable, __file__, what, "--folder", str(folder), "--dim", str(args.dim),
               "--k", str(args.k), "--centres", str(args.centres), "--device", str(args.device)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


def peak() -> int:
    """Peak resident bytes of this process (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_alone(what: str, folder: Path, args: argparse.Namespace) -> dict:
    """A child's part: a dictionary for its parent."""
    start = time.perf_counter()
    if what == "build":
        retrieval.index_files(folder.parent / "large", folder, n_lists=0)
        return {"seconds": time.perf_counter() - start, "peak": peak()}
    queries = unit(mixture(1024, args.dim, args.centres, seed=2).float())
    index = retrieval.open_index(folder)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))                   # libraries are loaded now
    Path("/proc/self/clear_refs").write_text("5")                      # the peak starts afresh
    before, start = peak(), time.perf_counter()
    ids = index.search(queries.to(args.device), args.k)[1]
    return {"queries": len(queries), "seconds": time.perf_counter() - start, "peak": peak(),
            "beside": peak() - before, "ids": ids.tolist()}


def main(argv: list[str] | None = None) -> int:
    parts = {"exact": exact, "ivf": ivf, "growth": growth, "shards": shards}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.
                                     RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="exact ivf growth shards (default: all)")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shard-rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--lists", type=int, default=4000)
    parser.add_argument("--centres", type=int, help="default: a 250th of the rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.device = clip_model.pick_device(args.device)
    args.centres = args.centres or max(1, args.rows // 250)
    if args.parts and args.parts[0] in ("memory", "build", "search"):      # a child
        print(json.dumps(measure_alone(args.parts[0], args.folder, args)))
        return 0
    for name in args.parts or parts:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            parts[name](args, Path(folder))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    sys.exit(main())
