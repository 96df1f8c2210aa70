"""``python -m moe_gguf`` is the command ``moe-gguf``."""

from moe_gguf.runtime.cli import main

main()
