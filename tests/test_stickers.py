"""examples/stickers.py: what is drawn, where it goes, what is said of it."""

import json

import numpy as np
import pytest
import stickers
from PIL import Image


def drawing(concept="fox_face", style="outlined", category="Animals & Nature",
            colour=(200, 90, 10)):
    ink = Image.new("RGBA", (40, 20), (*colour, 255))
    names, keywords = [concept.replace("_", " "), "fox"], ["animal", "wild"]
    return stickers.Drawing(concept, style, category, names, keywords, "fox", ink)


def test_a_plain_picture_is_centred_on_its_background_and_not_clipped():
    pixels = np.asarray(stickers.render(drawing(), "blue"))
    is_ink = np.abs(pixels.astype(int) - stickers.COLOURS["blue"]).sum(-1) > 30
    rows, columns = np.nonzero(is_ink.any(1))[0], np.nonzero(is_ink.any(0))[0]
    assert pixels.shape == (64, 64, 3) and columns[-1] - columns[0] + 1 == 54
    assert abs(rows[0] + rows[-1] - 63) <= 1 and columns[0] + columns[-1] == 63
    assert tuple(pixels[0, 0]) == stickers.COLOURS["blue"]


def test_variants_are_deterministic_and_never_clipped():
    one, two = stickers.variants(drawing(), 7, 0), stickers.variants(drawing(), 7, 0)
    assert [(b, p.tobytes()) for b, p in one] == [(b, p.tobytes()) for b, p in two]
    assert one[0][0] == "white" and len({background for background, _ in one}) == 7
    for background, picture in one:
        edge = np.asarray(picture).astype(int)
        border = np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]])
        assert np.abs(border - stickers.COLOURS[background]).sum(-1).mean() < 60


def test_blank_pictures_and_empty_ink_are_left_out():
    white = drawing(colour=(255, 255, 255))
    assert "white" not in [background for background, _ in stickers.variants(white, 7, 0)]
    assert stickers.cut_to_ink(Image.new("RGBA", (9, 9))) is None
    assert not stickers.shows_something(Image.new("RGB", (64, 64), "red"))


def captions(drawing, background="orange", others=(), seed=0):
    total = stickers.total_strengths([drawing, *others])
    return stickers.captions(drawing, background, total, np.random.default_rng(seed))


def test_captions_have_the_four_forms_of_the_everyday_name_and_some_of_others():
    fox = drawing()
    fox.char, fox.aliases, fox.foreign = "\U0001f98a\ufe0f", ["fox cub"], ["fuchs"] * 3
    texts = captions(fox)
    assert texts[0] == "fox" and texts.count("fox") > 1
    forms = ("{}", "outlined {}", "{} on an orange background",
             "outlined {} on an orange background", "a {}")
    for name, least in (("fox", 5), ("fox face", 3), ("fox cub", 3)):
        assert sum(form.format(name) in texts for form in forms) >= least
    assert {"the fox", "\U0001f98a\ufe0f", "\U0001f98a", "fuchs"} <= set(texts)
    assert texts == captions(fox)                                # the key alone decides


def test_held_out_phrases_stand_in_no_keyword_caption():
    many = [drawing(f"thing_{i}") for i in range(60)]
    held = {row["phrase"] for row in stickers.held_out_phrases(many)}
    assert held and not held & {text for d in many for text in captions(d, others=many)}


def test_a_word_is_said_most_of_what_it_names_best():
    def thing(concept, title, keywords, category="Objects"):
        ink = Image.new("RGBA", (9, 9), (200, 90, 10, 255))
        return stickers.Drawing(concept, "flat", category, [concept], keywords, title, ink)

    palm = thing("palm", "palm tree", ["beach"])
    crown = thing("crown", "crown", ["king", "queen", "palm"])
    prince = thing("prince", "prince", ["king"], "People & Body")
    assert stickers.strengths(palm) == {"beach": 1 / 2, "palm": 1.0, "tree": 1 / 2,
                                        "palm tree": 1.0}
    assert stickers.strengths(crown)["queen"] == 1 / 3
    assert stickers.strengths(prince)["king"] == 1 / 4
    assert stickers.strengths(thing("jet", "airplane", ["sky", "plane"]))["plane"] == 1 / 2

    def times(word, one):
        texts = [captions(one, others=[palm, crown, prince], seed=i) for i in range(40)]
        return sum(text in (word, f"a {word}", f"the {word}") for each in texts for text in each)

    assert times("king", crown) > 3 * times("king", prince)
    assert times("palm", palm) > 5 * times("palm", crown)


