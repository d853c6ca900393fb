"""The seed's launcher under its own name; see `clt --help` for ours."""

import sys

from clt.__main__ import main

main(["convert-batchtopk-to-jumprelu", *sys.argv[1:]])
