"""index.py: search, self-exclusion, files, command."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_clip, write_pictures
from PIL import Image

import clip_model
import index as retrieval


def make(tmp_path, rows, name="idx", n_lists=0):
    rows, about = torch.as_tensor(rows, dtype=torch.float32), ("some clip", "abc", tmp_path)
    names = [f"{i}.png" for i in range(len(rows))]
    return retrieval.write_index(tmp_path / name, rows, names, *about, n_lists)


def brute_force(index, queries, k):
    """A float64 sort of the stored rows, scores to 2^-30, lower id first where they tie."""
    queries = queries.double() / queries.double().norm(dim=1, keepdim=True)
    rows = np.array(index.rows[:], np.float64)
    scores = np.round(queries.numpy() @ rows.T * 2**30) / 2**30
    ids = np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def scan_dtype(request, monkeypatch):
    """Both precisions of a CPU's scan, whatever this one multiplies natively."""
    monkeypatch.setattr(retrieval, "scan_dtype", lambda device: request.param)


def problem(rng):
    """Rows (N, E) of one of four kinds, queries, k."""
    n, dim = (int(np.exp(rng.uniform(np.log(low), np.log(high))))
              for low, high in ((1, 5000), (8, 300)))
    rows, queries, kind = rng.normal(size=(n, dim)), rng.normal(size=(5, dim)), rng.integers(4)
    if kind == 1:                                                          # duplicates
        rows = rows[rng.integers(0, n // 5 + 1, n)]
    if kind == 2:                                          # alike beyond what bfloat16 tells apart
        rows = rows[:1] + 1e-3 * rows
        queries = rows[rng.integers(0, n, 5)] + 0.01 * queries
    if kind == 3:                                                          # all scores negative
        rows, queries = np.abs(rows) + 0.01, -np.abs(queries)
    return rows, torch.from_numpy(queries).float(), int(rng.choice([1, 10, n]))


# ---------------------------------------------------------------- search

def test_search_equals_a_float64_sort_on_100_problems(tmp_path, scan_dtype):
    rng = np.random.default_rng(0)
    for i in range(100):
        rows, queries, k = problem(rng)
        index = make(tmp_path, rows)
        scores, ids = index.search(queries, k)
        wanted_scores, wanted = brute_force(index, queries, k)
        assert (ids.numpy() == wanted).all(), i
        assert np.allclose(scores.numpy(), wanted_scores, atol=1e-6)
        if len(rows) > retrieval.GROUP * (retrieval.LISTED * k + 1):       # groups enough
            _, ids, is_sure = retrieval.scan(index.rows, retrieval.unit(queries, "a query"), k)
            assert (ids.numpy() == wanted)[is_sure].all()


@pytest.mark.parametrize("n", [20003, 20 * 1024 + 3])                      # 3: no whole group
def test_the_scan_proves_what_the_definition_finds(tmp_path, scan_dtype, monkeypatch, n):
    """Blocks smaller than the index; a tail that fills no group."""
    monkeypatch.setattr(retrieval, "BLOCK", 1024)
    rng = np.random.default_rng(1)
    index = make(tmp_path, rng.normal(size=(n, 256)))
    queries = retrieval.unit(torch.from_numpy(rng.normal(size=(50, 256))), "a query")
    queries[0] = torch.from_numpy(index.rows[n - 1])                       # a row of the tail
    wanted, (scores, ids, is_sure) = (search(index.rows, queries, 3) for search in
                                      (retrieval.exact_search, retrieval.scan))
    assert torch.equal(ids, wanted[1]) and torch.equal(scores, wanted[0]) and ids[0, 0] == n - 1
    assert is_sure.float().mean() > 0.9
    monkeypatch.setattr(retrieval, "exact_search", None)                   # not wanted for these
    assert torch.equal(index.search(queries[is_sure], 3)[1], ids[is_sure])


@pytest.mark.parametrize("n, large, small, others, best", [
    (254, 1, 1 - 2**-8, 254, 154),                # the query alone loses: its entries round up
    (256, 1 + 2**-8 + 2**-10, 1, 254, 214),       # the rows alone
    (256, 1, 1 - 2**-8, 236, 156),                # the scores alone
    (254, 1 + 2**-7, 1, 155, 130)])               # scores below -1, where bfloat16 is coarser
def test_each_part_of_the_bound_is_needed(tmp_path, scan_dtype, n, large, small, others, best):
    """All low scores are alike. Row 800 is the best, by less than what rounding takes away."""
    rows = torch.full((6400, 257), -small / 16)
    rows[:, :others] = -large / 16
    rows[800, best:others] = -small / 16
    rows[:, 254 if large > 1 else n:] = 0
    rows[:, 256] = (1 - rows.square().sum(1)).clamp(min=0).sqrt().bfloat16()
    np.save(tmp_path / "rows.npy", rows.half().numpy())
    index = retrieval.index_files(tmp_path / "index", tmp_path / "rows.npy")
    query = (torch.arange(257) < n).double()[None] / n**0.5
    assert not retrieval.scan(index.rows, query, 1)[2] and index.search(query, 1)[1] == 800


def test_a_query_of_any_norm_and_type_finds_the_same(tmp_path):
    index = make(tmp_path, np.random.default_rng(0).normal(size=(300, 16)))
    query = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).half()
    scores, ids = index.search(query, 5)
    for same in (1e19 * query.float(), 1e-13 * query.double()):
        found = index.search(same, 5)
        assert torch.equal(found[1], ids) and torch.allclose(found[0], scores)


@pytest.mark.parametrize("queries, k", [
    (torch.zeros(1, 16), 3), (torch.full((1, 16), torch.nan), 3), (torch.ones(16), 3),
    (torch.ones(1, 8), 3), (torch.ones(1, 16), -1)])
def test_bad_queries_are_refused(tmp_path, queries, k):
    with pytest.raises(ValueError):
        make(tmp_path, np.eye(16)).search(queries, k)


def test_equal_rows_come_in_the_order_of_their_ids(tmp_path):
    index = make(tmp_path, np.tile(np.eye(4), (100, 1)))
    scores, ids = index.search(torch.tensor([[1.0, 0, 0, 0]]), 150)
    assert ids[0, :100].tolist() == list(range(0, 400, 4)) and (scores[0, :100] == 1).all()
    assert ids[0, 100:].tolist() == [i for i in range(400) if i % 4][:50]
    assert index.search(torch.ones(2, 4), 500)[1].shape == (2, 400)
    assert index.search(torch.ones(2, 4), 0, exclude=torch.arange(2))[1].shape == (2, 0)


def test_a_row_is_excluded_by_its_id_among_duplicates(tmp_path):
    """Row 7 looks like rows 3 and 5, which rank before it: it goes, they stay."""
    rows = np.random.default_rng(0).normal(size=(10, 8))
    rows[[3, 5]] = rows[7]
    index = make(tmp_path, rows)
    _, ids = index.search(torch.from_numpy(rows[[7]]).float(), 3, exclude=torch.tensor([7]))
    assert ids[0, :2].tolist() == [3, 5] and 7 not in ids[0]
    everything = index.search(torch.from_numpy(rows).float(), 10, exclude=torch.arange(10))[1]
    assert everything.shape == (10, 9)
    assert all(i not in row for i, row in enumerate(everything.tolist()))


def test_the_table_is_every_rows_search_kept_and_made_anew_where_stale(tmp_path):
    index = make(tmp_path, np.random.default_rng(0).normal(size=(40, 8)))
    table = retrieval.neighbor_table(index, 3)
    assert table.dtype == np.int32 and table.shape == (40, 3)
    assert (brute_force(index, torch.from_numpy(index.rows[:]), 4)[1][:, 1:] == table).all()
    path = index.folder / "neighbors-3.npy"
    for harm in (b"", path.read_bytes()[:-8]):
        path.write_bytes(harm)
        assert (retrieval.neighbor_table(index, 3) == table).all()
    np.save(index.folder / "embeddings.npy", index.rows[:][::-1])          # other rows
    other = retrieval.neighbor_table(retrieval.open_index(index.folder), 3)
    assert (other == 39 - table[::-1]).all()
    assert retrieval.neighbor_table(make(tmp_path, np.eye(3), "few"), 9).shape == (3, 2)


# ---------------------------------------------------------------- inverted lists

def clusters(n=3000, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, dim))
    return centres[rng.integers(0, 30, n)] + 0.3 * rng.normal(size=(n, dim))


