"""index.py: search, self-exclusion, files, command."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_clip, write_pictures

import clip_model
import index as retrieval


def make(tmp_path, rows, name="idx"):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    return retrieval.write_index(
        tmp_path / name, rows, [f"{i}.png" for i in range(len(rows))], "some clip", "abc", tmp_path
    )


def brute_force(index, queries, k):
    """A float64 sort of the stored rows, lower id first where scores tie."""
    queries = torch.nn.functional.normalize(queries, dim=1).double().numpy()  # float32's
    rows = np.array(index.embeddings, np.float64)
    scores = np.stack([(rows * query).sum(1) for query in queries])
    ids = np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=["bf16", "f16", "f32"])
def scan_dtype(request, monkeypatch):
    """Every precision of the scan, whatever this processor is quicker at."""
    monkeypatch.setattr(retrieval, "scan_dtype", lambda device: request.param)
    return request.param


def problem(rng):
    """Rows (N, E) of one of five kinds, queries, k."""
    n = int(np.exp(rng.uniform(0, np.log(5000))))
    dim = int(np.exp(rng.uniform(np.log(8), np.log(768))))
    rows = rng.normal(size=(n, dim))
    kind = rng.integers(5)
    if kind == 1:  # duplicates
        rows = rows[rng.integers(0, n // 5 + 1, n)]
    if kind == 2:  # near-equal rows that bfloat16 can't tell apart
        rows = rows[:1] + 1e-3 * rows
    if kind == 3:  # clusters
        rows = rows[rng.integers(0, min(n, 20), n)] + 0.1 * rng.normal(size=(n, dim))
    queries = rng.normal(size=(int(rng.integers(1, 10)), dim))
    if kind in (2, 3):
        queries = rows[rng.integers(0, n, len(queries))] + 0.01 * queries
    if kind == 4:  # every score is negative
        rows, queries = np.abs(rows) + 0.01, -np.abs(queries)
    k = int(rng.choice([1, 10, n, rng.integers(1, n + 1)]))
    return rows, torch.from_numpy(queries).float(), min(k, n)


def test_search_equals_a_float64_sort_on_200_problems(tmp_path, device, scan_dtype, monkeypatch):
    rng = np.random.default_rng(0)
    certified = []
    for i in range(200):
        rows, queries, k = problem(rng)
        index = make(tmp_path, rows)
        monkeypatch.setattr(retrieval, "LISTED", int(rng.choice([1, 8, 128])))
        if i % 3 == 0:  # passing blocks instead of a resident one
            monkeypatch.setattr(retrieval, "RESIDENT_BYTES", 0)
            monkeypatch.setattr(retrieval, "BLOCK_BYTES", (16 + len(rows) // 6) * 2 * rows.shape[1])
        scores, ids = index.search(queries.to(device), k)
        wanted_scores, wanted = brute_force(index, queries, k)
        assert np.abs(scores.cpu().numpy() - wanted_scores).max() < 1e-6
        assert (ids.cpu().numpy() == wanted).all(), (i, rows.shape, k)
        unit = torch.nn.functional.normalize(queries, dim=1).to(device)
        certified.append(index.nearest(unit, k)[2].float().mean().item())
        monkeypatch.undo()
        monkeypatch.setattr(retrieval, "scan_dtype", lambda device: scan_dtype)
    assert 0.1 < np.mean(certified) < 1.0  # both ways were walked


def test_the_callers_precision_settings_neither_matter_nor_change(tmp_path, device, scan_dtype,
                                                                  monkeypatch):
    rows = np.random.default_rng(0).normal(size=(3000, 64))
    queries = torch.from_numpy(np.random.default_rng(1).normal(size=(300, 64))).float()
    index, matmul = make(tmp_path, rows), torch.backends.cuda.matmul
    wanted, seen, search_block = brute_force(index, queries, 10)[1], [], retrieval.search_block

    def look(*given):
        seen.append((matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision,
                     matmul.allow_fp16_accumulation, torch.is_autocast_enabled(device.type)))
        return search_block(*given)

    monkeypatch.setattr(retrieval, "search_block", look)
    torch.set_float32_matmul_precision("medium")
    try:
        for set_it in (lambda: None, lambda: setattr(matmul, "fp32_precision", "tf32")):
            set_it()
            before = matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
            with torch.autocast(device.type, torch.bfloat16):
                found = index.search(queries.to(device), 10)[1].cpu().numpy()
            assert (found == wanted).all()
            assert (matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("ieee", "ieee", False, False)}


def test_the_certificate_refuses_a_wrong_order(tmp_path, monkeypatch):
    """1,600 rows, 200 groups, that bfloat16 rounds to the same one: its order says nothing, and the
    certificate must not pass; a row far ahead of all others may."""
    monkeypatch.setattr(retrieval, "scan_dtype", lambda device: torch.bfloat16)
    rows = np.ones((1600, 64))
    rows[:, 0] += np.linspace(0, 2e-3, 1600)
    index = make(tmp_path, rows)
    query = torch.zeros(1, 64)
    query[0, 0], query[0, 1] = 1.0, 0.9
    block = next(index.blocks(query.device, torch.bfloat16))
    low = (block.low[:1600].float() @ query.bfloat16().float()[0]).bfloat16()
    assert len(low.unique()) == 1  # no order at all
    scores, ids, sure = index.nearest(torch.nn.functional.normalize(query, dim=1), 10)
    assert not sure.any() and (ids.numpy() == brute_force(index, query, 10)[1]).all()
    rows = np.random.default_rng(0).normal(size=(1600, 64))
    index = make(tmp_path, rows)
    query = torch.from_numpy(rows[7:8]).float()
    assert index.nearest(torch.nn.functional.normalize(query, dim=1), 1)[2].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_score_lies_above_its_groups_bound(tmp_path, dtype):
    """Adversarial roundings: entries half-way between two bfloat16 numbers, all errors one way."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, 96, generator=generator)
    rows[:256] = rows[:256].bfloat16().float() * (1 + 2.0**-9) * (1 - 1e-4)
    index = make(tmp_path, rows)
    queries = torch.nn.functional.normalize(torch.cat([
        torch.randn(20, 96, generator=generator), rows[:20], rows[300:320]]), dim=1)
    queries[20:30] = queries[20:30].bfloat16().float() * (1 + 2.0**-9)
    block = retrieval.Block(index.rows, torch.device("cpu"), dtype, torch.arange(512))
    maxima = retrieval.group_maxima(queries, block, dtype)
    bound = retrieval.at_most(maxima, retrieval.error_bound(queries, block, dtype))  # (Q, G)
    exact = queries.double() @ torch.from_numpy(index.rows.read(0, 512)).double().T
    best = exact.view(len(queries), -1, retrieval.GROUP).amax(2)
    assert (best <= bound[:, :-1]).all()
    assert (best >= retrieval.at_least(
        maxima, retrieval.error_bound(queries, block, dtype))[:, :-1]).all()
    if dtype == torch.bfloat16:  # and the scan alone would be wrong: the bound is needed
        assert (best > maxima[:, :-1].double()).any()
        assert (bound - maxima.float()).max() < 0.02


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_query_that_is_not_finite_is_refused(tmp_path, bad):
    index = make(tmp_path, np.eye(8))
    with pytest.raises(ValueError, match="query embedding is not finite"):
        index.search(torch.full((1, 8), bad, dtype=torch.float64), 2)      # 1e300: in float32


