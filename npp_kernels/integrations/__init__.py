"""The operations inside known trainers, by family. Only `torchtitan` imports the trainer that it is for."""
