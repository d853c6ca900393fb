"""The phase guide's phase 5; `clt phase visualize --help` for its flags."""

import sys

from clt.__main__ import main

main(["phase", "visualize", *sys.argv[1:]])
