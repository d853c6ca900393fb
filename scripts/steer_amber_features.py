"""The phase guide's phase 7 for AMBER; `clt phase steer --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "steer", "--dataset", "amber", *sys.argv[1:]])
