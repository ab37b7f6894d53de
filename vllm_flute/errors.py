"""The one exception type that this project raises for bad input."""


class FluteError(Exception):
    """Bad input: a checkpoint, an option, a shape or a machine that cannot do what is asked.

    The message is one line that names the file or tensor, what was found, what was expected
    and what to do. Command lines and the server print it without a traceback. Not a ValueError: pydantic, which vLLM
    builds its configuration with, would wrap that in a message of its own.
    """
