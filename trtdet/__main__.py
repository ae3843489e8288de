# SPDX-License-Identifier: Apache-2.0
"""`python -m trtdet STAGE ...`"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (the rest does not even compile there)
    sys.exit(f"error: trtdet needs Python 3.10 or later, this is {sys.version.split()[0]}")

from trtdet.start import main

if __name__ == "__main__":
    raise SystemExit(main())
