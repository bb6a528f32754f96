"""The site of the documentation is built without a warning: no broken link, no page left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("mkdocstrings") and find_spec("material")),
    reason="the extra [docs] is not installed",
)


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *options, "-d", str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages |= {Path("index.html"), Path("contributing.html"), Path("changelog.html")}
    assert not [page for page in pages if not (site / page).is_file()]


def test_api_pages_come_from_docstrings(site):
    text = re.sub(r"<[^>]+>", "", (site / "api" / "bt_kernels.html").read_text(encoding="utf-8"))
    import bt_kernels

    for name in bt_kernels.__all__:
        first = (getattr(bt_kernels, name).__doc__ or "").strip().splitlines()[0].split("`")[0].strip()
        assert name in text and first[:40] in text, name


def test_site_asks_nothing_of_other_hosts(site):
    """It opens from the disk, and from a machine without a network."""
    page = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=.https?://[^>]*>", page)


def test_a_broken_link_ends_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[gone](gone.md)\n")
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    kept = configuration[configuration.index("validation:") :]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: test\ndocs_dir: docs\n{kept}")
    done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0 and "gone.md" in done.stdout + done.stderr
