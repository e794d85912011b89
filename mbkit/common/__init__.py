"""What every room may use: checks, tables, progress, the machine, random streams."""
