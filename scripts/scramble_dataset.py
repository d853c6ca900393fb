import sys

from clt.__main__ import main

main(["scramble", *sys.argv[1:]])