def test_plurals_and_colours():
    assert [stickers.plural(word) for word in ("fox", "dog", "berry", "key", "scissors")] == [
        "foxes", "dogs", "berries", "keys", "scissors"]
    assert stickers.main_colour(Image.new("RGBA", (9, 9), (221, 46, 68, 255))) == "red"
    assert stickers.main_colour(Image.new("RGBA", (9, 9), (221, 46, 68, 0))) is None
    assert "red fox" in {text for i in range(20)
                         for text in captions(drawing(colour=(221, 46, 68)), seed=i)}


def test_scenes_say_where_their_parts_are_and_avoid_the_held_out_corner():
    props = [drawing("heart", "flat", "Smileys & Emotion"), drawing("crown", "outlined", "Objects"),
             *(drawing("apple", style, "Food & Drink") for style in ("flat", "outlined"))]
    big = [drawing("car", s, "Travel & Places") for s in ("flat", "outlined")]
    rows = [row for _, _, row in stickers.make_scenes([*props, *big], 40, 0)]
    assert {len(row["parts"]) for row in rows} == {1, 2, 3}
    for row in rows:
        for part in row["parts"]:
            left, top, right, bottom = part["box"]
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            assert (part["concept"], part["style"]) != ("apple", "outlined")
            assert part["style"] == row["style"]


def many_drawings():
    """Twenty small ones, twelve big ones."""
    return ([drawing(c, "flat", "Objects") for c in stickers.PROPS[:20]],
            [drawing(f"big_{i}", "flat", "Travel & Places") for i in range(12)])


def test_scenes_come_in_families_and_keep_pairs_apart():
    props, big = many_drawings()
    apart = {(b.concept, s.concept) for b in big for s in props
             if stickers.is_kept_apart(b.concept, s.concept)}
    assert 0.03 < len(apart) / 240 < 0.15
    rows = [row for _, _, row in stickers.make_scenes([*props, *big], 400, 0)]
    met = {(row["concept"], part["concept"]) for row in rows for part in row["parts"][1:]}
    assert len(met) > 200 and not met & apart
    families = [rows[i:i + 4] for i in range(0, 400, 4)]
    for family in families:
        assert len({(row["concept"], row["background"]) for row in family}) == 1
        assert [len(row["parts"]) > 1 for row in family] == [False, True, True, True]
    assert len({family[0]["concept"] for family in families[:32]}) == 32      # each has its turn
    places = [len({tuple(row["parts"][0]["box"]) for row in family}) for family in families]
    assert 65 < sum(n == 1 for n in places) < 95


@pytest.mark.slow
def test_the_whole_world_renders_twice_to_the_same_bytes(tmp_path):
    for name in "ab":
        argv = ["--out", str(tmp_path / name), "--variants", "2", "--scenes", "50"]
        assert stickers.main(argv) == 0
    one, two = ({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
                for folder in (tmp_path / "a", tmp_path / "b"))
    assert len(one) > 7000 and one == two
    for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        held = row["style"] == "outlined" and row["category"] in stickers.HELD_OUT
        assert row["path"].startswith("heldout/") == (held and "parts" not in row)


def test_single_pictures_are_rendered_as_the_whole_world_renders_them(tmp_path, monkeypatch):
    """One of the corner, one of another folder; a drawing that nobody asked for is not drawn."""
    drawn = [drawing(), drawing(style="flat"), drawing("pig", "flat")]
    monkeypatch.setattr(stickers, "all_drawings", lambda only: (
        [d for d in drawn if (d.style, d.concept) in only], {}))
    wanted = ["heldout/outlined/fox_face-2.png", "images/flat/fox_face-0.png"]
    assert stickers.main(["--out", str(tmp_path), "--only", *wanted]) == 0
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")) == wanted
    found = Image.open(tmp_path / wanted[0])
    assert found.tobytes() == stickers.variants(drawing(), 7, 0)[2][1].tobytes()
