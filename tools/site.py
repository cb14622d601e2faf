"""The hooks of mkdocs.yml: pages that lie outside of docs/, and links that hold on a code host and on the site.

Pages link to each other by their paths in the repository. On the site, a link to another page becomes one to that
page; one to any other file leads to the repository, if `repo_url` of mkdocs.yml names it, and is plain text if not.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tools/pocket/README.md": "pocket.md",
}
PICTURES = {"benchmarks/results/train_growth.svg": "train_growth.svg"}
_PARTS = re.compile(r"(^```.*?^```|`[^`\n]*`)", flags=re.M | re.S)  # code, in which nothing is a link
_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures from outside."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for source, place in PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page."""
    here = page.file.src_uri
    source = next((path for path, at in OUTSIDE.items() if at == here), f"docs/{here}")

    def rewrite(match: re.Match) -> str:
        shown, text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        outside = OUTSIDE | PICTURES
        found = outside.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(found) is not None and (path in outside or path.startswith("docs/")):
            return f"{shown}[{text}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{mark}{anchor})"
        if shown or not (ROOT / path).exists():
            return match[0]  # for mkdocs to complain of
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{mark}{anchor})" if config.repo_url else text

    # links may have code as their text: what is in the code is hidden while links are looked for
    code: list[str] = []

    def hide(match: re.Match) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    hidden = _LINK.sub(rewrite, _PARTS.sub(hide, markdown))
    return re.sub(r"\0(\d+)\0", lambda match: code[int(match[1])], hidden)
