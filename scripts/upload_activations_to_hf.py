"""The seed's launcher: a folder of activations onto the Hugging Face Hub."""

import sys

from clt.__main__ import main

main(["upload-activations-to-hf", *sys.argv[1:]])
