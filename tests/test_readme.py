"""README.md, RESULTS.md, benchmarks/README.md: their commands are ones that the scripts take, their
code runs, what they name is there, and they stay as short as they promise."""

import argparse
import ast
import re
import runpy
import shlex
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

import knn_diffusion
import train

ROOT = Path(__file__).resolve().parent.parent
DOCS = {name: (ROOT / name).read_text("utf-8")
        for name in ("README.md", "RESULTS.md", "benchmarks/README.md")}
MODULES = ["clip_model", "edit", "index", "knn_diffusion", "sample", "train", "vqvae"]


class Parsed(BaseException):
    """The arguments are parsed; no script catches this one."""


def code_in(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def spans_in(text: str) -> list[str]:
    """What stands between single ticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def commands() -> list[list[str]]:
    """[script, argument, ...] of every `python SCRIPT.py ...` in a block or between ticks."""
    found = []
    for text in DOCS.values():
        for code in code_in(text, "bash") + spans_in(text):
            for line in code.replace("\\\n", " ").splitlines():
                if re.match(r"python \S+\.py", line):
                    found.append(shlex.split(line, comments=True)[1:])
    return sorted(map(list, set(map(tuple, found))))


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_scripts_take_what_the_texts_say(command, monkeypatch):
    """Run a script until its arguments are parsed. It ends with SystemExit if it refuses them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    script = ROOT / command[0]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [str(script), *command[1:]])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")
    if "--preset" in command:
        assert command[command.index("--preset") + 1] in train.PRESETS[command[1]]


def test_options_named_in_passing_exist():
    named = {span.split()[0] for text in DOCS.values() for span in spans_in(text)
             if span.startswith("--")}
    sources = {(ROOT / script).read_text("utf-8") for script, *_ in commands()}
    known = {name for source in sources for name in re.findall(r'"(--[\w-]+)"', source)}
    assert len(named) >= 8 and named <= known, named - known


@pytest.mark.parametrize("code", [c for text in DOCS.values() for c in code_in(text, "python")])
def test_the_code_runs_as_it_stands(code, monkeypatch):
    """Except that two sampling steps are enough."""
    shown = []

    def brief(sampler, *given, **options):
        return sampler(*given, **{**options, "steps": 2})

    monkeypatch.chdir(ROOT)
    for name in ("sample", "sample_tokens"):
        monkeypatch.setattr(knn_diffusion, name, partial(brief, getattr(knn_diffusion, name)))
    exec(code, {"display": shown.append})
    assert code.count("display(") == 0 or len(shown) == 4


@pytest.mark.parametrize("name", DOCS)
def test_what_is_named_is_there(name):
    folder, text = (ROOT / name).parent, DOCS[name]
    anchors = {doc: {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                     for heading in re.findall(r"^#+ (.*)$", found, re.M)}
               for doc, found in DOCS.items()}
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        path, _, anchor = link.partition("#")
        file = (folder / path).resolve() if path else ROOT / name
        assert file.is_file(), link
        assert not anchor or anchor in anchors[str(file.relative_to(ROOT))], link
    ours = r"(?<![\w/.-])(?:weights|examples|benchmarks|tests)/[\w./-]*\w|(?<![\w/.-])\w+\.py\b"
    for path in re.findall(ours, text):
        places = [ROOT, ROOT / "examples"]                  # evaluate.py stands for examples/'s
        assert any((place / path).exists() for place in places), path


def test_the_symbol_table_names_what_its_files_define():
    rows = re.findall(r"^\|[^|]+\|([^|]+)\| (\w+\.py) \|$", DOCS["README.md"], re.M)
    assert len(rows) >= 10
    for names, file in rows:
        tree = ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
        defined = {node.name for node in tree if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        for name in re.findall(r"`([\w.]+)`", names):
            assert set(name.split(".")) <= defined, f"{name} in {file}"


def test_the_readme_is_short_and_its_blocks_stand_as_ci_extracts_them():
    text = DOCS["README.md"]
    assert len(text.splitlines()) <= 170
    assert all(len(line) <= 120 for doc in DOCS.values() for line in doc.splitlines())
    for name in ("install", "picture", "tests"):
        assert re.search(rf"^<!-- {name} -->\n```bash\n.+?\n```$", text, re.M | re.S)


def test_the_package_has_all_seven_modules_and_our_requirements():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert settings["tool"]["setuptools"]["py-modules"] == MODULES
    assert all((ROOT / f"{module}.py").is_file() for module in MODULES)
    wanted = settings["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    assert wanted == ["requirements.txt"] and (ROOT / wanted[0]).is_file()


@pytest.mark.parametrize("name", DOCS)
def test_tables_have_no_empty_column(name):
    for table in re.findall(r"(?:^\|.*\|\n)+", DOCS[name], re.M):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, rows[0]
        assert all(any(column) for column in list(zip(*rows[2:]))[1:]), rows[0]
