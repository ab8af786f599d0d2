"""examples/tour.ipynb: what is committed is small and whole, and it runs anywhere.

To run it again and keep the results:
    jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False \\
        examples/tour.ipynb
The slow tests need requirements-notebook.txt.
"""

import base64
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOUR = ROOT / "examples" / "tour.ipynb"
SECONDS_PER_CELL, SECONDS = 60, 480


def outputs_of(cells: list) -> list:
    """All outputs. Nothing on stderr, where warnings go, and no error."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    return outputs


def test_the_committed_notebook_is_small_and_was_run_from_top_to_bottom_without_a_warning():
    assert TOUR.stat().st_size <= 1.2e6
    cells = json.loads(TOUR.read_text("utf-8"))["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert len(counts) > 20 and counts == list(range(1, len(counts) + 1))
    figures = [base64.b64decode(data) for output in outputs_of(cells)
               for kind, data in output.get("data", {}).items() if kind.startswith("image/")]
    assert len(figures) >= 20 and max(map(len, figures)) <= 60_000


def files_and_times() -> dict[Path, int]:
    kept = ("weights", "examples")
    return {path: path.stat().st_mtime_ns for name in kept for path in (ROOT / name).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_notebook_runs_in_another_folder_in_minutes_and_writes_nothing_there(
        tmp_path, monkeypatch):
    import matplotlib.font_manager  # noqa: F401  (its first import builds a cache, and says so)
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # on a busy machine two would wait
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    notebook, before, start = nbformat.read(TOUR, as_version=4), files_and_times(), time.time()
    nbclient.NotebookClient(notebook, timeout=SECONDS_PER_CELL, kernel_name="python3",
                            resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.time() - start <= SECONDS
    assert outputs_of(notebook["cells"])
    assert not list(tmp_path.iterdir()) and files_and_times() == before


@pytest.mark.slow
def test_runs_are_plotted_whatever_columns_they_have_and_harmed_rows_are_left_out(tmp_path):
    pytest.importorskip("matplotlib")
    import plot_runs

    logs = {"old": "step,loss,lr\n50,0.5,0.1\n\n100,0.4,0.1\n150,x,\n",
            "new": "step,loss,images_per_second,held_out_loss\n50,0.6,54.0,\n100,0.3,55,0.7\n"}
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text(text)
    assert plot_runs.read_log(tmp_path / "old")["loss"] == [(50, 0.5), (100, 0.4)]
    panels = plot_runs.plot([tmp_path / "old", tmp_path / "new"]).axes
    assert [axis.get_title() for axis in panels] == ["loss", "held-out loss", "pictures per second"]
    assert [list(line.get_xdata()) for line in panels[0].lines] == [[50, 100], [50, 100]]
    assert plot_runs.main([str(tmp_path / "old"), "--out", str(tmp_path / "loss.png")]) == 0
    assert plot_runs.main([str(tmp_path), "--out", str(tmp_path / "no.png")]) == 2


@pytest.mark.slow
def test_the_figures_that_need_no_stickers_are_drawn_again(tmp_path):
    """Without rendered stickers the first figure is there, and one sentence says what lacks."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "figures.py", "--data", tmp_path / "none",
         "--out", tmp_path], capture_output=True, text=True)
    assert (tmp_path / "denoise.png").is_file() and done.returncode == 2
    assert "Traceback" not in done.stderr
