"""The reference of the commands is what the commands say now."""

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "commands.py"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("commands_page", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run: python tools/commands.py"
