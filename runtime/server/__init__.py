"""HTTP over one engine: OpenAI's and Anthropic's protocols, and what llama.cpp's server adds.

Importing this raises UserError where its packages are missing, before a model is loaded.
"""

from ..errors import UserError

try:
    import fastapi as _fastapi  # noqa: F401
    import prometheus_client as _prometheus_client  # noqa: F401
    import python_multipart as _multipart  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as missing:
    raise UserError(
        f"serving needs more packages ({missing}): pip install 'moe-gguf[server]'"
    ) from missing
