"""The operations inside known trainers: one file each. Only `torchtitan` imports the trainer that it is for."""
