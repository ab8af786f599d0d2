"""Draw what training runs wrote into log.csv: loss, held-out loss, pictures per second.

    python examples/plot_runs.py runs/a runs/b --out loss.png

A run is a folder that train.py or train_clip.py wrote. Its log may have any of the columns below;
`step` and one of them are enough. Packages: requirements-notebook.txt.
"""
from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip_model import require, run_command  # noqa: E402

PANELS = {"loss": "loss", "held_out_loss": "held-out loss", "gradient_norm": "gradient norm",
          "images_per_second": "pictures per second"}


def read_log(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Column → [(step, value), ...] of RUN/log.csv. Empty and harmed values are left out."""
    points: dict[str, list[tuple[int, float]]] = {}
    with open(run / "log.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for name in PANELS:
                try:
                    points.setdefault(name, []).append((int(row["step"]), float(row[name])))
                except (KeyError, TypeError, ValueError):
                    continue                                   # no such column, or nothing in it
    return points


def plot(runs: list[Path]) -> Figure:
    """One panel per column that some run has, one line per run. Raises FileNotFoundError for a
    folder without a log, ValueError for logs without a number."""
    logs = {str(run): read_log(run) for run in runs}
    names = [name for name in PANELS if any(log.get(name) for log in logs.values())]
    require(names, "there is no finished row in these logs yet")
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, log in logs.items():
            axis.plot(*zip(*log.get(name) or [(None, None)]), ".-", label=Path(label).name)
        axis.set(xlabel="step", title=PANELS[name])
        axis.legend()
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder with log.csv")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    return run_command(parser, lambda args: plot(args.runs).savefig(args.out), argv)


if __name__ == "__main__":
    sys.exit(main())