def test_equal_rows_come_in_the_order_of_their_ids(tmp_path, device):
    index = make(tmp_path, [[1, 0], [0, 1], [1, 0], [1, 0]])
    query = torch.tensor([[1.0, 0.0]], device=device)
    assert index.search(query, 4)[1].tolist() == [[0, 2, 3, 1]]


def test_a_row_is_excluded_by_its_id_among_duplicates(tmp_path, device):
    """Excluding by rank would drop row 0 and give row 2 itself back."""
    index = make(tmp_path, [[1, 0], [0, 1], [1, 0], [1, 1]])
    query = torch.tensor([[1.0, 0.0]], device=device)
    assert index.search(query, 2, exclude=torch.tensor([2]))[1].tolist() == [[0, 3]]
    assert index.search(query, 9, exclude=torch.tensor([0]))[1].tolist() == [[2, 3, 1]]
    # An excluded row that is not among the k+1 nearest costs no neighbour.
    assert index.search(query, 2, exclude=torch.tensor([1]))[1].tolist() == [[0, 2]]


def test_neighbor_table_never_holds_the_row_itself(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 8))
    rows[10:20] = rows[0]  # ten duplicates
    index = make(tmp_path, rows)
    table = retrieval.neighbor_table(index, 10)
    assert table.shape == (50, 10) and table.dtype == np.int32
    assert (table != np.arange(50)[:, None]).all()
    assert set(table[0]) == set(range(10, 20))
    stored = np.load(index.folder / "neighbors-10.npy")
    assert (retrieval.neighbor_table(index, 10) == stored).all()
    for content in (b"", (index.folder / "neighbors-10.npy").read_bytes()[:-4] + b"\x09\0\0\0"):
        (index.folder / "neighbors-10.npy").write_bytes(content)  # damaged: computed anew
        assert (retrieval.neighbor_table(index, 10) == stored).all()
    with pytest.raises(ValueError, match="k is 0"):
        retrieval.neighbor_table(index, 0)
    assert retrieval.neighbor_table(make(tmp_path, rows[:3], "small"), 10).shape == (3, 2)


def test_a_new_index_removes_the_old_neighbour_table(tmp_path):
    index = make(tmp_path, np.eye(4))
    retrieval.neighbor_table(index, 2)
    make(tmp_path, np.eye(4)[::-1].copy())
    assert not list((tmp_path / "idx").glob("neighbors-*"))


@pytest.mark.parametrize(
    "rows", [np.zeros((0, 4)), np.zeros((2, 4)), [[np.nan, 1.0]], [[np.inf, 1.0]]]
)
def test_bad_rows_are_refused(tmp_path, rows):
    with pytest.raises(ValueError):
        make(tmp_path, rows)
    assert not (tmp_path / "idx" / "manifest.json").exists()


