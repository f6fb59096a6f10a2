"""`python -m lcr2s_ext` prints what this installation is; with arguments it is the `lcr2s` command."""

import sys

from lcr2s_ext import info

if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(info.main())
    from lcr2s_ext import cli

    sys.exit(cli.main())
