"""One command a file: click parses, a function of the package does the work, the outcome is printed."""
