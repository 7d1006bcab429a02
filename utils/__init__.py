"""Shared code of the notebooks: thin modules, one idea each (CONTRIBUTING.md shows the layout)."""
