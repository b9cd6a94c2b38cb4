"""Files bundled with fastattn, installed as the package `fastattn.bundled`.

README.md here says what they are and where they come from; fastattn/files.py reads and checks them.
"""
