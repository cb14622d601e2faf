"""The package is light until something of it is used, and PEFT knows the method in whatever order the two come."""

import subprocess
import sys

import pytest

import pyreft
from pyreft.errors import ReftError
from pyreft.model import ReftModel

KNOWN = "; from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; print(known['REFT'].__name__)"


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize(
    "first",
    [
        "import pyreft, importlib.util; importlib.util.find_spec('peft'); import peft.utils",
        pytest.param("import peft, pyreft", marks=pytest.mark.slow),
        pytest.param("from pyreft.config import ReftConfig", marks=pytest.mark.slow),
        pytest.param("from pyreft.files.together import reading", marks=pytest.mark.slow),
        pytest.param("import pyreft; pyreft.get_reft_model", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_the_method_whichever_comes_first(first):
    assert run(first + KNOWN) == ["ReftTuner"]


def test_importing_the_package_or_asking_for_help_imports_none_of_what_it_is_built_on():
    heavy = "print(*{'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules))"
    command = "try: main()\nexcept SystemExit: pass"
    assert run(f"import sys, pyreft; dir(pyreft); {heavy}") == []
    program = f"import sys; from pyreft_cli.app import main\nsys.argv[1:] = ['--help']\n{command}\n{heavy}"
    assert run(program)[-1] not in ("torch", "transformers", "peft", "datasets")


def test_names_and_modules_come_when_they_are_used():
    assert pyreft.ReftModel is ReftModel
    assert pyreft.errors.ReftError is pyreft.ReftError is ReftError
    assert set(pyreft.__all__) <= set(dir(pyreft))
    for name in ("nothing", "_private", "__wrapped__"):
        assert not hasattr(pyreft, name)
    with pytest.raises(AttributeError, match="module 'pyreft' has no attribute 'RefModel'"):
        pyreft.RefModel  # noqa: B018
