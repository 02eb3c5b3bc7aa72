"""Convert a T5-family checkpoint into a FAT5 repo, prove that it computes the same, and export it back.

The work is done by `fat5convert.convert.convert`, `fat5convert.verify.verify` and `fat5convert.export.export`.
"""