def test_bad_queries_are_refused(tmp_path, device):
    index = make(tmp_path, np.eye(4))
    for queries, k, message in (
        (torch.ones(1, 3), 1, r"\(Q, 4\)"),
        (torch.ones(1, 4), -1, "k is -1"),
        (torch.full((1, 4), torch.nan), 1, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(queries.to(device), k)
    assert index.search(torch.ones(2, 4, device=device), 0)[1].shape == (2, 0)
    with pytest.raises(ValueError, match="nprobe is 0"):
        index.search(torch.ones(1, 4, device=device), 1, nprobe=0)


def test_rows_on_disk_are_plain_unit_norm_float16(tmp_path):
    index = make(tmp_path, [[3.0, 4.0], [0.0, -2.0]])
    rows = np.load(tmp_path / "idx" / "embeddings.npy")
    assert rows.dtype == np.float16 and np.allclose(rows, [[0.6, 0.8], [0, -1]], atol=1e-3)
    assert (tmp_path / "idx" / "paths.txt").read_text() == "0.png\n1.png\n"
    assert index.manifest["rows"] == 2 and index.manifest["normalised"] is True


def test_damaged_indexes_do_not_open(tmp_path):
    make(tmp_path, np.eye(4))
    folder = tmp_path / "idx"
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, content in (
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("embeddings.npy", good["embeddings.npy"][:-3]),
        ("embeddings.npy", b""),
        ("paths.txt", b"0.png\n"),
        ("paths.txt", b"\xff\xfe"),
        ("manifest.json", good["manifest.json"].replace(b'"format": 1', b'"format": 9')),
        ("manifest.json", good["manifest.json"].replace(
            b'"format": 1', b'"files": [{"file": "embeddings.npy", "rows": "4"}], "format": 1')),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match="index at"):
            retrieval.open_index(folder)
        (folder / name).write_bytes(good[name])
    retrieval.open_index(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no index"):
        retrieval.open_index(folder)


def test_encoder_of_another_model_is_refused_naming_both(tmp_path):
    index = make(tmp_path, np.eye(4))
    retrieval.check_encoder(index, "same", "abc", 4)
    with pytest.raises(ValueError, match=r"some clip \(abc, 4 dimensions\), not by other \(xyz, 8"):
        retrieval.check_encoder(index, "other", "xyz", 8)
    with pytest.raises(ValueError):
        retrieval.check_encoder(index, "other", "xyz", 4)
    index.manifest["encoder_hash"] = ""
    with pytest.warns(UserWarning, match="does not say"):
        retrieval.check_encoder(index, "any", "xyz", 4)


# ---------------------------------------------------------------- inverted lists


def mixture(n, dim, centres, seed=0, spread=0.3):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, dim)) / np.sqrt(dim)
    return (means[rng.integers(centres, size=n)]
            + spread * rng.normal(size=(n, dim)) / np.sqrt(dim)).astype(np.float32)


def with_lists(tmp_path, rows, n_lists, name="ivf"):
    return retrieval.write_index(tmp_path / name, torch.from_numpy(rows),
                                 [str(i) for i in range(len(rows))], "c", "h", tmp_path, n_lists)


def test_all_lists_probed_is_exact_and_few_are_nearly(tmp_path, device, scan_dtype):
    rows = mixture(4000, 32, 60)
    index = with_lists(tmp_path, rows, 50)
    queries = torch.from_numpy(mixture(100, 32, 60)).to(device)
    wanted = index.search(queries, 10)[1]
    assert (wanted.cpu().numpy() == brute_force(index, queries.cpu(), 10)[1]).all()
    assert torch.equal(index.search(queries, 10, nprobe=50)[1], wanted)
    assert torch.equal(index.search(queries, 10, nprobe=999)[1], wanted)
    shares = []
    for nprobe in (1, 4, 16):
        found = index.search(queries, 10, nprobe=nprobe)[1]
        shares.append((found[:, :, None] == wanted[:, None]).any(1).float().mean().item())
    assert shares == sorted(shares) and shares[1] > 0.8 and shares[2] > 0.98
    own = torch.arange(100, device=device)
    ids = index.search(torch.from_numpy(rows[:100]).to(device), 5, exclude=own, nprobe=4)[1]
    assert ids.shape == (100, 5) and (ids != own[:, None]).all()


@pytest.mark.parametrize("run", [2, 9])
def test_only_rows_of_the_probed_lists_come_back(tmp_path, device, scan_dtype, monkeypatch, run):
    """Lists of 1 to 700 rows, in runs padded to one length; scores of both signs: neither padding
    nor the next list's rows may slip in, be the queries many or one."""
    rng = np.random.default_rng(0)
    sizes = [1, 1, 2, 3, 60, 700, 5, 1, 33]
    means = np.linalg.qr(rng.normal(size=(16, 16)))[0][:len(sizes)]
    rows = np.concatenate([m + 0.05 * rng.normal(size=(n, 16)) for m, n in zip(means, sizes)])
    index, lay_out = make(tmp_path, rows), retrieval.lay_out
    monkeypatch.setattr(retrieval, "lay_out", lambda lists: lay_out(lists, run=run))
    index.lists = retrieval.Lists(torch.from_numpy(means).float(), torch.arange(len(rows)),
                                  torch.tensor([0, *np.cumsum(sizes)]))
    of_list = np.repeat(np.arange(len(sizes)), sizes)
    for sign in (1, -1):
        queries = sign * torch.from_numpy(means + 0.3 * rng.normal(size=means.shape)).float()
        unit = torch.nn.functional.normalize(queries, dim=1)
        scores, exact_order = brute_force(index, queries, len(rows))
        for nprobe in (2, 4, 9):
            probes = (unit @ index.lists.centroids.T).topk(nprobe, dim=1).indices.numpy()
            found, ids = index.search(queries.to(device), 4, nprobe=nprobe)
            for i in range(len(queries)):
                inside = [j for j in exact_order[i] if of_list[j] in probes[i]]
                if len(inside) >= 4:
                    assert ids[i].tolist() == inside[:4], (sign, nprobe, i)
        assert (index.search(queries.to(device), 4, nprobe=9)[1].cpu().numpy()
                == exact_order[:, :4]).all()
        together = index.search(queries.to(device), 4, nprobe=1)[1]
        alone = [index.search(query[None].to(device), 4, nprobe=1)[1] for query in queries]
        assert torch.equal(torch.cat(alone), together)
        block = index.resident[device]
        probes = torch.from_numpy(probes).to(device)
        low = retrieval.list_scores(unit.to(device), block, index.layout, probes, scan_dtype)
        assert low.shape == (9, 9 * 704) and low.min() == 0 and (low.max() > 0.5) == (sign == 1)


def test_lists_that_hold_too_few_rows_are_made_up_for(tmp_path, device):
    index = with_lists(tmp_path, mixture(300, 16, 10), 30)
    queries = torch.from_numpy(mixture(20, 16, 10, seed=3)).to(device)
    for k in (10, 100, 300, 999):
        scores, ids = index.search(queries, k, nprobe=1)
        assert ids.shape == (20, min(k, 300)) and ids.min() >= 0 and torch.isfinite(scores).all()
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_empty_lists_are_looked_into_without_harm(tmp_path, device, monkeypatch):
    rows = np.repeat(unit(np.random.default_rng(0).normal(size=(3, 8))), 20, axis=0)
    index = with_lists(tmp_path, rows, 10)  # 60 rows, three of them different
    assert (index.lists.offsets.diff() == 0).any()
    for resident in (2**30, 0):
        monkeypatch.setattr(retrieval, "RESIDENT_BYTES", resident)
        scores, ids = index.search(index.lists.centroids.to(device), 3, nprobe=1)
        assert scores.shape == (10, 3) and torch.isfinite(scores).all() and ids.max() < 60


def test_lists_of_an_index_larger_than_memory_give_the_same(tmp_path, device, monkeypatch):
    index = with_lists(tmp_path, mixture(3000, 24, 40), 40)
    queries = torch.from_numpy(mixture(50, 24, 40, seed=1)).to(device)
    wanted = index.search(queries, 10, nprobe=3)
    monkeypatch.setattr(retrieval, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", 40_000)
    index = retrieval.open_index(index.folder)
    found = index.search(queries, 10, nprobe=3)
    assert torch.equal(found[1], wanted[1]) and torch.allclose(found[0], wanted[0])
    assert not index.resident


def test_kmeans_finds_separated_centres_and_restarts_empty_lists():
    rows = torch.from_numpy(mixture(2000, 16, 8, spread=0.02))
    rows = torch.nn.functional.normalize(rows, dim=1)
    many = retrieval.spherical_kmeans(rows, 40, seed=1)
    assert ((rows @ many.T).amax(1) > 0.99).all()              # every centre has a centroid
    centroids = retrieval.spherical_kmeans(rows, 8, seed=1)
    assert torch.allclose(centroids.norm(dim=1), torch.ones(8), atol=1e-5)
    again = retrieval.spherical_kmeans(rows, 8, seed=1)
    assert torch.equal(centroids, again)
    twice = torch.cat([rows[:1].expand(100, -1), rows[:40]])  # mostly one row: empty lists
    lists = retrieval.nearest_centroid(twice, retrieval.spherical_kmeans(twice, 20), torch.float32)
    assert len(lists.unique()) > 10


def test_one_kmeans_step_by_hand():
    """Two lists: each centroid is the normalised sum of the rows nearer to it."""
    rows = torch.tensor([[1.0, 0.1], [1.0, -0.3], [0.2, 1.0], [-0.1, 1.0]])
    rows = torch.nn.functional.normalize(rows, dim=1)
    found = retrieval.spherical_kmeans(rows, 2, iterations=5)
    wanted = torch.nn.functional.normalize(torch.stack([rows[:2].sum(0), rows[2:].sum(0)]), dim=1)
    assert torch.allclose(found[found[:, 0].argsort(descending=True)], wanted, atol=1e-5)


def test_default_lists_follow_the_number_of_rows():
    assert [retrieval.default_lists(n) for n in (0, 49_999, 50_000, 10**6)] == [0, 0, 894, 4000]
    assert all(n / retrieval.default_lists(n) >= 39 for n in (50_000, 10**5, 10**6, 10**8))


def test_recall_counts_hits_and_rows(tmp_path):
    index = with_lists(tmp_path, mixture(2000, 16, 30), 30)
    hits, scanned, _, _ = retrieval.recall(index, 10, 30, queries=50)
    assert hits == 1 and scanned == 1
    hits, scanned, _, _ = retrieval.recall(index, 10, 1, queries=50)
    assert 0.2 < hits < 1 and 0.01 < scanned < 0.2
    with pytest.raises(ValueError, match="no inverted lists"):
        retrieval.recall(make(tmp_path, np.eye(4)), 1, 1)


def test_damaged_lists_do_not_open(tmp_path):
    folder = with_lists(tmp_path, mixture(200, 8, 5), 5).folder
    for name, damage in (
        ("lists", lambda x: np.zeros_like(x)), ("lists", lambda x: x[:-1]),
        ("offsets", lambda x: x[::-1].copy()), ("offsets", lambda x: x[:-1]),
        ("centroids", lambda x: x[:, :-1].copy()), ("centroids", lambda x: x * np.nan),
        ("offsets", lambda x: x.astype(np.float64)), ("lists", lambda x: x.astype(np.float32)),
    ):
        good = np.load(folder / f"{name}.npy")
        np.save(folder / f"{name}.npy", damage(good))
        with pytest.raises(ValueError, match="damaged"):
            retrieval.open_index(folder)
        np.save(folder / f"{name}.npy", good)
    (folder / "lists.npy").unlink()
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(folder)


# ---------------------------------------------------------------- many files


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_shards(folder, rows, cuts):
    folder.mkdir(parents=True)
    for i, part in enumerate(np.split(rows, cuts)):
        np.save(folder / f"img_emb_{i}.npy", part)


def test_rows_of_many_files_are_one_matrix(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(60, 8)))
    write_shards(tmp_path / "s", rows, [10, 10, 37, 59])
    files = [tmp_path / "s" / f"img_emb_{i}.npy" for i in range(5)]
    found = retrieval.Rows(files)
    assert found.shape == (60, 8) and (np.array(found) == rows).all()
    for a, b in ((0, 60), (9, 11), (36, 60), (58, 99), (5, 5)):
        assert (found.read(a, b) == rows[a:b]).all() and (found[a:b] == rows[a:b]).all()
    ids = np.array([[59, 0, 10], [9, 37, 36]])
    assert (found[ids] == rows[ids]).all() and (found[7] == rows[7]).all()
    (files[2]).write_bytes(files[2].read_bytes()[:-1])
    with pytest.raises(ValueError):
        retrieval.Rows(files)


def test_shards_stay_where_they_are_and_follow_the_number_in_their_name(tmp_path, capsys):
    """img_emb_10 comes after img_emb_9, not after img_emb_1."""
    rows = unit(np.random.default_rng(0).normal(size=(24, 8)))
    write_shards(tmp_path / "s", rows, range(2, 24, 2))
    out = tmp_path / "idx"
    assert retrieval.main(["build", "--embeddings", str(tmp_path / "s"), "--out", str(out)]) == 0
    index = retrieval.open_index(out)
    assert not list(out.glob("*.npy")) and (np.array(index.embeddings) == rows).all()
    assert len(index.manifest["files"]) == 12 and index.manifest["encoder"] == "unknown"
    assert index.paths[5] == 5 and "24 rows" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="does not say"):
        retrieval.check_encoder(index, "any", "xyz", 8)
    queries = torch.from_numpy(rows[[3, 20]]).float()
    assert index.search(queries, 1)[1].tolist() == [[3], [20]]
    assert retrieval.neighbor_table(index, 3).shape == (24, 3)


