"""The documentation site, built by Sphinx of the Markdown files as they lie in the checkout: ``make docs``.

The source directory is the checkout itself, so that links between ``docs/``, the README and the other READMEs are the
same on the site and on a code host. What is missing, a file, a heading or a picture, is an error of the build.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
release = version = PROJECT["version"]
html_title = f"{project} {release}"
copyright = f"the authors of {project}"

extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/*.md",
    "slurm/README.md",
    "benchmarks/README.md",
]
exclude_patterns = [".*", "runs", "data", "assets", "build", "dist", "wandb", "docs/_build"]

myst_heading_anchors = 4
highlight_language = "text"
nitpicky = True

html_theme = "furo"
html_static_path = ["site"]
html_css_files = ["site.css"]
templates_path = ["site"]
html_additional_pages = {"index": "to_index.html"}
html_copy_source = False
html_show_sphinx = False
html_domain_indices = html_use_index = False
