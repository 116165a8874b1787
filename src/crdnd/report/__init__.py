"""What was measured, for readers: a table for the terminal and a report in one HTML file."""
