"""Notebooks of a few cells, for the tests."""

from nbformat import NotebookNode, from_dict


def cell(kind: str, text: str, name: str, **more) -> NotebookNode:
    """A cell with its id."""
    made = {"cell_type": kind, "id": name, "metadata": {}, "source": text} | more
    return from_dict(
        made if kind == "markdown" else {"outputs": [], "execution_count": None} | made
    )


def stream(text: str, name: str = "stdout") -> NotebookNode:
    """Printed text."""
    return from_dict({"output_type": "stream", "name": name, "text": text})


def notebook(*cells: NotebookNode) -> NotebookNode:
    """A notebook of these cells."""
    about = {"metadata": {"kernelspec": {"display_name": "Python 3", "name": "python3"}}}
    return from_dict({"cells": list(cells), "nbformat": 4, "nbformat_minor": 5} | about)
