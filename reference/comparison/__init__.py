"""What comparing runs is made of: journal, outcomes, scores of samples, tables and plots."""
