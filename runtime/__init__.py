"""The engine: the native plugin, what drives it, and the faces (command line, Python, server)."""
