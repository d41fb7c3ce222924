"""A run on one page: ``python -m uvit_dist.page RUN_DIR``, or ``write_page``."""

from uvit_dist.page.html import write_page

__all__ = ["write_page"]
