"""What mkdocs.yml cannot say: pages from other folders, the configuration reference and llms.txt."""

from __future__ import annotations

import ast
import base64
import functools
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PAGES = {  # files of the repository that are pages of the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "examples/plugin/README.md": "plugin.md",
}
FOLDERS = {"examples/plugin": "plugin.md", "notebooks": "notebooks/01_quickstart.md", "docs": "index.md"}
COMMANDS = ["train", "prepare", "plan", "generate", "evaluate", "export", "report", "demo"]
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/."""
    for path, uri in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text + plugin_files() * (uri == "plugin.md")))
    generated: dict[str, str | bytes] = {f"reference/{name}.md": text for name, text in reference().items()}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        generated |= notebook(path)
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between pages."""
    uri = page.file.src_uri
    origins = {uri: path for path, uri in PAGES.items()}
    folder = posixpath.dirname(origins.get(uri, f"docs/{uri}"))
    return LINK.sub(lambda found: link(found, folder, posixpath.dirname(uri)), markdown)


def link(found: re.Match[str], folder: str, here: str) -> str:
    """The link of a file in `folder`, on a page in `here`; its text alone where the site has no such page."""
    image, text, target, anchor = found.groups()
    path = posixpath.normpath(posixpath.join(folder, target))
    if not (ROOT / path).exists():
        return found[0]  # mkdocs reports it
    page = PAGES.get(path) or FOLDERS.get(path)
    if page is None and not path.startswith("docs/"):
        return text
    return (
        f"{image}[{text}]({posixpath.relpath(page or path.removeprefix('docs/'), here or '.')}{anchor or ''})"
    )


def plugin_files() -> str:
    """The files of the plugin, as they are."""
    folder = ROOT / "examples" / "plugin"
    parts = []
    for path in [folder / "plugin.py", *sorted(folder.glob("conf/*/*.yaml"))]:
        kind = "python" if path.suffix == ".py" else "yaml"
        text = path.read_text(encoding="utf-8")
        parts.append(f"\n## `{path.relative_to(folder).as_posix()}`\n\n```{kind}\n{text}```\n")
    return "".join(parts)


def notebook(path: Path) -> dict[str, str | bytes]:
    """A notebook as a page, and its pictures."""
    found: dict[str, str | bytes] = {}
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(found)}.png"
                found[f"notebooks/{name}"] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Picture]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"````text\n{text}\n````")
    return {f"notebooks/{path.stem}.md": "\n\n".join(parts) + "\n", **found}


def reference() -> dict[str, str]:
    """The pages of the configuration reference, from conf/ and its comments."""
    commands = ["# Commands\n\nEvery command is called as `python -m gpt_lightning.NAME key=value …`.\n"]
    for name in COMMANDS:
        commands += [section(f"## {name}", CONF / f"{name}.yaml", "")]
    choices = [
        "# Configuration\n\n`GROUP=CHOICE` selects a choice, `GROUP.KEY=VALUE` sets a value. A choice with "
        "few keys takes the others from the choice that it extends.\n"
    ]
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        group = folder.name
        if group == "hydra":  # Hydra's own groups
            continue
        choices += [f"## {group}\n"]
        for path in sorted(folder.glob("*.yaml")):  # those with _ are parts of others
            title = f"All choices of {group}" if path.stem.startswith("_") else f"{group}={path.stem}"
            choices += [section(f"### {title}", path, group)]
    return {"commands": "\n".join(commands), "configuration": "\n".join(choices)}


