"""OpenAI's bodies and an engine's requests: what is asked and what is answered, without HTTP."""
