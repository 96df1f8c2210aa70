"""The two exceptions a user of moe-gguf meets."""


class UserError(Exception):
    """Unusable input: one sentence that names the cause and the mend; the CLI exits with 2."""


class ExpertReadError(OSError):
    """An expert could not be read while a layer waited for it (EIO, short read, truncated file).

    The step that needed it failed; no slot holds half an expert, and the model stays usable.
    """
