"""What an operator does for M models at once, one family of layers a file."""
