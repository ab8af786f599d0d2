"""README.md: its commands are ones that the scripts take, its notebook code runs, its links lead
somewhere."""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def commands() -> list[list[str]]:
    """[script, argument, ...] of every `python script.py ...` in a bash block or between ticks."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`([^`]+)`", README)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if re.match(r"python \S+\.py ", line)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [parts[1:] for parts in words if "…" not in parts]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_scripts_take_what_the_readme_says(command, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def only(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    script = ROOT / command[0]
    spec = importlib.util.spec_from_file_location(f"readme_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only)
    with pytest.raises(Parsed):
        module.main(command[1:])


def test_the_notebook_code_runs(monkeypatch):
    """As it stands, but for two sampling steps."""
    import knn_diffusion

    code = re.search(r"## From a notebook.*?```python\n(.*?)```", README, re.S)[1]
    shown, sample, sample_tokens = [], knn_diffusion.sample, knn_diffusion.sample_tokens
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(knn_diffusion, "sample",
                        lambda *given, **options: sample(*given, **{**options, "steps": 2}))
    monkeypatch.setattr(knn_diffusion, "sample_tokens",
                        lambda *given, **options: sample_tokens(*given, **{**options, "steps": 2}))
    exec(code, {"display": shown.append})
    assert [picture.size for picture in shown] == [(256, 256)] * 4


def test_pictures_and_files_named_in_links_are_there():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) >= 4 and all((ROOT / link).is_file() for link in links)
