"""Conversations as a model's own template writes them, and answers as it means them.

Templates, grammars of tool calls and parsers of answers are llama.cpp's own, so what they give is
what its server gives. They run in processes of their own (``process``), which a template or an
answer may end.
"""
