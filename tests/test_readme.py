"""The README's programs run as they stand, its map leads somewhere, its commands are the ones that work."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)

CHECKS = """
assert report["finite"]
assert abs(float(share) - 0.3) < 4 * (0.3 * 0.7 / 1000) ** 0.5 + 0.01
assert abs(float(found.log_prob)) < 100 and 0 < float(found.error) < 10
assert jax.tree.all(jax.tree.map(lambda g: bool(jnp.all(jnp.isfinite(g))), gradient))
assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))
"""


@pytest.mark.slow
def test_programs_run_as_they_stand():
    """The share of the mixture's first component: within 4 standard errors (false-alarm rate 6e-5) and 0.01."""
    subprocess.run([sys.executable, "-c", "\n".join([*PROGRAMS, CHECKS])], check=True, cwd=ROOT)


def test_programs_are_five_and_short():
    _, *programs = PROGRAMS
    assert len(programs) == 5
    assert all(len([line for line in program.splitlines() if line.strip()]) <= 10 for program in programs)


def rows():
    table = README.split("## From formula to function")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line[:1] == "|" and "`" in line
    ]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1].replace("`", ""))
def test_the_map_leads_somewhere(row):
    """Every function of the map exists, every test file holds that test, every script and picture is there."""
    _, functions, tests, scripts, picture = row
    for name in re.findall(r"`([\w.]+)`", functions):
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(f"dgm_jax.{module}"), attribute), name
    for file, test in re.findall(r"`(\w+\.py)(?:::(\w+))?`", tests):
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"
    for file in re.findall(r"`([\w/]+\.py)`", scripts):
        assert (ROOT / file).exists(), file
    assert (ROOT / re.fullmatch(r"\[picture\]\((docs/images/\w+\.png)\)", picture).group(1)).exists(), picture


def test_pictures_are_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 400_000, picture


@pytest.mark.parametrize("kind", ["main", "test"])
def test_each_command_is_one_line_that_installs_and_runs(kind):
    block = re.search(rf"<!-- {kind} command -->\n```bash\n(.*?)```", README, flags=re.S)
    assert block is not None
    lines = block.group(1).strip().splitlines()
    assert len(lines) == 1
    assert "pip install" in lines[0]
    for script in re.findall(r"experiments/\w+\.py", lines[0]):
        assert (ROOT / script).exists()
