"""`leeway` and `python -m leeway`.

Nothing but Python itself is imported before `main`: an error of the installation, or too little memory to import it,
must not exit with 1, which is a verdict of `leeway gate`.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run `leeway.cli.main`; exit 70 with one line for whatever it does not catch itself."""
    try:
        from leeway.cli import main as run

        run()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:  # noqa: BLE001 - Python would exit 1
        try:
            print(
                f"leeway: cannot run ({type(error).__name__}: {error}); install it again", file=sys.stderr, flush=True
            )
        finally:
            os._exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    main()
