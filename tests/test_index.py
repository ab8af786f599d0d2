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
    queries = queries.double().numpy()
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores = queries @ np.array(index.embeddings, np.float64).T
    ids = np.lexsort((np.broadcast_to(np.arange(scores.shape[1]), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


@pytest.mark.parametrize("seed", range(12))
def test_search_equals_a_float64_sort(tmp_path, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    n, dim, q = int(rng.integers(1, 400)), int(rng.integers(8, 65)), int(rng.integers(1, 9))
    monkeypatch.setattr(retrieval, "BLOCK_BYTES", int(rng.integers(500, 50_000)))  # many blocks
    index = make(tmp_path, rng.normal(size=(n, dim)))
    queries = torch.from_numpy(rng.normal(size=(q, dim))).float()
    for k in (1, 10, n, n + 5):
        scores, ids = index.search(queries, k)
        wanted_scores, wanted = brute_force(index, queries, min(k, n))
        assert ids.shape == (q, min(k, n))
        assert np.abs(scores.numpy() - wanted_scores).max() < 1e-6
        assert (ids.numpy() == wanted).all()


def test_equal_rows_come_in_the_order_of_their_ids(tmp_path):
    index = make(tmp_path, [[1, 0], [0, 1], [1, 0], [1, 0]])
    assert index.search(torch.tensor([[1.0, 0.0]]), 4)[1].tolist() == [[0, 2, 3, 1]]


def test_a_row_is_excluded_by_its_id_among_duplicates(tmp_path):
    """Excluding by rank would drop row 0 and give row 2 itself back."""
    index = make(tmp_path, [[1, 0], [0, 1], [1, 0], [1, 1]])
    query = torch.tensor([[1.0, 0.0]])
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


def test_bad_queries_are_refused(tmp_path):
    index = make(tmp_path, np.eye(4))
    for queries, k, message in (
        (torch.ones(1, 3), 1, r"\(Q, 4\)"),
        (torch.ones(1, 4), -1, "k is -1"),
        (torch.full((1, 4), torch.nan), 1, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(queries, k)
    assert index.search(torch.ones(2, 4), 0)[1].shape == (2, 0)


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