def test_other_embeddings_are_copied_normalised_and_never_overwritten(tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    source = tmp_path / "s"
    write_shards(source, rows, [20])
    (source / "paths.txt").write_text("".join(f"{i}.jpg\n" for i in range(30)))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    index = retrieval.index_files(tmp_path / "idx", source)
    assert np.allclose(np.array(index.embeddings), unit(rows), atol=1e-3)
    assert index.paths[29] == "29.jpg"
    np.save(tmp_path / "long.npy", (3 * unit(rows)).astype(np.float16))  # float16, not of norm 1
    longer = retrieval.index_files(tmp_path / "idx2", tmp_path / "long.npy")
    norms = np.linalg.norm(np.array(longer.embeddings, np.float32), axis=1)
    assert np.allclose(norms, 1, atol=1e-3)
    with pytest.raises(ValueError, match="another --out"):  # a second time it would be a source
        retrieval.index_files(source, source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    with pytest.raises(ValueError, match="30 rows"):
        retrieval.index_files(tmp_path / "idx", tmp_path / "idx", dim=9)
    np.save(tmp_path / "embeddings-0.npy", rows)
    with pytest.raises(ValueError, match="another --out"):
        retrieval.index_files(tmp_path, tmp_path / "embeddings-0.npy")
    assert (np.load(tmp_path / "embeddings-0.npy") == rows).all()


def test_lists_can_be_added_to_an_index(tmp_path):
    """It keeps its encoder and finds its pictures, in the same folder or another."""
    write_pictures(tmp_path / "pics", 5)
    names = retrieval.list_images(tmp_path / "pics")
    index = retrieval.write_index(tmp_path / "idx", torch.eye(5), names, "a clip", "beef",
                                  tmp_path / "pics")
    assert index.lists is None
    for out in (tmp_path / "deeper" / "other", tmp_path / "idx"):
        again = retrieval.index_files(out, tmp_path / "idx", n_lists=2)
        assert len(again.lists.centroids) == 2 and again.paths == names
        assert (again.manifest["encoder"], again.manifest["encoder_hash"]) == ("a clip", "beef")
        assert None not in retrieval.neighbor_pictures(again, [0, 4])


def test_names_that_came_later_are_kept_beside_the_index(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8))).astype(np.float16)
    write_shards(tmp_path / "s" / "img_emb", rows, [10])
    folder = tmp_path / "s" / "img_emb"
    assert retrieval.index_files(folder, folder).paths[7] == 7
    (tmp_path / "s" / "paths.txt").write_text("".join(f"{i}.jpg\n" for i in range(30)))
    assert retrieval.index_files(folder, folder).paths[7] == "7.jpg"


