"""Measure editing:  python examples/evaluate_edit.py train-judge | table

200 pairs of a big and a small sticker whose concepts stand together in no training scene (so the
big one is none of the concepts that are small elsewhere): the picture shows the big one, the text
names the small one. Of every result, at the model's own resolution, nothing pasted:

    the changed region   the 32x32 window with the largest summed absolute difference
    Kept                 PSNR to the picture outside that window, dB
    Done                 the judge names the small sticker in the window

A result that equals its picture fails both. The judge is `evaluate.py`'s network, trained on small
stickers in windows of scenes; windows with no small sticker are one more answer. It never trains
or steers anything. Beside edit.py's model: noise-and-denoise with the text (SDEdit, Meng et al.
2022) by the generator that it was trained from, which has seen single stickers only, over strengths
and at the strength with our Kept where one between them has it; the plain text-to-image sample; and
what a perfect editor would give, the small sticker rendered in.

Shapes: B batch, C channels, H W picture, E CLIP dimension, K neighbours.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stickers
import torch
import torch.nn.functional as F
from evaluate import (
    BACKGROUNDS,
    ROOT,
    SHIPPED,
    STYLES,
    Bench,
    Judge,
    JudgeConfig,
    Maker,
    merge_near_identical,
    open_bench,
    open_maker,
    read_rows,
    report,
    roughened,
    to_unit,
)
from PIL import Image
from torch import Tensor

import clip_model
import edit
import knn_diffusion
import sample
import train

WINDOW = 32                                  # pixels a side
BASELINE_STEPS = 20
NOTHING = "nothing small"                    # the judge's name for a window without a small sticker


# ---------------------------------------------------------------- the two measures

def changed_window(before: Tensor, after: Tensor) -> Tensor:
    """Left and top int64 (B, 2) of the window of two pictures (B, C, H, W) that differs most; the
    first from the top left where several do."""
    difference = (after - before).abs().sum(1, keepdim=True)                     # (B, 1, H, W)
    sums = F.avg_pool2d(difference.double(), WINDOW, 1)                          # (B, 1, 33, 33)
    best, columns = sums.flatten(1).argmax(1), sums.shape[-1]
    return torch.stack([best % columns, best // columns], dim=1)


def kept(before: Tensor, after: Tensor) -> Tensor:
    """PSNR (B,) in dB of pictures (B, C, H, W) in [0, 1] outside the window that changed most;
    -inf where a picture did not change at all, inf where it changed in the window only."""
    height, width = before.shape[-2:]
    corner = changed_window(before, after)
    inside = edit.region_mask(torch.cat([corner, corner + WINDOW], 1), height, width)
    squares = ((after - before).square() * ~inside).sum((1, 2, 3))
    error = squares / (~inside).expand_as(before).sum((1, 2, 3))
    changed = (after != before).flatten(1).any(1)
    return torch.where(changed, -10 * error.log10(), -math.inf)


def windows(pictures: Tensor, corners: Tensor) -> Tensor:
    """The windows at corners (B, 2) of pictures (B, C, H, W), twice as large: (B, C, 64, 64)."""
    cut = torch.stack([picture[:, top:top + WINDOW, left:left + WINDOW]
                       for picture, (left, top) in zip(pictures, corners.tolist())])
    return F.interpolate(cut, scale_factor=2, mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- the judge of small stickers

def training_scenes(drawings: list[stickers.Drawing], n: int, seed: int
                    ) -> tuple[Tensor, list[tuple], list[stickers.Drawing | None], list[str]]:
    """n scenes with one small sticker or none: pictures uint8 (n, 3, 64, 64), the small ones' boxes
    (the big ones' where there is none), the small ones, the backgrounds."""
    big, props = stickers.big_ones(drawings), stickers.props_of(drawings)
    pictures, boxes, small, backgrounds = [], [], [], []
    for i in range(n):
        rng = stickers.generator(seed, "judge", i)
        first = big[rng.integers(len(big))]
        may = stickers.small_ones(props, first)
        beside = [may[rng.integers(len(may))]] if rng.random() < 0.85 else []
        background = str(rng.choice(BACKGROUNDS))
        picture, parts = stickers.scene(first, stickers.pose(rng), beside, background, rng)
        pictures.append(np.asarray(picture))
        boxes.append(parts[-1]["box"])
        small.append(beside[0] if beside else None)
        backgrounds.append(background)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), boxes, small, backgrounds


