"""``python -m moe_gguf`` is the command ``moe-gguf``."""

from .runtime.cli.main import main

main()
