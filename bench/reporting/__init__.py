"""What is made of it: records, tables, goals, plots, the report."""
