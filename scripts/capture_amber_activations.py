"""The phase guide's phase 1 for AMBER; `clt phase capture --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "capture", "--dataset", "amber", *sys.argv[1:]])