def test_few_lists_give_nearly_the_exact_rows_and_all_of_them_just_these(tmp_path):
    index = make(tmp_path, clusters(), n_lists=40)
    queries = torch.from_numpy(clusters(1100, seed=1)).float()            # in two batches
    exact = index.search(queries, 5)[1]
    assert torch.equal(index.search(queries, 5, nprobe=40)[1], exact)
    near = index.search(queries, 5, nprobe=8)[1]
    assert 0.9 < (near[:, :, None] == exact[:, None]).any(1).float().mean() <= 1
    assert torch.equal(index.search(queries, 3000, nprobe=8)[1], index.search(queries, 3000)[1])


def test_the_best_rows_of_the_probed_lists_come_back(tmp_path):
    index = make(tmp_path, clusters(), n_lists=20)
    queries = torch.from_numpy(clusters(9, seed=2))
    centroids, order, offsets = index.lists
    lists = order.split(offsets.diff().tolist())
    near = (queries.float() @ centroids.T).topk(3).indices
    found = index.search(queries, 120, nprobe=3)[1]                        # some lists hold fewer
    for query, three, ids in zip(queries, near, found):
        members = torch.cat([lists[c] for c in three]).numpy()
        ranks = np.argsort(-(index.rows[members].astype(np.float64) @ query.numpy()))
        assert ids.tolist() == members[ranks][:120].tolist()
    few = make(tmp_path, np.tile(np.eye(4), (100, 1)), "few", n_lists=10)  # six lists are empty
    assert (few.search(torch.eye(4), 100, nprobe=9)[0] == 1).all()


