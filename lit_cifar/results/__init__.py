"""What is counted in an evaluation, how it is worded, and how it is drawn."""
