"""Judge the sticker models:  python examples/evaluate.py clip | vqvae | train-judge | judge | …

    clip           retrieval by the sticker CLIP: names, styled names, keyword phrases kept out
    vqvae          what tokens keep of the drawings that the VQ-VAE was not trained on
    train-judge    train the judge from the drawings (needs requirements-dev.txt)
    judge          name what is in a folder of `sample.py --singles`, against its prompts
    table          200 prompts: the method, its parts, baselines (--baseline), the nearest picture
    unseen         prompts whose pair of drawing and background no picture of the index has
    steps          the same prompts with 100, 50, 25 and 10 sampling steps: quality and time
    swap           held-out prompts with the default index, index-heldout and both
    copies         how near samples come to the training pictures

The judge is a small convolutional classifier of concept, style and background colour. It is trained
on the drawings alone with its own shifts, turns, colours and blurs, and it never trains or steers
anything. Concepts whose drawings are near-identical count as one: a root mean square difference
under 0.02 of the range at 32 px on grey, in either style. The numbers printed here are shares of
prompts; no number is an FID.

Shapes: B batch, C channels, H W picture, E CLIP dimension, K neighbours, N index rows.
"""
from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import clip_model  # noqa: E402
import index as retrieval  # noqa: E402
import knn_diffusion  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import vqvae  # noqa: E402
from clip_model import require  # noqa: E402

STYLES = ("flat", "outlined")
BACKGROUNDS = ("white", "black", "red", "green", "blue", "yellow", "purple", "orange", "pink",
               "gray")
NEAR_IDENTICAL = 0.02
SHIPPED = ROOT / "weights" / "stickers"


# ---------------------------------------------------------------- the judge

@dataclass(frozen=True)
class JudgeConfig:
    n_groups: int                    # concepts, near-identical ones merged
    width: int = 32                  # channels of the first layer


class Judge(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] -> logits of concept group, style and background."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config, w = config, config.width

        def layer(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(c_out), nn.ReLU())

        self.features = nn.Sequential(
            layer(3, w, 2), layer(w, 2 * w, 2), layer(2 * w, 2 * w, 1), layer(2 * w, 4 * w, 2),
            layer(4 * w, 4 * w, 1), layer(4 * w, 6 * w, 2))                # (B, 6w, 4, 4)
        self.hidden = nn.Linear(6 * w * 16, 256)
        self.concept = nn.Linear(256, config.n_groups)
        self.style = nn.Linear(256, len(STYLES))
        self.background = nn.Linear(256, len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.features(pictures * 2 - 1).flatten(1)
        x = F.relu(self.hidden(F.dropout(x, 0.2, self.training)))
        return self.concept(x), self.style(x), self.background(x)


def merge_near_identical(drawings: list, render) -> dict[str, int]:
    """concept -> group. Concepts join where their drawings differ by less than NEAR_IDENTICAL."""
    parent = {d.concept: d.concept for d in drawings}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    for style in STYLES:
        of_style = [d for d in drawings if d.style == style]
        if not of_style:
            continue
        flat = np.stack([np.asarray(render(d, "gray").resize((32, 32), Image.Resampling.BOX))
                         for d in of_style]).reshape(len(of_style), -1).astype(np.float64) / 255
        square = (flat ** 2).sum(1)
        rms = np.sqrt(((square[:, None] + square - 2 * flat @ flat.T) / flat.shape[1]).clip(0))
        for i, j in zip(*np.nonzero(np.triu(rms < NEAR_IDENTICAL, 1))):
            parent[root(of_style[i].concept)] = root(of_style[j].concept)
    roots = sorted({root(concept) for concept in parent})
    return {concept: roots.index(root(concept)) for concept in parent}


def judge_batch(inks: Tensor, colours: Tensor, n: int, generator: torch.Generator
                ) -> tuple[Tensor, Tensor, Tensor]:
    """Random drawings with random backgrounds, sizes, turns, shifts, blur, light and grain.

    inks: premultiplied RGBA (N, 4, 64, 64) in [0, 1]. Returns pictures (n, 3, 64, 64), the
    drawings' numbers and the backgrounds' numbers (n,).
    """
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    which = torch.randint(len(inks), (n,), generator=generator)
    background = torch.randint(len(colours), (n,), generator=generator)
    shrink, angle = 1 / uniform(0.82, 1.15, n), uniform(-0.12, 0.12, n)      # output -> input
    cos, sin = shrink * angle.cos(), shrink * angle.sin()
    shift = uniform(-0.16, 0.16, n, 2) * shrink[:, None]
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1),
                         torch.stack([sin, cos, shift[:, 1]], 1)], 1)                  # (n, 2, 3)
    ink = F.grid_sample(inks[which], F.affine_grid(theta, (n, 4, 64, 64), align_corners=False),
                        align_corners=False)
    plain = (colours[background] + uniform(-0.04, 0.04, n, 3)).clamp(0, 1)[:, :, None, None]
    pictures = ink[:, :3] + (1 - ink[:, 3:]) * plain
    return roughened(pictures, generator), which, background