def test_lists_added_in_vain_leave_the_index_as_it_was(tmp_path, monkeypatch):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8)))
    index = make(tmp_path, rows)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "make_lists", die)
        with pytest.raises(KeyboardInterrupt):
            retrieval.index_files(index.folder, index.folder, n_lists=2)
    again = retrieval.open_index(index.folder)
    assert again.manifest == index.manifest and again.lists is None


def test_an_index_is_rebuilt_where_files_came_and_refused_where_they_are_elsewhere(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8))).astype(np.float16)
    write_shards(tmp_path / "s", rows, [10])
    elsewhere = retrieval.index_files(tmp_path / "idx", tmp_path / "s")
    with pytest.raises(ValueError, match="elsewhere"):
        retrieval.index_files(elsewhere.folder, elsewhere.folder, n_lists=2)
    here = retrieval.index_files(tmp_path / "s", tmp_path / "s", "a clip", "beef")
    assert len(here) == 30 and here.manifest["encoder_hash"] == "beef"
    np.save(tmp_path / "s" / "img_emb_2.npy", rows[:5])
    more = retrieval.index_files(tmp_path / "s", tmp_path / "s")
    assert len(more) == 35 and more.manifest["encoder"] == "unknown"
    (tmp_path / "s" / "manifest.json").write_text('{"name": "another program"}')
    assert len(retrieval.index_files(tmp_path / "s", tmp_path / "s")) == 35


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_bad_embeddings_are_refused_in_one_sentence(tmp_path, bad, capsys):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8)))
    rows[17] = bad
    np.save(tmp_path / "e.npy", rows)
    argv = ["build", "--embeddings", str(tmp_path / "e.npy"), "--out", str(tmp_path / "idx")]
    assert retrieval.main(argv) == 2
    assert "zero or not finite" in capsys.readouterr().err
    assert not (tmp_path / "idx").exists()


