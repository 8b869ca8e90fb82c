"""Where tokens come from: data sets of codes, their files, and text."""
