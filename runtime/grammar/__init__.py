"""Grammars and schemas of requests: read, bounded and applied, so that none ends the process."""
