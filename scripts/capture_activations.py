"""The seed's launcher: images and queries into L0/, L1/, ...; `clt generate` is ours and stores nothing twice."""

import sys

from clt.__main__ import main

main(["capture-activations", *sys.argv[1:]])
