"""What an export carries for PyTorch: a file that is copied, and never imported here."""
