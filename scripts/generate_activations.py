"""The seeds' launcher: HDF5 chunks in the data set's own folder unless asked otherwise."""

import sys

from clt.__main__ import main

main(["generate", "--output-format", "hdf5", "--held-out-fraction", "0", *sys.argv[1:]])
