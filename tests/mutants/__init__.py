"""Kept defects: each is planted in a copy of the tree, and the named tests must notice it."""
