# SPDX-License-Identifier: Apache-2.0
"""`python -m trtdet STAGE ...`"""

from trtdet.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
