"""The programs of bench.py, one a file; what several of them share is in common.py."""
