"""Plugins for other programs, which import them by name. Nothing of qkit imports this package."""
