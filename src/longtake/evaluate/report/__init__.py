"""What a comparison found, as one HTML file that needs nothing else: see `page`."""

from .page import page

__all__ = ["page"]