def test_kmeans_finds_separated_centres_and_lists_hold_their_own(tmp_path):
    noise = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    rows = make(tmp_path, torch.eye(6).repeat_interleave(50, 0) + 0.05 * noise).rows
    centroids, order, offsets = retrieval.make_lists(rows, 24, iterations=20)
    rows, lists = torch.from_numpy(rows[:]).float(), order.split(offsets.diff().tolist())
    nearest = (rows @ centroids.T).argmax(1)
    for c, members in enumerate(lists):
        assert members.tolist() == (nearest == c).nonzero().flatten().tolist()
        mean = torch.nn.functional.normalize(rows[members].sum(0), dim=0)  # zero: an empty list
        assert torch.allclose(centroids[c], mean, atol=1e-5)


def test_two_builds_are_the_same_bytes(tmp_path):
    one, two = (make(tmp_path, clusters(), name, n_lists=30).folder for name in ("a", "b"))
    bytes_of = [{path.name: path.read_bytes() for path in each.iterdir()} for each in (one, two)]
    assert "lists.npy" in bytes_of[0] and bytes_of[0] == bytes_of[1]


# ---------------------------------------------------------------- files

def test_rows_on_disk_are_plain_unit_norm_float16_or_damaged(tmp_path):
    index = make(tmp_path, 7 * np.random.default_rng(0).normal(size=(9, 4)))
    rows = np.load(index.folder / "embeddings.npy")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    assert rows.dtype == np.float16 and np.allclose(norms, 1, atol=1e-3)
    for bad in (np.zeros((1, 4)), np.full((1, 4), np.nan), np.zeros((0, 4))):
        with pytest.raises(ValueError):
            make(tmp_path, bad, "bad")
    assert not (tmp_path / "bad").exists()
    rows.view(np.uint16)[5, 3] ^= 1 << 14                                  # a flipped bit
    np.save(index.folder / "embeddings.npy", rows)
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(index.folder).search(torch.ones(1, 4), 3)


@pytest.mark.parametrize("name, content", [
    ("manifest.json", b"{"), ("manifest.json", b'{"rows": 200, "dim": 8}'),
    ("embeddings.npy", b""), ("paths.txt", b"one name\n"), ("lists.npy", None)])
def test_damaged_indexes_do_not_open(tmp_path, name, content):
    index = make(tmp_path, clusters(200), n_lists=10)
    other = (index.folder / "offsets.npy").read_bytes()
    (index.folder / name).write_bytes(other if content is None else content)
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(index.folder)


def test_encoder_of_another_model_is_refused_naming_both(tmp_path):
    index = make(tmp_path, np.eye(4))
    retrieval.check_encoder(index, "mine", "abc", 4)
    for fingerprint, dim in (("xyz", 4), ("abc", 8)):
        with pytest.raises(ValueError, match="some clip.*other clip"):
            retrieval.check_encoder(index, "other clip", fingerprint, dim)
    index.manifest["encoder_hash"] = ""
    with pytest.warns(UserWarning, match="which encoder"):
        retrieval.check_encoder(index, "mine", "abc", 4)


