"""The phase guide's attribution graphs for POPE; `clt phase attribute --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "attribute", "--dataset", "pope", *sys.argv[1:]])