def section(heading: str, path: Path, package: str) -> str:
    """A heading, the first comment of a YAML file and the table of its keys."""
    text = path.read_text(encoding="utf-8")
    comment = re.match(r"(?:# @package.*\n)?((?:#.*\n)*)", text)
    assert comment is not None  # the pattern also matches nothing
    lines = [line.removeprefix("#").removeprefix(" ") for line in comment[1].splitlines()]
    prefix = "" if "# @package _global_" in text else package
    found = list(keys(text, prefix))
    known = comments() | {key.name: key.note for key in found if key.note}
    rows = []
    for key in found:
        value = key.value.replace("|", "\\|")
        meaning = known.get(key.name) or link_or_docstring(key) or known.get(key.parent, "")
        rows.append(f"| `{key.name}` | {f'`{value}`' if value else ''} | {cell(meaning)} |")
    table = ["| key | value | meaning |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([heading, "", *paragraphs(lines), "", *table, ""])


def paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines of a comment: an indented line continues the one before."""
    for number, line in enumerate(lines):
        label = re.match(r"(Needs|Published|Reproduces): ", line)
        yield ("\n" if number and label else "") + line.strip().replace("<|", "&lt;|")


class Key(NamedTuple):
    """A key of a YAML file as it is set on a command line."""

    name: str
    value: str
    note: str  # its comment
    parent: str
    target: str  # the class that it selects, or whose argument it is
    argument: str


@functools.cache
def comments() -> dict[str, str]:
    """The comments of the files that define a key; those of presets are about other values of it."""
    found: dict[str, str] = {}
    for path in [CONF / "train.yaml", *sorted(CONF.glob("*/*.yaml"))]:
        text = path.read_text(encoding="utf-8")
        if "# @package _global_" not in text:
            prefix = "" if path.parent == CONF else path.parent.name
            found = {key.name: key.note for key in keys(text, prefix) if key.note} | found
    return found


def link_or_docstring(key: Key) -> str:
    """The other key that one takes its value from; else what the class says of itself or of an argument."""
    if linked := re.fullmatch(r"\$\{([\w.]+)\}", key.value):
        return f"as `{linked[1]}`"
    if not key.target.startswith("gpt_lightning."):
        return ""
    text = docstring(key.target)
    entry = rf"^    (?:\w+, )*{key.argument}(?:, \w+)*: (.*(?:\n {{8}}.*)*)"
    found = re.search(entry, text, re.M) if key.argument else re.match(r"(?s)(.*?\.)(?:\s|$)", text)
    return " ".join(found[1].split()) if found else ""


def docstring(target: str) -> str:
    """Of a class or function of the package, which is read without importing it."""
    module, _, name = target.rpartition(".")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(ast.get_docstring(it) or "" for it in tree.body if isinstance(it, kinds) and it.name == name)


def keys(text: str, prefix: str) -> Iterator[Key]:
    """The keys of a YAML file."""
    root = yaml.compose(text, yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        yield from _keys(root, prefix, "", text.splitlines())


def _keys(node: yaml.MappingNode, prefix: str, target: str, lines: list[str]) -> Iterator[Key]:
    for key, value in node.value:
        if key.value in ("defaults", "hydra") or key.value.startswith("_"):
            continue
        name = f"{prefix}.{key.value}" if prefix else key.value
        below = isinstance(value, yaml.CollectionNode) and not value.flow_style  # in the lines below the key
        note = _comment(lines, (key if below else value).end_mark)
        if not (below and isinstance(value, yaml.MappingNode)):
            yield Key(name, _source(value, lines), note, prefix, target, key.value)
            continue
        own = next((item.value for one, item in value.value if one.value == "_target_"), "")
        if note or own:
            yield Key(name, own, note, prefix, own, "")
        yield from _keys(value, name, own, lines)


def _comment(lines: list[str], end: yaml.Mark) -> str:
    """The comment behind a place; it may go on in lines of its own."""
    before, mark, note = lines[end.line][end.column :].partition("#")
    column = end.column + len(before)
    for line in lines[end.line + 1 :]:
        if not mark or line[: column + 1].strip() != "#":
            break
        note += " " + line[column + 1 :].strip()
    return note.strip()


def cell(text: str) -> str:
    """A text for a cell of a table, in which only code between backticks is formatted."""
    parts = text.replace("|", "\\|").split("`")
    for i in range(0, len(parts), 2):  # outside of code
        parts[i] = re.sub(r"([*_])", r"\\\1", parts[i].replace("<", "&lt;"))
    return "`".join(parts)


def _source(node: yaml.Node, lines: list[str]) -> str:
    """A value as the file has it."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        text = ", ".join(str(item.value) or '""' for item in node.value)
    else:
        last = node.end_mark.column if node.start_mark.line == node.end_mark.line else None
        text = lines[node.start_mark.line][node.start_mark.column : last]
    return text


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Remembers the pages for `on_post_build`."""
    config.extra["pages"] = nav.pages
    return nav


def on_post_build(config: MkDocsConfig) -> None:
    """Writes llms.txt and, for each page that it lists, the Markdown text."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    for page in config.extra["pages"]:
        path = site / page.file.src_uri
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page.markdown, encoding="utf-8")
        lines.append(f"- [{page.title}]({page.file.src_uri})")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
