"""The phase guide's attribution graphs for AMBER; `clt phase attribute --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "attribute", "--dataset", "amber", *sys.argv[1:]])
