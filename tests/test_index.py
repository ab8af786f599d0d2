"""index.py: search, self-exclusion, files, command."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_clip, write_pictures
from PIL import Image

import clip_model
import index as retrieval


def make(tmp_path, rows, name="idx", **options):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    paths = [f"{i}.png" for i in range(len(rows))]
    return retrieval.write_index(tmp_path / name, rows, paths, "some clip", "abc", tmp_path,
                                 **options)


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
    """Rows (N, E) of one of five kinds, queries, k."""
    n, dim = (int(np.exp(rng.uniform(np.log(low), np.log(high))))
              for low, high in ((1, 5000), (8, 300)))
    rows, kind = rng.normal(size=(n, dim)), rng.integers(5)
    if kind == 1:                                                          # duplicates
        rows = rows[rng.integers(0, n // 5 + 1, n)]
    if kind == 2:                                          # alike beyond what bfloat16 tells apart
        rows = rows[:1] + 1e-3 * rows
    if kind == 3:                                                          # clusters
        rows = rows[rng.integers(0, min(n, 20), n)] + 0.1 * rng.normal(size=(n, dim))
    queries = rng.normal(size=(int(rng.integers(1, 10)), dim))
    if kind in (2, 3):
        queries = rows[rng.integers(0, n, len(queries))] + 0.01 * queries
    if kind == 4:                                                          # all scores negative
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


@pytest.mark.parametrize("n", [5003, 5 * 1024 + 3])                        # 3: no whole group
def test_the_scan_proves_the_ids_of_the_definition_where_it_is_used(tmp_path, scan_dtype,
                                                                    monkeypatch, n):
    """Enough rows for it; blocks smaller than the index; a tail that fills no group."""
    monkeypatch.setattr(retrieval, "BLOCK", 1024)
    rng, proved, real = np.random.default_rng(1), [], retrieval.scan
    index = make(tmp_path, rng.normal(size=(n, 256)))

    def watched(*given):
        found = real(*given)
        proved.append(found[2].float().mean())
        return found

    monkeypatch.setattr(retrieval, "scan", watched)
    queries = torch.from_numpy(rng.normal(size=(50, 256)))
    queries[0] = torch.from_numpy(index.rows[n - 1])                       # a row of the tail
    scores, ids = index.search(queries, 3)
    assert (ids.numpy() == brute_force(index, queries, 3)[1]).all() and ids[0, 0] == n - 1
    wanted = retrieval.exact_search(index.rows, retrieval.unit(queries, "a query"), 3)
    assert torch.equal(ids, wanted[1]) and torch.equal(scores, wanted[0].float())
    assert proved[0] > 0.9


def test_what_the_scan_cannot_prove_is_searched_as_defined(tmp_path, scan_dtype):
    """Rows that differ by less than the bound."""
    rng = np.random.default_rng(2)
    index = make(tmp_path, rng.normal(size=(1, 64)) + 1e-3 * rng.normal(size=(3000, 64)))
    queries = torch.from_numpy(index.rows[:5]).float()
    assert not retrieval.scan(index.rows, queries.double(), 1)[2].any()
    assert (index.search(queries, 1)[1].numpy() == brute_force(index, queries, 1)[1]).all()


def test_a_query_of_any_norm_and_type_finds_the_same(tmp_path):
    index = make(tmp_path, np.random.default_rng(0).normal(size=(300, 16)))
    query = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    scores, ids = index.search(query, 5)
    for same in (1e19 * query, 1e-13 * query.double()):
        found = index.search(same, 5)
        assert torch.equal(found[1], ids) and torch.allclose(found[0], scores)
    half = index.search(query.half(), 5)[0]
    assert half.dtype == torch.float32 and torch.allclose(half, scores, atol=1e-3)


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


def test_a_large_k_gives_all_rows_and_none_is_none(tmp_path):
    index = make(tmp_path, np.eye(5))
    assert index.search(torch.ones(2, 5), 10**6)[1].shape == (2, 5)
    assert index.search(torch.ones(2, 5), 0, exclude=torch.arange(2))[1].shape == (2, 0)


def test_the_table_is_every_rows_search_kept_and_made_anew_where_stale(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 8))
    index = make(tmp_path, rows)
    table = retrieval.neighbor_table(index, 3)
    assert table.dtype == np.int32 and table.shape == (40, 3)
    for i in range(40):
        assert (brute_force(index, torch.from_numpy(rows[[i]]), 40)[1][0][1:4] == table[i]).all()
    path = index.folder / "neighbors-3.npy"
    sound = path.read_bytes()
    for harm in (b"", sound[:-8], sound[:100]):
        path.write_bytes(harm)
        assert (retrieval.neighbor_table(index, 3) == table).all()
    other = make(tmp_path, rows[::-1].copy())                              # takes its place
    assert not (other.folder / "neighbors-3.npy").exists()
    assert retrieval.neighbor_table(make(tmp_path, np.eye(3), "few"), 9).shape == (3, 2)


# ---------------------------------------------------------------- inverted lists

def clusters(n=3000, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, dim))
    return centres[rng.integers(0, 30, n)] + 0.3 * rng.normal(size=(n, dim))


def test_all_lists_probed_is_exact_and_few_are_nearly(tmp_path):
    index = make(tmp_path, clusters(), n_lists=40)
    queries = torch.from_numpy(clusters(60, seed=1)).float()
    exact = index.search(queries, 5)[1]
    assert torch.equal(index.search(queries, 5, nprobe=40)[1], exact)
    near = index.search(queries, 5, nprobe=8)[1]
    hits = (near[:, :, None] == exact[:, None]).any(1).float().mean()
    assert 0.9 < hits <= 1
    own = index.search(torch.from_numpy(index.rows[:50]), 3, nprobe=8, exclude=torch.arange(50))[1]
    assert all(i not in row for i, row in enumerate(own.tolist()))


def test_the_best_rows_of_the_probed_lists_come_back(tmp_path):
    index = make(tmp_path, clusters(), n_lists=20)
    query = torch.from_numpy(clusters(1, seed=2)).float()
    centroids, order, offsets = index.lists
    c = (query @ centroids.T).argmax()
    members = order[offsets[c]:offsets[c + 1]].numpy()
    ranks = np.argsort(-(index.rows[members].astype(np.float64) @ query[0].double().numpy()))
    assert len(members) >= 6
    assert index.search(query, 5, nprobe=1)[1][0].tolist() == members[ranks[:5]].tolist()


def test_lists_that_hold_too_few_rows_are_made_up_for(tmp_path):
    index = make(tmp_path, clusters(400), n_lists=100)
    queries = torch.from_numpy(clusters(3, seed=3)).float()
    assert (index.search(queries, 350, nprobe=2)[1].numpy() == brute_force(index, queries, 350)[1]
            ).all()


def test_kmeans_finds_separated_centres_and_lists_hold_their_own(tmp_path):
    """Six directions, 24 lists: some end up empty and do no harm."""
    noise = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    rows = make(tmp_path, torch.eye(6).repeat_interleave(50, 0) + 0.05 * noise).rows
    centroids, order, offsets = retrieval.make_lists(rows, 24, iterations=20)
    assert centroids.amax(0).min() > 0.95 and torch.isfinite(centroids).all()
    nearest = (torch.from_numpy(rows[:]).float() @ centroids.T).argmax(1)
    assert torch.equal(nearest[order], torch.arange(24).repeat_interleave(offsets.diff()))
    assert torch.equal(order.sort().values, torch.arange(300))


def test_two_builds_are_the_same_bytes(tmp_path):
    one, two = (make(tmp_path, clusters(), name, n_lists=30).folder for name in ("a", "b"))
    names = sorted(path.name for path in one.iterdir())
    assert "lists.npy" in names and names == sorted(path.name for path in two.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()


# ---------------------------------------------------------------- files

def test_rows_on_disk_are_plain_unit_norm_float16(tmp_path):
    index = make(tmp_path, 7 * np.random.default_rng(0).normal(size=(9, 4)))
    rows = np.load(index.folder / "embeddings.npy")
    assert rows.dtype == np.float16
    assert np.allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-3)
    tiny = make(tmp_path, 1e-13 * np.eye(4), "tiny")
    assert torch.equal(tiny.search(torch.eye(4), 1)[1][:, 0], torch.arange(4))
    for bad in (np.zeros((1, 4)), np.full((1, 4), np.nan), np.zeros((0, 4))):
        with pytest.raises(ValueError):
            make(tmp_path, bad, "bad")
    assert not (tmp_path / "bad").exists()


def test_a_flipped_bit_in_a_row_is_met_with_a_sentence(tmp_path):
    index = make(tmp_path, np.random.default_rng(0).normal(size=(50, 8)))
    path = index.folder / "embeddings.npy"
    rows = np.load(path)
    rows.view(np.uint16)[20, 3] ^= 1 << 14
    np.save(path, rows)
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(index.folder).search(torch.ones(1, 8), 3)


@pytest.mark.parametrize("name, content", [
    ("manifest.json", b"{"), ("manifest.json", b"[]"), ("embeddings.npy", b""),
    ("embeddings.npy", None), ("paths.txt", b"one name\n"), ("lists.npy", b"no array")])
def test_damaged_indexes_do_not_open(tmp_path, name, content):
    index = make(tmp_path, clusters(200), n_lists=10)
    path = index.folder / name
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(index.folder)
    with pytest.raises(FileNotFoundError, match="no index"):
        retrieval.open_index(tmp_path / "nowhere")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    index = make(tmp_path, np.eye(3))
    names = "".join(f"{i}.png\r\n" for i in range(3))
    (index.folder / "paths.txt").write_bytes(b"\xef\xbb\xbf" + names.encode())
    assert list(retrieval.open_index(index.folder).paths) == ["0.png", "1.png", "2.png"]


def test_encoder_of_another_model_is_refused_naming_both(tmp_path):
    index = make(tmp_path, np.eye(4))
    retrieval.check_encoder(index, "mine", "abc", 4)
    for name, fingerprint, dim in (("other clip", "xyz", 4), ("other clip", "abc", 8)):
        with pytest.raises(ValueError, match="some clip.*other clip"):
            retrieval.check_encoder(index, name, fingerprint, dim)
    unknown = retrieval.write_index(tmp_path / "u", torch.eye(4), list("abcd"), "unknown", "",
                                    tmp_path)
    with pytest.warns(UserWarning, match="which encoder"):
        retrieval.check_encoder(unknown, "mine", "abc", 4)


def test_shards_are_searched_where_they_are_in_the_order_of_their_numbers(tmp_path):
    rows = torch.nn.functional.normalize(torch.randn(60, 8), dim=1).half().numpy()
    (tmp_path / "emb").mkdir()
    for i in range(12):
        np.save(tmp_path / "emb" / f"img_emb_{i}.npy", rows[5 * i:5 * i + 5])
    assert retrieval.main(["build", "--embeddings", str(tmp_path / "emb"), "--out",
                           str(tmp_path / "idx")]) == 0
    index = retrieval.open_index(tmp_path / "idx")
    assert (index.rows[:] == rows).all() and not (index.folder / "embeddings.npy").exists()
    ids = np.array([[59, 3], [10, 10]])
    assert (index.rows[ids] == rows[ids]).all() and (index.rows[7:23] == rows[7:23]).all()
    assert len(np.asarray(index.rows)) == 60                               # it ends by IndexError
    (tmp_path / "emb" / "img_emb_11.npy").unlink()
    with pytest.raises(ValueError, match="damaged"):
        retrieval.open_index(tmp_path / "idx")


def test_a_folder_that_is_no_index_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    np.save(tmp_path / "rows.npy", np.eye(4, dtype=np.float32))
    argv = ["build", "--embeddings", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "mine")]
    assert retrieval.main(argv) == 2
    assert "neither new nor an index" in capsys.readouterr().err
    index = make(tmp_path, np.eye(4))
    (index.folder / "diary.txt").write_text("dear")
    assert retrieval.main([*argv[:-1], str(index.folder)]) == 2
    assert len(retrieval.open_index(index.folder)) == 4
    assert retrieval.main([*argv[:-1], str(tmp_path)]) == 2                # the rows' own folder


def test_a_failed_build_keeps_the_old_index(tmp_path, monkeypatch):
    index = make(tmp_path, np.eye(4))

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(retrieval, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="could not be written: .*no space left"):
        make(tmp_path, np.eye(5))
    assert len(retrieval.open_index(index.folder)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["idx"]


# ---------------------------------------------------------------- the command

@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "pics", 4)
    (tmp_path / "pics" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "pics" / "phone.heic").write_bytes(b"unknown kind")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pics" / "a.avif")
    write_pictures(tmp_path / "elsewhere", 2, seed=1)
    (tmp_path / "pics" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "pics")
    clip_model.save(tmp_path / "clip.safetensors", tiny_clip(), {})
    return tmp_path


def test_build_finds_all_pictures_and_says_what_it_left_out(pictures, capsys):
    """Behind links, too; what lies beside the index is found again from anywhere."""
    (pictures / "disk").mkdir()
    (pictures / "runs").symlink_to(pictures / "disk")
    out = pictures / "runs" / "idx"
    assert retrieval.main(["build", str(pictures / "pics"), "--clip",
                           str(pictures / "clip.safetensors"), "--out", str(out)]) == 0
    said, errors = capsys.readouterr()
    assert "7 rows of 16" in said and "1 files skipped, 1 of other kinds never tried" in said
    assert "broken.png" in errors
    index = retrieval.open_index(out)
    assert sorted(index.paths) == ["000.png", "001.png", "002.png", "003.png", "a.avif",
                                   "linked/000.png", "linked/001.png"]
    assert None not in retrieval.neighbor_pictures(index, list(range(7)))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == 7 and manifest["encoder_hash"] == clip_model.load(
        pictures / "clip.safetensors").fingerprint()


def test_search_prints_rank_score_row_path(world, tmp_path, capsys):
    argv = ["search", str(world / "index"), "--clip", str(world / "clip.safetensors"), "--k", "3"]
    picture = str(world / "images" / "004.png")
    assert retrieval.main([*argv, picture, "--out", str(tmp_path / "n.png")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"] and lines[0][3] == "004.png"
    assert float(lines[0][1]) > 0.999 and Image.open(tmp_path / "n.png").width > 3 * 90
    assert retrieval.main([*argv, "red"]) == 0
    assert retrieval.main([*argv, "004.png"]) == 2                         # a mistyped picture
    assert "'004.png' is neither a text nor a picture" in capsys.readouterr().err
    for extra in ([""], ["red", "--k", "-1"], ["red", "--nprobe", "0"]):
        assert retrieval.main([*argv, *extra]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_recall_and_info_print_what_they_did(tmp_path, capsys):
    make(tmp_path, clusters(), n_lists=30)
    assert retrieval.main(["recall", str(tmp_path / "idx"), "--nprobe", "1", "30"]) == 0
    few, every = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert few < every == 1
    assert retrieval.main(["info", str(tmp_path / "idx")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3000
    make(tmp_path, np.eye(4), "plain")
    assert retrieval.main(["recall", str(tmp_path / "plain")]) == 2


@pytest.mark.parametrize("argv", [
    ["build", "nowhere", "--out", "x"], ["build", "--out", "x"], ["info", "nowhere"],
    ["build", "--embeddings", "nowhere", "--out", "x"], ["search", "nowhere", "red"]])
def test_user_mistakes_give_status_2_and_one_sentence(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert retrieval.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
