"""Networks to measure on, built in code, and how contenders are timed against each other."""