def test_odd_embeddings_are_refused_in_one_sentence(tmp_path, capsys):
    good = unit(np.random.default_rng(0).normal(size=(30, 8)))
    folder = tmp_path / "two"
    folder.mkdir()
    np.save(folder / "a_0.npy", good)
    np.save(folder / "a_1.npy", good[:, :5])
    for name, content in (("x.npy", b"hello"), ("y.npy", b"")):
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "vector.npy", good[0])
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    np.save(tmp_path / "none.npy", good[:0])
    for source in ("two", "x.npy", "y.npy", "vector.npy", "words.npy", "none.npy", "nowhere"):
        argv = ["build", "--embeddings", str(tmp_path / source), "--out", str(tmp_path / "idx")]
        assert retrieval.main(argv) == 2, source
        error = capsys.readouterr().err.strip()
        assert error and len(error.splitlines()) == 1 and "Traceback" not in error
        assert not (tmp_path / "idx").exists()
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "wide.npy", np.zeros((5, 0), np.float16))
    np.save(tmp_path / "long.npy", np.full((5, 8), 1e30, np.float32))
    retrieval.index_files(tmp_path / "idx", tmp_path / "good.npy")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()}
    argv = ["build", "--out", str(tmp_path / "idx"), "--embeddings"]
    for flags in (["good.npy", "--ivf", "many"], ["good.npy", "--ivf", "0"],
                  ["good.npy", "--ivf", "31"], ["good.npy", str(tmp_path)], ["wide.npy"],
                  ["long.npy"]):
        assert retrieval.main([*argv, str(tmp_path / flags[0]), *flags[1:]]) == 2, flags
        assert len(capsys.readouterr().err.splitlines()) == 1
    for names in ("é\n" * 30, "a\n" * 29):
        (tmp_path / "paths.txt").write_bytes(names.encode("latin-1"))
        assert retrieval.main([*argv, str(tmp_path / "good.npy")]) == 2
        assert "paths.txt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()} == kept
    (tmp_path / "paths.txt").write_text("\n".join(f"{i}.png" for i in range(30)))   # no last \n
    assert retrieval.index_files(tmp_path / "named", tmp_path / "good.npy").paths[29] == "29.png"


def test_shards_come_in_the_order_of_all_their_numbers(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(40, 8))).astype(np.float16)
    (tmp_path / "s").mkdir()
    for i in (2, 0, 3, 1):
        np.save(tmp_path / "s" / f"part-{i:05d}-of-00004.npy", rows[10 * i:10 * i + 10])
    index = retrieval.index_files(tmp_path / "idx", tmp_path / "s")
    assert (np.array(index.embeddings) == rows).all()


