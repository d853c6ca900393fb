"""The phase guide's phase 3 for AMBER; `clt phase classify --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "classify", "--dataset", "amber", *sys.argv[1:]])
