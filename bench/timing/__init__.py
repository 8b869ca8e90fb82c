"""How it is timed: clocks, limits of the machine, one measurement, one session."""