def test_rows_are_picked_as_numpy_picks_them_or_not_at_all(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8))).astype(np.float16)
    write_shards(tmp_path / "s", rows, [10, 20])
    found = retrieval.index_files(tmp_path / "idx", tmp_path / "s").embeddings
    for key in (4, slice(5, 3), slice(25, 40), slice(-3, None), [3, 28], [8, 9, 10, 11],
                np.array([[1, 12], [29, 0]])):
        assert np.array_equal(found[key], rows[key])
    for key in (np.arange(30) % 7 == 3, -1, [3, -2], 30, [29, 30], slice(None, None, 2)):
        with pytest.raises(IndexError, match="row ids"):
            found[key]
    assert len(list(found)) == 30


def test_a_cut_or_missing_shard_does_not_open(tmp_path):
    rows = unit(np.random.default_rng(0).normal(size=(30, 8)))
    write_shards(tmp_path / "s", rows, [10, 20])
    index = retrieval.index_files(tmp_path / "idx", tmp_path / "s")
    shard = tmp_path / "s" / "img_emb_1.npy"
    good = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(good[:-2]), lambda: np.save(shard, rows[:9]),
                   shard.unlink):
        damage()
        with pytest.raises(ValueError, match="damaged"):
            retrieval.open_index(tmp_path / "idx")
        shard.write_bytes(good)
    retrieval.open_index(tmp_path / "idx")
    shard.write_bytes(good[:-40])  # cut while it is open
    with pytest.raises(ValueError, match="cut off"):
        index.rows.read(0, 30)


def test_a_killed_build_leaves_no_index(tmp_path, monkeypatch):
    """Whatever the write that fails, an old index's manifest is gone and no new one there."""
    rows = mixture(200, 8, 5)
    real = retrieval.save_array
    for dies_at in range(4):
        with_lists(tmp_path, rows, 5)
        count = iter(range(99))

        def save(path, array, dies_at=dies_at, count=count):
            if next(count) == dies_at:
                raise KeyboardInterrupt
            real(path, array)

        monkeypatch.setattr(retrieval, "save_array", save)
        with pytest.raises(KeyboardInterrupt):
            with_lists(tmp_path, rows[::-1].copy(), 5)
        monkeypatch.undo()
        with pytest.raises(FileNotFoundError, match="no index"):
            retrieval.open_index(tmp_path / "ivf")


# ---------------------------------------------------------------- the neighbour table