def random_windows(boxes: Tensor, is_small: Tensor, generator: torch.Generator) -> Tensor:
    """Corners (B, 2) of windows: around a small sticker's box (B, 4), with up to 3 pixels of it cut
    off; anywhere where there is none."""
    u = torch.rand(len(boxes), 2, generator=generator)
    low = (boxes[:, 2:] - WINDOW - 3).clamp(0, 64 - WINDOW)
    high = (boxes[:, :2] + 3).clamp(0, 64 - WINDOW)
    low, high = (torch.where(is_small[:, None], side, end)
                 for side, end in ((low, 0), (high, 64 - WINDOW)))
    return (low + u * (high - low + 1)).long()


def train_judge(args: argparse.Namespace) -> None:
    """Train the judge of small stickers and print its accuracy on windows of fresh scenes."""
    start = time.time()
    drawings, _ = stickers.all_drawings()
    props = stickers.props_of(drawings)
    group_of = merge_near_identical(props, stickers.render)
    none = len(set(group_of.values()))
    torch.manual_seed(args.seed)
    judge = Judge(JudgeConfig(none + 1)).to(memory_format=torch.channels_last)

    def drawn(n: int, seed: int) -> tuple[Tensor, ...]:
        pictures, boxes, small, backgrounds = training_scenes(drawings, n, seed)
        answers = [group_of[d.concept] if d else none for d in small]
        styles = [STYLES.index(d.style) if d else -100 for d in small]           # -100: no target
        return (pictures, torch.tensor(boxes), torch.tensor(answers), torch.tensor(styles),
                torch.tensor([BACKGROUNDS.index(name) for name in backgrounds]))

    def batch(scenes: tuple[Tensor, ...], rows: Tensor, seeded: torch.Generator
              ) -> tuple[Tensor, tuple[Tensor, ...]]:
        pictures, boxes, answers, *others = (part[rows] for part in scenes)
        corners = random_windows(boxes, answers != none, seeded)
        found = roughened(windows(pictures.float() / 255, corners), seeded)
        return found, (answers, *others)

    scenes = drawn(args.scenes, args.seed)
    print(f"{args.scenes} scenes, {len(props)} small drawings in {none} groups, "
          f"{time.time() - start:.0f} s", flush=True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    for step in range(args.steps):
        seeded = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rows = torch.randint(len(scenes[0]), (256,), generator=seeded)
        pictures, targets = batch(scenes, rows, seeded)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(pictures.to(memory_format=torch.channels_last))
        loss = sum(F.cross_entropy(got.float(), wanted) for got, wanted in zip(logits, targets))
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, 2e-3, args.steps // 10,
                                                              args.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    judge.eval()
    fresh = drawn(2000, args.seed + 1)
    fresh = tuple(part[fresh[2] != none] for part in fresh)
    pictures, targets = batch(fresh, torch.arange(len(fresh[0])), torch.Generator().manual_seed(7))
    accuracy = report("windows of fresh scenes, blurred and grained", judge, pictures, *targets)
    empty = drawn(2000, args.seed + 2)
    empty = tuple(part[empty[2] == none] for part in empty)
    pictures, targets = batch(empty, torch.arange(len(empty[0])), torch.Generator().manual_seed(8))
    with torch.no_grad():
        false = (judge(pictures)[0].argmax(1) != none).float().mean()
    accuracy += f"; names something in {false:.1%} of {len(pictures)} windows with nothing small"
    concepts = {d.concept: [group_of[d.concept], list(dict.fromkeys([*d.names, d.title]))]
                for d in props}
    clip_model.save_model(args.out, judge, {
        "step": str(args.steps), "command": args.command_line, "accuracy": accuracy,
        "concepts": json.dumps(concepts | {NOTHING: [none, [NOTHING]]}, ensure_ascii=False)})
    print(f"judge of {none} small stickers and nothing, a closed set: {accuracy}")
    print(f"wrote {args.out}, {(time.time() - start) / 60:.1f} min")


# ---------------------------------------------------------------- the table

def edit_pairs(n: int, seed: int) -> tuple[list[Image.Image], list[str], list[Image.Image]]:
    """n pictures of a big sticker, texts that name a small one kept apart from it, and the same
    pictures with the small one rendered in. No pair twice."""
    drawings, _ = stickers.all_drawings()
    props = stickers.props_of(drawings)
    pairs = [(big, small) for big in stickers.big_ones(drawings)
             for small in stickers.small_ones(props, big)
             if stickers.is_kept_apart(big.concept, small.concept)
             and big.concept not in stickers.PROPS]
    order = stickers.generator(seed, "pairs").permutation(len(pairs))
    pictures, texts, wanted = [], [], []
    for i, (big, small) in enumerate(pairs[j] for j in order[:n]):
        rng = stickers.generator(seed, "pair", i)
        background, place = str(rng.choice(BACKGROUNDS)), stickers.pose(rng)
        pictures.append(stickers.scene(big, place, [], background, rng)[0])
        wanted.append(stickers.scene(big, place, [small], background, rng)[0])
        texts.append(stickers.with_article(small.title))
    return pictures, texts, wanted


def check_kept_apart(data: Path) -> int:
    """How many scenes there are. Raises ValueError where a pair that is to be kept apart stands in
    one: the scenes are older than the rule."""
    scenes = [row["parts"] for row in read_rows(data) if "parts" in row]
    for first, *small in scenes:
        for part in small:
            if stickers.is_kept_apart(first["concept"], part["concept"]):
                raise ValueError(f"{data} has a scene of {first['concept']} and {part['concept']}, "
                                 "which are to be kept apart: render it again")
    return len(scenes)


def measure(bench: Bench, before: Tensor, after: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Kept (B,) in dB and Done, bool (B,), of pictures (B, 3, 64, 64) in [0, 1]."""
    with torch.no_grad():
        best = bench.judge(windows(after, changed_window(before, after)))[0].argmax(1).tolist()
    named = torch.tensor([answer in bench.parse(text)[0] for answer, text in zip(best, texts)])
    psnr = kept(before, after)
    return psnr, named & (psnr > -math.inf)


def table(args: argparse.Namespace) -> None:
    """Kept and Done of edit.py's model, of the baselines, and of a perfect editor."""
    bench, n_scenes = open_bench(args.judge), check_kept_apart(args.data)
    pictures, texts, wanted = edit_pairs(args.n, args.seed)
    ours = open_maker(args, args.weights, args.index)
    if args.guidance_image is None:
        args.guidance_image = edit.S_I["discrete" if ours.codec else "continuous"]
    if not ours.model.config.edit:
        raise ValueError(f"{args.weights} draws pictures; editing wants weights of `train.py edit`")
    generator = open_maker(args, args.generator, args.index)
    if not isinstance(generator.model, knn_diffusion.UNet) or generator.model.config.edit:
        raise ValueError(f"{args.generator} is no continuous generator, as the baselines want one")
    before = to_unit(pictures)
    print(f"{len(texts)} pairs kept apart in {n_scenes} scenes, one result each from seed "
          f"{args.seed}, {args.steps} steps (the generator {BASELINE_STEPS}), guidance "
          f"{args.guidance_text:g} (text) {args.guidance_image:g} (picture), "
          f"{args.weights}, {args.generator}, {args.index}.\n"
          f"Done's standard error is {50 / len(texts) ** 0.5:.1f} points at 50 %. "
          f"The judge {bench.accuracy}.\n")
    print("| | Kept, median | Kept ≥ 26 dB | Done | both |\n|---|---|---|---|---|")

    def row(label: str, results: list[Image.Image]) -> tuple[float, Tensor]:
        psnr, done = measure(bench, before, to_unit(results), texts)
        middle = psnr.median().item()
        print(f"| {label} | {middle:.1f} dB | {(psnr >= 26).float().mean():.1%} | "
              f"{done.float().mean():.1%} | {(done & (psnr >= 26)).float().mean():.1%} |",
              flush=True)
        return middle, done

    results = edited(ours, pictures, texts, args)
    our_kept, our_done = row("edit.py", results)
    if args.out:
        clip_model.grid([pictures, results, wanted], 64).save(args.out)

    def denoised(strength: float) -> list[Image.Image]:
        return noise_and_denoise(generator, pictures, texts, strength, args)

    found = {strength: row(f"noise and denoise, strength {strength:g}", denoised(strength))[0]
             for strength in args.strengths}
    strength = with_kept(found, our_kept)
    if strength not in found:
        row(f"noise and denoise, strength {strength:.3f}, our Kept", denoised(strength))
    row("text to image", denoised(1.0))
    row("the small sticker rendered in", wanted)
    row("the picture itself", pictures)
    if ours.codec:
        row("the picture through the VQ-VAE", in_batches(len(pictures), lambda part:
            ours.codec.decode(ours.codec.encode(2 * before[part] - 1))))
    print("\nDone by edit.py: " + by_text(texts, our_done))


def by_text(texts: list[str], done: Tensor) -> str:
    """How many of each, the most frequent first: "a ring 0 of 8, a drum 2 of 9, ..."."""
    asked, came = Counter(texts), Counter(itertools.compress(texts, done.tolist()))
    return ", ".join(f"{text} {came[text]} of {n}" for text, n in asked.most_common())


def with_kept(found: dict[float, float], target: float) -> float:
    """The strength at which Kept would be the target, between the measured ones, by straight lines;
    the nearest end beyond them."""
    strengths = sorted(found, reverse=True)                      # Kept rises
    values = np.maximum.accumulate([found[s] for s in strengths])
    return float(np.interp(target, values, strengths))


def in_batches(n: int, draw: Callable[[slice], Tensor]) -> list[Image.Image]:
    return [picture for start in range(0, n, 50)
            for picture in clip_model.to_pictures(draw(slice(start, start + 50)))]


def edited(maker: Maker, pictures: list[Image.Image], texts: list[str], args: argparse.Namespace
           ) -> list[Image.Image]:
    """edit.py's results, every text on its own picture."""
    x = 2 * to_unit(pictures) - 1
    query, neighbors, _, _ = sample.condition_on(maker.clip.embed_texts(texts), maker.index, args.k,
                                                 "both", args.query)
    return in_batches(len(texts), lambda part: edit.edit_picture(
        maker.model, x[part], query[part], neighbors[part], [args.seed] * len(x[part]), maker.codec,
        steps=args.steps, guidance=args.guidance_text, guidance_picture=args.guidance_image))


@torch.no_grad()
def noise_and_denoise(maker: Maker, pictures: list[Image.Image], texts: list[str], strength: float,
                      args: argparse.Namespace) -> list[Image.Image]:
    """The generator from a picture noised to a share of T; from noise alone at 1."""
    x = 2 * to_unit(pictures) - 1
    query, neighbors, _, _ = sample.condition_on(maker.clip.embed_texts(texts), maker.index, args.k,
                                                 "both", args.query)

    def draw(part: slice) -> Tensor:
        begin = {"start": x[part], "start_at": strength} if strength < 1 else {}
        *_, found = knn_diffusion.sample(maker.model, query[part], neighbors[part],
                                         [args.seed] * len(x[part]), steps=BASELINE_STEPS,
                                         guidance=args.guidance_text, **begin)
        return found

    return in_batches(len(texts), draw)


# ---------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["train-judge", "table"])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stickers")
    parser.add_argument("--weights", type=Path, default=SHIPPED / "edit.safetensors",
                        help="of `train.py edit` (default: the shipped continuous ones)")
    parser.add_argument("--generator", type=Path, default=SHIPPED / "continuous.safetensors",
                        help="continuous weights for the baselines")
    parser.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    parser.add_argument("--vqvae", type=Path, default=SHIPPED / "vqvae.safetensors")
    parser.add_argument("--index", type=Path, default=SHIPPED / "index")
    parser.add_argument("--judge", type=Path, default=SHIPPED / "judge-edit.safetensors")
    parser.add_argument("--n", type=int, default=200, help="pairs (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--query", choices=["text", "nearest"], default="text")
    parser.add_argument("--guidance-text", type=float, default=2.0)
    parser.add_argument("--guidance-image", type=float, help="default: as edit.py")
    parser.add_argument("--strengths", type=float, nargs="+", metavar="S",
                        default=[0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6], help="of noise-and-denoise")
    parser.add_argument("--scenes", type=int, default=20000, help="train-judge: scenes to render")
    parser.add_argument("--steps", type=int, help="of sampling (default: as edit.py), or of the "
                        "judge (800)")
    parser.add_argument("--out", type=Path, help="train-judge: file to write; table: a picture of "
                        "originals, results and wanted ones")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command_line = "python examples/evaluate_edit.py " + shlex.join(argv)
    try:
        if args.steps is not None and args.steps < 1 or args.n < 1 or args.seed < 0 or args.k < 1:
            raise ValueError("--steps, --n and --k want 1 or more, --seed 0 or more")
        if not all(BASELINE_STEPS / 1000 <= strength < 1 for strength in args.strengths):
            raise ValueError(f"--strengths wants numbers below 1 and not below "
                             f"{BASELINE_STEPS / 1000}: a step of T = 1,000 each")
        if args.what == "train-judge":
            args.steps, args.out = args.steps or 800, args.out or Path("judge-edit.safetensors")
            train_judge(args)
        else:
            table(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
