"""What a study found: tables and pictures of the committed results (notebook 07)."""

__all__ = []
