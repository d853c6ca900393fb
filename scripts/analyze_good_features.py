"""The phase guide's phase 4; `clt phase analyze --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "analyze", *sys.argv[1:]])
