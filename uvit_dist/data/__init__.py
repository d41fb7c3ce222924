"""What is read, in which order, and in which form."""
