"""crosslayer: see what happens inside language and vision-language models.

Importing this package does no work; the parts are imported where they are used, for example
`from clt.models import CrossLayerTranscoder`.
"""

__version__ = "0.1.0"
