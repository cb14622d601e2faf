"""The snippets of a Markdown file, and how the Python ones are run."""

import re


def blocks(path, language):
    """The code blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def run_python(path):
    """Run the Python blocks one after the other, with the names of those before; return these names."""
    names = {}
    assert blocks(path, "python")
    for number, block in enumerate(blocks(path, "python")):
        exec(compile(block, f"{path.name}, Python snippet {number}", "exec"), names)
    return names
