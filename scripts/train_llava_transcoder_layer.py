"""The seed's launcher: one layer's transcoder. `clt train` makes the joint one, which is the better choice."""

import sys

from clt.__main__ import main

main(["train-layer", *sys.argv[1:]])
