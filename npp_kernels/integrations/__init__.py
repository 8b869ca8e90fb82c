"""The operations inside known trainers: one file each, none of which imports the trainer it is for."""