def test_the_table_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Two blocks of rows in, it dies; the second run asks only for what is missing."""
    rows = mixture(3 * 65536, 4, 9)
    index = make(tmp_path, rows)
    seen = []

    def fake(index, queries, own, k, below):
        seen.append(own[0].item())
        if len(seen) == 130:  # at row 132,096
            raise KeyboardInterrupt
        return (own[:, None] + torch.arange(1, k + 1)) % len(index)

    monkeypatch.setattr(retrieval, "own_neighbors", fake)
    with pytest.raises(KeyboardInterrupt):
        retrieval.neighbor_table(index, 3)
    assert not (index.folder / "neighbors-3.npy").exists()
    part, = index.folder.glob("neighbors-3-*.part")
    part.write_bytes(part.read_bytes() + b"half")  # of a row
    seen[:] = [0] * 200
    table = retrieval.neighbor_table(index, 3)
    assert seen[200] == 129 * 1024 and len(seen) == 200 + 63
    wanted = (np.arange(len(rows))[:, None] + np.arange(1, 4)) % len(rows)
    assert (table == wanted).all()
    assert sorted(p.name for p in index.folder.glob("neighbors-*")) == [
        "neighbors-3.key", "neighbors-3.npy"]


def test_two_runs_at_once_write_one_table(tmp_path, monkeypatch):
    """The second begins when the first has one block of three, and ends before it."""
    rows, calls, real = mixture(3000, 4, 9), [], retrieval.own_neighbors
    index = make(tmp_path, rows)
    wanted = retrieval.neighbor_table(make(tmp_path / "alone", rows), 3)

    def with_a_rival(*args):
        calls.append(args)
        if len(calls) == 2:
            assert (retrieval.neighbor_table(index, 3) == wanted).all()
            assert len(calls) == 4                                  # it took over the first block
        return real(*args)

    monkeypatch.setattr(retrieval, "own_neighbors", with_a_rival)
    assert (retrieval.neighbor_table(index, 3) == wanted).all()
    assert (np.load(index.folder / "neighbors-3.npy") == wanted).all()


def test_near_duplicates_come_last_where_a_threshold_is_set(tmp_path):
    rows = mixture(60, 16, 60)
    rows[1:6] = rows[0] * (1 + 1e-3)  # five copies of row 0
    index = make(tmp_path, rows)
    plain = retrieval.neighbor_table(index, 5)
    sparing = retrieval.neighbor_table(index, 5, below=0.99)
    assert set(plain[0]) == {1, 2, 3, 4, 5} and not set(sparing[0]) & set(range(6))
    assert (plain[20] == sparing[20]).all()
    everything = retrieval.neighbor_table(index, 59, below=0.99)
    assert set(everything[0][-5:]) == {1, 2, 3, 4, 5}
    assert (everything != np.arange(60)[:, None]).all()


def test_the_table_is_searched_on_the_device_asked_for(tmp_path, monkeypatch):
    devices = []

    def fake(index, queries, own, k, below):
        devices.append(queries.device.type)
        return (own[:, None] + torch.arange(1, k + 1)) % len(index)

    monkeypatch.setattr(retrieval, "own_neighbors", fake)
    retrieval.neighbor_table(make(tmp_path, mixture(20, 4, 5)), 3, device="meta")
    assert devices == ["meta"]


def test_the_table_uses_the_lists(tmp_path, monkeypatch):
    index = with_lists(tmp_path, mixture(2000, 16, 30), 30)
    exact = retrieval.neighbor_table(make(tmp_path, mixture(2000, 16, 30)), 10)
    few = {}
    for nprobe in (30, 1):  # another nprobe is another table
        monkeypatch.setattr(retrieval, "TABLE_NPROBE", nprobe)
        few[nprobe] = retrieval.neighbor_table(index, 10)
    assert (few[30] == exact).mean() > 0.999
    assert (few[1] != exact).any() and (few[1] != np.arange(2000)[:, None]).all()


# ---------------------------------------------------------------- the command


def test_build_skips_unreadable_files_and_lists_them(tmp_path, capsys):
    write_pictures(tmp_path / "pics" / "deeper", 3)
    write_pictures(tmp_path / "pics", 2)
    (tmp_path / "pics" / "empty.png").write_bytes(b"")
    (tmp_path / "pics" / "text.jpg").write_text("hello")
    (tmp_path / "pics" / "notes.txt").write_text("hello")
    clip_model.save(tmp_path / "clip", tiny_clip(), {})
    assert (
        retrieval.main(
            [
                "build",
                str(tmp_path / "pics"),
                "--clip",
                str(tmp_path / "clip"),
                "--out",
                str(tmp_path / "idx"),
            ]
        )
        == 0
    )
    index = retrieval.open_index(tmp_path / "idx")
    assert index.paths == [
        "000.png",
        "001.png",
        "deeper/000.png",
        "deeper/001.png",
        "deeper/002.png",
    ]
    out, error = capsys.readouterr()
    assert "2 files skipped" in out and "empty.png" in error and "text.jpg" in error
    assert all(p is not None for p in retrieval.neighbor_pictures(index, [0, 4]))


def test_search_prints_rank_score_row_path(world, tmp_path, capsys):
    picture = world / "images" / "007.png"
    assert (
        retrieval.main(
            [
                "search",
                str(world / "index"),
                str(picture),
                "--k",
                "3",
                "--clip",
                str(world / "clip.safetensors"),
                "--out",
                str(tmp_path / "n.png"),
            ]
        )
        == 0
    )
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3 and lines[0][0] == "1" and lines[0][2:] == ["7", "007.png"]
    assert float(lines[0][1]) > 0.99 and (tmp_path / "n.png").exists()
    assert (
        retrieval.main(
            [
                "search",
                str(world / "index"),
                "red",
                "--clip",
                str(world / "clip.safetensors"),
                "--k",
                "99",
            ]
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_a_text_of_10000_characters_is_no_file_name(world):
    clip = ["--clip", str(world / "clip.safetensors")]
    with pytest.warns(UserWarning, match="was cut"):
        assert retrieval.main(["search", str(world / "index"), "red " * 2500, *clip]) == 0


def test_recall_and_neighbors_print_what_they_did(tmp_path, capsys):
    np.save(tmp_path / "e.npy", unit(mixture(2000, 16, 30)))
    out = str(tmp_path / "idx")
    assert retrieval.main(["build", "--embeddings", str(tmp_path / "e.npy"), "--out", out,
                           "--ivf", "30"]) == 0
    assert retrieval.main(["recall", out, "--nprobe", "1", "30"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()][-3:]
    assert lines[0][0] == "nprobe" and lines[2][0] == "30" and lines[2][2] == "100.00%"
    assert float(lines[1][1]) < float(lines[2][1]) and float(lines[2][1]) > 0.999
    assert retrieval.main(["neighbors", out, "--k", "4"]) == 0
    assert np.load(tmp_path / "idx" / "neighbors-4.npy").shape == (2000, 4)
    assert retrieval.main(["recall", out, "--k", "0"]) == 2
    assert retrieval.main(["recall", out, "--nprobe", "0"]) == 2
    assert retrieval.main(["neighbors", out, "--k", "0"]) == 2


def test_info_prints_the_manifest(world, capsys):
    assert retrieval.main(["info", str(world / "index")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 20


def test_user_mistakes_give_status_2_and_one_sentence(world, tmp_path, capsys):
    clip = ["--clip", str(world / "clip.safetensors")]
    (tmp_path / "empty").mkdir()
    other = tiny_clip(seed=3)
    clip_model.save(tmp_path / "other", other, {})
    for argv in (
        ["info", str(tmp_path / "nothing")],
        ["search", str(tmp_path), "red", *clip],
        ["search", str(world / "index"), " ", *clip],
        ["search", "i" * 5000, "red", *clip],
        ["search", str(world / "index"), "red", *clip, "--k", "-1"],
        ["search", str(world / "index"), "red", "--clip", str(tmp_path / "other")],
        ["search", str(world / "index"), "red", "--clip", str(tmp_path / "missing")],
        ["build", str(tmp_path / "empty"), *clip, "--out", str(tmp_path / "out")],
        ["build", str(tmp_path / "nowhere"), *clip, "--out", str(tmp_path / "out")],
    ):
        assert retrieval.main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert error and "Traceback" not in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
