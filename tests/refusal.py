"""How the tests hold an error to its form: one sentence that says what is wrong."""

import pytest


def refused(call, *words):
    """The call raises ValueError with one sentence that has these words in it."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert message.endswith(".") and ". " not in message and "\n" not in message, message
    assert all(word in message for word in words), message
