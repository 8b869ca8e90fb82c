"""The operations inside known trainers, none of which is imported here."""
