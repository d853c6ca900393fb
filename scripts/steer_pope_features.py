"""The phase guide's phase 7 for POPE; `clt phase steer --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "steer", "--dataset", "pope", *sys.argv[1:]])
