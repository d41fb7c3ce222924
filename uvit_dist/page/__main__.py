"""A run on one page: curves, attempts and faults, samples, scores, configuration. One HTML file, no network.

    python -m uvit_dist.page runs/digits_demo
    python -m uvit_dist.page runs/digits_demo --out /tmp/digits.html

Made from the run's files alone, while it goes on or later; again for a newer state.
"""

from __future__ import annotations

import argparse

from uvit_dist.errors import OutputError, explained_exit
from uvit_dist.page import write_page


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m uvit_dist.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", help="the run's directory")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN_DIR/page.html)")
    args = parser.parse_args()
    with explained_exit():
        try:
            path = write_page(args.run_dir, args.out)
        except OSError as error:
            raise OutputError(f"{error}; mend its permissions, or give another file: --out FILE") from None
        print(path)


if __name__ == "__main__":
    main()