def roughened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1] with random blur, light and grain."""
    n = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    softer = F.avg_pool2d(F.pad(soft, (2, 2, 2, 2), mode="replicate"), 5, 1)
    blur = uniform(-1, 2)                                 # a third sharp, a third each blur
    pictures = torch.where(blur < 0, pictures, torch.where(
        blur < 1, torch.lerp(pictures, soft, blur), torch.lerp(soft, softer, blur - 1)))
    grain = uniform(0, 0.06) * torch.randn(pictures.shape, generator=generator)
    return (pictures * uniform(0.92, 1.08) + grain).clamp(0, 1)


def train_judge(args: argparse.Namespace) -> None:
    """Train the judge and print its accuracy on fresh shifts and on the rendered sticker world."""
    import stickers
    start = time.time()
    drawings, _ = stickers.all_drawings()
    group_of = merge_near_identical(drawings, stickers.render)
    groups = torch.tensor([group_of[d.concept] for d in drawings])
    styles = torch.tensor([STYLES.index(d.style) for d in drawings])
    canvases = []
    for drawing in drawings:
        canvas = Image.new("RGBA", (64, 64))
        stickers.paste(canvas, drawing.ink, 54, (32, 32))
        canvases.append(np.asarray(canvas, np.float32) / 255)
    inks = torch.from_numpy(np.stack(canvases)).permute(0, 3, 1, 2)
    inks = torch.cat([inks[:, :3] * inks[:, 3:], inks[:, 3:]], dim=1)
    colours = torch.tensor([stickers.COLOURS[name] for name in BACKGROUNDS]) / 255
    torch.manual_seed(args.seed)
    judge = Judge(JudgeConfig(len(set(group_of.values())))).to(memory_format=torch.channels_last)
    print(f"{len(drawings)} drawings, {len(group_of)} concepts in {judge.config.n_groups} groups, "
          f"{sum(p.numel() for p in judge.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
    for step in range(args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pictures, which, background = judge_batch(inks, colours, 256, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(pictures.to(memory_format=torch.channels_last))
        targets = (groups[which], styles[which], background)
        loss = sum(F.cross_entropy(got.float(), wanted) for got, wanted in zip(logits, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    judge.eval()
    names = {d.concept: list(dict.fromkeys([*d.names, d.title])) for d in drawings}
    pictures, which, background = judge_batch(inks, colours, 2000,
                                              torch.Generator().manual_seed(2**40))
    accuracy = report("fresh shifts, turns, colours and blurs of its drawings", judge, pictures,
                      groups[which], styles[which], background)
    if (args.data / "captions.jsonl").is_file():
        rows = [row for row in read_rows(args.data) if "parts" not in row][::10]
        pictures = [Image.open(args.data / row["path"]).convert("RGB") for row in rows]
        accuracy += "; " + report(
            "every tenth picture of the sticker world", judge, to_unit(pictures),
            torch.tensor([group_of[row["concept"]] for row in rows]),
            torch.tensor([STYLES.index(row["style"]) for row in rows]),
            torch.tensor([BACKGROUNDS.index(row["background"]) for row in rows]))
    clip_model.save_model(args.out, judge, {
        "step": str(args.steps), "command": args.command_line, "accuracy": accuracy,
        "concepts": json.dumps({c: [group_of[c], names[c]] for c in names}, ensure_ascii=False)})
    print(f"judge, a closed set: {accuracy}")
    print(f"wrote {args.out}, {(time.time() - start) / 60:.1f} min")


@torch.no_grad()
def report(what: str, judge: Judge, pictures: Tensor, *targets: Tensor) -> str:
    """The shares of concept, style and background named rightly, in a sentence."""
    logits = [torch.cat(parts) for parts in zip(*(judge(part) for part in pictures.split(256)))]
    shares = [(got.argmax(1) == wanted).float().mean() for got, wanted in zip(logits, targets)]
    return (f"on {what} (n = {len(pictures)}) concept {shares[0]:.1%}, style {shares[1]:.1%}, "
            f"background {shares[2]:.1%}")


def to_unit(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures -> float32 (B, 3, 64, 64) in [0, 1]."""
    resized = [np.asarray(clip_model.fit_square(picture, 64)) for picture in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def read_rows(data: Path, name: str = "captions.jsonl") -> list[dict]:
    with open(data / name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@dataclass
class Bench:
    """The judge and the table of concepts that its file carries."""
    judge: Judge
    group_of: dict[str, int]             # concept -> group
    names: dict[str, list[str]]          # concept -> names
    accuracy: str                        # measured after its training

    def hits(self, pictures: list[Image.Image], prompts: list[str]) -> dict[str, list[bool]]:
        """Whether each picture has its prompt's concept (top1, top5), style and background, and
        style and concept (top 5) both. A prompt that names no style, or no background, does not
        count there."""
        with torch.no_grad():
            concept, style, background = self.judge(to_unit(pictures))
        top = concept.topk(5).indices.tolist()
        hits: dict[str, list[bool]] = {
            name: [] for name in ("top1", "top5", "background", "style", "both")}
        for i, prompt in enumerate(prompts):
            groups, asked_style, asked_background = self.parse(prompt)
            hits["top1"].append(top[i][0] in groups)
            hits["top5"].append(bool(groups & set(top[i])))
            if asked_style:
                hits["style"].append(STYLES[style[i].argmax()] == asked_style)
                hits["both"].append(hits["style"][-1] and hits["top5"][-1])
            if asked_background:
                hits["background"].append(BACKGROUNDS[background[i].argmax()] == asked_background)
        return {name: values for name, values in hits.items() if values}

    def parse(self, prompt: str) -> tuple[set[int], str | None, str | None]:
        """[STYLE] NAME [on a COLOUR background] -> groups the name stands for, style, colour."""
        text, style, colour = " ".join(prompt.lower().split()), None, None
        for name in BACKGROUNDS:
            for article in ("a", "an"):
                ending = f" on {article} {name} background"
                if text.endswith(ending):
                    text, colour = text[: -len(ending)], name
        if text.startswith(("a ", "an ")) and not self.groups_named(text):
            text = text.split(" ", 1)[1]
        for name in STYLES:
            if text.startswith(name + " ") and not self.groups_named(text):
                text, style = text[len(name) + 1:], name
        groups = self.groups_named(text)
        require(len(groups) > 0, f"the judge knows no sticker called {text!r}")
        return groups, style, colour

    def groups_named(self, text: str) -> set[int]:
        return {self.group_of[c] for c, names in self.names.items() if text in names}


def open_bench(path: Path) -> Bench:
    judge, metadata = clip_model.load_model(path, {"Judge": (Judge, JudgeConfig)})
    require({"concepts", "accuracy"} <= set(metadata),
          f"{path} has no table of concepts: it was not written by train-judge")
    table = json.loads(metadata["concepts"])
    return Bench(judge, {c: group for c, (group, _) in table.items()},
                 {c: names for c, (_, names) in table.items()}, metadata["accuracy"])


def judge_folder(args: argparse.Namespace) -> None:
    """Print a line a picture, then the shares. The prompt is read from each picture's own text
    chunk, or is line i of --prompts for a picture named i-j.png."""
    bench = open_bench(args.judge)
    lines = args.prompts.read_text("utf-8").splitlines() if args.prompts else []
    given = [line.strip() for line in lines if line.strip()]
    files = sorted(args.singles.glob("[0-9]*-[0-9]*.png"))
    numbers, prompts = [int(file.stem.split("-")[0]) for file in files], []
    require(files and set(numbers) == set(range(len(given) or len(set(numbers)))),
          f"{args.singles} does not hold a picture for each of the prompts")
    for file, number in zip(files, numbers):
        parameters = Image.open(file).info.get("parameters")
        own = json.loads(parameters)["prompt"] if parameters else None
        require(own or given, f"{file} does not say what it was drawn for: name its --prompts")
        require(not given or own in (None, given[number]),
              f"{file} was drawn for {own!r}, which is not line {number + 1} of the prompts")
        prompts.append(own or given[number])
    pictures = [clip_model.read_image(file) for file in files]
    with torch.no_grad():
        best = bench.judge(to_unit(pictures))[0].argmax(1).tolist()
    named = {group: concept for concept, group in reversed(bench.group_of.items())}
    for file, prompt, group in zip(files, prompts, best):
        right = "right" if group in bench.parse(prompt)[0] else "wrong"
        print(f"{file.name}\t{right}\t{prompt}\tjudge says: {bench.names[named[group]][0]}")
    shares = {name: np.mean(x) for name, x in bench.hits(pictures, prompts).items()}
    print(f"n = {len(files)}: " + "  ".join(f"{name} {x:.1%}" for name, x in shares.items()))


# ---------------------------------------------------------------- the sticker CLIP

def evaluate_clip(args: argparse.Namespace) -> None:
    """Closed-vocabulary retrieval: text -> every plain drawing on white."""
    clip = clip_model.load(args.clip)
    rows = [row for row in read_rows(args.data) if row.get("plain")]
    pictures = [clip_model.read_image(args.data / row["path"]) for row in rows]
    images = torch.cat([clip.embed_pictures(pictures[i:i + 256])
                        for i in range(0, len(pictures), 256)])                       # (N, E)
    concepts = [row["concept"] for row in rows]
    names = {row["concept"]: row["captions"][0] for row in rows}

    code = {concept: i for i, concept in enumerate(names)}
    codes = torch.tensor([code[c] for c in concepts])                                 # (N,)
    is_outlined = torch.tensor([row["style"] == "outlined" for row in rows])

    def scores(texts: list[str]) -> Tensor:
        return torch.cat([clip.embed_texts(texts[i:i + 256]) @ images.T
                          for i in range(0, len(texts), 256)])                        # (Q, N)

    def hit(top: Tensor, wanted: list[set[int]]) -> float:
        return float(np.mean([any(int(codes[i]) in right for i in row)
                              for row, right in zip(top, wanted)]))

    print(f"{args.clip}: {len(rows)} plain drawings on white, {len(names)} first names as queries; "
          "either style counts as right; a closed vocabulary: every name was in training")
    top, each = scores(list(names.values())).topk(10).indices, [{i} for i in range(len(names))]
    print(f"text -> picture: R@1 {hit(top[:, :1], each):.3f}, R@10 {hit(top, each):.3f}")

    both = [c for c, i in code.items() if (codes == i).sum() == 2]
    first, exact = [], []
    for style in STYLES:
        right_style = is_outlined == (style == "outlined")
        for concept, row in zip(both, scores([f"{style} {names[c]}" for c in both])):
            own = codes == code[concept]
            first.append(bool(row[own & right_style] > row[own & ~right_style]))
            exact.append(bool((own & right_style)[row.argmax()]))
    print(f"styled name (n = {len(first)}): its style before the other one {np.mean(first):.3f}; "
          f"that drawing first of all {np.mean(exact):.3f}")
    held_out_recall(args.data, scores, hit, code)


def held_out_recall(data: Path, scores, hit, code: dict[str, int]) -> None:
    """R@10 of the keyword phrases kept out of training: those that stand in no caption, and those
    of them whose words never stand together in a caption of a concept they are right for."""
    phrases = {row["phrase"]: set(row["concepts"]) for row in read_rows(data, "phrases.jsonl")}

    def words(text: str) -> frozenset[str]:
        return frozenset(text.split()) - {"a", "an"}

    verbatim: set[str] = set()
    together: dict[str, set[frozenset[str]]] = {}
    for row in read_rows(data):
        for part in row.get("parts", []) + [row]:
            verbatim.update(part["captions"])
            together.setdefault(part["concept"], set()).update(map(words, part["captions"]))
    unseen = {p: c for p, c in phrases.items() if p not in verbatim}
    strict = {p: c for p, c in unseen.items()
              if not any(words(p) <= seen for concept in c for seen in together[concept])}
    for label, chosen in (("in no caption, word for word", unseen),
                          ("whose words stand together in no caption of theirs", strict)):
        top = scores(list(chosen)).topk(10).indices
        share = hit(top, [{code[c] for c in right if c in code} for right in chosen.values()])
        print(f"keyword phrases {label} (n = {len(chosen)}): R@10 {share:.3f}")


# ---------------------------------------------------------------- tokens

def psnr(found: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture (B,), dB; 4 is the squared range of [-1, 1]."""
    return 10 * torch.log10(4 / (found.clamp(-1, 1) - x).square().flatten(1).mean(1))


@torch.no_grad()
def reconstruct(model: vqvae.VQVAE, pictures: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstructions (N, 3, S, S) of uint8 (N, S, S, 3), the PSNR of each in dB, and how often
    each code was used (V,)."""
    counts, found, quality = torch.zeros(model.config.n_codes, dtype=torch.int64), [], []
    for x in clip_model.to_x(pictures).split(64):
        tokens = model.encode(x)
        found.append(model.decode(tokens, x.shape[2] // model.config.factor))
        quality.append(psnr(found[-1], x))
        counts += tokens.flatten().bincount(minlength=len(counts))
    return torch.cat(found), torch.cat(quality), counts


def evaluate_vqvae(args: argparse.Namespace) -> None:
    """PSNR over the drawings that `train.py vqvae` keeps out by default, style by style; with
    --grid twelve of each style, originals over reconstructions."""
    codec, _ = vqvae.load(args.vqvae)
    folder = args.data / "images"
    _, kept_out = train.split_by_drawing(retrieval.list_images(folder), 10)
    total = torch.zeros(codec.config.n_codes, dtype=torch.int64)
    qualities, grid = [], []
    for style in STYLES:
        names = [name for name in kept_out if name.startswith(f"{style}/")]
        pictures = train.read_pictures(folder, names, codec.config.image_size)
        _, quality, counts = reconstruct(codec, pictures)
        print(f"{style}: {quality.mean():.2f} dB, {len(names)} pictures of drawings kept out")
        qualities += quality.tolist()
        total += counts
        shown = train.read_pictures(folder, names[::-(-len(names) // 12)], codec.config.image_size)
        found, _, _ = reconstruct(codec, shown)
        grid += [clip_model.to_pictures(x) for x in (train.to_x(shown), found)]
    print(f"{args.vqvae}: PSNR {np.mean(qualities):.2f} dB on {len(qualities)} pictures, "
          f"{int((total > 0).sum())} of {len(total)} codes used, perplexity "
          f"{torch.special.entr(total / total.sum()).sum().exp():.0f}")
    if args.grid:
        clip_model.grid(grid, codec.config.image_size).save(args.grid)
        print(f"wrote {args.grid}")


# ---------------------------------------------------------------- generation

def pick_prompts(data: Path, names: dict[str, list[str]], n: int, seed: int,
                 held_out: bool = False, unseen: bool = False) -> list[str]:
    """n prompts "NAME on a COLOUR background", flags left out. Concepts are those outside the
    held-out corner, or those inside: then prompts start with "outlined". unseen: the colour is one
    that no picture of the concept in images/ has. names: concept -> names, the first is used."""
    rows = [row for row in read_rows(data) if "parts" not in row]
    held = {row["concept"] for row in rows if row["path"].startswith("heldout/")}
    wanted = {row["concept"] for row in rows if row["category"] != "Flags"}
    concepts = sorted(c for c in wanted if (c in held) == held_out)
    there = {(row["concept"], row["background"]) for row in rows if unseen}
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    for i in rng.permutation(len(concepts)):
        left = [c for c in BACKGROUNDS if (concepts[i], c) not in there]
        if not left or len(prompts) == n:
            continue
        colour = left[rng.integers(len(left))]
        article = "an" if colour == "orange" else "a"
        style = "outlined " if held_out else ""
        prompts.append(f"{style}{names[concepts[i]][0]} on {article} {colour} background")
    return prompts


class Union:
    """Two indexes searched as one."""

    def __init__(self, *indexes: retrieval.Index) -> None:
        self.rows = np.concatenate([index.rows[:] for index in indexes])
        self.paths = [path for index in indexes for path in index.paths]

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = (queries @ torch.from_numpy(self.rows).float().T).topk(k)
        return found.values, found.indices


@dataclass
class Maker:
    """A generator with its CLIP and an index: prompts in, pictures out."""
    model: knn_diffusion.UNet | knn_diffusion.TokenTransformer
    clip: clip_model.CLIP
    index: retrieval.Index | Union
    codec: vqvae.VQVAE | None                       # of a transformer

    def draw(self, prompts: list[str], args: argparse.Namespace, k: int = 10,
             condition: str = "both", query: str = "text", others: bool = False,
             alone: bool = False, next_seed: bool = False) -> list[Image.Image]:
        """One picture per prompt. others: each prompt gets another one's neighbours; alone: the
        query is chosen with them and then stands alone."""
        queries = self.clip.embed_texts(prompts)
        query, neighbors, _, _ = sample.condition_on(queries, self.index, k, condition, query)
        if others:
            neighbors = neighbors.roll(1, 0)
        neighbors = None if alone else neighbors
        seeds = [args.seed + next_seed] * len(prompts)
        sampler = {"sampler": args.sampler} if args.sampler else {}
        return clip_model.to_pictures(sample.draw(
            self.model, query, neighbors, seeds, self.codec, 50, steps=args.steps,
            guidance=args.guidance, **sampler))


def open_maker(args: argparse.Namespace, weights: Path, index_path: Path) -> Maker:
    model, _, clip, index, codec = sample.open_all(weights, args.clip, index_path, args.vqvae)
    args.steps = args.steps or (25 if codec else 20)
    return Maker(model, clip, index, codec)


def interval(hits: list[bool]) -> str:
    """The share, and where 95 % of 2,000 shares of as many prompts drawn anew lie (bootstrap)."""
    draws = np.random.default_rng(0).integers(len(hits), size=(2000, len(hits)))
    low, high = np.quantile(np.array(hits)[draws].mean(1), (0.025, 0.975))
    return f"{np.mean(hits):.1%} ({100 * low:.0f}–{100 * high:.0f})"


COLUMNS = {"top1": "concept top 1", "top5": "top 5", "background": "background"}
SWAP_COLUMNS = {"top5": "concept top 5", "style": "style", "both": "both"}


def print_head(args: argparse.Namespace, bench: Bench, n: int, columns: dict[str, str]) -> None:
    print(f"{n} prompts, one sample each from seed {args.seed}, {args.steps} steps of the "
          f"{args.sampler or 'default'} sampler, guidance {args.guidance:g}, "
          f"{args.weights.name}. In brackets: 95 % of a bootstrap over the prompts.\n"
          f"The judge {bench.accuracy}.\n")
    print(f"| | {' | '.join(columns.values())} |\n|---|{'---|' * len(columns)}")


def print_row(label: str, bench: Bench, pictures: list[Image.Image], prompts: list[str],
              columns: dict[str, str] = COLUMNS) -> None:
    hits = bench.hits(pictures, prompts)
    print(f"| {label} | {' | '.join(interval(hits[name]) for name in columns)} |", flush=True)


ROWS = {"text and 10 neighbours (the method)": {},
        "text alone": {"condition": "query"},
        "10 neighbours alone": {"condition": "neighbors"},
        "text and another prompt's neighbours": {"others": True},
        "nearest picture as query, 10 neighbours": {"query": "nearest"},
        "nearest picture as query, no neighbours": {"query": "nearest", "alone": True},
        "text and 1 neighbour": {"k": 1}, "text and 5": {"k": 5}, "text and 20": {"k": 20}}


def table(args: argparse.Namespace) -> None:
    """The method, its parts, models trained without (--baseline), and the nearest picture."""
    bench = open_bench(args.judge)
    maker = open_maker(args, args.weights, args.index)
    prompts = pick_prompts(args.data, bench.names, args.n, args.seed)
    print_head(args, bench, len(prompts), COLUMNS)
    drawn = {}
    for label, options in list(ROWS.items())[: 1 if args.quick else None]:
        drawn[label] = maker.draw(prompts, args, **options)
        print_row(label, bench, drawn[label], prompts)
    for path in args.baseline:
        other = open_maker(args, path, args.index)
        condition = clip_model.read_weights(path)[1].get("condition", "both")
        print_row(f"{path.parent.name}: trained with --condition {condition}", bench,
                  other.draw(prompts, args, condition=condition), prompts)
    _, ids = maker.index.search(maker.clip.embed_texts(prompts), 1)
    nearest = retrieval.neighbor_pictures(maker.index, ids[:, 0].tolist())
    if None not in nearest:
        print_row("the nearest picture itself", bench, nearest, prompts)
    if not args.quick:
        first, *_ = drawn.values()
        others = drawn["text and another prompt's neighbours"]
        print("\nmean difference from the first row, of 255: another prompt's neighbours "
              f"{difference(first, others):.1f}, another seed "
              f"{difference(first, maker.draw(prompts, args, next_seed=True)):.1f}")


def difference(some: list[Image.Image], others: list[Image.Image]) -> float:
    pairs = zip(some, others)
    return float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b)).mean() for a, b in pairs]))


def unseen(args: argparse.Namespace) -> None:
    """Pairs of drawing and background that retrieval alone can not show."""
    bench, maker = open_bench(args.judge), open_maker(args, args.weights, args.index)
    prompts = pick_prompts(args.data, bench.names, args.n, args.seed, unseen=True)
    print_head(args, bench, len(prompts), COLUMNS)
    print_row("text and 10 neighbours", bench, maker.draw(prompts, args), prompts)
    _, ids = maker.index.search(maker.clip.embed_texts(prompts), 1)
    nearest = retrieval.neighbor_pictures(maker.index, ids[:, 0].tolist())
    if None not in nearest:
        print_row("the nearest picture itself", bench, nearest, prompts)


def steps(args: argparse.Namespace) -> None:
    """Quality and time by the number of sampling steps."""
    bench, maker = open_bench(args.judge), open_maker(args, args.weights, args.index)
    prompts = pick_prompts(args.data, bench.names, args.n, args.seed)
    counts = [100, 50, 25, 10]
    args.steps = " / ".join(map(str, counts))
    print_head(args, bench, len(prompts), COLUMNS)
    maker.draw(prompts[:2], argparse.Namespace(**{**vars(args), "steps": 2}))          # warm up
    for args.steps in counts:
        start = time.perf_counter()
        pictures = maker.draw(prompts, args)
        milliseconds = 1e3 * (time.perf_counter() - start) / len(prompts)
        print_row(f"{args.steps} steps, {milliseconds:.0f} ms per picture", bench, pictures,
                  prompts)


def swap(args: argparse.Namespace) -> None:
    """The same held-out prompts, weights and seeds with three indexes."""
    bench, maker = open_bench(args.judge), open_maker(args, args.weights, args.index)
    prompts = pick_prompts(args.data, bench.names, args.n, args.seed, held_out=True)
    default, heldout = maker.index, retrieval.open_index(args.heldout_index)
    print_head(args, bench, len(prompts), SWAP_COLUMNS)
    for label, maker.index in (("the default index", default), ("index-heldout", heldout),
                               ("both in one", Union(default, heldout))):
        print_row(label, bench, maker.draw(prompts, args), prompts, SWAP_COLUMNS)


def copies(args: argparse.Namespace) -> None:
    """How far samples, and training pictures, are from the nearest (other) training picture."""
    maker = open_maker(args, args.weights, args.index)
    names = open_bench(args.judge).names
    drawn = maker.draw(pick_prompts(args.data, names, args.n, args.seed), args)
    ids = np.random.default_rng(args.seed).permutation(len(maker.index.paths))
    pictures = [clip_model.read_image(args.data / "images" / path) for path in maker.index.paths]
    pixels = to_unit(pictures).flatten(1)
    rows = torch.from_numpy(maker.index.rows[:]).float()
    some = torch.from_numpy(ids[:1000])
    shown = to_unit(drawn).flatten(1)
    embedded = maker.clip.embed_pictures(drawn)
    print("| distance | of samples, median | of training pictures to each other, median, nearest "
          "5 % | samples nearer than those 5 % |\n|---|---|---|---|")
    for label, samples, every in (("pixels, root mean square", shown, pixels),
                                  ("CLIP, root of 2 − 2 cosine", embedded, rows)):
        scale = every.shape[1] ** 0.5 if every is pixels else 1.0
        own = torch.cdist(every[some], every)
        own[torch.arange(len(some)), some] = torch.inf
        own, far = own.amin(1) / scale, torch.cdist(samples, every).amin(1) / scale
        limit = own.quantile(0.05)
        print(f"| {label} | {far.median():.3f} | {own.median():.3f}, {limit:.3f} | "
              f"{(far < limit).float().mean():.1%} |")
    nearest = torch.cdist(shown, pixels).argmin(1).tolist()
    if args.grid:
        chosen = range(12)
        clip_model.grid([[drawn[i] for i in chosen], [pictures[nearest[i]] for i in chosen]],
                        64).save(args.grid)
        print(f"wrote {args.grid}: samples over the training pictures nearest by pixels")


# ---------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = {"clip": evaluate_clip, "vqvae": evaluate_vqvae, "train-judge": train_judge,
             "judge": judge_folder, "table": table, "unseen": unseen, "steps": steps, "swap": swap,
             "copies": copies}
    parser.add_argument("what", choices=kinds)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "stickers")
    parser.add_argument("--clip", type=Path, default=SHIPPED / "clip.safetensors")
    parser.add_argument("--weights", type=Path, default=SHIPPED / "continuous.safetensors")
    parser.add_argument("--vqvae", type=Path, default=SHIPPED / "vqvae.safetensors")
    parser.add_argument("--baseline", type=Path, nargs="+", default=[],
                        help="table: weights of other models, trained with --condition query, say")
    parser.add_argument("--index", type=Path, default=SHIPPED / "index")
    parser.add_argument("--heldout-index", type=Path, default=SHIPPED / "index-heldout")
    parser.add_argument("--judge", type=Path, default=SHIPPED / "judge.safetensors")
    parser.add_argument("--singles", type=Path, help="judge: a folder of sample.py --singles")
    parser.add_argument("--prompts", type=Path, help="judge: its prompts, one a line")
    parser.add_argument("--n", type=int, help="prompts (default: swap all, else 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sampler", help="as sample.py's")
    parser.add_argument("--quick", action="store_true", help="table: the first row only")
    parser.add_argument("--grid", type=Path, help="vqvae: also draw twelve pictures of each style "
                        "over their reconstructions into this PNG; copies: twelve samples over the "
                        "nearest training pictures")
    parser.add_argument("--steps", type=int, help="of sampling (default: continuous 20, discrete "
                        "25), or of the judge (1500)")
    parser.add_argument("--out", type=Path, default=Path("judge.safetensors"),
                        help="train-judge: file to write")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.command_line = "python examples/evaluate.py " + shlex.join(argv)
    if args.steps is None and args.what == "train-judge":
        args.steps = 1500
    if args.n is None:
        args.n = 10_000 if args.what == "swap" else 200
    try:
        require((args.steps is None or args.steps >= 1) and args.n >= 1 and args.seed >= 0,
              "--steps and --n want 1 or more, --seed 0 or more")
        require(args.what != "train-judge" or args.steps >= 20,
              "train-judge wants 20 --steps or more")
        require(args.what != "judge" or args.singles, "judge wants --singles DIR")
        kinds[args.what](args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