def test_shards_are_searched_where_they_are_in_the_order_of_their_numbers(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(60, 8), dim=1).half().numpy()
    (tmp_path / "emb").mkdir()
    for i in range(12):
        np.save(tmp_path / "emb" / f"img_emb_{i}.npy", rows[5 * i:5 * i + 5])
    names = "".join(f"{i}.png\r\n" for i in range(60))                     # as Windows writes it
    (tmp_path / "emb" / "paths.txt").write_bytes(b"\xef\xbb\xbf" + names.encode())
    index = retrieval.index_files(tmp_path / "idx", tmp_path / "emb")
    assert (index.rows[:] == rows).all() and not (index.folder / "embeddings.npy").exists()
    assert list(index.paths) == [f"{i}.png" for i in range(60)]
    for some in (np.array([[59, 3], [10, 10]]), slice(7, 23), 4):
        assert (index.rows[some] == rows[some]).all()
    assert len(np.asarray(index.rows)) == 60                               # it ends by IndexError
    (tmp_path / "emb" / "img_emb_11.npy").unlink()
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(tmp_path / "idx")


def test_an_out_that_holds_anything_else_is_left_alone(tmp_path, capsys):
    rows, index = tmp_path / "emb" / "rows.npy", make(tmp_path, np.eye(4))
    rows.parent.mkdir()
    np.save(rows, np.eye(5))
    for source, out, said in ((index.folder / "embeddings.npy", index.folder, "would make way"),
                              (rows, rows.parent, "neither new nor an index")):
        assert retrieval.main(["build", "--embeddings", str(source), "--out", str(out)]) == 2
        assert source.is_file() and said in capsys.readouterr().err
    assert len(retrieval.index_files(index.folder, rows)) == 5             # an index makes way
    (index.folder / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match="neither new nor an index"):
        retrieval.index_files(index.folder, rows)


def test_a_failed_build_keeps_the_old_index(tmp_path, monkeypatch):
    index = make(tmp_path, np.eye(4))
    monkeypatch.setattr(retrieval, "write_array_header_1_0", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, np.eye(5))
    assert len(retrieval.open_index(index.folder)) == 4 and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- the command

def test_build_finds_all_pictures_and_says_what_it_left_out(tmp_path, capsys):
    write_pictures(tmp_path / "pics", 2)
    (tmp_path / "pics" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "pics" / "phone.heic").write_bytes(b"unknown kind")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pics" / "a.avif")
    write_pictures(tmp_path / "elsewhere", 2, seed=1)
    (tmp_path / "pics" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "pics")
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep")
    out, clip = tmp_path / "runs" / "idx", tmp_path / "clip.safetensors"
    clip_model.save(clip, tiny_clip(), {})
    argv = ["build", str(tmp_path / "pics"), "--clip", str(clip), "--out", str(out)]
    assert retrieval.main(argv) == 0
    said, errors = capsys.readouterr()
    assert "broken.png" in errors and "1 files not readable, 1 of other kinds" in said
    index = retrieval.open_index(out)
    assert index.paths == ["000.png", "001.png", "a.avif", "linked/000.png", "linked/001.png"]
    assert None not in retrieval.neighbor_pictures(index, list(range(5)))
    assert index.manifest["encoder_hash"] == clip_model.load(clip).fingerprint()
    assert index.manifest["root"] == "../../../pics"


def test_search_prints_rank_score_row_path(world, tmp_path, capsys):
    argv = ["search", str(world / "index"), "--clip", str(world / "clip.safetensors"), "--k", "3"]
    picture = str(world / "images" / "004.png")
    assert retrieval.main([*argv, picture, "--out", str(tmp_path / "n.png")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"] and lines[0][3] == "004.png"
    assert float(lines[0][1]) > 0.999 and Image.open(tmp_path / "n.png").width > 3 * 90
    assert retrieval.main([*argv, "red"]) == 0 and capsys.readouterr().out.count("\n") == 3
    for wrong in (["004.png"], [""], ["red", "--k", "-1"], ["red", "--nprobe", "0"]):
        assert retrieval.main([*argv, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_recall_and_info_print_what_they_found(tmp_path, capsys):
    folder = str(make(tmp_path, clusters(), n_lists=30).folder)
    assert retrieval.main(["recall", folder, "--nprobe", "1", "30"]) == 0
    few, every = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert few < every == 1 and retrieval.main(["info", folder]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3000
    assert retrieval.main(["recall", str(make(tmp_path, np.eye(4), "plain").folder)]) == 2


@pytest.mark.parametrize("argv", [
    ["build", "nowhere", "--out", "x"], ["build", "--out", "x"], ["info", "nowhere"],
    ["build", "--embeddings", "nowhere", "--out", "x"], ["search", "nowhere", "red"]])
def test_user_mistakes_give_status_2_and_one_sentence(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert retrieval.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())
