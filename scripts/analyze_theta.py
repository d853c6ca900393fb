"""The seed's launcher under its own name; see `clt --help` for ours."""

import sys

from clt.__main__ import main

main(["analyze-theta", *sys.argv[1:]])
