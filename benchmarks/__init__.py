"""Measuring: commands that print the README's figures, and the notebooks' logic."""
