"""SMOOT for Hugging Face: a Trainer that makes saliency maps sharp and faithful.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that `import smoot_hf` and the
command `smoot-hf --help` do not wait for torch and transformers.
"""

import lazy_loader

from .former_places import serve_former_places

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

serve_former_places()
