"""The phase guide's phase 6; `clt phase map --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "map", *sys.argv[1:]])
