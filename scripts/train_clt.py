"""crosslayer-coding's launcher, with its flags and defaults; see `clt train` for ours."""

import sys

from clt.__main__ import main

main(["train-clt", *sys.argv[1:]])
