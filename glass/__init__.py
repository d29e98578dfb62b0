"""What the scripts share: one subject a file. The scripts at the top are what one runs and edits."""
